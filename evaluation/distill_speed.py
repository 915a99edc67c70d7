"""What does the Trainer around a distillation cost, and what does a kept teacher save? Steps per second, side by side.

    python evaluation/distill_speed.py [--model wikilm-8m] [--keep 1.0 0.625] [--steps 12] [--rounds 3] [--threads 2]

The bare loop is the least that the job takes: the teacher's forward pass, the student's forward and backward pass with KL over
plain logits, and AdamW. Beside it stand `distill` with the teacher in memory, and with what it said kept on disk. The student
is the model with a share of its layers: uncut it costs as much as its teacher, whose forward pass is then a quarter of all, so
that keeping it can save no more than a third of the rest. All three take turns in one process; a ratio is the median over the
rounds. The result goes to evaluation/results/distill_speed.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench import LENGTH, MODELS, head
from torch import Tensor
from transformers import TrainerCallback

from llmcompress.data.sources import DataSpec
from llmcompress.io.journal import Journal
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import untracked
from llmcompress.pipeline.resolve import calibration_data, find_base, source_of
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import Context
from llmcompress.stages.distill import stage
from llmcompress.stages.distill.stage import Distill
from llmcompress.stages.distill.student import whole

FILE = Path(__file__).parent / "results" / "distill_speed.json"
BATCH, MICRO = 8, 8


class Clock(TrainerCallback):
    """When each step ended."""

    ends: list[float]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class Timed(stage.DistillTrainer):
    """The trainer of the stage, with a clock; every training here puts its own in `last`."""

    last: Clock

    def __init__(self, **settings: Any) -> None:
        Timed.last = Clock()
        super().__init__(**{**settings, "callbacks": [*settings["callbacks"], Timed.last]})


def staged(model: DiskModel, base: DiskModel, layers: Any, folder: Path, steps: int, **settings: Any) -> float:
    """Steps per second of the stage, its evaluations apart: they come after the last step."""
    lesson = Distill(steps=steps, batch=BATCH, micro_batch=MICRO, learning_rate=1e-5, evaluate_every=steps, **settings)
    with tempfile.TemporaryDirectory() as scratch:
        journal = Journal(Path(scratch) / "journal", "timed")
        source = source_of(str(base.folder), base.device)
        lesson.apply(
            model, Context(lambda name: source, range(len(model.layers)), layers, journal, Path(scratch), folder, 0, untracked)
        )
    ends = Timed.last.ends
    return (len(ends) - 1) / (ends[-1] - ends[0])


def bare(model: DiskModel, base: DiskModel, windows: Tensor, steps: int) -> float:
    """Steps per second of the loop that anyone would write."""
    student, teacher = whole(model).requires_grad_().train(), whole(base).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    ends = []
    for step in range(steps):
        ids = windows[step * BATCH : (step + 1) * BATCH]
        with torch.no_grad():
            p = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1), -1)
        q = F.log_softmax(student(input_ids=ids, use_cache=False).logits.flatten(0, 1), -1)
        F.kl_div(q, p, log_target=True, reduction="batchmean").backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return (steps - 1) / (ends[-1] - ends[0])


def measure(base: DiskModel, text: str, keep: float, steps: int, rounds: int) -> dict[str, Any]:
    """All ways beside each other, for a student of a share of the layers."""
    spec = DataSpec(source=text, samples=32, length=LENGTH)
    layers = calibration_data(base, spec, tokenizer_of(base.folder), lambda length: steps * BATCH * length)
    windows = layers.training.view(-1, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        model, cache = base, Path(folder) / "cache"
        if keep < 1:
            cut = {"prune": {"axis": "layer", "keep": keep, "score": "influence"}}
            recipe = Recipe.model_validate({"data": spec.model_dump(exclude_unset=True), "stages": [cut]})
            run_recipe(recipe, Path(folder) / "cut", base=str(base.folder))
            model = DiskModel(Path(folder) / "cut", base.device)
        ways: dict[str, Callable[[], float]] = {
            "bare loop": lambda: bare(model, base, windows, steps),
            "distill": lambda: staged(model, base, layers, cache, steps),
            "distill, kept teacher": lambda: staged(model, base, layers, cache, steps, cache=True),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                found[name].append(way())
                print(f"{keep:g} of the layers, {name}: {found[name][-1]:.3f} steps/s", flush=True)
    rows = []
    for name, rates in found.items():
        ratios = [rate / first for rate, first in zip(rates, found["bare loop"], strict=True)]
        rows.append({"what": name, "steps_per_s": median(rates), "of_bare_loop": median(ratios), "all": rates})
    saved = [kept / live for kept, live in zip(found["distill, kept teacher"], found["distill"], strict=True)]
    return {"layers": keep, "rows": rows, "kept_over_live": median(saved)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wikilm-8m")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.625])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stage.DistillTrainer = Timed  # type: ignore[misc]
    base, text = MODELS[given.model]
    model = DiskModel(find_base(base).folder, torch.device("cpu"))
    students = [measure(model, text, keep, given.steps, given.rounds) for keep in given.keep]
    shape = {"model": given.model, "batch": BATCH, "length": LENGTH, "steps": given.steps}
    FILE.write_text(json.dumps({**head(), **shape, "students": students}, indent=2) + "\n")
    for student in students:
        print(f"{student['layers']:g} of the layers: kept over live {student['kept_over_live']:.2f}")


if __name__ == "__main__":
    main()
