"""push(): an artefact goes to the Hub, whole, in one commit, with a card that says how to load it from there.

What goes there is a list of kinds of files, so that nothing which happens to lie in the folder is published by accident; and
the report goes without the paths of this machine. A card that its owner has edited stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from llmcompress import hub
from llmcompress.artifact import KEPT, MADE
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import OutputError
from llmcompress.recipe import FILE as RECIPE
from llmcompress.recipe import Recipe
from llmcompress.report import FILE, Report
from llmcompress.report.card import card, for_others, front_matter

CARD = "README.md"


def push(folder: str | Path, repo: str, *, private: bool = False, message: str | None = None) -> hub.Pushed:
    """Put the artefact in `folder` under the id `repo` on the Hub, which is made if there is none; one commit.

    After a broken upload the same call goes on: what has arrived is not sent again. Files of an earlier artefact there that
    this one has no more, such as other shards, go in the same commit. Errors: CompressError where the folder is no whole
    artefact, OutputError where the Hub refuses.
    """
    folder = Path(folder)
    if not hub.is_repository(repo):
        raise OutputError(f"{repo} is no id of a repository; give one like user/name")
    report, recipe = Report.of(folder), Recipe.from_file(folder / RECIPE)
    require_own_recipe(report, recipe, folder)
    Checkpoint.open(folder, base=False)  # refuses a folder whose weights are not all there
    files: dict[str, Path | bytes] = {
        str(file.relative_to(folder)): file for pattern in KEPT + MADE for file in folder.glob(pattern) if file.is_file()
    }
    shared = for_others(report, repo)
    files[FILE] = shared.to_json().encode()
    files[CARD] = _card(folder, report, shared, (folder / RECIPE).read_text("utf-8"), repo)
    message = message or f"{report.base.model} compressed by llmcompress"
    return hub.push(repo, files, private=private, message=message, replaced=("model*.safetensors*", *MADE[1:]))


def require_own_recipe(report: Report, recipe: Recipe, folder: Path) -> None:
    """Refuse a folder whose recipe is not the one that its report tells of. Errors: OutputError."""
    if recipe.digest != report.recipe_digest:
        raise OutputError(f"{folder / RECIPE} is not the recipe that {FILE} beside it tells of; take both as they were written")


def _card(folder: Path, report: Report, shared: Report, recipe_yaml: str, repo: str) -> bytes:
    """The card with the id of the repository in it; as it is, where it is no more the one that was written with the model."""
    file = folder / CARD
    there = file.read_text("utf-8", "replace") if file.is_file() else ""
    inherited = front_matter(there)
    if there and there != card(report, recipe_yaml, inherited):
        return file.read_bytes()
    return card(shared, recipe_yaml, inherited, repo).encode()
