"""How fast is a codebook linear on a CPU, beside bitsandbytes' nf4 and the plain linear?

    python -m evaluation lookup-speed [--threads 2] [--pace 1] [--out FILE]

Weights are random; those of the codebook are rounded to sixteen quantiles of a normal distribution, which
each row has in float16, those of nf4 in groups of 64. What a weight is does not change what its product
costs. All three have the same inputs, in float32 and in bfloat16, and take turns in short bursts in one
process (timing.py); the 10th percentile and the median of their calls are held against nf4's. Every output is
held against the product of the weight that the linear stands for. Which kernels run depends on the processor:
bitsandbytes has a product of 4 bits for AVX512-BF16 and dequantises elsewhere; ours says which form it was
compiled in. Five minutes on two cores; the result goes to results/lookup_speed-avx512.json, or to -avx2.json
where the processor has no more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from evaluation import machine, results
from evaluation.options import parser
from evaluation.results import LookupRow
from evaluation.speed import alone, plain, random, stock_nf4
from evaluation.timing import race
from llmcompress.algorithms.codebook import Palette, nearest
from llmcompress.formats import bitsandbytes_layout, codebook
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.kernels import lut_gemm

SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))  # rows x columns
TOKENS = (1, 4, 16, 128)
DTYPES = (torch.float32, torch.bfloat16)
LAYOUT = CodebookLayout(16, 1, "float16")
CASE_S = 12.0  # for all calls of a case
FAR = 0.02  # relative error of the product of the same weight, in bfloat16


@dataclass(frozen=True)
class Candidate:
    """A linear, and the weight [R, C] that it stands for."""

    module: nn.Module
    weight: Tensor

    def error(self, x: Tensor) -> float:
        """Relative error of its output for inputs [T, C]."""
        exact = x.float() @ self.weight.T
        return float((self.module(x).float() - exact).norm() / exact.norm())

    @property
    def memory_bytes(self) -> int:
        """What it holds in memory."""
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))


def clustered(W_RC: Tensor) -> CodebookWeight:
    """The weight at the nearest of sixteen quantiles, the same for each row."""
    quantiles = torch.special.ndtri((torch.arange(16) + 0.5) / 16) * W_RC.shape[1] ** -0.5
    levels = LAYOUT.snap(quantiles.float().repeat(len(W_RC), 1))
    return CodebookWeight.of(Palette(nearest(W_RC, levels, 1), levels, 1), LAYOUT)


def candidates(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Candidate]:
    """All that is measured, the reference first."""
    W_RC = random(*shape, torch.float32, torch.device("cpu"))
    packed, made = bitsandbytes_layout.quantize_nearest(W_RC.to(dtype), "nf4", 64, False), clustered(W_RC)
    return {
        "bitsandbytes nf4": Candidate(
            alone(stock_nf4(W_RC.to(dtype))), bitsandbytes_layout.dequantize(packed, torch.float32)
        ),
        "codebook of 16 entries per row": Candidate(codebook.linear(made, None), made.dequantize()),
        "plain": Candidate(plain(W_RC.to(dtype)), W_RC),
    }


def measure(
    shape: tuple[int, int], dtype: torch.dtype, tokens: int, found: Mapping[str, Candidate], budget_s: float
) -> list[LookupRow]:
    """A shape with a number of tokens. Errors: SystemExit where an output is not that of its weight."""
    what, inputs = f"linear {shape[0]} x {shape[1]}", str(dtype).removeprefix("torch.")
    print(f"{what}, {inputs}, tokens {tokens}", file=sys.stderr, flush=True)
    x = random(tokens, shape[1], torch.float32, torch.device("cpu")).mul_(shape[1] ** 0.5).to(dtype)
    errors = {name: candidate.error(x) for name, candidate in found.items()}
    if wrong := {name: error for name, error in errors.items() if not error < FAR}:
        raise SystemExit(f"not the products of these weights, by relative error: {wrong}")
    timings = race({name: partial(candidate.module, x) for name, candidate in found.items()}, budget_s)
    return [
        LookupRow(
            what=what,
            dtype=inputs,
            tokens=tokens,
            candidate=name,
            calls=timing.calls,
            p10_s=timing.p10_s,
            median_s=timing.median_s,
            time_of_nf4_p10=1 / timing.speedup_p10,
            time_of_nf4_median=1 / timing.speedup_median,
            relative_error=errors[name],
            memory_bytes=found[name].memory_bytes,
        )
        for name, timing in timings.items()
    ]


def show(rows: Sequence[LookupRow]) -> None:
    """How many times nf4's time each takes, at the 10th percentile and in the median."""
    table = Table("linear", "inputs", "tokens", *dict.fromkeys(row.candidate for row in rows))
    for what, dtype, tokens in dict.fromkeys((row.what, row.dtype, row.tokens) for row in rows):
        cells = [row for row in rows if (row.what, row.dtype, row.tokens) == (what, dtype, tokens)]
        ratios = [f"{cell.time_of_nf4_p10:.2f} ({cell.time_of_nf4_median:.2f})" for cell in cells]
        table.add_row(what.removeprefix("linear "), dtype, str(tokens), *ratios)
    Console(width=110).print(table)


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """Measure every case and write each as soon as it is there."""
    options = parser("lookup-speed", __doc__)
    options.add_argument("--out", type=Path, help="result file; default in results/")
    options.add_argument("--pace", type=float, default=1.0, help="how many times the usual number of calls")
    given = machine.parse(options, argv)
    capability = torch.backends.cpu.get_cpu_capability()
    head, rows = machine.head(), list[LookupRow]()
    for shape in SHAPES:
        for dtype in DTYPES:
            found = candidates(shape, dtype)
            for tokens in TOKENS:
                rows += measure(shape, dtype, tokens, found, CASE_S * given.pace)
                facts = {"cpu_capability": capability, "kernel": lut_gemm.form(), "rows": rows}
                results.write(f"lookup_speed-{capability.lower()}", head, facts, given.out)
    show(rows)
    return 0
