"""A recipe run again from the report of its artefact: bit-equal, or what differs, and refusals before the
time is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.errors import AcceptError, CompressError, DataError, ModelError, OutputError
from llmcompress.pipeline.reproduce import KL, PERPLEXITY, _close, reproduce, threads_of
from llmcompress.pipeline.run import run_recipe
from llmcompress.report.schema import Report
from tests.bases import known, save_base, small_recipe, write_text
from tests.clients import shell

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a text, and what a recipe made of them."""
    folder = tmp_path_factory.mktemp("shelf")
    base, text = save_base(folder / "base", num_hidden_layers=1), write_text(folder / "facts.txt")
    run_recipe(small_recipe(text, base), folder / "out")
    return folder


@pytest.fixture
def copy(shelf: Path, tmp_path: Path) -> Path:
    """The artefact, to damage."""
    return Path(shutil.copytree(shelf / "out", tmp_path / "copy"))


def edit_report(folder: Path, *path: str, value: Any) -> None:
    file = folder / "report.json"
    raw = at = json.loads(file.read_text())
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(json.dumps(raw))


def test_the_same_bytes_come_out_again(shelf: Path, tmp_path: Path) -> None:
    found = reproduce(str(shelf / "out"), out=tmp_path / "kept")
    assert (found.verdict, found.differences) == ("bit-equal", ())
    assert found.again.fidelity == found.reported.fidelity
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == (
        shelf / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_the_number_of_threads_is_that_of_the_report(shelf: Path, copy: Path) -> None:
    before = torch.get_num_threads()
    edit_report(copy, "environment", "device", value=f"a CPU, {before + 1} threads")
    found = reproduce(str(copy))
    assert threads_of(found.again.environment.device) == before + 1
    assert torch.get_num_threads() == before


def test_weights_that_differ_are_named_and_numbers_that_hold_are_within_tolerance(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit_report(copy, "environment", "versions", "torch", value="1.0")
    found = reproduce(str(copy))
    assert found.verdict == "equal within tolerance"
    assert found.differences[0] == f"torch: made with 1.0, here {torch.__version__}"
    share = 100 / tensors[name].numel()
    assert found.differences[1:] == (f"{name}: {share:.3g} % of its values differ",)


@pytest.mark.slow
def test_other_numbers_are_different(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {name: tensor * 2 if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    edit_report(copy, "compressed", "perplexity", value=Report.of(copy).compressed.perplexity * 2)  # type: ignore[operator]
    found = reproduce(str(copy))
    assert found.verdict == "different"
    assert found.differences[-1].startswith("and ") and "more tensors" in found.differences[-1]
    code, out, _ = shell({}, "reproduce", str(copy))
    assert code == AcceptError.exit_code and ": different" in out and "% of its values differ" in out


def test_another_structure_is_different_and_says_where(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 3.0}))
    tensors = load_file(copy / "model.safetensors")
    tensors["new"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = reproduce(str(copy))
    assert found.verdict == "different"
    said = "\n".join(found.differences)
    assert "config.json: rope_theta was 3.0, now " in said
    assert "model.norm.weight: is new" in said and "new: is missing" in said
    assert "lm_head.weight: was torch.float16" in said


def test_a_config_that_says_where_and_by_what_it_was_written_is_no_other_structure(
    shelf: Path, copy: Path
) -> None:
    config = json.loads((copy / "config.json").read_text())
    said = {
        "_name_or_path": "/home/someone/base",
        "auto_map": {"AutoConfig": "a.B"},
        "transformers_version": "4.0.0",
    }
    (copy / "config.json").write_text(json.dumps(config | said))
    assert reproduce(str(copy)).verdict == "bit-equal"


def test_close_is_what_the_tolerances_say(shelf: Path) -> None:
    report = Report.of(shelf / "out")
    assert report.fidelity.kl_nats_mean is not None and report.compressed.perplexity is not None

    def moved(kl: float, perplexity: float) -> Report:
        fidelity = report.fidelity.model_copy(
            update={"kl_nats_mean": known(report.fidelity.kl_nats_mean) * (1 + kl)}
        )
        small = report.compressed.model_copy(
            update={"perplexity": known(report.compressed.perplexity) * (1 + perplexity)}
        )
        return report.model_copy(update={"fidelity": fidelity, "compressed": small})

    assert _close(report, moved(0.9 * KL, 0.9 * PERPLEXITY)) and _close(
        report, moved(-0.9 * KL, -0.9 * PERPLEXITY)
    )
    assert not _close(report, moved(1.1 * KL, 0))
    assert not _close(report, moved(0, 1.1 * PERPLEXITY))


def test_another_text_or_base_is_refused_before_the_run(shelf: Path, copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"another line {number}\n" for number in range(900)))
    with pytest.raises(
        DataError,
        match=r"gives tokens with sha256 \w{16}, the report was made with \w{16}; give the same text",
    ):
        reproduce(str(copy), data=str(other), out=tmp_path / "never")
    edit_report(copy, "data", "source", value="gone.txt")
    with pytest.raises(
        DataError,
        match=r"the text gone.txt was a file or folder of whoever made this model; give yours with data",
    ):
        reproduce(str(copy))
    assert reproduce(str(copy), data=str(shelf / "facts.txt")).verdict == "bit-equal"
    edit_report(copy, "base", "model", value="gone/base")
    with pytest.raises(
        ModelError,
        match=r"the base gone/base was a folder of whoever made this model; give yours with base",
    ):
        reproduce(str(copy), data=str(shelf / "facts.txt"))
    assert not (tmp_path / "never").exists()


def test_what_is_no_artefact_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "recipe.yaml").write_text("stages: [{quantize: {group_size: 128}}]")
    with pytest.raises(CompressError, match=r"is not the recipe that report.json beside it tells of"):
        reproduce(str(copy))
    with pytest.raises(CompressError, match=r"no recipe file .*recipe.yaml; give the path"):
        reproduce(str(tmp_path))
    with pytest.raises(
        ModelError, match=r"./nowhere is no folder; give one that `llmcompress run` wrote, or a Hub id"
    ):
        reproduce("./nowhere")


def test_the_second_artefact_is_not_written_over_the_first(copy: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    for out in (copy, tmp_path):
        with pytest.raises(OutputError, match="is or holds the artefact"):
            reproduce(str(copy), out=out, overwrite=True)
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
