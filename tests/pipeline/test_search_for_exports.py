"""The best model that an export can hold: formats that it takes, and linears that its engines join."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from llmcompress.errors import CompressError, ModelError
from llmcompress.exports.card import ExportFacts
from llmcompress.pipeline.run import run_recipe
from tests.exports.test_gguf import merging_tokenizer
from tests.pipeline.test_search import Place

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture
def place(tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    found = Place(tmp_path, vocab_size=264)
    merging_tokenizer().save_pretrained(found.base)
    return found


def test_what_is_found_for_gguf_becomes_a_file_with_these_formats(place: Place, tmp_path: Path) -> None:
    (found,) = place.search("24%", loads_with="gguf", choose_among=None).found
    assert found.recipe.exports == ("gguf",)
    assert {*found.ways.values()} <= {"kept", "w8a16", "iq4_nl", "q4_0"}
    run_recipe(found.recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= found.size_bytes
    kinds = {
        tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out-gguf" / "model.gguf").tensors
    }
    assert kinds & {"IQ4_NL", "Q4_0"} and kinds <= {"F32", "Q8_0", "IQ4_NL", "Q4_0"}


def test_linears_that_an_engine_joins_take_the_same_format(place: Place, tmp_path: Path) -> None:
    (found,) = place.search("40%", loads_with="compressed-tensors", choose_among=None).found
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        joined = [[f"{prefix}.self_attn.{name}_proj" for name in "qkv"]]
        joined.append([f"{prefix}.mlp.{name}_proj" for name in ("gate", "up")])
        assert all(len({found.ways[linear] for linear in linears}) == 1 for linears in joined)
    assert len({*found.ways.values()}) > 1, "layers and kinds of linears may differ"
    run_recipe(found.recipe, tmp_path / "out")
    assert ExportFacts.of(tmp_path / "out-compressed-tensors").kinds


def test_what_an_export_cannot_hold_is_refused_before_the_search(place: Place, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="choose_among has prune, but no widths are chosen for gguf"):
        place.search("40%", loads_with="gguf", choose_among=["quantize", "prune"])
    other = Place(tmp_path / "other", "gpt2")
    with pytest.raises(ModelError, match="the result can't be exported to gguf: "):
        other.search("40%", loads_with="gguf", choose_among=None)
