"""Two runs with one `--out`, and a stranger's folder that appears there: one wins, nobody loses anything."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.campaign.bench import Bench, Count, partial_of
from tests.campaign.forked import Child, Ended


def pairs(bench: Bench, tries: int) -> Count:
    """Start a second run with another recipe a random moment after the first; every third time something else
    happens there."""
    count = Count("pairs")
    for number, place in enumerate(bench.places("pair", tries)):
        out = place / "out"
        if number % 3 == 0:
            count.ended(*_stranger(bench, out))
        elif number % 3 == 1:
            count.ended(*_rivals(bench, out))
        else:
            count.ended(*_replaced(bench, out))
    return count


def _start(bench: Bench, name: str, out: Path, *more: str) -> Child:
    return Child(bench.folder, *bench.words(name, out, *more))


def _pause(bench: Bench, name: str) -> None:
    time.sleep(bench.draw.random() * bench.seconds[name])


def _rivals(bench: Bench, out: Path) -> tuple[str, str | None]:
    """Two runs with two recipes: one ends with 0 and its own bytes, the other is refused."""
    names = sorted(bench.expected, key=lambda _: bench.draw.random())
    first = _start(bench, names[0], out)
    _pause(bench, names[0])
    second = _start(bench, names[1], out)
    ended = dict(zip(names, (first.wait(), second.wait()), strict=True))
    return "two recipes", _fault(bench, out, ended)


def _replaced(bench: Bench, out: Path) -> tuple[str, str | None]:
    """A finished artefact that one run replaces while a second tries the same, or is killed on the way."""
    if (done := bench.run("short", out)).code:
        return "two that replace", f"exit code {done.code}: {done.err}"
    names = sorted(bench.expected, key=lambda _: bench.draw.random())
    first = _start(bench, names[0], out, "--overwrite")
    _pause(bench, names[0])
    second = _start(bench, names[1], out, "--overwrite")
    if bench.draw.random() < 0.5:
        _pause(bench, names[0])
        if first.alive:
            first.send(signal.SIGKILL)
        ended = first.wait(), second.wait()
        if not any(bench.fault_of(name, out) is None for name in names):
            return "one that replaces is killed", f"{out} is neither the old nor the new artefact: {ended}"
        return "one that replaces is killed", None
    ended = first.wait(), second.wait()
    good = [name for name, end in zip(names, ended, strict=True) if end.code == 0]
    crashed = next((end.crashed for end in ended if end.crashed), None)
    if crashed or not good or not any(bench.fault_of(name, out) is None for name in good):
        return "two that replace", crashed or f"{out} is the artefact of neither: {ended}"
    return "two that replace", None


def _stranger(bench: Bench, out: Path) -> tuple[str, str | None]:
    """A folder with a file that appears at `--out` while a run is under way stays, and the run can still be
    finished."""
    child = _start(bench, "short", out)
    _pause(bench, "short")
    try:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    except FileExistsError:
        child.wait()
        return "a stranger's folder, too late", bench.fault_of("short", out)
    ended = child.wait()
    if not (out / "mine.txt").is_file():
        return "a stranger's folder", f"the folder that appeared at {out} is lost: {ended}"
    if ended.code != 2 or ended.crashed:
        return "a stranger's folder", f"exit code {ended.code}: {ended.err[-600:]}"
    out.rename(out.with_name("moved"))
    again = bench.run("short", out)
    if again.code or (fault := bench.fault_of("short", out)):
        return (
            "a stranger's folder",
            f"the second run: exit code {again.code}, {again.err[-600:] if again.code else fault}",
        )
    return "a stranger's folder", None


def _fault(bench: Bench, out: Path, ended: dict[str, Ended]) -> str | None:
    winners = [name for name, end in ended.items() if end.code == 0]
    crashed = next((end.crashed for end in ended.values() if end.crashed), None)
    if crashed or len(winners) != 1:
        return crashed or f"{len(winners)} runs with one --out ended with 0: {ended}"
    if partial_of(out).exists():
        return f"{partial_of(out)} is left"
    return bench.fault_of(winners[0], out)
