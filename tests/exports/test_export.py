"""What every target shares: what it reads of an artefact, and how its result appears."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from llmcompress.errors import CompressError, ModelError, OutputError, RecipeError
from llmcompress.exports import registry
from llmcompress.exports.artefact import Artefact
from llmcompress.exports.card import FILE
from llmcompress.exports.target import TargetName, Written
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.registry import dequantize
from llmcompress.io.output_folder import Writer
from llmcompress.pipeline.api import compress
from llmcompress.pipeline.export import export
from llmcompress.recipe.recipe import Recipe
from tests.bases import save_base, write_text
from tests.exports.artefacts import grouped, written

pytestmark = pytest.mark.usefixtures("short_runs")


@dataclass(frozen=True)
class Floats:
    """A target for these tests: every weight in float32."""

    name: str = "floats"
    extra: str = "dev"
    loads_with: str = "transformers"
    loading: str = 'AutoModelForCausalLM.from_pretrained("{name}")'
    loading_from_hub: str = 'AutoModelForCausalLM.from_pretrained("{name}")'
    language: str = "python"

    def missing(self) -> str | None:
        return None

    def unsupported(self, config: PretrainedConfig) -> str | None:
        return None

    def refusal(self, artefact: Artefact) -> str | None:
        wrong = [each for each in artefact.matrices.values() if each.format == "w8a8"]
        return f"{wrong[0].name} is {wrong[0].format}" if wrong else None

    def unfit(self, artefact: Artefact) -> str | None:
        return self.refusal(artefact)

    def weight_bytes(self, artefact: Artefact) -> int:
        return self.size_bytes(artefact)

    def size_bytes(self, artefact: Artefact) -> int:
        return 8 * artefact.checkpoint.size_bytes

    def write(self, artefact: Artefact, writer: Writer) -> Written:
        for matrix in artefact.matrices.values():
            writer.add({f"{matrix.key}.weight": artefact.weight(matrix)})
        for key, tensor in artefact.tensors():
            writer.add({key: tensor})
        writer.close({key: value for key, value in artefact.config.items() if key != "quantization_config"})
        return Written(dict.fromkeys(artefact.matrices, "float32"), ("It is larger.",))


@pytest.fixture(autouse=True)
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TARGETS, "floats", Floats())


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("artefact") / "small", IntegerLayout("w4a16", "dynamic", 32))


def test_an_artefact_is_read_by_names_shapes_and_layouts(artefact: Path) -> None:
    found = Artefact(artefact)
    matrix = found.matrices["model.layers.1.mlp.down_proj"]
    assert (matrix.shape, matrix.format, matrix.native) == ((64, 320), "w4a16", False)
    assert len(found.matrices) == 14
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= found.plain.keys()
    weight = found.weight(matrix)
    assert torch.equal(weight, dequantize(found.stored(matrix)))
    assert weight.shape == (64, 320)


def test_an_export_appears_whole_with_a_card_and_what_was_converted(artefact: Path, tmp_path: Path) -> None:
    made = export(artefact, "floats", tmp_path / "out")
    assert made.folder == tmp_path / "out"
    facts = json.loads((tmp_path / "out" / FILE).read_text())
    assert facts["target"] == "floats" and facts["artefact"] == "small"
    assert facts["converted"]["model.layers.0.mlp.up_proj"] == "float32"
    assert facts["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("out")' in card and "It is larger." in card
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_a_target_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = written(tmp_path / "small", IntegerLayout("w8a8"))
    with pytest.raises(
        ModelError, match=r"can't be exported to floats: model\.layers\.0\.self_attn\.q_proj is w8a8"
    ):
        export(folder, "floats", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_target_that_is_not_there_is_refused_with_those_that_are(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"to onnx is no target; give one of: .*floats"):
        export(artefact, "onnx", tmp_path / "out")


def test_what_exists_stays_unless_it_is_an_export_that_may_be_replaced(
    artefact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(artefact, "floats", out)
    with pytest.raises(OutputError, match="exists"):
        export(artefact, "floats", out)
    export(artefact, "floats", out, overwrite=True)
    (out / FILE).unlink()
    with pytest.raises(OutputError, match=r"holds other things than a result with export\.json"):
        export(artefact, "floats", out, overwrite=True)
    assert (out / "model.safetensors").is_file()


def test_an_export_may_not_replace_its_artefact(artefact: Path) -> None:
    before = (artefact / "config.json").read_bytes()
    with pytest.raises(OutputError, match="is or holds the base"):
        export(artefact, "floats", artefact, overwrite=True)
    assert (artefact / "config.json").read_bytes() == before


def test_an_error_while_writing_leaves_nothing(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Floats, artefact: Artefact, writer: Writer) -> Written:
        writer.add({"one": torch.zeros(3)})
        raise ModelError("a matrix is damaged")

    monkeypatch.setattr(Floats, "write", broken)
    with pytest.raises(ModelError, match="damaged"):
        export(artefact, "floats", tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_damaged_codes_are_refused(artefact: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "small", grouped(), damage=lambda tensor: tensor * float("nan"))
    with pytest.raises(ModelError, match="finite"):
        export(folder, "floats", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_an_artefact_that_lacks_a_tensor_is_refused(name: str, artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(artefact, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"has no tensor for {name} \(1 missing\)"):
        export(folder, "floats", tmp_path / "out")


def test_a_plain_base_has_no_matrices(tmp_path: Path) -> None:
    assert not Artefact(save_base(tmp_path / "base")).matrices


@pytest.fixture
def exporting(tmp_path: Path) -> dict[str, object]:
    """A recipe that exports what it makes of a pico model."""
    base = save_base(tmp_path / "base")
    text = write_text(tmp_path / "text.txt")
    data = {"source": str(text), "samples": 4, "length": 32, "evaluation_samples": 2}
    stages = [{"quantize": {"format": "w4a16", "group_size": 32, "rounding": "nearest"}}]
    return {"base": str(base), "data": data, "stages": stages, "export": "compressed-tensors"}


def test_a_recipe_exports_its_result_beside_it(exporting: dict[str, object], tmp_path: Path) -> None:
    compress(None, exporting, tmp_path / "out")
    beside = tmp_path / "out-compressed-tensors"
    export(tmp_path / "out", "compressed-tensors", tmp_path / "alone")
    ours, alone = (load_file(place / "model.safetensors") for place in (beside, tmp_path / "alone"))
    assert ours.keys() == alone.keys() and all(torch.equal(ours[name], alone[name]) for name in ours)
    assert json.loads((beside / FILE).read_text())["target"] == "compressed-tensors"


def test_an_export_without_a_place_is_refused_before_the_run(
    exporting: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "out-compressed-tensors").mkdir()
    (tmp_path / "out-compressed-tensors" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="out-compressed-tensors exists"):
        compress(None, exporting, tmp_path / "out")
    with pytest.raises(OutputError, match="holds other things than a result with export"):
        compress(None, exporting, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()
    assert [*(tmp_path / "out-compressed-tensors").iterdir()] == [
        tmp_path / "out-compressed-tensors/mine.txt"
    ]


def test_what_a_target_cannot_say_leaves_the_result(exporting: dict[str, object], tmp_path: Path) -> None:
    exporting["stages"] = [{"quantize": {"format": "nf4", "rounding": "nearest"}}]
    with pytest.raises(ModelError, match="can't be exported to compressed-tensors"):
        compress(None, exporting, tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file()
    assert not (tmp_path / "out-compressed-tensors").exists()


def test_a_recipe_names_targets_that_there_are(exporting: dict[str, object]) -> None:
    assert {*get_args(TargetName)} == {*registry.TARGETS} - {"floats"}
    assert Recipe.of_entries(exporting).exports == ("compressed-tensors",)
    several = Recipe.of_entries({**exporting, "export": ["gguf", "compressed-tensors"]})
    assert several.exports == ("gguf", "compressed-tensors")
    without = {key: value for key, value in exporting.items() if key != "export"}
    assert "export" not in Recipe.of_entries(without).to_yaml()
    with pytest.raises(RecipeError, match="export"):
        Recipe.of_entries({**exporting, "export": "onnx"})


def test_a_model_in_memory_is_not_exported(exporting: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="export needs a folder that is exported; give out"):
        compress(None, exporting)
