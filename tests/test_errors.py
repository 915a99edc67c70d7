"""What an error says of arguments: as a caller from Python writes them, and as options of the command
line."""

from __future__ import annotations

from llmcompress.errors import CompressError, OutputError, argument


def test_an_argument_is_worded_for_who_gave_it() -> None:
    message = (
        f"{argument('out')} small exists; choose another {argument('out')} or pass "
        f"{argument('overwrite', 'True')}"
    )
    error = OutputError(message)
    assert str(error) == "out small exists; choose another out or pass overwrite=True"
    assert error.on_command_line() == "--out small exists; choose another --out or pass --overwrite"


def test_what_a_user_gave_steers_no_terminal_and_breaks_no_line() -> None:
    error = CompressError("name \x1b[31m\n\u202e is none\x01")
    for line in (str(error), error.on_command_line()):
        assert line.isprintable() and line == "name \\x1b[31m \\u202e is none\\x01"
