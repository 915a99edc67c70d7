"""What is it worth to round all rows of a linear together? Formats of 4 bits and less, with `two_sided` and
without.

    python -m evaluation two-sided [--models stories260k ...] [--formats nf4 codebook-8 ...]
                                   [--roundings gptq learned] [--threads 1]

Each row is a whole run from disk to disk and its own report, on the sequences that models.py gives for the
model. Nearest codes are measured for NF4 with scales in 8 bits, where they are stock bitsandbytes. A row is
written to results/two_sided.json as soon as it is measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from evaluation import machine, results
from evaluation.models import SUBJECTS, present
from evaluation.options import parser
from evaluation.results import TwoSidedRow
from evaluation.runs import Stage, known, losses, run, seconds
from llmcompress.recipe.recipe import Recipe

STOCK = "nf4"
FORMATS: dict[str, Stage] = {
    STOCK: {"format": "nf4", "group_size": 64, "double_quant": True},
    "w4a16": {"format": "w4a16", "group_size": 64},
    "w4a8": {"format": "w4a8", "group_size": 64},
    "codebook-8": {"format": "codebook", "entries": 8},
    "codebook-4": {"format": "codebook", "entries": 4},
}
ROUNDINGS = ("nearest", "gptq", "learned")


def measure(model: str, format: str, rounding: str, two_sided: bool) -> TwoSidedRow:
    """Run one rounding in one format on one model."""
    subject, settings = SUBJECTS[model], FORMATS[format] | {"rounding": rounding}
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
        format=format,
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
    """Measure every rounding in every format on every model, and write each row."""
    options = parser("two-sided", __doc__)
    options.add_argument("--models", nargs="+", choices=SUBJECTS, default=present())
    options.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    given = machine.parse(options, argv, threads=1)
    for model, format, rounding in product(given.models, given.formats, given.roundings):
        if rounding == "nearest" and format != STOCK:
            continue
        for two_sided in (False,) if rounding == "nearest" else (False, True):
            row = measure(model, format, rounding, two_sided)
            rows = results.merge("two_sided", ("model", "format", "rounding", "two_sided"), row)
            results.write("two_sided", machine.head(), {"rows": rows})
            said = f"{model}: {format}, {rounding}, two_sided {two_sided}: KL {row.kl_nats_mean:.6f}"
            print(said, file=sys.stderr)
    return 0
