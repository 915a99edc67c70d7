"""The files of an export that `push` sends: its weights, what travels beside them, its card and export.json.

export.json and the card name nothing of this machine, as they are written for others.
"""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import OutputError
from llmcompress.exports.card import FILE, ExportFacts
from llmcompress.exports.registry import target_of
from llmcompress.io import own_code
from llmcompress.io.checkpoint import INDEX
from llmcompress.io.companion_files import is_inside, kept
from llmcompress.io.tokenizer import vocabulary_files
from llmcompress.pipeline.export import weight_files
from llmcompress.report.schema import CARD
from llmcompress.report.schema import FILE as REPORT


def is_export(folder: Path) -> bool:
    """Whether a folder is what `export` wrote."""
    return (folder / FILE).is_file() and not (folder / REPORT).is_file()


def outgoing(folder: Path, repo: str) -> tuple[dict[str, Path | bytes], str]:
    """Return all files to upload, by their names on the Hub, and the commit message. Errors: OutputError if
    the folder is no whole export."""
    facts = ExportFacts.of(folder)
    weights = weight_files(folder)
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    own = [*weights, *index, folder / FILE, folder / CARD]
    if links := [file for file in own if not is_inside(file, folder)]:
        raise OutputError(f"{links[0]} is a link that leaves the folder; put the file itself in its place")
    size = sum(file.stat().st_size for file in weights)
    if size != facts.size_bytes or not weights:
        raise OutputError(
            f"{folder} has {size} bytes of weights, and its {FILE} tells of {facts.size_bytes}; export again"
        )
    code = own_code.files_of(folder)
    files: dict[str, Path | bytes] = {**code, **kept(folder, vocabulary_files(folder), code=bool(code))}
    files |= {file.name: file for file in (*weights, *index)}
    files |= {FILE: facts.to_json().encode(), CARD: _card(folder, facts, repo)}
    return files, f"{facts.artefact} exported to {facts.target} by llmcompress"


def _card(folder: Path, facts: ExportFacts, repo: str) -> bytes:
    """The card, which loads the export by the id of the repository."""
    target, file = target_of(facts.target), folder / CARD
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    here, there = target.loading.format(name=folder.name), target.loading_from_hub.format(name=repo)
    return text.replace(here, there).encode()
