"""Which text a user can name, and what a local file or folder gives to calibrate on and to evaluate on.

A side is a stream of pieces of text that are joined as they are, read lazily, so that no more of a file is read than is used. A
row of a table (.jsonl, .parquet, Hub) becomes its text and an empty line, as the GPTQ papers join WikiText-2.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer

from llmcompress import hub
from llmcompress.errors import DataError, first_line
from llmcompress.untrusted import Unreadable, yaml_of

PYTHON_DOCS = "python-docs"
SUFFIXES = (".txt", ".jsonl", ".parquet")
CALIBRATES = ("train", "calibration")  # first words of the names of a folder's files
EVALUATES = (("valid", "validation", "val"), ("test",), ("heldout",))  # the first kind that is there


WINDOWS = ("samples", "length", "seed", "evaluation_samples", "bos")  # what a DataSpec says beside which text it is
LARGEST = 1 << 12  # bytes of a mapping on the command line
EXAMPLE = "'{source: user/name, config: en, column: text}'"


class DataSpec(BaseModel):
    """Which text, and how many windows of it: the `data` entry of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(default=PYTHON_DOCS, min_length=1, description="Hub data set id, file, folder, or python-docs")
    config: str | None = Field(default=None, description="configuration of a Hub data set")
    split: str = Field(default="train", description="Hub split that calibrates")
    evaluation_split: str | None = Field(default=None, description="Hub split that evaluates; default validation, else test")
    column: str = Field(default="text", description="column that holds the text (Hub, .jsonl, .parquet)")
    revision: str | None = Field(default=None, description="commit, branch or tag of a Hub data set")
    samples: int = Field(default=256, ge=1, description="calibration windows")
    length: int | None = Field(default=None, ge=2, description="tokens a window; default up to 2048, as model and text allow")
    seed: int = Field(default=0, ge=0, lt=2**63, description="draws the calibration windows")
    evaluation_samples: int = Field(default=64, ge=1, description="evaluation windows")
    bos: Literal["auto"] | bool = Field(
        default="auto", description="begin each window with the BOS token; auto: where the tokenizer adds it by itself"
    )

    @model_serializer(mode="wrap")
    def _older_keys_alone_unless_bos_is_set(self, handler: Any) -> Any:
        """Without `bos: auto`, so that recipes keep the digests that they had before there was that key."""
        return {key: value for key, value in handler(self).items() if (key, value) != ("bos", "auto")}

    def with_text(self, text: str) -> DataSpec:
        """As many windows of another text: a source, `user/name@revision` too, or a mapping as in a recipe, of more than that.

        What a mapping does not say of the text is at its default; what it does not say of the windows stays. Errors: DataError.
        """
        given: Any = {"source": text}
        if text.lstrip().startswith("{"):
            try:
                given = yaml_of(text, largest=LARGEST)
            except Unreadable as error:
                raise DataError(f"data {error}; give a source, or a mapping like {EXAMPLE}") from None
        elif not Path(text).expanduser().exists() and hub.is_id((split := hub.split(text))[0]):
            given = {"source": split[0], "revision": split[1]}
        return self.with_place(given)

    def with_place(self, given: Mapping[str, Any]) -> DataSpec:
        """The same of the fields `given`, by name. Errors: DataError."""
        try:
            return DataSpec.model_validate({name: getattr(self, name) for name in WINDOWS} | dict(given))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key, known = ".".join(map(str, first["loc"])), ", ".join(DataSpec.model_fields)
            why = f"unknown key; use {known}" if first["type"] == "extra_forbidden" else first["msg"]
            raise DataError(f"data {str(given)[:200]}: {key}: {why}") from None


class Texts(NamedTuple):
    """Pieces of text, joined as they are. Both sides may be one iterator: evaluation is read first and calibration goes on."""

    calibration: Iterable[str]
    evaluation: Iterable[str]
    revision: str | None = None  # the commit of a Hub data set
    evaluation_split: str | None = None  # and what evaluates, where that is not the split that calibrates


def file_texts(file: Path, column: str) -> Texts:
    """One file: its last tenth evaluates, what is before calibrates; in rows, or in characters of a .txt (at a line's end)."""
    if file.suffix == ".txt":
        text = "".join(_lines(file))
        cut = len(text) * 9 // 10
        line_end = text.find("\n", cut, (cut + len(text)) // 2)
        cut = cut if line_end < 0 else line_end + 1
        return Texts(text[:cut].splitlines(keepends=True), text[cut:].splitlines(keepends=True))
    rows = sum(1 for _ in _pieces(file, column))
    return Texts(islice(_pieces(file, column), rows * 9 // 10), islice(_pieces(file, column), rows * 9 // 10, None))


def folder_texts(folder: Path, column: str) -> Texts:
    """A folder: train* (or calibration*) files calibrate; valid*, else test*, else heldout* evaluate."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)

    def named(words: tuple[str, ...]) -> list[Path]:
        return [file for file in files if re.split(r"[^a-z]", file.stem.lower())[0] in words]

    calibrates = named(CALIBRATES)
    evaluates = next(filter(None, map(named, EVALUATES)), [])
    if not calibrates or not evaluates:
        found = ", ".join(file.name for file in files) or "no .txt, .jsonl or .parquet file"
        missing = "valid* or test* file to evaluate on" if calibrates else "train* file to calibrate on"
        raise DataError(f"{folder} holds {found} and no {missing}; name one so, or give one file (its last tenth evaluates)")
    for ours, theirs in product(evaluates, calibrates):
        if filecmp.cmp(ours, theirs, shallow=False):
            raise DataError(f"{ours} is the same text as {theirs.name}, so it can't evaluate; use different text for the two")
    calibration, evaluation = (chain.from_iterable(_pieces(file, column) for file in side) for side in (calibrates, evaluates))
    return Texts(calibration, evaluation)


def _pieces(file: Path, column: str) -> Iterator[str]:
    """The text of one local file: lines of a .txt, or rows of a .jsonl or .parquet each followed by an empty line."""
    if file.suffix == ".txt":
        yield from _lines(file)
    elif file.suffix == ".jsonl":
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                yield from row_text(_json_row(line, f"{file} line {number}"), column, str(file))
    elif file.suffix == ".parquet":
        yield from _parquet(file, column)
    else:
        raise DataError(f"{file} is not text that can be read; use a .txt, .jsonl or .parquet file")


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file with their ends; DataError where it can't be read or is not UTF-8."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{file} can't be read ({error.strerror}); give a file that can") from error


def _json_row(line: str, where: str) -> dict[str, object]:
    """One line of a .jsonl as a dictionary."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not an object; write one object a line, as {{'text': '...'}}")
    return row


def _parquet(file: Path, column: str) -> Iterator[str]:
    """The rows of a Parquet file, a batch at a time; only the one column is read."""
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise _no_column(column, names, str(file))
            for batch in table.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield from row_text({column: value}, column, str(file))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is no Parquet file that can be read ({first_line(error)}); write it again") from error


def row_text(row: dict[str, object], column: str, source: str) -> Iterator[str]:
    """The text of one row and an empty line; nothing for a null."""
    if column not in row:
        raise _no_column(column, list(row), source)
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise DataError(f"column {column!r} of {source} holds a {type(value).__name__}, not text; name a column of strings")
    if value is not None:
        yield value + "\n\n"


def _no_column(column: str, names: list[str], source: str) -> DataError:
    return DataError(f"{source} has no column {column!r}; it has {', '.join(names)}: set column to one of them")
