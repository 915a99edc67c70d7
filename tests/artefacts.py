"""What the tests ask of an artefact on disk: what it loads as, what it computes, and what the report measured
of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import ModelError
from llmcompress.formats.registry import AnyLayout, StoredWeight, dequantize, tensors_of
from llmcompress.integrations import transformers_quantizer  # teaches from_pretrained our formats
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report
from tests.bases import VOCABULARY, byte_tokenizer, known

CPU = torch.device("cpu")
TOKENS = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> PreTrainedModel:
    model, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True))
    assert not any(
        set(info[kind]) - {"lm_head.weight"}
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    return cast(PreTrainedModel, model)


@torch.no_grad()
def live(model: PreTrainedModel) -> Tensor:
    return cast(Tensor, model(TOKENS).logits).float()


def measured(folder: Path) -> Tensor:
    """The logits that a report is made of."""
    return torch.cat(list(logits(DiskModel(folder, CPU, quantized=True), TOKENS)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    once, again = weights_of(folder), weights_of(other)
    return once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


def set_linear(model: PreTrainedModel, name: str, W_RC: Tensor) -> None:
    """Give a linear the weight [R, C], whichever way round its module has it."""
    module: Any = model.get_submodule(name)
    module.weight.data = (W_RC.T if isinstance(module, Conv1D) else W_RC).contiguous()


def write_in(
    folder: Path, model: PreTrainedModel, layout: AnyLayout, made: Callable[[Tensor], StoredWeight]
) -> PreTrainedModel:
    """Write a model whose linears are what is `made` of their weights [R, C], and give the model itself these
    weights."""
    state, names = dict(model.state_dict()), []
    for name, module in linears(model).items():
        plain = cast(Tensor, module.weight).data
        turned = isinstance(module, Conv1D)
        found = made((plain.T if turned else plain).contiguous())
        del state[f"{name}.weight"]
        state.update({f"{name}.{part}": tensor for part, tensor in tensors_of(found, native=False).items()})
        weight = dequantize(found)
        plain.copy_(weight.T if turned else weight)
        names.append(name)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = transformers_quantizer.quantization_config([(layout, names)])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All but the head, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n != "lm_head"}


def assert_same_in_memory(told: Recipe, base: Path, folder: Path) -> tuple[PreTrainedModel, Report, Report]:
    """What a recipe makes of a base in memory is what it writes to `folder`/out: the model, its report and
    the written one."""
    written = run_recipe(told, folder / "out")
    result, report = apply_recipe(
        told, cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval()), byte_tokenizer()
    )
    assert report.compressed.parameters == written.compressed.parameters
    # the header
    assert 0 <= known(written.compressed.size_bytes) - known(report.compressed.size_bytes) < 10_000
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-3)
    assert torch.equal(live(result), live(load(folder / "out")))
    result.save_pretrained(folder / "saved")
    once, again = weights_of(folder / "out"), weights_of(folder / "saved")
    assert once.keys() == again.keys() and all(
        torch.equal(tensor, again[name]) for name, tensor in once.items()
    )
    return result, report, written


def assert_refused(told: Recipe, why: str, out: Path) -> None:
    """A recipe that a model can't take is refused in one line, by a plan and by a run, before anything is
    written."""
    for act in cast("list[Callable[[Recipe], Any]]", [plan_recipe, lambda given: run_recipe(given, out)]):
        with pytest.raises(ModelError, match=why) as caught:
            act(told)
        assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()
