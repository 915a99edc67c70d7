"""Shipped recipes by name: which there are, what wins over a name, and what a wrong name is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llmcompress.errors import RecipeError
from llmcompress.recipe import shipped
from llmcompress.recipe.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
OTHER = "stages: [{quantize: {format: fp4}}]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_names_are_those_of_the_recipe_files() -> None:
    assert shipped.names() == tuple(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    assert {"demo", "nf4-gptq", "nf4-learned"} <= set(shipped.names())


def test_a_name_is_its_file(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert shipped.path_of("nf4-gptq").read_text() == (RECIPES / "nf4-gptq.yaml").read_text()
    assert (
        shipped.load("nf4-gptq") == shipped.resolve("nf4-gptq") == Recipe.from_file(RECIPES / "nf4-gptq.yaml")
    )
    assert shipped.resolve("nf4-gptq").origin is None
    assert not caplog.records


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_or_folder_of_the_name_wins_and_a_note_says_so(
    kind: str, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = here / "nf4-gptq"
    if kind == "folder":
        place.mkdir()
        place = place / "recipe.yaml"
    place.write_text(OTHER)
    assert shipped.resolve("nf4-gptq") == Recipe.parse(OTHER)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        record.getMessage()
        == f"recipe nf4-gptq: taken from the {kind} of that name here, not the shipped recipe"
    )
    assert shipped.load("nf4-gptq") != Recipe.parse(OTHER)


def test_a_folder_without_a_recipe_hides_no_name(here: Path) -> None:
    (here / "demo").mkdir()
    assert shipped.resolve("demo") == shipped.load("demo")


def test_a_path_is_read_as_before(here: Path) -> None:
    (here / "mine.yaml").write_text(OTHER)
    assert shipped.resolve("mine.yaml") == shipped.resolve(here / "mine.yaml") == Recipe.parse(OTHER)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("nf4-gtpq", "did you mean nf4-gptq?"),
        ("nf4-gptq.yaml", "did you mean nf4-gptq?"),
        ("recipes/nf4-gptq.yml", "did you mean nf4-gptq?"),
        ("qqqqq", "`llmcompress recipes` lists the names"),
    ],
)
def test_a_word_that_names_nothing_is_told_the_nearest_name(word: str, meant: str, here: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        shipped.resolve(word)
    assert str(refused.value).startswith(f"no recipe file {word}, and no shipped recipe of that name; ")
    assert meant in str(refused.value)
    with pytest.raises(RecipeError, match=r"no shipped recipe is called .*; "):
        shipped.path_of(word)


def test_an_installation_without_recipes_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "INSTALLED", here / "a")
    monkeypatch.setattr(shipped, "CHECKOUT", here / "b")
    shipped.folder.cache_clear()
    try:
        with pytest.raises(RecipeError, match="this installation has no recipes"):
            shipped.resolve("demo")
    finally:
        shipped.folder.cache_clear()
