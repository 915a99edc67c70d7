"""How fast are codebooks solved for on a CPU by the C kernels, beside torch's loops, and what do both lose?

    python -m evaluation codebook-speed [--model smollm2-4-layers] [--turns 2] [--out FILE]

Every linear of the last layer is solved for with 16, 8 and 4 values a row, under the second moments of its
own inputs, as `search` does it. Both take turns in one process. The fastest turn counts, in seconds of the
processor, so that other programs do not count. Three minutes; the result goes to results/codebook_speed.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from evaluation import machine, results
from evaluation.models import SUBJECTS
from evaluation.options import parser
from evaluation.reference_models import FIRST_LAYERS, SMOLLM2, made
from evaluation.results import CodebookSpeedRow
from llmcompress.algorithms.codebook import Palette, solve_codebook
from llmcompress.algorithms.codebook_loops import PLAIN
from llmcompress.algorithms.hessian import Factors, Moments
from llmcompress.algorithms.quantize_weight import output_error
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.kernels import codebook_loops, column_loops
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.resolve import calibration_data, find_base

ENTRIES = (16, 8, 4)
LOOPS = {"torch": PLAIN, "kernels": codebook_loops.LOOPS}


def last_layer(name: str) -> dict[str, tuple[torch.Tensor, Moments]]:
    """Weight and second moments of each linear of a model's last layer, by its name in the layer."""
    subject = SUBJECTS[name]
    model = DiskModel(find_base(subject.base).folder, torch.device("cpu"))
    data = calibration_data(model, subject.data(), tokenizer_of(model.folder))
    for layer in walk(model, data.calibration):
        if layer.index == len(model.layers) - 1:
            moments = layer.moments()
            return {linear: (layer.weight(linear).clone(), moments[linear]) for linear in moments}
    raise SystemExit(f"{name} has no layers")


def solved(W_RC: torch.Tensor, factors: Factors, entries: int, way: str) -> tuple[Palette, float]:
    """Codes and levels, and the seconds of the processor that they took."""
    layout, begun = CodebookLayout(entries, 1, "bfloat16"), time.thread_time()
    palette = solve_codebook(
        W_RC,
        factors.moments.H_CC,
        entries,
        1,
        snap=layout.snap,
        factor=factors.ordered,
        loops=LOOPS[way],
    )
    return palette, time.thread_time() - begun


def measure(linear: str, W_RC: torch.Tensor, factors: Factors, turns: int) -> list[CodebookSpeedRow]:
    """The rows of one linear."""
    rows = []
    for entries in ENTRIES:
        seconds = dict.fromkeys(LOOPS, float("inf"))
        found = dict[str, Palette]()
        for _ in range(turns):
            for way in LOOPS:
                found[way], taken = solved(W_RC, factors, entries, way)
                seconds[way] = min(seconds[way], taken)
        reference = found["torch"].weight()
        for way, palette in found.items():
            weight = palette.weight()
            rows.append(
                CodebookSpeedRow(
                    linear=linear,
                    rows=len(W_RC),
                    columns=W_RC.shape[1],
                    entries=entries,
                    way=way,
                    cpu_seconds=seconds[way],
                    output_error=output_error(W_RC, weight, factors.moments.H_CC),
                    same_weights=float((weight == reference).float().mean()),
                )
            )
        torchs, ours = rows[-2:]
        print(
            f"{linear}, {entries}: {torchs.cpu_seconds:.2f} and {ours.cpu_seconds:.2f} s, "
            f"error {torchs.output_error:.5f} and {ours.output_error:.5f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def show(rows: Sequence[CodebookSpeedRow]) -> None:
    """What all linears of the layer take together."""
    table = Table("values a row", *LOOPS, "times faster")
    for entries in ENTRIES:
        taken = [sum(r.cpu_seconds for r in rows if r.entries == entries and r.way == way) for way in LOOPS]
        table.add_row(str(entries), *(f"{seconds:.2f} s" for seconds in taken), f"{taken[0] / taken[1]:.1f}")
    Console(width=110).print(table)


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """Measure every linear and write its rows as soon as they are there; 2 where there are no kernels."""
    options = parser("codebook-speed", __doc__)
    options.add_argument("--model", choices=(FIRST_LAYERS, SMOLLM2), default=FIRST_LAYERS)
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--out", type=Path, help="result file; default in results/")
    given = machine.parse(options, argv, threads=1)
    for module in (codebook_loops, column_loops):
        if module.KERNEL.why_not is not None:
            print(f"no kernel here: {module.KERNEL.why_not}", file=sys.stderr)
            return 2
    made(given.model)
    head, rows = machine.head(), list[CodebookSpeedRow]()
    factors: dict[int, Factors] = {}
    for linear, (W_RC, moments) in last_layer(given.model).items():
        shared = factors.setdefault(id(moments), Factors(moments))
        assert shared.ordered  # computed before the solvers are timed
        rows += measure(linear, W_RC, shared, given.turns)
        results.write("codebook_speed", head, {"model": given.model, "rows": rows}, given.out)
    show(rows)
    return 0
