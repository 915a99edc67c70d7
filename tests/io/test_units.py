"""Quantities: durations as a user writes them."""

from __future__ import annotations

import pytest

from llmcompress.io.units import duration, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h5s", 3605), ("0m", 0), ("10m30s", 630)],
)
def test_a_duration_is_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "1.5h", "-3m", "30m1h", "2 h", "3d", "٣m", "1" * 9 + "h"])
def test_anything_else_is_no_duration(text: str) -> None:
    assert seconds_of(text) is None


def test_a_duration_is_printed_for_people() -> None:
    assert [duration(value) for value in (None, 0.84, 41, 185, 7620)] == [
        "-",
        "0.8 s",
        "41 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
