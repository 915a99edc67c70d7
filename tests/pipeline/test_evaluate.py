"""Numbers of `evaluate` against the same numbers computed by hand from whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.data.calibration import load_data
from llmcompress.data.sources import DataSpec
from llmcompress.errors import CompressError, ModelError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.run import run_recipe
from tests.bases import VOCABULARY, byte_tokenizer, known, save_base, small_recipe, write_text

KEYS = ["model", "perplexity", "perplexity_ci95", "tokens", "size_bytes", "tokens_per_s"]
AGAINST = ["kl_nats_mean", "kl_nats_p99", "top1_agreement"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    text = write_text(tmp_path_factory.mktemp("text") / "facts.txt")
    return DataSpec(source=str(text), samples=1, length=32, evaluation_samples=6)


@pytest.fixture(scope="module")
def sequences(spec: DataSpec) -> Tensor:
    return load_data(spec, byte_tokenizer(), VOCABULARY, 96).evaluation


def whole_logits(model: torch.nn.Module, sequences: Tensor) -> Tensor:
    with torch.no_grad():
        return model(sequences, use_cache=False).logits.double()  # type: ignore[no-any-return]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_stock_checkpoint_is_as_far_from_its_base_as_by_hand(
    family: str, spec: DataSpec, sequences: Tensor, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    stock = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    stock.save_pretrained(tmp_path / "stock")
    byte_tokenizer().save_pretrained(tmp_path / "stock")

    dense = AutoModelForCausalLM.from_pretrained(base)
    log_p = whole_logits(dense, sequences).log_softmax(-1)
    for name, module in stock.named_modules():
        if type(module).__name__ == "Linear4bit":
            target, weight = (
                dense.get_submodule(name),
                bitsandbytes_layout.dequantize(bitsandbytes_linear.packed_of(module)),
            )
            target.weight.data = weight.T if type(target).__name__ == "Conv1D" else weight
    log_q = whole_logits(dense, sequences).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll = F.nll_loss(log_q[:, :-1].flatten(0, 1), sequences[:, 1:].flatten())

    found = evaluate(str(tmp_path / "stock"), against=str(base), data=spec)
    assert list(found.to_dict()) == [*KEYS, *AGAINST]
    assert found.kl_nats_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_nats_p99 == pytest.approx(
        float(kl.flatten().sort().values[math.ceil(0.99 * kl.numel()) - 1]), rel=1e-3
    )
    assert found.top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()), abs=0.006
    )
    assert found.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert found.tokens == 6 * 31
    assert found.size_bytes == (tmp_path / "stock" / "model.safetensors").stat().st_size


def test_a_model_is_no_distance_from_itself(spec: DataSpec, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", max_shard_size="100KB")
    found = evaluate(str(base), against=str(base), data=spec)
    assert (found.kl_nats_mean, found.kl_nats_p99, found.top1_agreement) == (0.0, 0.0, 1.0)
    low, high = found.perplexity_ci95
    assert low < found.perplexity < high and known(found.tokens_per_s) > 0


def test_without_a_base_there_is_no_distance(spec: DataSpec, tmp_path: Path) -> None:
    found = evaluate(str(save_base(tmp_path / "base")), data=spec)
    assert list(found.to_dict()) == KEYS


@pytest.mark.slow
def test_an_artefact_evaluates_as_its_report_says(spec: DataSpec, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    report = run_recipe(small_recipe(Path(spec.source), base), tmp_path / "out")
    same = spec.model_copy(update={"length": 24, "evaluation_samples": 4})
    found = evaluate(str(tmp_path / "out"), against=str(base), data=same)
    assert found.kl_nats_mean == pytest.approx(report.fidelity.kl_nats_mean, rel=1e-6)
    assert found.perplexity == pytest.approx(report.compressed.perplexity, rel=1e-6)
    assert found.size_bytes == report.compressed.size_bytes


def test_models_of_two_vocabularies_can_not_be_compared(spec: DataSpec, tmp_path: Path) -> None:
    one, other = save_base(tmp_path / "one"), save_base(tmp_path / "other", vocab_size=320)
    with pytest.raises(ModelError, match="predicts 256 tokens and its base 320"):
        evaluate(str(one), against=str(other), data=spec)
    assert torch.is_grad_enabled()  # an error half way leaves nothing switched off


def test_what_can_not_be_evaluated_is_told_so(spec: DataSpec, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for model, against in ((tmp_path / "none", base), (base, tmp_path / "none"), (base, tmp_path)):
        with pytest.raises(CompressError) as caught:
            evaluate(str(model), against=str(against), data=spec)
        assert len(str(caught.value).splitlines()) == 1
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer that loads"):
        evaluate(str(base), data=spec)
