"""What llmcompress logs is shown on the command line, a line a record, and left to the program everywhere
else."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from llmcompress.cli import logs

LOGGER = logging.getLogger("llmcompress.somewhere")


def test_records_are_lines_and_names_with_brackets_are_no_markup() -> None:
    text = io.StringIO()
    with logs.shown_on(Console(file=text, width=20)):
        LOGGER.debug("not shown")
        LOGGER.info("a file named %s is\nread", "[red]a[/]")
        LOGGER.warning("a line that is longer than the console is wide")
        LOGGER.error("wrong")
        logging.getLogger("another").warning("not ours")
    assert text.getvalue().splitlines() == [
        "note: a file named [red]a[/] is read",
        "warning: a line that is longer than the console is wide",
        "error: wrong",
    ]


def test_only_the_first_process_tells_notes_and_warnings() -> None:
    text = io.StringIO()
    with logs.shown_on(Console(file=text), logging.ERROR):
        LOGGER.warning("said by the first one")
        LOGGER.error("wrong")
    assert text.getvalue() == "error: wrong\n"


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("llmcompress")
    before = logger.level, logger.propagate, [*logger.handlers]
    with logs.shown_on(Console(file=io.StringIO())):
        assert not logger.propagate
    assert (logger.level, logger.propagate, logger.handlers) == before
