"""How much faster is a run in several processes, and does it write the same codes?

    python -m evaluation several-processes [--processes 1 2] [--models ...] [--quick] [--out FILE]

Each recipe is run by its command line, from disk to disk, in one process and then in several, on the CPU with
one thread each. Seconds are those of the stage, and of the whole run with its start, its evaluation and its
timing of both models, which only rank 0 does. Codes are compared with those of one process. Only the order of
sums over tokens differs, which now and then moves a code across the middle between two levels: in the first
layer these codes and what depends on them differ, and with them the inputs of all layers that follow.

Run it on an idle machine with a core for each process; `others_cpu_share` says what other processes took, in
cores. A quarter of an hour on two cores; the result goes to results/several_processes.json. With --quick (a
minute or two, few tokens, numbers that mean little) only --out is written. A job's rows are written as soon
as they are measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from evaluation import machine, results
from evaluation.cost import others_cpu_s
from evaluation.models import MODELS, present
from evaluation.options import parser
from evaluation.reference_models import SMOLLM2
from evaluation.results import SeveralRow
from evaluation.runs import known
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report


@dataclass(frozen=True)
class Job:
    """A rounding on a model."""

    model: str
    rounding: str

    def recipe(self, samples: int | None) -> Recipe:
        """The recipe to run, on so many sequences, or on all that calibrate the model."""
        subject = MODELS[self.model]
        data = subject.data()
        data = data.model_copy(update={"samples": samples or data.samples})
        stages = [{"quantize": {"format": "nf4", "rounding": self.rounding}}]
        entries = {"base": subject.base, "data": data.model_dump(mode="json"), "stages": stages}
        return Recipe.model_validate(entries)


FIRST_LAYER = ".layers.0."
JOBS = (Job("wikilm-8m", "gptq"), Job("wikilm-8m", "learned"), Job(SMOLLM2, "gptq"))
QUICK = (Job("wikilm-8m", "gptq"),)
MEASURED = tuple(dict.fromkeys(job.model for job in JOBS))


def run(recipe: Path, out: Path, processes: int) -> float:
    """Run the command line in so many processes; returns the processor seconds of others in a second."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "llmcompress", "run", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start, others = time.perf_counter(), others_cpu_s() - children_cpu_s()
    subprocess.run(
        [*command, "--out", str(out), "--device", "cpu"], env=environment, capture_output=True, check=True
    )
    return (others_cpu_s() - children_cpu_s() - others) / (time.perf_counter() - start)


def children_cpu_s() -> float:
    """Processor seconds of the runs that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def codes_that_differ(one: Path, other: Path, within: str = "") -> float:
    """The share of the 4-bit codes of two artefacts that differ; a byte holds two. `within` is part of the
    names of their linears."""
    differing = count = 0
    with (
        safe_open(one / "model.safetensors", "pt") as first,
        safe_open(other / "model.safetensors", "pt") as second,
    ):
        for name in first.keys():  # noqa: SIM118  # no mapping
            tensor = first.get_tensor(name)
            if not tensor.is_floating_point() and name.endswith(".weight") and within in name:
                changed = tensor ^ second.get_tensor(name)
                differing += int((changed & 15 != 0).sum() + (changed >> 4 != 0).sum())
                count += 2 * tensor.numel()
    return differing / count


def measured(jobs: Sequence[Job], counts: Sequence[int], samples: int | None) -> list[SeveralRow]:
    """Every job in each number of processes, the first of which the others are compared with."""
    rows = list[SeveralRow]()
    for job in jobs:
        with tempfile.TemporaryDirectory() as name:
            folder, first = Path(name), len(rows)
            (folder / "recipe.yaml").write_text(job.recipe(samples).to_yaml(), "utf-8")
            for processes in counts:
                print(f"{job} in {processes}", file=sys.stderr, flush=True)
                out = folder / str(processes)
                others = run(folder / "recipe.yaml", out, processes)
                report = Report.of(out)
                stage_s, run_s = report.stages[0].seconds, report.cost.seconds
                row = SeveralRow(
                    model=job.model,
                    rounding=job.rounding,
                    tokens=report.data.calibration_tokens,
                    processes=processes,
                    stage_s=stage_s,
                    run_s=run_s,
                    stage_speedup=rows[first].stage_s / stage_s if len(rows) > first else 1.0,
                    run_speedup=rows[first].run_s / run_s if len(rows) > first else 1.0,
                    codes_that_differ=codes_that_differ(folder / str(counts[0]), out),
                    codes_that_differ_first_layer=codes_that_differ(
                        folder / str(counts[0]), out, FIRST_LAYER
                    ),
                    kl_nats_mean=known(report.fidelity.kl_nats_mean),
                    others_cpu_share=others,
                )
                rows.append(row)
    return rows


def show(rows: Sequence[SeveralRow]) -> None:
    """Print the rows as a table."""
    heads = (
        "model",
        "rounding",
        "tokens",
        "processes",
        "stage s",
        "run s",
        "codes that differ",
        "in layer 0",
    )
    table = Table(*heads, "KL")
    for row in rows:
        names = [row.model, row.rounding, str(row.tokens), str(row.processes)]
        seconds = [f"{row.stage_s:.1f}", f"{row.run_s:.1f}"]
        differ = [f"{row.codes_that_differ:.2e}", f"{row.codes_that_differ_first_layer:.2e}"]
        table.add_row(*names, *seconds, *differ, f"{row.kl_nats_mean:.6f}")
    Console(width=120).print(table)
    busiest = max(row.others_cpu_share for row in rows)
    print(f"other processes took up to {busiest:.2f} of a core")


def main(argv: Sequence[str]) -> int:
    """Measure every job and write the result."""
    options = parser("several-processes", __doc__)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options.add_argument(
        "--out", type=Path, help="result file; default results/several_processes.json, none with --quick"
    )
    options.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    options.add_argument("--models", nargs="+", choices=MEASURED, default=MEASURED, help="only these")
    given = machine.parse(options, argv, threads=1)
    wanted = set(given.models) & set(present())
    for job in [job for job in (QUICK if given.quick else JOBS) if job.model in wanted]:
        rows = measured([job], given.processes, 32 if given.quick else None)
        show(rows)
        if given.out or not given.quick:
            others = results.without("several_processes", model=job.model, rounding=job.rounding)
            results.write("several_processes", machine.head(), {"rows": [*others, *rows]}, given.out)
    return 0
