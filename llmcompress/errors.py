"""The errors that a user's input can cause.

Each message is one line with three parts: what was given, why it can't be, and what to do. The command line
prints the message without a traceback and exits with `exit_code`; anything that is not a CompressError is our
bug and keeps its traceback.
"""


class CompressError(Exception):
    """The input is wrong; the message says what was given, why not, and what to do.

    What was given may be anyone's: it is put into one line, and no character of it can steer a terminal.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


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
