"""How the command line shows records of the `llmcompress` logger: one line each on stderr.

The library logs and never prints. A program that imports it sees the records according to its own logging
setup.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console

WORDS = {logging.INFO: ("note", "bold cyan"), logging.WARNING: ("warning", "bold yellow")}


class ConsoleHandler(logging.Handler):
    """Prints records on a rich console, above a progress bar if there is one."""

    def __init__(self, console: Console, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record as `warning: message`."""
        from rich.text import Text

        word, style = WORDS.get(record.levelno, (record.levelname.lower(), "bold red"))
        try:
            message = " ".join(self.format(record).split())
            self.console.print(Text.assemble((f"{word}: ", style), message), soft_wrap=True)
        except Exception:  # as in every logging handler
            self.handleError(record)


@contextlib.contextmanager
def shown_on(console: Console, level: int = logging.INFO) -> Iterator[None]:
    """Show log records of llmcompress from `level` on, on a console within the context."""
    logger = logging.getLogger("llmcompress")
    handler, before = ConsoleHandler(console, level), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
