"""Temporary folders: they go with their context, and where there can be none one line names TMPDIR."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmcompress.errors import OutputError
from llmcompress.io.safetensors_writer import writing
from llmcompress.io.scratch import is_scratch, scratch_folder
from llmcompress.pipeline.in_memory import apply_recipe
from tests.bases import byte_tokenizer, save_base, small_recipe, write_text
from tests.models import pico


def test_a_scratch_folder_goes_with_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert is_scratch(folder / "journal") and folder.parent == tmp_path
        with (
            pytest.raises(
                OutputError, match=r"File too large\); free space there or set TMPDIR to another folder"
            ),
            writing(folder / "journal"),
        ):
            raise OSError(27, "File too large")
    assert not any(tmp_path.iterdir()) and not is_scratch(tmp_path / "out")


@pytest.mark.parametrize("asked", [None, "/no/such/folder"])
def test_where_there_can_be_none_one_line_names_tmpdir(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    monkeypatch.delenv("TMPDIR", raising=False)
    if asked:
        monkeypatch.setenv("TMPDIR", asked)
    where = (
        f"TMPDIR, which is {asked},"
        if asked
        else r"the system's folder of temporary files \(TMPDIR is not set\)"
    )
    line = (
        rf"^can't write to {where} \(No such file or directory\); free space there or set TMPDIR to another "
        r"folder$"
    )
    with pytest.raises(OutputError, match=line), scratch_folder():
        raise AssertionError("there is none")


def test_a_model_in_memory_without_a_temporary_folder_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(write_text(tmp_path / "facts.txt"), rounding="nearest")
    model = pico("llama", vocab_size=256, num_hidden_layers=1)
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(OutputError, match="TMPDIR"):
        apply_recipe(recipe, model, byte_tokenizer())
    assert getattr(model.config, "quantization_config", None) is None


WITHOUT = """
import sys, tempfile
tempfile.tempdir = "/no/such/folder"  # as if no folder of temporary files could be written
sys.argv = ["llmcompress", *sys.argv[1:]]
from llmcompress.cli.app import main

pytestmark = pytest.mark.usefixtures("short_runs")
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [True, False])
def test_a_run_needs_no_temporary_folder_but_for_what_draws(drawn: bool, tmp_path: Path) -> None:
    base, text = save_base(tmp_path / "base", num_hidden_layers=1), write_text(tmp_path / "facts.txt")
    (tmp_path / "recipe.yaml").write_text(small_recipe(text, base, rounding="nearest").to_yaml())
    place = tmp_path / "matplotlib" if drawn else Path("/proc/none")
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        "run",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(tmp_path / "a" / "out"),
    ]
    environment = os.environ | {"MPLCONFIGDIR": str(place), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if drawn:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "a" / "out" / "error_per_layer.png").stat().st_size > 1000
    else:
        assert done.returncode == 2 and not (tmp_path / "a").exists()
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "MPLCONFIGDIR" in line and "TMPDIR" in line and "Traceback" not in done.stderr
