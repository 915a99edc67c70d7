"""The errors that a user's input can cause.

Each message is one line with three parts: what was given, why it is not possible, and what to do. The command
line prints the message without a traceback and exits with `exit_code`. Anything that is not a CompressError
is a bug of llmcompress and keeps its traceback.
"""

import re

ARGUMENT = re.compile("\x01(\\w+)(=\\w+)?\x02")


def argument(name: str, value: str = "") -> str:
    """Return the name of an argument for use in a message: `out` for callers from Python, `--out` on the
    command line.

    With `value` it is an argument to set: `overwrite=True` and `--overwrite`.
    """
    return f"\x01{name}{'=' if value else ''}{value}\x02"


class CompressError(Exception):
    """The input is wrong; the message says what was given, why not, and what to do.

    The input in the message may come from anyone, so the message is put into one line and unprintable
    characters are escaped: it cannot steer a terminal.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())
        super().__init__(_printable(ARGUMENT.sub(r"\1\2", self.message)))

    def on_command_line(self) -> str:
        """Return the message with arguments spelled as options."""
        return _printable(ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')}", self.message))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def first_line(error: BaseException) -> str:
    """Return the message of a foreign error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RecipeError(CompressError):
    """The recipe cannot be read, or asks for something that is not possible."""


class DataError(CompressError):
    """The calibration or evaluation text is missing, too short, or not what the model reads."""


class ModelError(CompressError):
    """The base model is missing, damaged, or of a kind that llmcompress does not know."""


class OutputError(CompressError):
    """The artefact cannot be written to the requested place."""


class ProcessError(CompressError):
    """Another process of the run has ended before its work was done."""

    exit_code = 1


class AcceptError(CompressError):
    """The result misses a bound of the recipe's `accept`."""

    exit_code = 3
