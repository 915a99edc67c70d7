"""Text files that nobody meant to write: each is read for what it is, or refused in one line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from llmcompress.data.calibration import CalibrationData, load_data
from llmcompress.data.sources import DataSpec
from llmcompress.errors import DataError
from tests.bases import byte_tokenizer, save_base, write_text
from tests.clients import shell

SMALL = {"samples": 8, "length": 24, "evaluation_samples": 4}


def load(
    source: Path | str, tokenizer: PreTrainedTokenizerFast | None = None, **spec: Any
) -> CalibrationData:
    entries = {"source": str(source)} | SMALL | spec
    return load_data(DataSpec.model_validate(entries), tokenizer or byte_tokenizer(), 256, 96)


def refused(source: Path | str, why: str, **spec: Any) -> None:
    with pytest.raises(DataError, match=why) as caught:
        load(source, **spec)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def facts(count: int = 700) -> list[str]:
    draw = random.Random(0)
    return [f"fact {number}: {draw.random()}" for number in range(count)]


def rows(file: Path, *lines: str) -> Path:
    """A .jsonl of facts, then these lines as they are."""
    file.write_text(
        "".join(json.dumps({"text": fact}) + "\n" for fact in facts())
        + "".join(line + "\n" for line in lines)
    )
    return file


def test_a_lone_surrogate_is_refused_by_its_row(tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", '{"text": "half of \\ud800 a smile"}')
    refused(
        file, r"a.jsonl line 701 holds \\ud800, half a character, which is no text; mend or remove the row"
    )
    whole = rows(tmp_path / "b.jsonl", '{"text": "all of \\ud83d\\ude00 a smile"}')
    assert load(whole).calibration.shape == (8, 24)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for plain in (write_text(tmp_path / "a.txt"), rows(tmp_path / "a.jsonl")):
        marked = tmp_path / f"marked{plain.suffix}"
        marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
        assert load(marked, samples=100, length=8).sha256 == load(plain, samples=100, length=8).sha256


def test_line_ends_of_sequences_are_line_ends(tmp_path: Path) -> None:
    for plain in (write_text(tmp_path / "a.txt"), rows(tmp_path / "a.jsonl")):
        other = tmp_path / f"other{plain.suffix}"
        other.write_bytes(plain.read_bytes().replace(b"\n", b"\r\n"))
        assert load(other).sha256 == load(plain).sha256


def test_rows_may_hold_numbers_of_any_length_beside_their_text(tmp_path: Path) -> None:
    plain = load(rows(tmp_path / "a.jsonl", json.dumps({"text": "the last"})))
    odd = load(
        rows(
            tmp_path / "b.jsonl", f'{{"text": "the last", "id": {"7" * 5000}, "score": -1e999, "rest": NaN}}'
        )
    )
    assert odd.sha256 == plain.sha256


def test_a_row_of_too_many_levels_is_refused(tmp_path: Path) -> None:
    deep = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
    refused(rows(tmp_path / "a.jsonl", deep), "a.jsonl line 701 has too many levels of lists and objects")


def test_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns: dict[str, Any] = {
        "number": pyarrow.array([1, 2]),
        "bytes": pyarrow.array([b"\xff", b"a"]),
        "struct": pyarrow.array([{"a": 1}, {"a": 2}]),
        "list": pyarrow.array([[1], [2]]),
        "time": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "broken": pyarrow.StringArray.from_buffers(
            2, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"\xff\xfe")
        ),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    for name, why in (
        ("number", "holds a int"),
        ("bytes", "holds a bytes"),
        ("struct", "holds a dict"),
        ("list", "holds a list"),
    ):
        refused(
            file,
            f"column '{name}' of .* {why}, not text; name a column of strings or of messages",
            column=name,
        )
    refused(file, "column 'time' of .* (can't be read|holds a)", column="time")
    refused(file, "column 'broken' of .* can't be read .*; name a column of UTF-8 text", column="broken")
    large, repeated = (
        pyarrow.array(facts(), pyarrow.large_string()),
        pyarrow.array(facts()).dictionary_encode(),
    )
    pyarrow.parquet.write_table(pyarrow.table({"large": large, "repeated": repeated}), file)
    assert (
        load(file, column="large").sha256
        == load(file, column="repeated").sha256
        == load(rows(tmp_path / "a.jsonl")).sha256
    )


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", "pipe.txt is not a regular file; give a .txt")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "train.jsonl")
    write_text(folder / "valid.txt")
    refused(folder, "train.jsonl is not a regular file")
    (folder / "train.jsonl").unlink()
    (folder / "train.txt").mkdir()
    refused(folder, "train.txt is not a regular file")
    (tmp_path / "words.txt").mkdir()
    refused(tmp_path / "words.txt", r"words.txt holds no .txt, .jsonl or .parquet file and no train\* file")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    monkeypatch.chdir(tmp_path)  # the whole path would be shortened where it is long
    refused(Path("loop.txt"), "loop.txt (does not exist|is no path that can be read)")


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may read everything")
def test_what_may_not_be_read_is_refused(tmp_path: Path) -> None:
    file = write_text(tmp_path / "facts.txt")
    file.chmod(0)
    refused(file, "facts.txt can't be read .Permission denied")
    folder = tmp_path / "folder"
    folder.mkdir(mode=0)
    refused(folder, "folder can't be read .Permission denied")


def test_a_text_that_gives_no_tokens_is_refused(tmp_path: Path) -> None:
    file = write_text(tmp_path / "facts.txt")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"known": 0}))
    with pytest.raises(
        DataError, match=r"the tokenizer can't encode the text \(.*UNK.*\); use the one of the model"
    ):
        load(file, PreTrainedTokenizerFast(tokenizer_object=words))
    deaf = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"q": 0}, [])))
    with pytest.raises(
        DataError,
        match=r"the calibration text of .* is empty or gives no tokens; give a source that holds text",
    ):
        load(file, deaf)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("a\0b.txt", "null byte"),
        ("a" * 5000, "File name too long"),
        ("{source: " + "a" * 2000 + "/" + "b" * 2000 + "}", "File name too long"),
        ("~nobody-at-all/facts.txt", "no such home folder"),
        ("\udce9.txt", "is not Unicode text"),
    ],
)
def test_names_that_no_file_has_are_refused(source: str, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        load(DataSpec().with_text(source).source)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


@pytest.mark.slow
def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    code, _, told = shell({}, "evaluate", base, "--data", rows(tmp_path / "a.jsonl", '{"text": "\\udfff"}'))
    assert (
        code == 2
        and told.startswith("error: ")
        and len(told.splitlines()) == 1
        and "half a character" in told
    )
