"""Rows kept as far as they were read: each comes once, a damaged shelf says so, and one that can't be written
stops nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llmcompress.data.row_cache import Row, RowCache
from llmcompress.errors import DataError

TEXTS = ["a", None, "b\u2028c\n", "", "é"]
SHELF = RowCache("user/texts", None, "ab" * 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stream(asked: list[int], texts: list[Any] = TEXTS) -> Callable[[int], Iterator[Row]]:
    """The rows from the nth on; `asked` gets each n."""

    def more(start: int) -> Iterator[Row]:
        asked.append(start)
        yield from ({"text": text, "id": number} for number, text in enumerate(texts[start:], start))

    return more


def read(count: int, more: Callable[[int], Iterator[Row]] | None, column: str = "text") -> list[Any]:
    return [row[column] for row in islice(SHELF.rows("train", column, more), count)]


def test_each_row_is_asked_for_once_and_the_last_is_known_to_be() -> None:
    asked: list[int] = []
    assert read(2, stream(asked)) == TEXTS[:2]
    assert read(2, stream(asked)) == TEXTS[:2] and read(4, stream(asked)) == TEXTS[:4]
    assert asked == [0, 2]
    with pytest.raises(DataError, match="4 rows of train of user/texts are in the cache, more are asked for"):
        read(9, None)
    assert read(9, stream(asked)) == read(9, None) == TEXTS
    assert asked == [0, 2, 4]


def test_what_was_read_before_a_stream_broke_is_kept() -> None:
    def broken(start: int) -> Iterator[Row]:
        yield {"text": "a"}
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        read(2, broken)
    assert read(1, None) == ["a"]


def test_another_column_split_or_commit_is_another_file() -> None:
    asked: list[int] = []
    assert read(5, stream(asked)) == TEXTS
    assert [row["text"] for row in islice(SHELF.rows("test", "text", stream(asked)), 1)] == ["a"]
    other = RowCache("user/texts", "en", SHELF.commit)
    assert [row["text"] for row in islice(other.rows("train", "text", stream(asked)), 1)] == ["a"]
    assert asked == [0, 0, 0]


def test_a_column_that_is_none_or_holds_no_text_is_given_as_it_is_and_not_kept(cache: Path) -> None:
    for column in ("id", "none"):
        (row,) = SHELF.rows("train", column, stream([]))
        assert row == {"text": "a", "id": 0}
    assert not list(cache.rglob("*.jsonl"))


def test_a_branch_stands_for_what_it_stood_for_last() -> None:
    assert RowCache.find("user/texts", None, "main") is None and SHELF.splits == []
    SHELF.remember("main", ["train", "test"])
    assert (
        RowCache.find("user/texts", None, "main") == RowCache.find("user/texts", None, SHELF.commit) == SHELF
    )
    assert RowCache.find("user/texts", None, None) is None and SHELF.splits == ["train", "test"]
    later = RowCache("user/texts", None, "cd" * 20)
    later.remember("main", ["train"])
    assert RowCache.find("user/texts", None, "main") == later and SHELF.splits == ["train", "test"]


@pytest.mark.parametrize("content", [b'"a"\n"b', b"\xff", b"no"])
def test_a_damaged_file_says_which_to_delete(content: bytes, cache: Path) -> None:
    assert read(9, stream([])) == TEXTS
    (file,) = cache.rglob("*.jsonl")
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file} can't be read \(.*\); delete it"):
        read(1, None)
    file.unlink()
    assert read(9, stream([])) == TEXTS


def test_a_cache_that_can_not_be_written_is_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder would be")
    assert read(9, stream([])) == TEXTS
    assert "what is read is not kept for later: " in caplog.text and "can't be written" in caplog.text
    caplog.clear()
    SHELF.remember(None, ["train"])
    assert "not kept" in caplog.text


def test_who_has_read_less_does_not_shorten_what_another_kept_meanwhile() -> None:
    asked: list[int] = []
    slow = SHELF.rows("train", "text", stream(asked))
    next(slow)
    assert read(len(TEXTS), stream(asked)) == TEXTS  # another run reads all meanwhile
    next(slow)
    del slow  # which keeps what it has read
    assert read(len(TEXTS), None) == TEXTS
