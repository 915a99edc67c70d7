"""What the campaign is tried on: a pico base, its text, two recipes, and what they come to when nothing goes
wrong."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from tests.bases import save_base, write_text
from tests.campaign.damage import content_of
from tests.campaign.forked import Ended, run

HEAL = "{distill: {steps: 4, batch: 2, learning_rate: 1.0e-3}}"
STAGES = {
    "long": f"[{{prune: {{axis: ffn, keep: 0.5}}}}, {HEAL}, {{quantize: {{format: nf4}}}}]",
    "short": "[{quantize: {format: w4a8, group_size: 32}}]",
}


@dataclass
class Count:
    """What one part of the campaign tried, how it ended, and the faults that it found."""

    part: str
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def ended(self, outcome: str, fault: str | None = None) -> None:
        """Count one case."""
        self.outcomes[outcome] += 1
        if fault is not None:
            self.faults.append(fault)

    @property
    def tried(self) -> int:
        """How many cases there were."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class Bench:
    """A folder of its own for each case, and what the recipes come to."""

    folder: Path
    draw: random.Random
    expected: dict[str, dict[str, str]]  # recipe -> the bytes of what it makes
    seconds: dict[str, float]  # recipe -> how long that takes

    @classmethod
    def set_up(cls, folder: Path, seed: int) -> Bench:
        """Make base, text and recipes, and run each recipe once undisturbed."""
        save_base(folder / "base")
        write_text(folder / "facts.txt")
        bench = cls(folder, random.Random(seed), {}, {})
        for name, stages in STAGES.items():
            data = f"{{source: {folder / 'facts.txt'}, samples: 8, length: 24, evaluation_samples: 4}}"
            (folder / f"{name}.yaml").write_text(f"data: {data}\nstages: {stages}\n")
        # here, so that each child is forked with what a run imports
        run_recipe(Recipe.from_file(folder / "short.yaml"), folder / "first", base=str(folder / "base"))
        for name in STAGES:
            out, start = folder / f"expected-{name}", time.monotonic()
            done = bench.run(name, out)
            if done.code:
                raise SystemExit(f"the undisturbed run of {name} failed: {done.err}")
            bench.expected[name], bench.seconds[name] = content_of(out), time.monotonic() - start
        return bench

    def words(self, name: str, out: Path, *more: str) -> tuple[str, ...]:
        """The command line of a run."""
        return (
            "run",
            str(self.folder / f"{name}.yaml"),
            "--base",
            str(self.folder / "base"),
            "--out",
            str(out),
            *more,
        )

    def run(self, name: str, out: Path, *more: str) -> Ended:
        """Run a recipe to its end."""
        return run(self.folder, *self.words(name, out, *more))

    def places(self, kind: str, tries: int) -> Iterator[Path]:
        """A new folder for each try, in which `out` is to be made."""
        for number in range(tries):
            place = self.folder / f"{kind}-{number}"
            place.mkdir()
            yield place

    def fault_of(self, name: str, out: Path) -> str | None:
        """What is wrong with the artefact of a recipe, or None: every byte is to be that of the undisturbed
        run."""
        if not out.is_dir():
            return f"{out} is not there"
        found, expected = content_of(out), self.expected[name]
        if found.keys() != expected.keys():
            return f"{out} has other files: {sorted(found.keys() ^ expected.keys())}"
        wrong = [file for file in expected if found[file] != expected[file]]
        return f"{out} differs in {wrong}" if wrong else None


def partial_of(out: Path) -> Path:
    """The folder in which a run with this `out` works."""
    return out.with_name(f".{out.name}.partial")
