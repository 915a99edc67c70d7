"""The worked examples of docs/architecture.md, in a copy of the package: its blocks are put in place, then
run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, Block, blocks

PAGE = ROOT / "docs" / "architecture.md"
SECTIONS = [*dict.fromkeys(block.section for block in blocks("python", "diff", pages=[PAGE]))]


def changed(text: str, block: Block) -> str:
    """A file with the lines that a diff adds, after those that it shows."""
    lines = [(line[:1], line[1:]) for line in block.text.splitlines(keepends=True)]
    assert {sign for sign, _ in lines} <= {" ", "+", "-"}
    before, after = ("".join(line for sign, line in lines if sign != leave) for leave in "+-")
    assert text.count(before) == 1, f"{block.place}: {block.file} has no such lines"
    return text.replace(before, after)


def put_in_place(block: Block, root: Path) -> None:
    assert block.file is not None
    file = root / block.file
    if block.language == "diff":
        file.write_text(changed(file.read_text(encoding="utf-8"), block), encoding="utf-8")
        return
    assert not file.exists(), f"{block.place}: {block.file} is there already"
    file.parent.mkdir(exist_ok=True)
    file.with_name("__init__.py").touch()
    file.write_text(block.text, encoding="utf-8")


def test_the_page_has_an_example_of_each() -> None:
    assert {*SECTIONS} == {"Add a stage", "Add a format", "Add a family"}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_runs(section: str, tmp_path: Path) -> None:
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llmcompress", tmp_path / "llmcompress", ignore=compiled)
    script = ""
    for block in blocks("python", "diff", pages=[PAGE]):
        if block.section == section and block.file:
            put_in_place(block, tmp_path)
        elif block.section == section and block.runs:
            script += f"# {block.place}\n{block.text}"
    assert script
    script += f"import llmcompress\nassert llmcompress.__file__.startswith({str(tmp_path)!r})\n"
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
