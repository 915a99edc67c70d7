"""How fast is a linear in codebooks? 16 levels a row by look-up, beside bitsandbytes' nf4 and the plain linear, on a CPU.

    python evaluation/lookup_speed.py [--threads 2] [--pace 1] [--out FILE]

Weights are random; those of the codebook are rounded to sixteen quantiles of a normal distribution, which each row has in
float16, those of nf4 in layers of 64. What a weight is does not change what its product costs. All three have the same inputs,
in float32 and in bfloat16, and take turns in short bursts in one process, as in speed.py; the 10th percentile and the median of
their calls are held against nf4's. Every output is held against the product of the weight that the linear stands for. Which
kernels run depends on the processor: bitsandbytes has a product of 4 bits for AVX512-BF16 and dequantises elsewhere; ours says
which form it was compiled in. Five minutes on two cores; the result goes to evaluation/results/lookup_speed-avx512.json, or to
-avx2.json where the processor has no more.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import head
from rich.console import Console
from rich.table import Table
from speed import plain, race, random
from torch import Tensor

from llmcompress.algorithms.codebook import Palette, nearest
from llmcompress.formats import bitsandbytes_layout, codebook
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.kernels import lut_gemm

FILE = Path(__file__).parent / "results" / f"lookup_speed-{torch.backends.cpu.get_cpu_capability().lower()}.json"
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))  # rows x columns
TOKENS = (1, 4, 16, 128)
DTYPES = (torch.float32, torch.bfloat16)
LAYOUT = CodebookLayout(16, 1, "float16")
CASE_S = 12.0  # for all calls of a case
FAR = 0.02  # relative error of the product of the same weight, in bfloat16

Row = dict[str, Any]


def clustered(W_RC: Tensor) -> CodebookWeight:
    """The weight at the nearest of sixteen quantiles, the same for each row."""
    quantiles = torch.special.ndtri((torch.arange(16) + 0.5) / 16) * W_RC.shape[1] ** -0.5
    levels = LAYOUT.snap(quantiles.float().repeat(len(W_RC), 1))
    return CodebookWeight.of(Palette(nearest(W_RC, levels, 1), levels, 1), LAYOUT)


def cases(shape: tuple[int, int], dtype: torch.dtype, budget_s: float) -> list[Row]:
    """A shape with every number of tokens. Errors: SystemExit where an output is not that of its weight."""
    W_RC = random(*shape, torch.float32, torch.device("cpu"))
    packed, made = bitsandbytes_layout.quantize_nearest(W_RC.to(dtype), "nf4", 64, False), clustered(W_RC)
    modules: dict[str, tuple[Any, Tensor]] = {
        "bitsandbytes nf4": (bitsandbytes_layout.linear(packed, None), bitsandbytes_layout.dequantize(packed, torch.float32)),
        "codebook of 16 a row": (codebook.linear(made, None), made.dequantize()),
        "plain": (plain(W_RC.to(dtype)), W_RC),
    }
    rows = []
    for tokens in TOKENS:
        case = {"what": f"linear {shape[0]} x {shape[1]}", "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
        x = random(tokens, shape[1], torch.float32, torch.device("cpu")).mul_(shape[1] ** 0.5).to(dtype)
        errors = {}
        for name, (module, weight) in modules.items():
            exact = x.float() @ weight.T
            errors[name] = float((module(x).float() - exact).norm() / exact.norm())
        if wrong := {name: error for name, error in errors.items() if not error < FAR}:
            raise SystemExit(f"not the products of these weights, by relative error: {wrong}")
        for row in race(case, {name: partial(module, x) for name, (module, _) in modules.items()}, budget_s):
            name, times = row["candidate"], {"p10": row.pop("speedup_p10"), "median": row.pop("speedup_median")}
            held = sum(t.nbytes for t in (*modules[name][0].parameters(), *modules[name][0].buffers()))
            ratios = {f"time_of_nf4_{which}": 1 / speedup for which, speedup in times.items()}
            rows.append(row | ratios | {"relative_error": errors[name], "memory_bytes": held})
    return rows


def show(rows: list[Row]) -> None:
    """How many times nf4's time each takes, at the 10th percentile and in the median."""
    table = Table("linear", "inputs", "tokens", *dict.fromkeys(row["candidate"] for row in rows))
    for what, dtype, tokens in dict.fromkeys((row["what"], row["dtype"], row["tokens"]) for row in rows):
        cells = [row for row in rows if (row["what"], row["dtype"], row["tokens"]) == (what, dtype, tokens)]
        ratios = [f"{cell['time_of_nf4_p10']:.2f} ({cell['time_of_nf4_median']:.2f})" for cell in cells]
        table.add_row(what.removeprefix("linear "), dtype, str(tokens), *ratios)
    Console(width=110).print(table)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--pace", type=float, default=1.0, help="how many times the usual number of calls")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[Row] = []
    result = head() | {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "kernel": lut_gemm.form(), "rows": rows}
    for shape in SHAPES:
        for dtype in DTYPES:
            rows += cases(shape, dtype, CASE_S * given.pace)
            given.out.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
