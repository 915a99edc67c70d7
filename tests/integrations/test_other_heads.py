"""Artefacts as models of other tasks: classes with a new head, or none, which is to be plain and
trainable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.formats.base import StoredModule
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import TOKENS
from tests.bases import save_base, small_recipe, write_text
from tests.models import FAMILIES

pytestmark = pytest.mark.usefixtures("short_runs")

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "int8": {"format": "int8"},
    "w8a8": {"format": "w8a8", "embedding": "int8"},
}
CLASSES = (
    "Model",
    "ModelForSequenceClassification",
    "ModelForTokenClassification",
    "ModelForQuestionAnswering",
)
HEADS = ("score", "classifier", "qa_outputs")
# whose class for questions calls the body otherwise than a checkpoint does
ELSEWHERE = ("llama", "qwen2", "qwen3", "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def quantised(model: nn.Module) -> list[str]:
    """The linears in layouts of bitsandbytes and the modules of ours, by full name."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (StoredModule, *bitsandbytes_linear.LINEARS))
    ]


def known(task: str, base: Path) -> bool:
    """Whether a family has a class of this task, and whether that reads a causal checkpoint of the family."""
    config = transformers.AutoConfig.from_pretrained(base)
    mapping = getattr(transformers, f"Auto{task}")._model_mapping
    return type(config) in mapping and not (
        task.endswith("QuestionAnswering") and config.model_type in ELSEWHERE
    )


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["nf4", "int8", "w8a8"])
def test_every_class_of_a_family_loads_an_artefact_with_a_plain_head(
    format: str, family: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    run_recipe(small_recipe(text, base, rounding="nearest", **FORMATS[format]), tmp_path / "out")
    causal: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    body = [name.removeprefix(f"{causal.base_model_prefix}.") for name in quantised(causal)]
    loaded = 0
    for task in (task for task in CLASSES if known(task, base)):
        model, info = getattr(transformers, f"Auto{task}").from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        loaded += 1
        assert {name.partition(".")[0] for name in info["missing_keys"]} <= set(HEADS)
        found = [name.removeprefix(f"{model.base_model_prefix}.") for name in quantised(model)]
        # which is the embedding, where that is int8
        assert found == [name for name in body if name != "lm_head"]
        heads = [module for name, module in model.named_modules() if name in HEADS]
        assert len(heads) == (task != "Model")
        for head in heads:
            assert type(head) is nn.Linear and head.weight.dtype == torch.float32
            head.weight.requires_grad_()
        outputs = model(TOKENS[:1])
        scores = outputs[0]
        assert bool(scores.isfinite().all())
        if heads and scores.requires_grad:
            scores.sum().backward()
            assert bool(heads[0].weight.grad.isfinite().all())
    assert loaded >= 2


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_list_skips_what_stays_plain_and_no_more(format: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    run_recipe(
        small_recipe(text, base, rounding="nearest", skip=["model.layers.0.*"], **FORMATS[format]),
        tmp_path / "out",
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    skip = config["llm_int8_skip_modules"]
    causal: Any = AutoModelForCausalLM.from_pretrained(base)
    plain = {name for name, module in causal.named_modules() if isinstance(module, nn.Linear)}
    left = {name for name in plain if not should_convert_module(name, skip)}
    assert left == {"lm_head", *(name for name in plain if name.startswith("model.layers.0."))}
    body: Any = transformers.AutoModel.from_pretrained(tmp_path / "out")  # whose names begin after `model.`
    assert {name.partition(".self")[0].partition(".mlp")[0] for name in quantised(body)} == {"layers.1"}


def test_a_head_named_as_a_quantised_linear_is_not_skipped() -> None:
    assert "score" not in bitsandbytes_layout.skip_list(["lm_head"], ["model.layers.0.score"], "model")
    assert {"lm_head", "score", "layers.0.a"} <= set(
        bitsandbytes_layout.skip_list(["lm_head", "model.layers.0.a"], ["model.b"], "model")
    )


def test_a_class_that_calls_its_body_otherwise_is_refused_in_one_line(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    run_recipe(small_recipe(text, base, rounding="nearest", format="w8a8"), tmp_path / "out")
    with pytest.raises(ModelError, match=r"LlamaForQuestionAnswering has no model\.layers") as caught:
        transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
