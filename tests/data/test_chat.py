"""Conversations as calibration text: found in any table, spelled by the tokenizer's chat template, refused in
one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
import pytest
from transformers import PreTrainedTokenizerFast

from llmcompress.data.calibration import CalibrationData, _tokenise, load_data
from llmcompress.data.local_files import file_texts
from llmcompress.data.row_cache import RowCache
from llmcompress.data.rows import Chat, row_pieces, spelled
from llmcompress.data.sources import DataSpec
from llmcompress.errors import DataError
from tests.bases import VOCABULARY, bos_tokenizer, byte_tokenizer
from tests.clients import ask
from tests.hub_server import OFFLINE, Hub, environment, serve

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def chat_tokenizer(template: str | None = TEMPLATE, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and one for the end of a turn."""
    tokenizer = bos_tokenizer() if bos else byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def talk(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"What is {number} times {number + 1}?"},
        {"role": "assistant", "content": f"It is {number * (number + 1)}."},
    ]


def shared(number: int) -> list[dict[str, Any]]:
    """The same as ShareGPT writes it."""
    return [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in talk(number)
    ]


def written(number: int) -> str:
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>\n" for m in talk(number))


def write(file: Path, column: str, rows: list[Any], **others: list[Any]) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: rows, **others}), file)
    else:
        lines = (
            {column: row} | {name: values[number] for name, values in others.items()}
            for number, row in enumerate(rows)
        )
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def load(tokenizer: PreTrainedTokenizerFast, source: Path, **spec: Any) -> CalibrationData:
    entries = {"source": str(source), "samples": 8, "length": 32, "evaluation_samples": 2} | spec
    return load_data(DataSpec.model_validate(entries), tokenizer, VOCABULARY + 2, 96)


def text_of(tokenizer: PreTrainedTokenizerFast, source: Path, column: str = "text") -> list[str]:
    """Both sides, as they are tokenised."""
    return [
        str(tokenizer.decode(_tokenise(side, tokenizer, 10**9))) for side in file_texts(source, column)[:2]
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("column", "asked"),
    [("messages", "text"), ("conversations", "text"), ("messages", "messages"), ("talk", "talk")],
)
def test_a_column_of_conversations_goes_through_the_chat_template(
    name: str, column: str, asked: str, tmp_path: Path
) -> None:
    made = shared if column == "conversations" else talk
    file = write(tmp_path / name, column, [made(number) for number in range(100)], id=list(range(100)))
    assert text_of(chat_tokenizer(), file, asked) == [
        "".join(map(written, range(90))),
        "".join(map(written, range(90, 100))),
    ]
    assert load(chat_tokenizer(), file, column=asked).calibration.shape == (8, 32)


def test_a_column_of_text_comes_before_one_of_conversations(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        "messages",
        [talk(number) for number in range(10)],
        text=[str(n) for n in range(10)],
    )
    assert text_of(chat_tokenizer(), file)[1] == "9\n\n"
    assert text_of(chat_tokenizer(), file, "messages")[1] == written(9)
    with pytest.raises(
        DataError, match="has no column 'story'; it has messages, text: set column to one of them"
    ):
        text_of(chat_tokenizer(), file, "story")


def test_special_tokens_of_the_template_are_encoded_as_such(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokens = _tokenise([Chat(talk(3), "here")], tokenizer, 10**9)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokens.tolist() == tokenizer(written(3), add_special_tokens=False)["input_ids"]
    assert tokens.tolist().count(end) == 2


def test_the_bos_of_a_template_is_not_doubled(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "messages", [talk(number) for number in range(100)])
    tokenizer = chat_tokenizer("{{ bos_token }}" + TEMPLATE, bos=True)
    layers = load(tokenizer, file)
    for side in (layers.calibration, layers.evaluation):
        assert (side[:, 0] == VOCABULARY).all() and VOCABULARY not in side[:, 1:]
    assert (
        str(tokenizer.decode(layers.evaluation[0].tolist()))
        == "<s>" + written(90)[: len(layers.evaluation[0]) + 5][: 31 + 6]
    )
    # no sequence has its own, so conversations begin as the template says
    kept = load(tokenizer, file, bos=False)
    assert VOCABULARY in kept.calibration and kept.evaluation[0, 0] == VOCABULARY


def test_a_long_conversation_is_read_whole(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "line of a long text\n" * 20_000}]
    tokenizer = chat_tokenizer()
    expected = "<|user|>" + long[0]["content"] + "<|end|>\n"
    assert str(tokenizer.decode(_tokenise([Chat(long, "here")], tokenizer, 10**9))) == expected


def test_parts_of_text_are_taken_and_nulls_of_a_table_left_out() -> None:
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two", "image": None}, "three"]
    row = {
        "messages": [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [1]},
        ]
    }
    (chat,) = row_pieces(row, "messages", "a.jsonl", "a.jsonl line 1")
    assert isinstance(chat, Chat)
    assert chat.messages == [
        {"role": "user", "content": "one, twothree"},
        {"role": "assistant", "content": "", "tool_calls": [1]},
    ]
    assert [
        *row_pieces({"messages": []}, "messages", "a", "a 1"),
        *row_pieces({"messages": None}, "messages", "a", "a 1"),
    ] == []


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": "a"}, "row 7, message 1 has no role; write messages as {role: user"),
        ({"role": "user"}, "row 7, message 1 has no content"),
        ({"role": "user", "content": 5}, "row 7, message 1 holds a int, not text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            r"holds a part that is no text \(image_url\)",
        ),
        ({"role": "user", "content": [3]}, r"holds a part that is no text \(int\)"),
        ({"role": "user", "content": "half \ud800"}, r"row 7 holds \\ud800, half a character"),
    ],
)
def test_a_message_that_is_no_text_is_refused_by_its_row(message: dict[str, Any], why: str) -> None:
    def read() -> list[list[str]]:
        pieces = row_pieces({"messages": [message]}, "text", "a.jsonl", "row 7")
        return [
            spelled(piece, chat_tokenizer(), without_bos=False) for piece in pieces if isinstance(piece, Chat)
        ]

    with pytest.raises(DataError, match=why) as caught:
        read()
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_template_does_not_take_is_refused_by_its_row(tmp_path: Path) -> None:
    rows = [talk(number) for number in range(20)]
    rows[3] = rows[3][::-1]
    file = write(tmp_path / "a.jsonl", "messages", rows)
    for tokenizer, why in (
        (
            chat_tokenizer(ALTERNATING),
            r"a.jsonl line 4 does not fit the tokenizer's chat template \(roles must alternate\)",
        ),
        (
            chat_tokenizer("{{ messages[0].content + 5 }}"),
            r"a.jsonl line 19 does not fit the tokenizer's chat template \(.*str",
        ),
        (
            chat_tokenizer(None),
            "a.jsonl line 19 is a conversation and the tokenizer has no chat template; name a column of",
        ),
    ):
        with pytest.raises(DataError, match=why) as caught:
            load(tokenizer, file)
        assert len(str(caught.value).splitlines()) == 1


def test_a_list_of_other_things_is_no_conversation(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        file = write(tmp_path / name, "messages", [["a", "b"]] * 20)
        with pytest.raises(
            DataError,
            match=r"column 'messages' of .* holds a list, not text; name a column of strings or of messages",
        ):
            load(chat_tokenizer(), file)


# from the Hub


@pytest.fixture
def served() -> Iterator[tuple[Hub, str]]:
    with serve() as found:
        yield found


@pytest.mark.slow
def test_conversations_are_streamed_kept_and_there_offline(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    lines = [json.dumps({"id": number, "messages": talk(number)}).encode() for number in range(6)]
    commit = hub.add(
        "user/chats",
        {"train.jsonl": b"\n".join(lines[:4]), "test.jsonl": b"\n".join(lines[4:])},
        kind="dataset",
    )
    script = """
from itertools import islice
from llmcompress.data.calibration import _texts
from llmcompress.data.sources import DataSpec
def contents(count, **spec):
    found = _texts(DataSpec(source="user/chats", **spec))
    sides = islice(found.calibration, count), found.evaluation
    return *([[m["content"] for m in chat.messages] for chat in side] for side in sides), found.revision
told(contents, 3)
told(contents, 3, column="messages")
"""
    expected = [[[m["content"] for m in talk(number)] for number in side] for side in ((0, 1, 2), (4, 5))]
    env = environment(endpoint, tmp_path)
    assert ask(env, script) == [[*expected, commit]] * 2
    before = len(hub.log)
    assert ask(env | OFFLINE, script) == [[*expected, commit]] * 2
    assert len(hub.log) == before


def test_a_shelf_keeps_conversations_as_they_will_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    shelf, asked = RowCache("user/chats", None, "ab" * 20), []

    def more(start: int) -> Iterator[dict[str, Any]]:
        asked.append(start)
        yield from (
            {"id": number, "messages": [*talk(number), None][: 2 + (number == 1)]}
            for number in range(start, 3)
        )

    first = [row["text"] for row in shelf.rows("train", "text", more)]
    assert first == [talk(0), [*talk(1), None], talk(2)] and asked == [0]
    assert [row["text"] for row in shelf.rows("train", "text", None)] == first
