"""Weights that are finite and huge: one line that names the layer, or a right result, and never half a
report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.algorithms.overflow import Overflow, require_within
from llmcompress.algorithms.quantize_weight import output_error, weight_error
from llmcompress.errors import CompressError, ModelError
from llmcompress.pipeline.run import run_recipe
from llmcompress.stages.base import naming_layer, require_numbers
from tests.bases import save_base, staged_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

UP = "model.layers.0.mlp.up_proj"


def one_weight(tensors: dict[str, Tensor]) -> None:
    """More than float16 holds."""
    tensors[f"{UP}.weight"][3, 5] = 7e4


def ffn(tensors: dict[str, Tensor]) -> None:
    """All of a feed-forward part, so that its product of three is 1e18 times what it was."""
    for name in tensors:
        if "layers.0.mlp" in name:
            tensors[name] *= 1e6


def embedding(tensors: dict[str, Tensor]) -> None:
    """Its squares are beyond float32."""
    tensors["model.embed_tokens.weight"] *= 1e30


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def base_with(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    base = save_base(folder, num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"quantize": {"format": "int8", "rounding": "nearest"}}, r"model\.layers\.0\.mlp\.\w+"),
        ({"quantize": {"format": "int8"}}, r"model\.layers\.0.* float16"),
        ({"codebook": {"entries": 16}}, rf"{UP}: weights up to 7e\+04 don't fit float16"),
        (
            {"quantize": {"format": "codebook", "entries": 16}},
            rf"{UP}: weights up to 7e\+04 don't fit float16",
        ),
    ],
    ids=["int8-nearest", "int8-gptq", "codebook", "codebook-quantize"],
)
def test_what_float16_does_not_hold_is_told_with_its_layer(
    stage: dict[str, Any], why: str, tmp_path: Path, text: Path
) -> None:
    base = base_with(tmp_path / "base", one_weight)
    with pytest.raises(ModelError, match=why) as caught:
        run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [one_weight, ffn, embedding], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "stage",
    [
        {"quantize": {"format": "w4a8"}},
        {"quantize": {"format": "nf4", "double_quant": True, "rounding": "nearest"}},
        {"prune": {"axis": "ffn", "keep": 0.5}},
        {"sparsify": {"pattern": "2:4"}},
        {"low_rank": {"layers_per_basis": 1, "keep": 0.5}},
        {"tie": {"fit": "mean"}},
    ],
    ids=["w4a8", "nf4", "ffn", "sparse", "basis", "tie"],
)
@pytest.mark.slow
def test_a_huge_weight_ends_in_one_line_or_in_a_whole_report(
    stage: dict[str, Any], change: Callable[[dict[str, Tensor]], None], tmp_path: Path, text: Path
) -> None:
    base = base_with(tmp_path / "base", change)
    refused = None
    try:
        run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    except CompressError as error:
        refused = str(error)
    assert (tmp_path / "out").exists() == (refused is None)
    if refused is not None:
        assert len(refused.splitlines()) == 1
        return
    # NaN and Infinity are no JSON
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in written.values() if tensor.is_floating_point())


def test_errors_of_large_weights_are_measured() -> None:
    """Their squares are beyond float32, and the share that is lost is not."""
    W_RC = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    Q_RC, H_CC = W_RC.round(decimals=1), torch.eye(8)
    assert output_error(W_RC * 1e25, Q_RC * 1e25, H_CC) == pytest.approx(
        output_error(W_RC, Q_RC, H_CC), rel=1e-5
    )
    assert weight_error(W_RC * 1e38, Q_RC * 1e38) == pytest.approx(weight_error(W_RC, Q_RC), rel=1e-5)


def test_facts_that_no_report_can_hold_are_refused_by_the_name_of_the_layer() -> None:
    require_numbers({"linears": [{"name": UP, "relative_error": 0.1}], "notes": ["nan"]}, "stage quantize")
    for number in (math.nan, math.inf):
        with pytest.raises(ModelError, match=rf"{UP}: relative_error is (nan|inf)"):
            require_numbers({"linears": [{"name": UP, "relative_error": number}]}, "stage quantize")


def test_a_method_that_overflows_is_told_with_its_layer() -> None:
    require_within(torch.tensor([65504.0]), torch.float16, "weights")
    with pytest.raises(Overflow, match="don't fit bfloat16"):
        require_within(torch.tensor([3.4e38, 1.0]), torch.bfloat16, "weights")
    with (
        pytest.raises(ModelError, match=rf"{UP}: weights up to 7e\+04 don't fit float16") as caught,
        naming_layer(UP),
    ):
        require_within(torch.tensor([7e4]), torch.float16, "weights")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ModelError, match=UP), naming_layer(UP):
        torch.linalg.cholesky(-torch.eye(2))
