"""What lies between two stages: a run that goes on from it gives the bytes of one that nothing disturbed,
whatever happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmcompress.errors import AcceptError
from llmcompress.io.manifest import MANIFEST
from llmcompress.io.output_folder import partial_folder
from llmcompress.pipeline.between_stages import REMADE
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from tests.bases import save_base, staged_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

STAGES: tuple[dict[str, Any], ...] = (
    {"prune": {"axis": "ffn", "keep": 64, "repair": False}},
    {"quantize": {"rounding": "nearest"}},
)
LESSON: dict[str, Any] = {"distill": {"steps": 6, "batch": 4, "learning_rate": 1e-3, "evaluate_every": 2}}


def interrupted(folder: Path, *stages: dict[str, Any]) -> tuple[Recipe, Path]:
    """A recipe of which all stages were done and nothing was published, and `whole`, what comes of it
    undisturbed."""
    recipe = staged_recipe(
        write_text(folder / "facts.txt"),
        save_base(folder / "base", num_hidden_layers=2),
        *stages,
        samples=4,
        length=16,
    )
    with pytest.raises(AcceptError):
        run_recipe(recipe.model_copy(update={"accept": Accept(kl_nats=1e-12)}), folder / "left")
    run_recipe(recipe, folder / "whole")
    return recipe, folder


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    return interrupted(tmp_path_factory.mktemp("stages"), *STAGES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe, folder = interrupted(tmp_path_factory.mktemp("trained"), STAGES[0], LESSON)
    assert len(load_file(partial_folder(folder / "left") / "journal-1" / "distill.00001.safetensors")) > 3, (
        "it has learned"
    )
    return recipe, folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def go_on(recipe: Recipe, folder: Path, name: str, damage: Callable[[Path], object]) -> list[str]:
    """The notes of a run that finds what was left, damaged."""
    out = folder / name
    shutil.copytree(partial_folder(folder / "left"), partial_folder(out))
    damage(partial_folder(out))
    report = run_recipe(recipe, out)
    assert weights(out) == weights(folder / "whole")
    assert (out / "config.json").read_bytes() == (folder / "whole" / "config.json").read_bytes()
    return [note for stage in report.stages for note in stage.notes]


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def link_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder / "nowhere")


JOINT = Path("journal", "joint")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda left: flipped(left / JOINT / "model.safetensors"),
    "cut short": lambda left: (left / JOINT / "model.safetensors").write_bytes(b"\x08"),
    "emptied": lambda left: (left / JOINT / "model.safetensors").write_bytes(b""),
    "no config": lambda left: (left / JOINT / "config.json").unlink(),
    "folder instead": lambda left: folder_instead(left / JOINT / "config.json"),
    "no manifest": lambda left: (left / JOINT / MANIFEST).write_bytes(b"\xff{"),
    "file instead": lambda left: file_instead(left / JOINT),
    "link instead": lambda left: link_instead(left / JOINT),
}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_between_stages_is_made_again_and_that_is_said(
    damage: str, two_stages: tuple[Recipe, Path]
) -> None:
    assert go_on(*two_stages, damage.replace(" ", "-"), DAMAGES[damage]).count(REMADE) == 1


def test_a_sound_model_between_stages_is_gone_on_from(two_stages: tuple[Recipe, Path]) -> None:
    assert REMADE not in go_on(*two_stages, "sound", lambda left: None)


def journal_file(left: Path) -> Path:
    return next(iter(sorted((left / "journal").glob("*.00001.safetensors"))))


KEYS: dict[str, Callable[[Path], object]] = {
    "no UTF-8": lambda left: (left / "journal" / "key").write_bytes(b"\xff\xfe"),
    "a folder": lambda left: folder_instead(left / "journal" / "key"),
    "no key": lambda left: (left / "journal" / "key").unlink(),
    "no folder": lambda left: file_instead(left / "journal"),
}


@pytest.mark.parametrize("damage", KEYS)
def test_a_journal_whose_key_is_damaged_is_made_again_and_that_is_said(
    damage: str, two_stages: tuple[Recipe, Path]
) -> None:
    notes = go_on(*two_stages, f"key-{damage}".replace(" ", "-"), KEYS[damage])
    assert any("1 files of the journal were damaged on the disk (key)" in note for note in notes)


LAYERS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda left: flipped(journal_file(left)),
    "emptied": lambda left: journal_file(left).write_bytes(b""),
    "folder": lambda left: folder_instead(journal_file(left)),
}


@pytest.mark.parametrize("damage", LAYERS)
def test_a_damaged_layer_is_done_again_and_that_is_said(damage: str, two_stages: tuple[Recipe, Path]) -> None:
    notes = go_on(*two_stages, f"layer-{damage}", LAYERS[damage])
    assert any("1 files of the journal were damaged on the disk" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill.00001", "outer.00000", "distilled.00000"])
def test_a_damaged_part_of_what_was_learned_is_never_left_out(
    name: str, trained: tuple[Recipe, Path]
) -> None:
    notes = go_on(*trained, name, lambda left: flipped(left / "journal-1" / f"{name}.safetensors"))
    assert any("damaged on the disk" in note for note in notes)


def test_the_base_that_changed_after_a_crash_is_another(
    two_stages: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = two_stages
    base, out = Path(shutil.copytree(folder / "base", tmp_path / "base")), tmp_path / "out"
    shutil.copytree(partial_folder(folder / "left"), partial_folder(out))
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    span = json.loads(content[8 : 8 + header])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    content[8 + header + span[1] - 1] ^= 1  # a bit of its last weight, far behind the first 4 KiB
    file.write_bytes(content)
    for target in (out, tmp_path / "fresh"):
        report = run_recipe(recipe, target, base=str(base))
        assert not any("earlier run" in note for stage in report.stages for note in stage.notes)
    assert weights(out) == weights(tmp_path / "fresh")
