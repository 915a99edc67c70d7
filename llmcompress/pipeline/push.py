"""push(): upload an artefact to the Hub, whole, in one commit, with a card that says how to load it from
there.

The files are listed by name, so that nothing which happens to lie in the folder is published by accident. The
list holds what llmcompress wrote, the weights, the code that the configs name (`io.own_code`), and the files
that travel beside weights (`io.companion_files`). None of them names a path of this machine: report, recipe
and card are made `for_others`. The report and the recipe in the folder keep such paths, so that `reproduce`
finds base and text again. A card that its owner has edited stays as it is, except for such paths.
"""

from __future__ import annotations

from pathlib import Path

from llmcompress import hub
from llmcompress.errors import OutputError
from llmcompress.exports.card import FILE as EXPORT
from llmcompress.io import own_code
from llmcompress.io.checkpoint import INDEX, Checkpoint
from llmcompress.io.companion_files import CONFIG, is_inside, kept
from llmcompress.io.local_names import without
from llmcompress.io.tokenizer import LEGACY, SETTINGS, vocabulary_files
from llmcompress.pipeline import push_export
from llmcompress.recipe.recipe import FILE as RECIPE
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.model_card import card, evaluations, front_matter
from llmcompress.report.page import page
from llmcompress.report.redaction import WITHHELD, for_others, local_names
from llmcompress.report.schema import (
    CARD,
    CHANGE_PICTURE,
    ERROR_PICTURE,
    EVALUATIONS,
    FILE,
    PAGE,
    TRAINING_PICTURE,
    Report,
)

PICTURES = (ERROR_PICTURE, CHANGE_PICTURE, TRAINING_PICTURE)
# files of an earlier artefact that go if this one has none
REPLACED = ("model*.safetensors*", "*.gguf", *PICTURES, EVALUATIONS, *LEGACY)


def push(folder: str | Path, repo: str, *, private: bool = False, message: str | None = None) -> hub.Pushed:
    """Upload the artefact or export in `folder` to the Hub repository `repo`, creating it if necessary, in
    one commit.

    After a broken upload the same call resumes: what has arrived is not sent again. Files of an earlier
    artefact that this one no longer has, such as other shards, are removed in the same commit. Errors:
    CompressError if the folder is no whole artefact or export, OutputError if the Hub refuses, or if the
    repository holds the other of the two.
    """
    if not hub.is_repository(repo):
        raise OutputError(f"{repo} is no id of a repository; give one like user/name")
    place = Path(folder)
    if push_export.is_export(place):
        (files, about), other = push_export.outgoing(place, repo), FILE
    else:
        (files, about), other = outgoing(place, repo), EXPORT
    return hub.push(repo, files, private=private, message=message or about, replaced=REPLACED, other=other)


def outgoing(folder: Path, repo: str) -> tuple[dict[str, Path | bytes], str]:
    """Return all files to upload, by their names on the Hub, and the commit message.

    Errors: CompressError if the folder is no whole artefact.
    """
    report, recipe = _with_public_text(Report.of(folder)), Recipe.from_file(folder / RECIPE)
    require_own_recipe(report, recipe, folder)
    code = own_code.files_of(folder)
    files: dict[str, Path | bytes] = {**code, **kept(folder, vocabulary_files(folder), code=bool(code))}
    files |= _weights(folder)
    files |= {name: folder / name for name in PICTURES if _is_there(folder, name)}
    told = recipe.for_others(report)
    shared = for_others(report, repo).model_copy(update={"recipe_digest": told.digest})
    files |= {RECIPE: told.to_yaml().encode(), FILE: shared.to_json().encode()}
    files[CARD] = _card(folder, report, recipe, shared, repo)
    files[PAGE] = page(shared, told.to_yaml(), repo).encode()
    if _is_there(folder, EVALUATIONS) and (entries := evaluations(shared)):
        files[EVALUATIONS] = hub.evaluation_results(entries).encode()
    return files, f"{shared.base.model} compressed by llmcompress"


def _with_public_text(report: Report) -> Report:
    """The report without samples of a data set on the Hub that not everyone may read."""
    data = report.data
    if report.samples is None or data.revision is None or hub.is_public_dataset(data.source, data.revision):
        return report
    return report.model_copy(update={"samples": WITHHELD})


def require_own_recipe(report: Report, recipe: Recipe, folder: Path) -> None:
    """Refuse a folder whose recipe is not the one that its report names. Errors: OutputError."""
    if recipe.digest != report.recipe_digest:
        raise OutputError(
            f"{folder / RECIPE} is not the recipe that {FILE} beside it tells of; take both as they were "
            "written"
        )


def _is_there(folder: Path, name: str) -> bool:
    return (folder / name).is_file() and is_inside(folder / name, folder)


def _weights(folder: Path) -> dict[str, Path]:
    """Return the weight files, and their index if there are several. Refuses weights that are not whole in
    the folder."""
    names = sorted({entry.file for entry in Checkpoint.open(folder, base=False).tensors.values()})
    if names != ["model.safetensors"]:
        names.append(INDEX)
    needed = (*names, CONFIG, SETTINGS, "tokenizer.json")
    if links := [name for name in needed if not is_inside(folder / name, folder)]:
        raise OutputError(
            f"{folder / links[0]} is a link that leaves the folder; put the file itself in its place"
        )
    return {name: folder / name for name in names}


def _card(folder: Path, report: Report, recipe: Recipe, shared: Report, repo: str) -> bytes:
    """Return the card with the id of the repository. A card that was edited since the run is kept, without
    local names."""
    there = (folder / CARD).read_text("utf-8", "replace") if _is_there(folder, CARD) else ""
    told, inherited = recipe.for_others(report), front_matter(there)
    written = (card(report, each.to_yaml(), inherited) for each in (told, recipe))
    if there and there not in written:
        names = [*local_names(report), *recipe.local_names(report)]
        return without(there, names).encode()
    return card(shared, told.to_yaml(), inherited, repo).encode()
