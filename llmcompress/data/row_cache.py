"""A cache of the rows of Hub data sets, so that no row is streamed twice and rows that were read work
offline.

A data set at a commit is a folder of the cache. It holds the names of its splits and one file per column of a
split that was read. The file has one JSON value per row, a text or a conversation, for as many rows as were
ever read, and an end mark after the last row of the split. A row never changes at its commit, so the cache
can be incomplete but never stale. The commit of a branch or tag is the one seen last.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.data.rows import column_among
from llmcompress.errors import DataError, first_line
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import put

logger = logging.getLogger(__name__)
Row = dict[str, Any]
END: dict[str, str] = {}  # the end mark; a row is a string, a list of messages or null


@dataclass(frozen=True)
class RowCache:
    """The rows of one configuration of a data set at a commit."""

    source: str
    config: str | None
    commit: str

    @classmethod
    def find(cls, source: str, config: str | None, revision: str | None) -> RowCache | None:
        """Return the cache of the commit that a branch, tag or commit stood for when it was last seen; None
        if it never was."""
        file = _place(source, config, revision) / "commit"
        return cls(source, config, _read(file)) if file.is_file() else None

    @property
    def splits(self) -> list[str]:
        """The names of the splits; empty if they are not known yet. Errors: DataError."""
        file = _place(self.source, self.config, self.commit) / "splits"
        return _read(file).split() if file.is_file() else []

    def remember(self, revision: str | None, splits: Sequence[str]) -> None:
        """Store the names of the splits, and that `revision` stands for this commit."""
        _keep(_place(self.source, self.config, self.commit) / "splits", "\n".join(splits))
        for name in {revision, self.commit}:
            _keep(_place(self.source, self.config, name) / "commit", self.commit)

    def rows(self, split: str, column: str, more: Callable[[int], Iterable[Row]] | None) -> Iterator[Row]:
        """Yield the rows of a split in order, with this column: first the rows kept, then `more(n)`, the rows
        after the first n.

        New rows are kept as far as they are read. Without `more` there is no network; raises DataError if the
        kept rows do not suffice.
        """
        file = _place(self.source, self.config, self.commit) / f"{_digest(split, column)}.jsonl"
        values = _values(file)
        kept = len(values)
        for value in values:
            if value == END:
                return
            yield {column: value}
        if more is None:
            raise DataError(
                f"{kept or 'no'} rows of {split} of {self.source} are in the cache, more are asked for, and "
                "HF_HUB_OFFLINE is set; unset it, or fetch all once with a network: "
                f"datasets.load_dataset({self.source!r})"
            )
        try:
            for row in more(kept):
                name = column_among(row, column)
                value = 0 if name is None else row[name]
                if not isinstance(value, str | list | None):  # not text; the reader raises the error
                    yield row
                    return
                values.append(json.loads(json.dumps(value, default=str)))  # the value as it will be read back
                yield {column: values[-1]}
            values.append(END)
        finally:
            if len(values) > max(kept, _length(file)):  # another process may have kept more meanwhile
                _keep(file, "".join(json.dumps(value) + "\n" for value in values))


def _place(source: str, config: str | None, revision: str | None) -> Path:
    return cache_folder() / "texts" / _digest(source, config, revision)


def _digest(*words: str | None) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read ({first_line(error)}); delete it") from None


def _values(file: Path) -> list[Any]:
    """Return the values of the lines of a file; an empty list if there is no file."""
    try:
        return [json.loads(line) for line in _read(file).splitlines()] if file.is_file() else []
    except ValueError as error:
        raise DataError(f"{file} can't be read ({first_line(error)}); delete it") from None


def _length(file: Path) -> int:
    """Return how many lines a file holds now; 0 if it cannot be read."""
    try:
        return len(_values(file))
    except DataError:
        return 0


def _keep(file: Path, text: str) -> None:
    """Write a file, whole or not at all. A cache that cannot be written only logs a warning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        put(file, text)
    except OSError as error:
        logger.warning(
            "what is read is not kept for later: %s can't be written (%s)", file, first_line(error)
        )
