"""Rows of a table of text: plain texts, or conversations that the tokenizer's chat template renders.

The values of a column tell which of the two it holds. A conversation is a list of messages, {role, content}
or ShareGPT's {from, value}. A text is followed by an empty line, as the GPTQ papers join WikiText-2. A
conversation is only what the template renders, since the template itself ends a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcompress.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = "text"  # the default column
CHATS = ("messages", "conversations")  # columns that are read if the default column is missing
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names -> roles


@dataclass(frozen=True)
class Chat:
    """A conversation: messages, each with a role and a content that are strings.

    `where` names the row it comes from.
    """

    messages: Sequence[Mapping[str, Any]]
    where: str


Piece = str | Chat


def column_among(names: Collection[str], column: str) -> str | None:
    """Return the column to read from `names`, or None if the requested column is missing.

    `text` is also the default, so a column of conversations may stand in for it.
    """
    wanted = (column, *CHATS) if column == TEXT else (column,)
    return next((name for name in wanted if name in names), None)


def row_pieces(row: Mapping[str, Any], column: str, source: str, where: str) -> Iterator[Piece]:
    """Yield the pieces of one row: a text with an empty line, a conversation, or nothing for a null.

    `where` names the row. Errors: DataError for a missing column, and for a value that is neither text nor a
    conversation.
    """
    name = column_among(row, column)
    if name is None:
        raise no_column(column, list(row), source)
    value = row[name]
    if isinstance(value, str):
        _require_unicode(value, where)
        yield value + "\n\n"
    elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
        if value:
            yield Chat(
                [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)],
                where,
            )
    elif value is not None:
        raise DataError(
            f"column {name!r} of {source} holds a {type(value).__name__}, not text; name a column of "
            "strings or of messages"
        )


def no_column(column: str, names: Sequence[str], source: str) -> DataError:
    """Return the error for a column that a table does not have."""
    return DataError(
        f"{source} has no column {column!r}; it has {', '.join(names) or 'none'}: set column to one of them"
    )


def spelled(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, without_bos: bool) -> list[str]:
    """Render a conversation with the tokenizer's chat template, in lines, so that a long one is not cut
    within a special token.

    `without_bos` removes the BOS at the start of the template, for sequences that begin with their own.
    Errors: DataError.
    """
    # tokenizers that render conversations without a template have no such attribute
    if not getattr(tokenizer, "chat_template", True):
        raise DataError(
            f"{chat.where} is a conversation and the tokenizer has no chat template; name a column of plain "
            "text, or take the tokenizer of a chat model"
        )
    try:
        text = str(
            tokenizer.apply_chat_template([dict(message) for message in chat.messages], tokenize=False)
        )
    # templates are programs and may raise anything; all of it means that this row does not fit
    except Exception as error:
        raise DataError(
            f"{chat.where} does not fit the tokenizer's chat template ({first_line(error)[:200]}); mend or "
            "remove the row"
        ) from None
    _require_unicode(text, chat.where)
    opening = tokenizer.bos_token if without_bos else None
    return text.removeprefix(opening or "").splitlines(keepends=True)


def _message(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message whose role and content are strings.

    Its other fields are kept for the template; nulls are left out. Errors: DataError.
    """
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and isinstance(speaker := message.pop("from", None), str):
        message["role"] = SPEAKERS.get(speaker, speaker)
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise DataError(
            f"{where} has no role; write messages as {{role: user, content: ...}} or "
            f"{{from: human, value: ...}}"
        )
    if "content" not in message and not set(message) - {"role"}:
        raise DataError(f"{where} has no content; mend or remove the row")
    return message | {"content": _content(message.get("content", ""), where)}


def _content(content: Any, where: str) -> str:
    """Return the text of a message; for a message of several parts, the texts of all parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where} holds a {type(content).__name__}, not text; mend or remove the row")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "part without text") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"{where} holds a part that is no text ({str(kind)[:40]}); give conversations of text alone"
            )
        texts.append(text)
    return "".join(texts)


def _require_unicode(text: str, where: str) -> None:
    """Raise DataError for half a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where} holds {code}, half a character, which is no text; mend or remove the row"
        ) from None
