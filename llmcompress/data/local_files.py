"""Text of local files and folders, plain or compressed with gzip, read lazily and in bounded memory.

A .txt file gives its lines; a .jsonl or .parquet file gives its rows. Line ends become newlines. A byte order
mark at the start of a file is not part of its text.
"""

from __future__ import annotations

import filecmp
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from llmcompress.data.rows import Piece, column_among, no_column, row_pieces
from llmcompress.data.sources import CHUNK, Texts
from llmcompress.errors import DataError, first_line

KINDS = {
    ".txt": ".txt",
    ".txt.gz": ".txt",
    ".jsonl": ".jsonl",
    ".jsonl.gz": ".jsonl",
    ".json.gz": ".jsonl",
    ".parquet": ".parquet",
}
READABLE = ".txt, .jsonl or .parquet file (the first two also as .gz)"
LONGEST_ROW = 1 << 26  # characters per line of a .jsonl
CALIBRATES = ("train", "calibration")  # first words of the names of a folder's files
EVALUATES = (("valid", "validation", "val"), ("test",), ("heldout",))  # the first kind found is used


def kind_of(file: Path) -> str | None:
    """Return the kind of a file by its name: .txt, .jsonl or .parquet; None for any other name."""
    return next((kind for ending, kind in KINDS.items() if file.name.endswith(ending)), None)


def file_texts(file: Path, column: str) -> Texts:
    """Return the two sides of one file: its last tenth evaluates and the rest calibrates.

    The tenth is in rows, or for a .txt in characters, cut at the end of a line.
    """
    if kind_of(file) == ".txt":
        cut = _cut(file)
        return Texts(_lines_between(file, 0, cut), _lines_between(file, cut, None))
    rows = sum(1 for _ in _pieces(file, column))
    return Texts(
        islice(_pieces(file, column), rows * 9 // 10), islice(_pieces(file, column), rows * 9 // 10, None)
    )


def folder_texts(folder: Path, column: str) -> Texts:
    """Return the two sides of a folder.

    train* (or calibration*) files calibrate; valid*, else test*, else heldout* files evaluate. Errors:
    DataError.
    """
    try:
        files = sorted(file for file in folder.iterdir() if kind_of(file))
    except OSError as error:
        raise _unreadable(folder, error, "folder") from None

    def named(words: tuple[str, ...]) -> list[Path]:
        return [file for file in files if re.split(r"[^a-z]", file.stem.lower())[0] in words]

    calibrates = named(CALIBRATES)
    evaluates = next(filter(None, map(named, EVALUATES)), [])
    if not calibrates or not evaluates:
        found = ", ".join(file.name for file in files) or "no .txt, .jsonl or .parquet file"
        missing = "valid* or test* file to evaluate on" if calibrates else "train* file to calibrate on"
        raise DataError(
            f"{folder} holds {found} and no {missing}; name one so, or give one file (its last tenth "
            "evaluates)"
        )
    for ours, theirs in product(evaluates, calibrates):
        if _same(ours, theirs):
            raise DataError(
                f"{ours} is the same text as {theirs.name}, so it can't evaluate; use different text for "
                "the two"
            )
    calibration, evaluation = (
        chain.from_iterable(_pieces(file, column) for file in side) for side in (calibrates, evaluates)
    )
    return Texts(calibration, evaluation)


def _same(ours: Path, theirs: Path) -> bool:
    """Whether two files hold the same bytes. Errors: DataError."""
    for file in (ours, theirs):
        _require_file(file)
    try:
        return filecmp.cmp(ours, theirs, shallow=False)
    except OSError as error:
        raise _unreadable(ours if error.filename == str(ours) else theirs, error) from None


def _pieces(file: Path, column: str) -> Iterator[Piece]:
    """Yield the pieces of one local file: lines of a .txt, or rows of a .jsonl or .parquet."""
    kind = kind_of(file)
    if kind == ".txt":
        yield from _lines(file, CHUNK)
    elif kind == ".jsonl":
        for number, line in enumerate(_lines(file, LONGEST_ROW + 1), 1):
            if line.strip():
                where = f"{file} line {number}"
                yield from row_pieces(_json_row(line, where), column, str(file), where)
    elif kind == ".parquet":
        yield from _parquet(file, column)
    else:
        raise DataError(f"{file} is not text that can be read; use a {READABLE}")


def _lines(file: Path, longest: int) -> Iterator[str]:
    """Yield the lines of a file with their ends; lines of more than `longest` characters come in parts.

    Errors: DataError if the file can't be read, is not UTF-8, or is not a gzip file although its name says
    so.
    """
    _require_file(file)
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8-sig")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8-sig") as text
        ):
            while line := text.readline(longest):
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; convert it to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is no whole gzip file ({first_line(error)}); compress it again") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _require_file(file: Path) -> None:
    """Raise DataError unless the path is a regular file; opening anything else may block forever."""
    try:
        is_file = file.is_file()
    except OSError as error:
        raise _unreadable(file, error) from None
    if not is_file:
        raise DataError(f"{file} is not a regular file; give a {READABLE}")


def _unreadable(path: Path, error: OSError, what: str = "file") -> DataError:
    return DataError(f"{path} can't be read ({error.strerror or first_line(error)}); give a {what} that can")


def _cut(file: Path) -> int:
    """Return where the last tenth of a text begins, in characters.

    This is at the end of a nearby line if there is one.
    """
    size = sum(map(len, _lines(file, CHUNK)))
    cut, position = size * 9 // 10, 0
    for line in _lines(file, CHUNK):
        position += len(line)
        if position > (cut + size) // 2:
            break
        if position > cut and line.endswith("\n"):
            return position
    return cut


def _lines_between(file: Path, start: int, stop: int | None) -> Iterator[str]:
    """Yield the lines of the text between two character positions; long lines come in parts of CHUNK
    characters."""
    position, held = 0, ""
    for part in _lines(file, CHUNK):
        if stop is not None and position >= stop:
            break
        position += len(part)
        if position <= start:
            continue
        held += part[
            max(0, start - position + len(part)) : None if stop is None else stop - position + len(part)
        ]
        *whole, held = held.splitlines(keepends=True) or [""]
        yield from whole
        if len(held) >= CHUNK:
            yield held[:CHUNK]
            held = held[CHUNK:]
    if held:
        yield held


def _json_row(line: str, where: str) -> dict[str, object]:
    """Parse one line of a .jsonl as a dictionary. Errors: DataError."""
    if len(line) > LONGEST_ROW:
        raise DataError(f"{where} is longer than {LONGEST_ROW} characters; write one object a line")
    try:
        row = json.loads(line, parse_int=_integer)
    except RecursionError:
        raise DataError(
            f"{where} has too many levels of lists and objects; write its text as a plain string"
        ) from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is a {type(row).__name__}, not an object; write one object a line, as {{'text': '...'}}"
        )
    return row


def _integer(digits: str) -> float:
    """Parse an integer; infinity if it has more digits than Python converts."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _parquet(file: Path, column: str) -> Iterator[Piece]:
    """Yield the rows of a Parquet file, one batch at a time; only the one column is read."""
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    _require_file(file)
    before = 0  # rows of the batches before
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names: list[str] = table.schema_arrow.names
            name = column_among(names, column)
            if name is None:
                raise no_column(column, names, str(file))
            for batch in table.iter_batches(columns=[name]):
                values = _values(batch.column(0), name, file)
                for number, value in enumerate(values, before + 1):
                    yield from row_pieces({name: value}, name, str(file), f"{file} row {number}")
                before += len(values)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file} is no Parquet file that can be read ({first_line(error)}); write it again"
        ) from error


def _values(column: Any, name: str, file: Path) -> list[Any]:
    """Return the values of a column.

    Errors: DataError for values that Python cannot represent, such as strings that are not UTF-8.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"column {name!r} of {file} can't be read ({first_line(error)}); name a column of UTF-8 text"
        ) from None
    return values
