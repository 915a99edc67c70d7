"""The recipes that ship with llmcompress, by name, and how a user's name for a recipe is resolved.

The files are `recipes/*.yaml` of a checkout. A wheel has copies of them in
`llmcompress/recipe/shipped_recipes`.
"""

from __future__ import annotations

import difflib
import functools
import logging
from pathlib import Path

from llmcompress import hub
from llmcompress.errors import RecipeError
from llmcompress.io.user_paths import path_of as user_path
from llmcompress.recipe.recipe import FILE, Recipe

INSTALLED = Path(__file__).parent / "shipped_recipes"  # setup.py copies them there
CHECKOUT = Path(__file__).parents[2] / "recipes"
SUFFIXES = (".yaml", ".yml")

logger = logging.getLogger(__name__)


@functools.cache
def folder() -> Path:
    """The folder that holds the shipped recipes. Errors: RecipeError."""
    for place in (INSTALLED, CHECKOUT):
        if any(place.glob("*.yaml")):
            return place
    raise RecipeError(
        f"this installation has no recipes in {INSTALLED}; install llmcompress again, or give a file"
    )


def names() -> tuple[str, ...]:
    """The names of the shipped recipes, sorted."""
    return tuple(sorted(file.stem for file in folder().glob("*.yaml")))


def path_of(name: str) -> Path:
    """The file of a shipped recipe. Errors: RecipeError, which suggests the nearest name."""
    if name not in names():
        raise RecipeError(f"no shipped recipe is called {name}; {_advice(name)}")
    return folder() / f"{name}.yaml"


def load(name: str) -> Recipe:
    """Load a shipped recipe. Errors: RecipeError."""
    return Recipe.from_file(path_of(name))


def resolve(text: str | Path) -> Recipe:
    """Load the recipe that a user names: a file or a folder, else a shipped recipe, else an id on the Hub.

    A file takes precedence over the shipped recipe of the same name, and so does a folder that holds
    recipe.yaml. Both cases are logged. Errors: RecipeError.
    """
    word, path = str(text), user_path(text, "recipe", RecipeError)
    if word in names():
        if path.is_file() or (path / FILE).is_file():
            kind = "folder" if path.is_dir() else "file"
            logger.warning(
                "recipe %s: taken from the %s of that name here, not the shipped recipe", word, kind
            )
            return Recipe.from_pretrained(path)
        return load(word)
    on_hub = path.suffix not in SUFFIXES and hub.is_repository(hub.split(word)[0])
    if not path.exists() and not on_hub:
        raise RecipeError(f"no recipe file {word}, and no shipped recipe of that name; {_advice(word)}")
    return Recipe.from_pretrained(text)


def _advice(word: str) -> str:
    """The shipped recipe that a word may mean, and where all are listed."""
    path = Path(word)
    stem = path.stem if path.suffix in SUFFIXES else path.name
    near = difflib.get_close_matches(stem, names(), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return (
        f"{meant}`llmcompress recipes` lists the names; or give a .yaml file, a folder that holds {FILE}, "
        "or a Hub id"
    )
