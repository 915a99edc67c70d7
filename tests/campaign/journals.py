"""A file of what a killed run has finished is damaged: the run that goes on still gives the same bytes."""

from __future__ import annotations

import signal
import time

from tests.campaign.bench import Bench, Count, partial_of
from tests.campaign.damage import DAMAGES
from tests.campaign.forked import Child


def journals(bench: Bench, tries: int) -> Count:
    """Kill each of `tries` runs at a random moment, damage one file of what it worked in, and let it go on to
    its end."""
    count = Count("journals")
    for place in bench.places("journal", tries):
        out = place / "out"
        child = Child(bench.folder, *bench.words("long", out))
        time.sleep((0.3 + 0.7 * bench.draw.random()) * bench.seconds["long"])
        if child.alive:
            child.send(signal.SIGKILL)
        child.wait()
        files = sorted(path for path in partial_of(out).rglob("*") if path.is_file())
        if out.exists() or not files:
            count.ended("was through" if out.exists() else "had not begun")
            continue
        damaged, damage = bench.draw.choice(files), bench.draw.choice(DAMAGES)
        what = f"{damage.__name__} {damaged.relative_to(partial_of(out))}"
        damage(damaged, bench.draw)
        done = bench.run("long", out)
        fault = done.crashed or (
            f"exit code {done.code}: {done.err[-600:]}" if done.code else bench.fault_of("long", out)
        )
        count.ended(damage.__name__, f"{what}: {fault}" if fault else None)
    return count
