"""Progress: a bar on a terminal, and plain lines elsewhere, few for fast work and one a layer for slow
work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmcompress.cli import progress
from llmcompress.cli.progress import INTERVAL, lines


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def printed(seconds: float, there: int, count: int) -> list[str]:
    """What is printed while `there` things of `count` take so many seconds each."""
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, width=40)
    seen = []
    for thing in lines(range(there), "quantize [nf4]", count, console, clock):
        clock.now += seconds
        seen.append(thing)
    assert seen == [*range(there)]
    return text.getvalue().splitlines()


def test_slow_work_is_a_line_for_each_thing_with_elapsed_and_remaining_time() -> None:
    assert printed(41, 3, 3) == [
        "quantize [nf4]: 1 of 3, 41 s elapsed, about 1 min 22 s left",
        "quantize [nf4]: 2 of 3, 1 min 22 s elapsed, about 41 s left",
        "quantize [nf4]: 3 of 3, 2 min 03 s elapsed",
    ]


def test_fast_work_is_the_first_the_last_and_one_line_in_some_seconds() -> None:
    found = printed(0.1, 1000, 1000)
    assert found[0].startswith("quantize [nf4]: 1 of 1000, 0.1 s elapsed")
    assert found[-1] == "quantize [nf4]: 1000 of 1000, 1 min 40 s elapsed"
    assert 2 < len(found) <= 2 + 100 / INTERVAL


@pytest.mark.parametrize(("there", "last"), [(1, ["quantize [nf4]: 1 of 1, 1.0 s elapsed"]), (0, [])])
def test_one_thing_is_one_line_and_none_is_none(there: int, last: list[str]) -> None:
    assert printed(1, there, there) == last


def test_where_things_end_early_the_last_line_says_how_many_there_were() -> None:
    assert printed(1, 2, 9)[-1].startswith("quantize [nf4]: 2 of 9, 2.0 s elapsed")


def test_the_remaining_time_is_that_at_the_pace_of_late() -> None:
    clock, text = Clock(), io.StringIO()
    for thing in lines(range(4), "work", 4, Console(file=text, width=100), clock):
        clock.now += 0.1 if thing == 0 else 60  # the first is read from the journal of an earlier run
    assert text.getvalue().splitlines()[1] == "work: 2 of 4, 1 min 00 s elapsed, about 2 min 00 s left"


def test_what_raises_is_no_last_line() -> None:
    text = io.StringIO()
    going = lines(range(5), "work", 5, Console(file=text), Clock())
    with pytest.raises(ZeroDivisionError):
        [1 / (2 - thing) for thing in going]
    assert text.getvalue().splitlines() == ["work: 1 of 5, 0.0 s elapsed"]


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, io.StringIO]:
    """A console in the place of that on stderr."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=text, force_terminal=request.param, width=100))
    return request.param, text


def test_a_bar_is_drawn_on_a_terminal_alone(stderr: tuple[bool, io.StringIO]) -> None:
    terminal, text = stderr
    assert [*progress.track(range(3), "work [a]", 3)] == [0, 1, 2]
    assert "work [a]" in text.getvalue()
    assert ("━" in text.getvalue()) == terminal
    assert ("3 of 3" in text.getvalue()) != terminal
