"""What the pages say holds: links lead somewhere, recipes are recipes, and blocks of code run."""

from __future__ import annotations

import ast
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

import llmcompress
from llmcompress.cli.app import app
from llmcompress.recipe import shipped
from llmcompress.recipe.recipe import Recipe
from tests.caches import own_cache
from tests.pages import PAGES, README, ROOT, Block, blocks, read

INTERNAL = ROOT / "docs" / "architecture.md"  # for who changes the package: test_worked_examples.py runs it
API = ROOT / "docs" / "python-api.md"
SHORT = 600  # seconds, for one block on a busy machine

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def every(*languages: str, but: Path | None = None) -> pytest.MarkDecorator:
    """One test a block."""
    found = [block for block in blocks(*languages) if block.page != but]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.place)


# 1. Links, and how long the first page is.


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in read(page).links:
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{link} leads nowhere"
        assert file.is_relative_to(ROOT)
        assert not anchor or anchor in read(file).anchors, f"{link}: {file.name} has no such heading"


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in read(page).links}
    assert {page for page in PAGES if page != README} <= linked


def test_the_first_page_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


# 2. Recipes.


@every("yaml")
def test_a_block_of_yaml_is_a_recipe(block: Block) -> None:
    if yaml.safe_load(block.text) is not None:  # a comment alone
        Recipe.parse(block.text, block.place)


# 3. Python imports what is public.


@every("python", but=INTERNAL)
def test_a_block_of_python_compiles_and_imports_public_names(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, block.place)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmcompress"):
            assert node.module == "llmcompress", f"{block.place}: {node.module} is no public module"
            assert {alias.name for alias in node.names} <= set(llmcompress.__all__)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("llmcompress.") for alias in node.names)


def test_the_page_of_the_api_names_all_that_is_public() -> None:
    table = API.read_text(encoding="utf-8").partition("\n## ")[0]
    named = {word for line in table.splitlines() if line.startswith("|") for word in line.split("`")[1::2]}
    assert named == {*llmcompress.__all__} - {"__version__"}


# 4. Commands, also those that are not run.


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each `llmcompress ...` of a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["llmcompress"]:
            yield words[1:]


@every("bash")
def test_a_command_is_one_that_there_is(block: Block) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for words in commands(block):
        assert words[0] in group.commands, f"{block.place}: no command {words[0]}"
        options = {option for parameter in group.commands[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, f"{block.place}: {words}"
        if words[0] in ("run", "plan") and not {"/", "."} & set(words[1]):
            assert words[1] in shipped.names(), f"{block.place}: no recipe {words[1]}"


# 5. What runs.


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who has this checkout installed, and no network."""
    folder = tmp_path_factory.mktemp("user")
    programs = folder / "programs"
    programs.mkdir()
    command = programs / "llmcompress"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmcompress "$@"\n')
    command.chmod(0o755)
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LLMCOMPRESS_CACHE": str(own_cache(folder / "cache")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run_in_shell(block: Block, environment: dict[str, str]) -> None:
    words = ["bash", "-euc", block.text]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SHORT)
    assert done.returncode == 0, f"{block.place}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


RUN = [page for page in PAGES if any(block.runs for block in blocks("bash", "python", pages=[page]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in RUN if page != INTERNAL],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_blocks_of_a_page_run(
    page: Path,
    shell: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLMCOMPRESS_CACHE", shell["LLMCOMPRESS_CACHE"])
    names: dict[str, Any] = {"__name__": "__main__"}  # one namespace a page
    level = logging.getLogger("llmcompress").level
    try:
        for block in blocks("bash", "python", pages=[page]):
            if block.runs and block.language == "python":
                exec(compile(block.text, block.place, "exec"), names)
            elif block.runs:
                run_in_shell(block, shell)
    finally:
        logging.getLogger("llmcompress").setLevel(level)
