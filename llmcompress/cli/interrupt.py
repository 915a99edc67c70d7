"""How the command `llmcompress` handles Ctrl-C and SIGTERM: one line, exit code 128 plus the signal's number,
no traceback.

Importing torch and transformers takes seconds, so the package imports this module first: before any work has
begun, a signal ends the process at once. Later, it is raised as an exception, so that temporary folders are
removed. A program that only imports the package is not affected.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOES_ON = "the same command goes on where it was"
MEANS = {"run": GOES_ON, "push": "the same command goes on, and what has arrived is not sent again"}


class Interrupted(BaseException):
    """A signal, by its number, and whether this process tells of it. It is not an Exception, so no
    `except Exception` of ours or of a library catches it."""

    def __init__(self, number: int, tells: bool) -> None:
        super().__init__(number, tells)
        self.number = number
        self.tells = tells

    def end(self) -> NoReturn:
        """Print the line, if this process tells of it, and end the process."""
        if self.tells:
            _tell(self.number)
        sys.exit(128 + self.number)


def is_command() -> bool:
    """Whether this process is the command line, not a program that imports the package."""
    program = Path((getattr(sys, "argv", None) or [""])[0])
    started = ("-m", "llmcompress") in pairwise(sys.orig_argv) and program.name in ("-m", "__main__.py")
    return started or program.stem == "llmcompress" or program.parts[-2:] == ("llmcompress", "__main__.py")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Make a signal end the work of the context in order and then the process, with SystemExit."""
    before = {number: signal.signal(number, _raise) for number in SIGNALS if _answers(number)}
    try:
        yield
    except Interrupted as stopped:
        stopped.end()
    except Exception as error:
        if (stopped_by := _cause(error)) is None:
            raise
        stopped_by.end()  # a library turned it into another error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(number: int) -> bool:
    """Whether a signal may be handled: nohup, and shells that start a background job, have it ignored."""
    # Python allows handlers in the main thread only
    ours = threading.current_thread() is threading.main_thread()
    return ours and signal.getsignal(number) not in (signal.SIG_IGN, None)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, _tells())


def _leave(number: int, frame: FrameType | None) -> None:
    if _tells():
        _tell(number)
    os._exit(128 + number)


def _cause(error: BaseException | None) -> Interrupted | None:
    """The signal that an error comes from, or None."""
    while error is not None:
        if isinstance(error, Interrupted):
            return error
        error = error.__cause__ or error.__context__
    return None


def _tells() -> bool:
    """Whether this process is the one that tells of a signal: of several that a launcher has started, rank 0,
    or the first that is left on this machine when rank 0 has been killed."""
    rank = int(os.environ.get("RANK", "0"))
    return rank == 0 or _left_of(os.getppid())[:1] == [rank]


def _left_of(launcher: int) -> list[int]:
    """The ranks that a launcher has started here and that are running; none where there is no /proc."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:
        return []
    ranks = []
    for child in children:
        with contextlib.suppress(OSError):  # it has ended
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks += [int(each[5:]) for each in variables if each.startswith(b"RANK=")]
    return sorted(ranks)


def _tell(number: int) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{_line(number, sys.argv[1:])}\n".encode())


def _line(number: int, arguments: list[str]) -> str:
    """The line that a signal prints for a command."""
    what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    command = arguments[0] if arguments else ""
    kept = any(argument.partition("=")[0] == "--out" for argument in arguments)
    means = GOES_ON if command == "reproduce" and kept else MEANS.get(command)
    return f"{what}: {means}" if means else f"{what}: nothing is left of it"


if is_command():
    for _number in SIGNALS:
        if _answers(_number):
            signal.signal(_number, _leave)
