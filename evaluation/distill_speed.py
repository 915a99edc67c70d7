"""What does the Trainer around a distillation cost, and what does a cached teacher save?

    python -m evaluation distill-speed [--model wikilm-8m] [--keep 1.0 0.625] [--steps 12] [--rounds 3]

The bare loop is the least that the job takes: the teacher's forward pass, the student's forward and backward
pass with KL over plain logits, and AdamW. Beside it stand `distill` with the teacher in memory, and with its
answers cached on disk. The student is the model with a share of its layers: uncut it costs as much as its
teacher, whose forward pass is then a quarter of all, so that keeping it can save no more than a third of the
rest. All three take turns in one process; a ratio is the median over the rounds. The result goes to
results/distill_speed.json.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import machine, results
from evaluation.models import LENGTH, MODELS
from evaluation.options import parser
from evaluation.results import Student, TrainingRow
from evaluation.runs import run
from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec
from llmcompress.integrations.distributed import ALONE
from llmcompress.io.journal import Journal
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.resolve import calibration_data, find_base, source_of
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import Context
from llmcompress.stages.distill.stage import Distill
from llmcompress.stages.distill.student import whole

BATCH = 8  # sequences of a step
RATE = 1e-5


class Clock:
    """A way to show progress that shows none, and keeps when each step of a training ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, things: Iterable[object], what: str, count: int) -> Iterator[object]:
        """Go through things; the stage takes one at the end of each step."""
        for thing in things:
            if what.startswith("distill"):
                self.ends.append(time.perf_counter())
            yield thing


def rate(ends: Sequence[float]) -> float:
    """Steps per second between the first step's end and the last's."""
    return (len(ends) - 1) / (ends[-1] - ends[0])


def staged(
    model: DiskModel, base: DiskModel, data: CalibrationData, cache: Path, steps: int, *, cached: bool = False
) -> float:
    """Steps per second of the stage, its evaluations apart: they come after the last step."""
    stage = Distill(
        steps=steps, batch=BATCH, micro_batch=BATCH, learning_rate=RATE, evaluate_every=steps, cache=cached
    )
    clock = Clock()
    source = source_of(str(base.folder), base.device)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        context = Context(
            teacher=lambda name: source,
            origin=range(len(model.layers)),
            data=data,
            journal=Journal(scratch / "journal", "timed"),
            scratch=scratch,
            cache=cache,
            seed=0,
            track=clock,
            processes=ALONE,
        )
        stage.apply(model, context)
    return rate(clock.ends)


def bare(model: DiskModel, base: DiskModel, tokens: Tensor, steps: int) -> float:
    """Steps per second of the plainest loop on sequences, int64 [N, LENGTH]."""
    student, teacher = whole(model).requires_grad_().train(), whole(base).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    ends = []
    for step in range(steps):
        ids = tokens[step * BATCH : (step + 1) * BATCH]
        with torch.no_grad():
            p = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1), -1)
        q = F.log_softmax(student(input_ids=ids, use_cache=False).logits.flatten(0, 1), -1)
        F.kl_div(q, p, log_target=True, reduction="batchmean").backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return rate(ends)


def cut(base: DiskModel, spec: DataSpec, keep: float, folder: Path) -> DiskModel:
    """The model with a share of its layers."""
    stage = {"prune": {"axis": "layer", "keep": keep, "score": "influence"}}
    recipe = Recipe.model_validate({"data": spec.model_dump(exclude_unset=True), "stages": [stage]})
    run(recipe, folder, base.folder)
    return DiskModel(folder, base.device)


def measure(base: DiskModel, text: str, keep: float, steps: int, rounds: int) -> Student:
    """All ways beside each other, for a student of a share of the layers."""
    spec = DataSpec(source=text, samples=32, length=LENGTH)
    data = calibration_data(base, spec, tokenizer_of(base.folder), lambda length: steps * BATCH * length)
    tokens = data.training.view(-1, LENGTH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = cut(base, spec, keep, folder / "cut") if keep < 1 else base
        ways: dict[str, Callable[[], float]] = {
            "bare loop": lambda: bare(model, base, tokens, steps),
            "distill": lambda: staged(model, base, data, folder / "cache", steps),
            "distill, cached teacher": lambda: staged(
                model, base, data, folder / "cache", steps, cached=True
            ),
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                found[way].append(call())
                print(f"{keep:g} of the layers, {way}: {found[way][-1]:.3f} steps/s", flush=True)
    return student(keep, found)


def student(keep: float, found: dict[str, list[float]]) -> Student:
    """The medians of the rounds."""

    def ratio(one: str, other: str) -> float:
        return median(mine / theirs for mine, theirs in zip(found[one], found[other], strict=True))

    rows = [
        TrainingRow(what=way, steps_per_s=median(rates), of_bare_loop=ratio(way, "bare loop"), all=rates)
        for way, rates in found.items()
    ]
    return Student(layers=keep, rows=rows, kept_over_live=ratio("distill, cached teacher", "distill"))


def main(argv: Sequence[str]) -> int:
    """Measure every student and write the result."""
    options = parser("distill-speed", __doc__)
    options.add_argument("--model", choices=MODELS, default="wikilm-8m")
    options.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.625])
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--rounds", type=int, default=3)
    given = machine.parse(options, argv)
    base, text = MODELS[given.model][:2]
    model = DiskModel(find_base(base).folder, torch.device("cpu"))
    students = [measure(model, text, keep, given.steps, given.rounds) for keep in given.keep]
    shape = {"model": given.model, "batch": BATCH, "length": LENGTH, "steps": given.steps}
    results.write("distill_speed", machine.head(), {**shape, "students": students})
    for one in students:
        print(f"{one.layers:g} of the layers: the cached teacher is {one.kept_over_live:.2f} times as fast")
    return 0
