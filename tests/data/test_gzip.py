"""Text that is compressed with gzip: read as if it were not, as far as it is needed, or refused in one
line."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.data.calibration import CalibrationData, _chunks, load_data
from llmcompress.data.local_files import LONGEST_ROW, _lines, file_texts, kind_of
from llmcompress.data.sources import CHUNK, DataSpec
from llmcompress.errors import DataError
from tests.bases import byte_tokenizer, write_text

SMALL = {"samples": 8, "length": 24, "evaluation_samples": 4}


def load(source: Path, **spec: Any) -> CalibrationData:
    return load_data(
        DataSpec.model_validate({"source": str(source)} | SMALL | spec), byte_tokenizer(), 256, 96
    )


def packed(file: Path, *, name: str | None = None) -> Path:
    """A file beside another, compressed."""
    out = file.with_name(name or f"{file.name}.gz")
    out.write_bytes(gzip.compress(file.read_bytes()))
    return out


def as_rows(text: Path, file: Path) -> Path:
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    return file


def test_a_compressed_file_gives_the_sequences_of_the_plain_one(tmp_path: Path) -> None:
    text = write_text(tmp_path / "facts.txt")
    rows = as_rows(text, tmp_path / "facts.jsonl")
    assert load(packed(text)).sha256 == load(text).sha256
    assert load(packed(rows)).sha256 == load(packed(rows, name="c4.json.gz")).sha256 == load(rows).sha256


def test_a_folder_may_hold_compressed_files(tmp_path: Path) -> None:
    plain, compressed = tmp_path / "plain", tmp_path / "compressed"
    for folder in (plain, compressed):
        folder.mkdir()
    text = write_text(tmp_path / "facts.txt").read_text()
    (plain / "train.txt").write_text(text[:9000])
    as_rows(tmp_path / "facts.txt", plain / "valid.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in text[9000:].splitlines())
    )
    packed(plain / "train.txt", name="train.txt.gz").rename(compressed / "train.txt.gz")
    packed(plain / "valid.jsonl", name="valid.jsonl.gz").rename(compressed / "valid.jsonl.gz")
    assert load(compressed).sha256 == load(plain).sha256


def test_the_name_says_what_a_file_holds() -> None:
    names = {
        "a.txt": ".txt",
        "a.txt.gz": ".txt",
        "a.b.jsonl": ".jsonl",
        "a.jsonl.gz": ".jsonl",
        "a.json.gz": ".jsonl",
    }
    names |= {"a.parquet": ".parquet"}
    assert {name: kind_of(Path(name)) for name in names} == names
    assert [kind_of(Path(name)) for name in ("a.gz", "a.parquet.gz", "a.json", "a.csv", "txt")] == [None] * 5


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_what_is_no_whole_gzip_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    plain = write_text(tmp_path / "facts.txt")
    whole = gzip.compress((plain if "txt" in name else as_rows(plain, tmp_path / "facts.jsonl")).read_bytes())
    damaged = {
        "no gzip": b"not compressed at all\n" * 9,
        "cut": whole[: len(whole) // 2],
        "head": whole[:9],
        "bits": whole[:200] + bytes(byte ^ 0xFF for byte in whole[200:240]) + whole[240:],
        "sum": whole[:-8] + b"\0" * 8,
    }
    for content in damaged.values():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DataError,
            match=rf"{name} is no whole gzip file \(.*\); compress it again|is not UTF-8|is not JSON",
        ) as caught:
            load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / name).write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"the calibration text of .* is empty or gives no tokens"):
        load(tmp_path / name)
    with pytest.raises(
        DataError,
        match=(
            r"gone.txt.gz does not exist; name a .txt, .jsonl or .parquet file "
            r"\(the first two also as .gz\)"
        ),
    ):
        load(tmp_path / "gone.txt.gz")


def test_a_text_that_unpacks_to_much_more_is_read_in_little_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.txt.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(30):
            file.write(b"a" * 1_000_000)  # one line of 30 MB in 30 kB
    tracemalloc.start()
    calibration, evaluation = file_texts(bomb, "text")[:2]
    first = next(_chunks(map(str, evaluation))), next(_chunks(map(str, calibration)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        bomb.stat().st_size < 50_000
        and [len(chunk) for chunk in first] == [CHUNK, CHUNK]
        and peak < 3_000_000
    )


def test_a_row_that_never_ends_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(LONGEST_ROW // 1_000_000 + 2):
            file.write(b"a" * 1_000_000)
    with pytest.raises(
        DataError, match=r"bomb.jsonl.gz line 1 is longer than 67108864 characters; write one object a line"
    ):
        load(bomb)


def test_no_more_of_a_folder_is_unpacked_than_is_used(tmp_path: Path) -> None:
    lines = "".join(f"fact {number} is {number**7}\n" for number in range(20_000))
    whole = gzip.compress(lines.encode())
    (tmp_path / "train.txt.gz").write_bytes(whole[: len(whole) // 2])
    write_text(tmp_path / "valid.txt")
    assert load(tmp_path, samples=1, length=8).calibration.shape == (1, 8)
    assert len(list(islice(_lines(tmp_path / "train.txt.gz", CHUNK), 9))) == 9


@given(
    st.lists(
        st.sampled_from(
            ["a", "bc\n", "\n", "\r\n", "\x0b", "\u2028", "é", "x" * 9, "y" * CHUNK, "z" * (CHUNK - 1)]
        ),
        max_size=40,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_text_is_divided_as_if_it_were_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes("".join(parts).encode())
    text = file.read_text("utf-8")
    cut = len(text) * 9 // 10
    end = text.find("\n", cut, (cut + len(text)) // 2)
    cut = cut if end < 0 else end + 1
    sides = [text[:cut].splitlines(keepends=True), text[cut:].splitlines(keepends=True)]
    found = [list(_chunks(map(str, side))) for side in file_texts(file, "text")[:2]]
    assert found == [list(_chunks(side)) for side in sides]
