"""What a checkpoint holds beside the model: masks of old versions, heads and towers that this class does not
have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import CPU, weights_of
from tests.bases import known, save_base, staged_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

OLD: dict[str, dict[str, Tensor]] = {
    "gpt2": {
        **{f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 96, 96, dtype=torch.uint8) for i in range(2)},
        **{f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)},
    },
    "gpt_neox": {
        **{
            f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 96, 96, dtype=torch.bool)
            for i in range(2)
        },
        **{f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(2)},
        **{f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(8) for i in range(2)},
    },
    "llama": {
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)},
        "model.position_ids": torch.arange(96)[None],
        "model.layers.2.embed_tokens.weight": torch.ones(256, 64),  # of a layer that predicts further tokens
        "model.layers.2.mlp.up_proj.weight": torch.ones(320, 64),
        "mtp.fc.weight": torch.ones(64, 128),
        "mtp.fc.weight_scale": torch.ones(64),
        "model.vision_tower.patch.weight": torch.ones(64, 64),
    },
}


def base_with(folder: Path, family: str) -> Path:
    """A base as old or larger models leave it: with tensors that the causal language model does not have."""
    base = save_base(folder, family)
    save_file(
        load_file(base / "model.safetensors") | OLD[family], base / "model.safetensors", {"format": "pt"}
    )
    return base


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", OLD)
@pytest.mark.parametrize(
    "stage",
    [
        {"prune": {"axis": "ffn", "keep": 0.6}},
        {"prune": {"axis": "layer", "keep": 1}},
        {"quantize": {"format": "nf4"}},
    ],
    ids=["ffn", "layer", "nf4"],
)
def test_what_is_no_part_of_the_model_is_neither_written_nor_counted(
    family: str, stage: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    base = base_with(tmp_path / "base", family)
    report = run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    assert not weights_of(tmp_path / "out").keys() & OLD[family].keys()
    _, info = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True))
    assert not info["unexpected_keys"] and not info["missing_keys"] - {"lm_head.weight"}
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert report.base.parameters == sum(p.numel() for p in plain.parameters())
    assert report.base.size_bytes == (base / "model.safetensors").stat().st_size, (
        "the size of a base is that of its files"
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_budget_of_bytes_holds_where_the_base_stores_masks(family: str, tmp_path: Path, text: Path) -> None:
    base, size = base_with(tmp_path / "base", family), 500_000
    stage = {"prune": {"axis": "ffn", "size": size, "allocation": "uniform"}}
    report = run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    assert 0.95 * size < known(report.compressed.size_bytes) <= size


def test_a_file_of_which_nothing_is_taken_counts_for_the_size_of_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size="200KB")
    whole = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    model = DiskModel(base, CPU)
    none = model.checkpoint.only([])
    assert model.checkpoint.size_bytes == none.size_bytes == whole and not none.tensors
