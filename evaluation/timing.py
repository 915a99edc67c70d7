"""Wall times of calls that take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

TURNS = 24  # of a candidate
FEWEST = 4  # of the slowest one
LONGEST_BURST = 50  # calls of a turn
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of a call, 10th percentile and median, and its speed-ups over the first candidate."""

    calls: int
    p10_s: float
    median_s: float
    speedup_p10: float
    speedup_median: float


def seconds(call: Call) -> float:
    """Seconds of one call, until its result is there."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


def race(calls: Mapping[str, Call], budget_s: float) -> dict[str, Timing]:
    """Time many calls of each candidate in turns of short bursts, all within `budget_s` seconds."""
    share = budget_s / len(calls)
    bursts: dict[str, tuple[int, int]] = {}  # calls of a turn, and every how many turns
    for name, call in calls.items():
        call()  # the first call pays for what is set up
        part = TURNS * seconds(call) / share  # of its share, at one call a turn
        bursts[name] = (
            min(LONGEST_BURST, max(1, int(1 / part))),
            min(TURNS // FEWEST, max(1, math.ceil(part))),
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS):
        # none always follows the same other
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            count, every = bursts[name]
            if turn % every == 0:
                times[name] += [seconds(calls[name]) for _ in range(count)]
    found = {
        name: (quantiles(taken, n=10, method="inclusive")[0], median(taken)) for name, taken in times.items()
    }
    low, middle = next(iter(found.values()))
    return {
        name: Timing(len(times[name]), p10, p50, low / p10, middle / p50)
        for name, (p10, p50) in found.items()
    }
