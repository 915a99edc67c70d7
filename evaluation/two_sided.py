"""What is it worth to round all rows of a linear together? NF4 with scales in 8 bits, with `two_sided` and
without.

    python -m evaluation two-sided [--models stories260k ...] [--roundings gptq learned] [--threads 1]

Each row is a whole run from disk to disk and its own report, on the sequences that models.py gives for the
model, beside nearest codes, which are stock bitsandbytes at the same bytes. A row is written to
results/two_sided.json as soon as it is measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from evaluation import machine, results
from evaluation.models import SUBJECTS, present
from evaluation.options import parser
from evaluation.results import TwoSidedRow
from evaluation.runs import known, losses, run, seconds
from llmcompress.recipe.recipe import Recipe

FORMAT = {"format": "nf4", "group_size": 64, "double_quant": True}
ROUNDINGS = ("nearest", "gptq", "learned")


def measure(model: str, rounding: str, two_sided: bool) -> TwoSidedRow:
    """Run one rounding on one model."""
    subject, settings = SUBJECTS[model], FORMAT | {"rounding": rounding}
    if two_sided:
        settings |= {"two_sided": True}
    recipe = Recipe.model_validate({"data": subject.data(), "stages": [{"quantize": settings}]})
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        report = run(recipe, Path(folder) / "out", subject.base)
        cpu_seconds = time.process_time() - start
    return TwoSidedRow(
        **losses(report),
        model=model,
        rounding=rounding,
        two_sided=two_sided,
        size_bytes=int(known(report.compressed.size_bytes)),
        seconds=seconds(report),
        cpu_seconds=cpu_seconds,
        peak_memory_bytes=report.cost.peak_memory_bytes,
        commit=machine.commit(),
        hardware=report.environment.device,
    )


def main(argv: Sequence[str]) -> int:
    """Measure every rounding on every model, and write each row."""
    options = parser("two-sided", __doc__)
    options.add_argument("--models", nargs="+", choices=SUBJECTS, default=present())
    options.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    given = machine.parse(options, argv, threads=1)
    for model in given.models:
        for rounding in given.roundings:
            for two_sided in (False,) if rounding == "nearest" else (False, True):
                row = measure(model, rounding, two_sided)
                rows = results.merge("two_sided", ("model", "rounding", "two_sided"), row)
                results.write("two_sided", machine.head(), {"rows": rows})
                print(
                    f"{model}: {rounding}, two_sided {two_sided}: KL {row.kl_nats_mean:.6f}", file=sys.stderr
                )
    return 0
