"""Runs that are killed at random, and go on: the bytes are those of an undisturbed run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.campaign.bench import Bench, Count
from tests.campaign.forked import Child

MOST = 3  # kills of one run
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def kills(bench: Bench, tries: int) -> Count:
    """Kill each of `tries` runs up to MOST times, at a random moment by a random signal, and let it go on to
    its end."""
    count = Count("kills")
    for place in bench.places("kill", tries):
        out, name = place / "out", bench.draw.choice(sorted(bench.expected))
        for _ in range(bench.draw.randint(1, MOST)):
            number = bench.draw.choice(SIGNALS)
            count.ended(f"{number.name}", _killed(bench, name, out, number))
        if out.exists():
            count.ended("was through", bench.fault_of(name, out))
            continue
        done = bench.run(name, out)
        fault = done.crashed or (
            f"exit code {done.code}: {done.err}" if done.code else bench.fault_of(name, out)
        )
        fault = fault or (f"{done.left} left in TMPDIR" if done.left else None)
        left = sorted(path.name for path in place.iterdir() if path.name != "out")
        count.ended("finished", fault or (f"{left} left beside {out}" if left else None))
    return count


def _killed(bench: Bench, name: str, out: Path, number: signal.Signals) -> str | None:
    """Send a signal to a run at a random moment; what is wrong with the way in which it ended."""
    child = Child(bench.folder, *bench.words(name, out))
    time.sleep(bench.draw.random() * bench.seconds[name])
    if child.alive:
        child.send(number)
    ended = child.wait()
    if number is signal.SIGKILL or ended.code in (0, 2):  # 2: an earlier one was through, and --out exists
        return None
    if ended.left:
        return f"{number.name} left {ended.left} in TMPDIR"
    if number is signal.SIGINT and (ended.code != 130 or "Traceback" in ended.err):
        return f"SIGINT ended with {ended.code}: {ended.err[-600:]}"
    return None
