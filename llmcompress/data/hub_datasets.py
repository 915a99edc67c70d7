"""Text of Hub data sets, streamed at one commit, so that only the rows that are used are downloaded.

Rows that were read are kept in the cache (`row_cache.py`). Without a network they are read from there, or
from the cache of `datasets.load_dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from llmcompress import hub
from llmcompress.data.row_cache import Row, RowCache
from llmcompress.data.rows import Piece, row_pieces
from llmcompress.data.sources import DataSpec, Texts
from llmcompress.errors import DataError, first_line


def hub_texts(spec: DataSpec) -> Texts:
    """Return the two sides of a Hub data set, streamed.

    `split` calibrates; `evaluation_split`, else validation, else test evaluates. If there is no other split,
    the first rows evaluate and the rows after them calibrate. A branch or tag is resolved to its commit once,
    so that everything is read from one commit. Errors: DataError.
    """
    if hub.offline():
        return _offline(spec)
    import datasets  # type: ignore[import-untyped, unused-ignore]

    commit = hub.dataset_commit(spec.source, spec.revision)
    shelf = RowCache(spec.source, spec.config, commit)
    try:
        splits = shelf.splits or datasets.get_dataset_split_names(
            spec.source, config_name=spec.config, revision=commit
        )
    except DataError:
        raise
    except Exception as error:  # the Hub client raises a dozen kinds, all for an unreadable data set
        raise _unreadable(spec.source, error) from error
    shelf.remember(spec.revision, splits)

    def stream(split: str, start: int) -> Iterable[Row]:
        yield from datasets.load_dataset(
            spec.source, spec.config, split=split, revision=commit, streaming=True
        ).skip(start)

    return _sides(spec, splits, lambda split: shelf.rows(split, spec.column, partial(stream, split)), commit)


def _offline(spec: DataSpec) -> Texts:
    """Return a Hub data set from the cache of `datasets.load_dataset`, or the rows of it that were streamed
    before."""
    import datasets  # type: ignore[import-untyped, unused-ignore]

    shelf = RowCache.find(spec.source, spec.config, spec.revision)
    wanted = shelf.commit if shelf else spec.revision
    try:
        every = datasets.load_dataset(spec.source, spec.config, revision=wanted)
        commit = next(
            Path(file["filename"]).parent.name for split in every.values() for file in split.cache_files
        )
        if not hub.is_commit(commit) or (commit != wanted and hub.is_commit(wanted)):
            raise FileNotFoundError(f"only {commit} is")
    except Exception as error:  # as above
        if shelf:
            return _sides(
                spec, shelf.splits, lambda split: shelf.rows(split, spec.column, None), shelf.commit
            )
        raise DataError(
            f"the Hub data set {spec.source} is not in the cache ({first_line(error)}), and HF_HUB_OFFLINE "
            f"is set; unset it, or fetch it once with a network: datasets.load_dataset({spec.source!r})"
        ) from None
    return _sides(spec, list(every), every.__getitem__, commit)


def _sides(spec: DataSpec, splits: list[str], rows_of: Callable[[str], Iterable[Row]], commit: str) -> Texts:
    """Choose the splits of a Hub data set that calibrate and evaluate. Errors: DataError."""
    for split in filter(None, (spec.split, spec.evaluation_split)):
        if split not in splits:
            raise DataError(f"{spec.source} has no split {split!r}; it has {', '.join(splits)}")
    if spec.evaluation_split == spec.split:
        raise DataError(
            f"{spec.source} can't evaluate on {spec.split!r}, which calibrates; leave evaluation_split out"
        )
    others = [
        split
        for split in (spec.evaluation_split, "validation", "test")
        if split in splits and split != spec.split
    ]
    rows = _hub_rows(spec, spec.split, rows_of)
    evaluation = _hub_rows(spec, others[0], rows_of) if others else rows
    return Texts(rows, evaluation, commit, others[0] if others else None)


def _hub_rows(spec: DataSpec, split: str, rows_of: Callable[[str], Iterable[Row]]) -> Iterator[Piece]:
    """Yield the pieces of the rows of one split, in order."""
    try:
        for number, row in enumerate(rows_of(split), 1):
            yield from row_pieces(row, spec.column, spec.source, f"{spec.source} {split} row {number}")
    except DataError:
        raise
    except Exception as error:  # as above; a stream can also break in the middle
        raise _unreadable(spec.source, error) from error


def _unreadable(source: str, error: Exception) -> DataError:
    why = first_line(error)
    advice = hub.TERMS if "gated" in why else "see its id, its config and your network"
    return DataError(f"the Hub data set {source} can't be read ({why}); {advice}")
