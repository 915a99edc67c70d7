"""Bases whose tensors have several dtypes: each keeps its own, and what is made of them loads and runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import CPU, assert_same_in_memory, distance, live, load, measured, weights_of
from tests.bases import known, save_base, staged_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

Dtype = Callable[[str, Tensor], torch.dtype]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def matrices_in(half: torch.dtype) -> Dtype:
    """Matrices in half precision, norms and biases in float32."""
    return lambda name, tensor: half if tensor.dim() > 1 else torch.float32


def mixed_base(folder: Path, family: str, dtype: Dtype, said: str | None) -> Path:
    """A base whose tensors have the dtypes given, and whose config.json says `said`."""
    base = save_base(folder, family)
    tensors = {name: t.to(dtype(name, t)) for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"dtype": said}
    (base / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return base


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "stage",
    [
        {"prune": {"axis": "ffn", "keep": 0.6}},
        {"prune": {"axis": "hidden", "keep": 0.75, "score": "activation"}},
        {"prune": {"axis": "sublayer", "keep": 1}},
        {"tie": {"fit": "mean"}},
        {"distill": {"steps": 1, "batch": 2}},
    ],
    ids=["ffn", "hidden", "sublayer", "tie", "distill"],
)
def test_each_tensor_keeps_its_own_dtype(
    stage: dict[str, Any], half: torch.dtype, tmp_path: Path, text: Path
) -> None:
    base = mixed_base(tmp_path / "base", "llama", matrices_in(half), "float32")
    run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    before, after = weights_of(base), weights_of(tmp_path / "out")
    assert after.keys() <= before.keys()
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: before[name].dtype for name in after
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert distance(measured(tmp_path / "out"), live(load(tmp_path / "out"))) < 1e-5


def test_what_layers_share_and_factors_have_the_dtype_of_their_weight(tmp_path: Path, text: Path) -> None:
    base = mixed_base(tmp_path / "base", "llama", matrices_in(torch.bfloat16), "float32")
    for name, stage in {
        "share": {"layers": "adjacent", "groups": 1, "steps": 0, "residual_rank": 2},
        "low_rank": {"layers_per_basis": 2, "keep": 0.5},
    }.items():
        run_recipe(staged_recipe(text, base, {name: stage}, samples=4, length=24), tmp_path / name)
        dtypes = {part: tensor.dtype for part, tensor in weights_of(tmp_path / name).items()}
        assert {dtype for part, dtype in dtypes.items() if "norm" in part} == {torch.float32}
        assert {dtype for part, dtype in dtypes.items() if "norm" not in part} == {torch.bfloat16}
        assert distance(measured(tmp_path / name), live(load(tmp_path / name))) < 1e-5


@pytest.mark.slow
def test_values_that_stay_and_levels_have_the_dtype_of_their_linear(tmp_path: Path, text: Path) -> None:
    def dtype(name: str, tensor: Tensor) -> torch.dtype:
        return torch.bfloat16 if "mlp" in name else torch.float32

    base = mixed_base(tmp_path / "base", "llama", dtype, "float32")
    stage = {"sparsify": {"pattern": "2:4", "score": "magnitude"}}
    run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "sparse")
    values = {
        name: t.dtype for name, t in weights_of(tmp_path / "sparse").items() if name.endswith("proj.weight")
    }
    assert values == {name: torch.bfloat16 if "mlp" in name else torch.float32 for name in values}
    run_recipe(
        staged_recipe(text, base, {"codebook": {"entries": 4}}, samples=4, length=24), tmp_path / "codebook"
    )
    levels = {
        name: t.dtype
        for name, t in weights_of(tmp_path / "codebook").items()
        if name.endswith("weight_levels")
    }
    assert levels == {name: torch.bfloat16 if "mlp" in name else torch.float16 for name in levels}


@pytest.mark.parametrize(
    ("family", "half", "said"),
    [
        ("gpt2", torch.bfloat16, "bfloat16"),
        ("gpt2", torch.bfloat16, None),
        ("llama", torch.bfloat16, "bfloat16"),
        ("llama", torch.float16, "float32"),
        ("gpt2", torch.float32, "bfloat16"),
    ],
)
@pytest.mark.parametrize(
    "stage",
    [
        {"format": "nf4", "rounding": "nearest"},
        {"format": "fp4", "double_quant": True},
        {"format": "int8", "rounding": "nearest"},
        {"format": "w8a8", "rounding": "nearest", "embedding": "int8"},
        {"format": "w4a8"},
    ],
    ids=["nf4", "fp4", "int8", "embedding", "w4a8"],
)
@pytest.mark.slow
def test_a_quantised_model_of_a_mixed_base_loads_and_generates(
    family: str, half: torch.dtype, said: str | None, stage: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    """In bitsandbytes' formats a loader casts no weight, so what stays dense is of one dtype there;
    config.json says it."""
    base = mixed_base(tmp_path / "base", family, matrices_in(half), said)
    run_recipe(staged_recipe(text, base, {"quantize": stage}, samples=4, length=24), tmp_path / "out")
    model = load(tmp_path / "out")
    assert distance(live(model), measured(tmp_path / "out")) < 0.05
    written = cast(Any, model).generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 7)
    norms = {t.dtype for name, t in weights_of(tmp_path / "out").items() if "norm" in name or ".ln_" in name}
    assert norms == {half if stage["format"] in ("nf4", "fp4", "int8") else torch.float32}


def test_a_budget_of_bytes_counts_each_tensor_in_its_own_dtype(tmp_path: Path, text: Path) -> None:
    def dtype(name: str, tensor: Tensor) -> torch.dtype:
        return torch.float32 if "mlp" in name else torch.bfloat16

    base, size = mixed_base(tmp_path / "base", "llama", dtype, "bfloat16"), 500_000
    stages: dict[str, dict[str, Any]] = {
        "ffn": {"axis": "ffn", "allocation": "uniform"},
        "layer": {"axis": "layer"},
    }
    for axis, stage in stages.items():
        recipe = staged_recipe(text, base, {"prune": {**stage, "size": size}}, samples=4, length=24)
        report = run_recipe(recipe, tmp_path / axis)
        assert known(report.compressed.size_bytes) <= size
        row = plan_recipe(recipe).rows[-1]
        assert row.size_bytes == sum(tensor.nbytes for tensor in weights_of(tmp_path / axis).values())
    assert known(report.compressed.size_bytes) > 0
    assert (tmp_path / "ffn" / "model.safetensors").stat().st_size > 0.97 * size


def test_the_dtype_of_a_model_is_that_of_most_bytes(tmp_path: Path) -> None:
    """There are more norms than matrices in a model without much else."""
    base = mixed_base(tmp_path / "base", "gpt2", matrices_in(torch.bfloat16), None)
    model = DiskModel(base, CPU)
    assert model.weight_dtype is torch.bfloat16
    assert model.dtype_of("transformer.h.0.ln_1.weight") is torch.float32
    assert model.dtype_of("lm_head.weight") is torch.bfloat16


def test_a_mixed_model_in_memory_keeps_its_dtypes(tmp_path: Path, text: Path) -> None:
    base = mixed_base(tmp_path / "base", "llama", matrices_in(torch.float32), "float32")
    recipe = staged_recipe(text, base, {"prune": {"axis": "ffn", "keep": 0.6}}, samples=4, length=24)
    model, _, _ = assert_same_in_memory(recipe, base, tmp_path)
    half = model.bfloat16()
    for norm in (module for name, module in half.named_modules() if name.endswith("norm")):
        norm.float()
    again, _ = apply_recipe(recipe, half, _tokenizer(base))
    assert {p.dtype for name, p in again.named_parameters() if "norm" in name} == {torch.float32}
    assert {p.dtype for name, p in again.named_parameters() if "norm" not in name} == {torch.bfloat16}


def _tokenizer(base: Path) -> Any:
    from llmcompress.io.tokenizer import tokenizer_of

    return tokenizer_of(base)
