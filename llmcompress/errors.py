"""The errors that a user's input can cause.

Each message is one line with three parts: what was given, why it can't be, and what to do. The command line
prints the message without a traceback and exits with `exit_code`; anything that is not a CompressError is our
bug and keeps its traceback.
"""

import re

ARGUMENT = re.compile("\x01(\\w+)(=\\w+)?\x02")


def argument(name: str, value: str = "") -> str:
    """An argument of a run, for a message: `out` to who calls from Python, `--out` to who is on the command
    line.

    With `value` it is one to be set: `overwrite=True`, and `--overwrite`.
    """
    return f"\x01{name}{'=' if value else ''}{value}\x02"


class CompressError(Exception):
    """The input is wrong; the message says what was given, why not, and what to do.

    What was given may be anyone's: it is put into one line, and no character of it can steer a terminal.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())
        super().__init__(_printable(ARGUMENT.sub(r"\1\2", self.message)))

    def on_command_line(self) -> str:
        """The message with arguments as options."""
        return _printable(ARGUMENT.sub(r"--\1", self.message))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def first_line(error: BaseException) -> str:
    """What an error of somebody else says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RecipeError(CompressError):
    """The recipe can't be read, or asks for what can't be."""


class DataError(CompressError):
    """The calibration or evaluation text is missing, too short, or not what the model reads."""


class ModelError(CompressError):
    """The base model is missing, damaged, or of a kind that llmcompress does not know."""


class OutputError(CompressError):
    """The artefact can't be written where it was asked for."""


class AcceptError(CompressError):
    """The result misses a bound of the recipe's `accept`."""

    exit_code = 3
