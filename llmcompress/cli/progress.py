"""Progress on stderr: a bar on a terminal, plain lines elsewhere.

A plain line gives what is done, how many of how many are finished, and the elapsed and the remaining time:
`quantize (nf4, gptq): 3 of 8, 41 s elapsed, about 68 s left`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console

from llmcompress.cli.terminal import err
from llmcompress.io.units import duration

INTERVAL = 3.0  # seconds between two plain lines
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def track(things: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """Yield `things` and show on stderr how many of `count` are finished."""
    return _bar(things, what, count) if err.is_terminal else lines(things, what, count, err)


def _bar(things: Iterable[Any], what: str, count: int) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield from progress.track(things, total=count, description=what)


def lines(
    things: Iterable[Any],
    what: str,
    count: int,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Yield `things` and print a line after the first, after the last, and between them at most every
    INTERVAL seconds.

    A thing is finished when the next one is requested. If there are fewer than `count`, the last line gives
    their number.
    """
    start = at = clock()
    done = printed = 0
    for thing in things:
        yield thing
        done += 1
        now = clock()
        if done in (1, count) or now - at >= INTERVAL:
            left = (now - at) / (done - printed) * (count - done)  # at the pace since the last line
            at, printed = now, done
            console.print(_line(what, done, count, now - start, left), **PLAIN)
    if printed != done:
        console.print(_line(what, done, count, clock() - start, 0.0), **PLAIN)


def _line(what: str, done: int, count: int, elapsed: float, left: float) -> str:
    """One plain line; `left` is the remaining time in seconds."""
    estimate = f", about {duration(left)} left" if done < count and left else ""
    return f"{what}: {done} of {count}, {duration(elapsed)} elapsed{estimate}"
