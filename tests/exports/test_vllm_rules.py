"""Our artefacts and exports held against what vLLM's loaders read, as `vllm_rules` restates it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.exports.artefact import Artefact
from llmcompress.formats.integer import IntegerLayout
from llmcompress.pipeline.export import export
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from tests.bases import save_base, write_text
from tests.exports.artefacts import written
from tests.exports.vllm_rules import (
    Broken,
    is_skipped,
    linears_of,
    load_bitsandbytes,
    load_compressed_tensors,
)

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(place: Path, text: Path, *stages: dict[str, Any], **config: Any) -> Path:
    """An artefact of a Llama with linears of 64, 128, 256 and 32 rows."""
    fields = {"intermediate_size": 256, "torch_dtype": "bfloat16", **config}
    base = save_base(place / "base", **fields)
    data = {"source": str(text), "samples": 4, "length": 24, "evaluation_samples": 2}
    run_recipe(Recipe.model_validate({"base": str(base), "data": data, "stages": [*stages]}), place / "small")
    return place / "small"


NATIVE: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "nf4": ([{"quantize": {"format": "nf4"}}], {}),
    "fp4": ([{"quantize": {"format": "fp4", "group_size": 32}}], {}),
    "nf4-double": ([{"quantize": {"format": "nf4", "double_quant": True}}], {}),
    "int8": ([{"quantize": {"format": "int8"}}], {}),
    "int8-threshold": ([{"quantize": {"format": "int8", "threshold": 6.0}}], {}),
    "tied": ([{"quantize": {"format": "nf4"}}], {"tie_word_embeddings": True}),
    "pruned": ([{"prune": {"axis": "ffn", "keep": 0.75}}, {"quantize": {"format": "nf4"}}], {}),
    "kv-pruned": (
        [{"prune": {"axis": "kv", "keep": 0.5}}, {"quantize": {"format": "int8"}}],
        {"num_key_value_heads": 4},
    ),
    "kept-layer": ([{"quantize": {"format": "nf4", "skip": ["*.down_proj"]}}], {}),
}


@pytest.mark.parametrize("name", NATIVE)
def test_vllm_reads_a_native_artefact_as_we_do(name: str, tmp_path: Path, text: Path) -> None:
    stages, config = NATIVE[name]
    folder = run(tmp_path, text, *stages, **config)
    found, artefact = load_bitsandbytes(folder), Artefact(folder)
    assert artefact.native
    for linear in linears_of(artefact.config):
        ours = [
            artefact.weight(artefact.matrices[part], artefact.dtype)
            if part in artefact.matrices
            else artefact.tensor(f"{part}.weight")
            for part in linear.parts
        ]
        tolerance = 2**-8 if name.startswith(("int8", "kv")) else 0  # ours is rounded to bfloat16
        torch.testing.assert_close(found[linear.name], torch.cat(ours).float(), rtol=tolerance, atol=0)


def test_what_vllm_skips_by_a_list() -> None:
    assert is_skipped("model.layers.0.mlp.down_proj", ["down_proj"])
    assert is_skipped("model.layers.0.mlp.down_proj", ["model.layers.0.mlp"])
    assert not is_skipped("model.layers.10.mlp.down_proj", ["model.layers.1"])
    assert not is_skipped("model.layers.0.self_attn.qkv_proj", ["model.layers.0.self_attn.q_proj"])


def test_vllm_can_not_keep_a_part_of_what_it_fuses(tmp_path: Path, text: Path) -> None:
    """A linear that is skipped beside its siblings, or all of them by their own names, which vLLM does not
    know."""
    folder = run(tmp_path, text, {"quantize": {"format": "nf4", "skip": ["*.layers.0.mlp.gate_proj"]}})
    with pytest.raises(Broken, match=r"gate_up_proj is quantised, so model\.layers\.0\.mlp\.gate_proj"):
        load_bitsandbytes(folder)


def test_vllm_has_no_quantised_head_of_bitsandbytes(tmp_path: Path, text: Path) -> None:
    """ParallelLMHead is no LinearBase, so it is always plain (BitsAndBytesConfig.get_quant_method)."""
    folder = run(tmp_path, text, {"quantize": {"format": "nf4", "head": "quantize"}})
    with pytest.raises(Broken, match=r"lm_head\.weight is"):
        load_bitsandbytes(folder)


def test_vllm_holds_4_bits_in_models_of_16_bits_alone(tmp_path: Path, text: Path) -> None:
    folder = run(tmp_path, text, {"quantize": {"format": "nf4"}})
    with pytest.raises(Broken, match="is uint8"):
        load_bitsandbytes(folder, torch.float32)


EXPORTS: dict[str, tuple[IntegerLayout, str, dict[str, Any]]] = {
    "w8a8": (IntegerLayout("w8a8"), "CompressedTensorsW8A8Int8", {}),
    "w8a8-static": (IntegerLayout("w8a8", "static"), "CompressedTensorsW8A8Int8", {}),
    "w8a16": (IntegerLayout("w8a16"), "CompressedTensorsWNA16", {}),
    "w4a16": (IntegerLayout("w4a16", "dynamic", 32), "CompressedTensorsWNA16", {}),
    "w4a8": (IntegerLayout("w4a8", "dynamic", 64), "CompressedTensorsWNA8Int", {}),
    "w4a4": (IntegerLayout("w4a4", "dynamic", 64), "CompressedTensorsWNA4Int", {}),
    "tied": (IntegerLayout("w8a8"), "CompressedTensorsW8A8Int8", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_vllm_finds_a_scheme_and_all_tensors_of_an_export(name: str, tmp_path: Path) -> None:
    layout, kind, config = EXPORTS[name]
    made = export(written(tmp_path / "small", layout, **config), "compressed-tensors", tmp_path / "out")
    found = load_compressed_tensors(made.folder)
    assert found.pop("lm_head", "plain") == "plain"
    assert len(found) == 8 and {*found.values()} == {kind}


def test_vllm_finds_each_scheme_of_a_mixture(tmp_path: Path, text: Path) -> None:
    overrides = {"*.down_proj": {"format": "w4a16"}, "*.o_proj": {"format": "w8a16"}}
    stage = {"quantize": {"format": "w8a8", "head": "quantize", "overrides": overrides}}
    made = export(run(tmp_path, text, stage), "compressed-tensors", tmp_path / "out")
    found = load_compressed_tensors(made.folder)
    assert found["model.layers.1.mlp.down_proj"] == "CompressedTensorsWNA16"
    assert found["model.layers.1.self_attn.qkv_proj"] == "CompressedTensorsW8A8Int8"
    assert found["lm_head"] == "CompressedTensorsW8A8Int8"


def test_vllm_finds_one_scale_for_the_inputs_of_what_it_fuses(tmp_path: Path, text: Path) -> None:
    stage = {"quantize": {"format": "w8a8", "activations": "static"}}
    made = export(run(tmp_path, text, stage), "compressed-tensors", tmp_path / "out")
    assert {*load_compressed_tensors(made.folder).values()} == {"CompressedTensorsW8A8Int8", "plain"}


def test_vllm_finds_the_shapes_of_a_pruned_export(tmp_path: Path, text: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "ffn", "keep": 0.75}},
        {"quantize": {"format": "w4a16", "skip": ["*.down_proj"]}},
    ]
    made = export(run(tmp_path, text, *stages), "compressed-tensors", tmp_path / "out")
    found = load_compressed_tensors(made.folder)
    assert found["model.layers.0.mlp.down_proj"] == "plain"
    assert found["model.layers.0.mlp.gate_up_proj"] == "CompressedTensorsWNA16"
