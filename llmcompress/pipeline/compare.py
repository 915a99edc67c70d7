"""Pages of finished runs and searches: that of one, written anew, and the comparison of several artefacts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from llmcompress import hub
from llmcompress.errors import CompressError, ModelError, OutputError, argument, first_line
from llmcompress.io.destination import require_file, write_file
from llmcompress.io.safetensors_writer import put
from llmcompress.io.user_paths import path_of, shortened
from llmcompress.pipeline.search import page_of
from llmcompress.recipe.recipe import FILE as RECIPE
from llmcompress.recipe.recipe import Recipe
from llmcompress.report import search_facts
from llmcompress.report.comparison import ComparedRow, compared, warning_of
from llmcompress.report.page import comparison_page, page
from llmcompress.report.schema import FILE, LARGEST, PAGE, Report

logger = logging.getLogger(__name__)


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write report.html of an artefact anew from its report.json and recipe.yaml, and return its path.

    Errors: CompressError if they can't be read, OutputError if the page can't be written.
    """
    place = path_of(folder, "folder")
    report = Report.of(place)
    recipe = Recipe.from_file(place / RECIPE) if (place / RECIPE).is_file() else None
    return _written(place / PAGE, page(report, recipe.for_others(report).to_yaml() if recipe else None), FILE)


def is_search(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that a search wrote, and no artefact."""
    place = path_of(folder, "folder")
    return (place / search_facts.FILE).is_file() and not (place / FILE).exists()


def write_search_page(folder: str | os.PathLike[str]) -> Path:
    """Write search.html of a search anew from its search.json, and return its path. Errors: those of
    `write_page`."""
    place = path_of(folder, "folder")
    facts = search_facts.SearchFacts.of(place)
    return _written(place / search_facts.PAGE, page_of(facts), search_facts.FILE)


def _written(file: Path, text: str, of: str) -> Path:
    """Write a page that is made of a file beside it. Errors: OutputError."""
    try:
        put(file, text)
    except OSError as error:
        raise OutputError(
            f"{file} can't be written ({error.strerror or first_line(error)}); copy {of} to a folder of "
            "your own and give that"
        ) from None
    return file


def compare(
    artefacts: Sequence[str | os.PathLike[str]], html: str | os.PathLike[str] | None = None
) -> list[ComparedRow]:
    """Compare the reports of several artefacts of one base, smallest first.

    A warning says what was not measured alike; such artefacts don't beat each other.

    Args:
        artefacts: folders that `run` wrote, or Hub ids.
        html: a file for the comparison as a page.

    Raises:
        CompressError: fewer than two are given, or a report can't be read or the page not be written.
    """
    names = [artefacts] if isinstance(artefacts, str | os.PathLike) else [*artefacts]
    names = [os.fspath(name) for name in names]
    if len(names) < 2:
        given = shortened(names[0]) if names else "none"
        raise CompressError(f"a comparison is of two artefacts or more, and got {given}; name another")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise CompressError(f"{shortened(twice[0])} is given twice; name another artefact")
    page_file = None if html is None else path_of(html, argument("html"), OutputError)
    if page_file is not None:
        require_file(page_file, argument("html"))
    reports = [(name, _report_of(name)) for name in names]
    if warning := warning_of(reports):
        logger.warning("%s", warning)
    if page_file is not None:
        write_file(page_file, comparison_page(reports), argument("html"))
    return compared(reports)


def _report_of(name: str) -> Report:
    """The report of a folder, or of an artefact on the Hub. Errors: CompressError."""
    repo, revision = hub.split(name)
    if path_of(name, "artefact", ModelError).exists():
        return Report.of(name)
    if not hub.is_repository(repo):
        raise ModelError(
            f"{shortened(name)} is no folder; give one that `llmcompress run` wrote, or a Hub id like "
            "user/name"
        )
    text, _ = hub.read(repo, FILE, revision, largest=LARGEST, wanted="artefact", error=ModelError)
    return Report.from_json(text, f"{FILE} of {name}")
