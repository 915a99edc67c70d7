"""How long does a compression take beside those of others: processor seconds, memory and loss, in one run?

    python -m evaluation compression-speed [--models smollm2-135m ...] [--recipes nf4-gptq ...]

For each recipe its rivals: nf4-gptq beside llm-compressor and GPTQModel, nf4-learned beside AutoRound at 200
iterations, w8a8 and int8-smooth beside SmoothQuant with GPTQ. All read the same sequences, one after another
on the threads given, each in a process of its own. Ours and theirs are charged alike, after the imports: for
loading the base, quantising and writing, not for what llmcompress measures afterwards; that stands in `run`.
Memory is the peak of the process up to there. Random weights (wide-llama) have no loss worth a figure.
`others_cpu_share` tells what other programs took of a core meanwhile. Rivals need hours for all of it on two
cores; a row is written to results/compression_speed.json as soon as it is measured.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from evaluation import machine, results
from evaluation.cost import others_cpu_s
from evaluation.models import SUBJECTS
from evaluation.reference_models import FIRST_LAYERS, SMOLLM2, WIDE, made
from evaluation.results import ROOT, CompressionSpeedRow
from evaluation.rivals.quantizers import options, quantized
from evaluation.runs import known
from llmcompress.modeling.sequential import EVALUATE
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe

AGAINST = {
    "nf4-gptq": ("llmcompressor", "gptqmodel"),
    "nf4-learned": ("autoround",),
    "w8a8": ("smoothquant",),
    "int8-smooth": ("smoothquant",),
}
KEY = ("model", "what")
SPEED = (SMOLLM2, FIRST_LAYERS, WIDE)


class Clock:
    """A `track` that notes processor time, time and memory when the work is done and the measuring begins."""

    def __init__(self) -> None:
        self.start = time.process_time(), time.perf_counter()
        self.spent: tuple[float, float, int] | None = None

    def __call__(self, things: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        if what == EVALUATE and self.spent is None:
            cpu, wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]
            self.spent = cpu, wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return things


def ours(model: str, name: str, threads: int) -> CompressionSpeedRow:
    """Run a recipe of recipes/ on a model; for a fresh process."""
    torch.set_num_threads(threads)
    subject, others, clock = SUBJECTS[model], others_cpu_s(), Clock()
    recipe = Recipe.from_file(ROOT / "recipes" / f"{name}.yaml").model_copy(update={"data": subject.data()})
    with tempfile.TemporaryDirectory() as folder:
        report = run_recipe(recipe, Path(folder) / "out", base=subject.base, track=clock)
    assert clock.spent is not None
    whole = time.perf_counter() - clock.start[1]
    cpu_seconds, seconds, memory = clock.spent
    return CompressionSpeedRow(
        model=model,
        what=name,
        package="llmcompress",
        threads=threads,
        cpu_seconds=cpu_seconds,
        seconds=seconds,
        peak_memory_bytes=memory,
        run_cpu_seconds=time.process_time() - clock.start[0],
        run_peak_memory_bytes=int(known(report.cost.peak_memory_bytes)),
        kl_nats_mean=None if model == WIDE else known(report.fidelity.kl_nats_mean),
        others_cpu_share=(others_cpu_s() - others) / whole,
        commit=machine.commit(),
    )


def theirs(model: str, rival: str, given: argparse.Namespace) -> CompressionSpeedRow:
    """Quantise a model anew with a rival."""
    others, start = others_cpu_s(), time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = quantized(model, rival, given)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    return CompressionSpeedRow(
        model=model,
        what=rival,
        package=found.package,
        threads=given.threads,
        cpu_seconds=found.cpu_seconds,
        seconds=found.seconds,
        peak_memory_bytes=found.peak_memory_bytes,
        kl_nats_mean=None if model == WIDE else found.kl_nats_mean,
        others_cpu_share=(others_cpu_s() - others - own) / (time.perf_counter() - start),
        commit=machine.commit(),
    )


def keep(row: CompressionSpeedRow) -> None:
    """Write a row beside those that are there."""
    rows = results.merge("compression_speed", KEY, row)
    results.write("compression_speed", machine.head(), {"rows": rows})
    print(
        f"{row.model}: {row.what}: {row.cpu_seconds:.0f} CPU s, {row.peak_memory_bytes / 1e6:.0f} MB, "
        f"KL {row.kl_nats_mean}",
        flush=True,
    )


def main(argv: Sequence[str]) -> int:
    """Measure each recipe, then its rivals; 1 where a rival fails."""
    asked = options("compression-speed", __doc__)
    asked.set_defaults(work=ROOT / "out" / "rivals", dtype="auto")
    asked.add_argument("--models", nargs="+", choices=SPEED, default=list(SPEED))
    asked.add_argument("--recipes", nargs="+", choices=AGAINST, default=list(AGAINST))
    asked.add_argument("--ours-only", action="store_true", help="measure no rival again")
    given = machine.parse(asked, argv, threads=1)
    failed = False
    for model in given.models:
        made(model)
        for name in given.recipes:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                keep(fresh.submit(ours, model, name, given.threads).result())
        rivals = dict.fromkeys(rival for name in given.recipes for rival in AGAINST[name])
        for rival in () if given.ours_only else rivals:
            shutil.rmtree(given.work / "out", ignore_errors=True)  # or it would only be scored again
            try:
                keep(theirs(model, rival, given))
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{model}: {rival} failed: {error}", flush=True)
                failed = True
    return int(failed)
