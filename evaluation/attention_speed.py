"""How fast is attention in bfloat16 on a CPU by the C kernel of calibration, beside torch's?

    python -m evaluation attention-speed [--threads 1] [--pace 1] [--out FILE]

Causal attention of random queries, keys and values, as projections leave them in memory: its output, and the
gradients of all three. Both have the same inputs and take turns in short bursts in one process (timing.py).
Every result is held against attention in float64. The shapes are those of four sequences of SmolLM2-135M and
of one long sequence of models with heads of 64 and 128 numbers. The kernel wants AVX512-BF16. One minute; the
result goes to results/attention_speed.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evaluation import machine, results
from evaluation.options import parser
from evaluation.results import AttentionRow
from evaluation.timing import race
from llmcompress.kernels import attention as kernel

# sequences, heads of queries, heads of keys, tokens, numbers a head
SHAPES = ((4, 9, 3, 512, 64), (1, 9, 3, 2048, 64), (1, 32, 8, 2048, 64), (1, 32, 8, 2048, 128))
CASE_S = 8.0  # for all calls of a case
FAR = 0.02  # relative error of what is computed in bfloat16
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch, in the dtype of its inputs."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the C kernel."""
    return kernel.attention(q, k, v, causal=True)


def results_of(attention: Attention, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def measure(shape: tuple[int, int, int, int, int], budget_s: float) -> list[AttentionRow]:
    """A shape: output alone, and gradients alone. Errors: SystemExit where a result is not that of exact
    attention."""
    B, H, G, L, D = shape
    what = f"{B} x {L} tokens, {H} heads of {D}, {G} of keys"
    print(what, file=sys.stderr, flush=True)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(B, L, heads, D, generator=generator).bfloat16().transpose(1, 2) for heads in (H, G, G, H)
    )
    exact = results_of(by_torch, [x.double() for x in (q, k, v)], grad)
    ways = {"torch": by_torch, "kernel": by_kernel}
    errors = {
        name: [
            float((found.double() - true).norm() / true.norm())
            for found, true in zip(results_of(way, (q, k, v), grad), exact, strict=True)
        ]
        for name, way in ways.items()
    }
    if wrong := {name: error for name, error in errors.items() if not max(error) < FAR}:
        raise SystemExit(f"not the attention of these inputs, by relative error: {wrong}")
    rows = []
    for gradients in (False, True):
        call = partial(_gradients, grad=grad) if gradients else _output
        calls = {name: call(way, (q, k, v)) for name, way in ways.items()}
        for name, timing in race(calls, budget_s / 2).items():
            rows.append(
                AttentionRow(
                    what=what,
                    gradients=gradients,
                    way=name,
                    calls=timing.calls,
                    p10_s=timing.p10_s,
                    median_s=timing.median_s,
                    time_of_torch_p10=1 / timing.speedup_p10,
                    time_of_torch_median=1 / timing.speedup_median,
                    relative_error=max(errors[name][1:] if gradients else errors[name][:1]),
                )
            )
    return rows


def _output(attention: Attention, inputs: Sequence[Tensor]) -> Callable[[], object]:
    q, k, v = inputs
    return lambda: attention(q, k, v)


def _gradients(attention: Attention, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """Gradients of an output that is computed once."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attention(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def show(rows: Sequence[AttentionRow]) -> None:
    """What each takes, and the kernel's share of torch's time."""
    table = Table("attention", "of", "torch", "kernel", "kernel / torch, 10th percentile (median)")
    found = {(row.what, row.gradients, row.way): row for row in rows}
    for what, gradients in dict.fromkeys((row.what, row.gradients) for row in rows):
        torchs, ours = (found[what, gradients, way] for way in ("torch", "kernel"))
        table.add_row(
            what,
            "gradients" if gradients else "output",
            f"{torchs.p10_s * 1e3:.1f} ms",
            f"{ours.p10_s * 1e3:.1f} ms",
            f"{ours.time_of_torch_p10:.2f} ({ours.time_of_torch_median:.2f})",
        )
    Console(width=110).print(table)


def main(argv: Sequence[str]) -> int:
    """Measure every shape and write each as soon as it is there; 2 where there is no kernel."""
    options = parser("attention-speed", __doc__)
    options.add_argument("--out", type=Path, help="result file; default in results/")
    options.add_argument("--pace", type=float, default=1.0, help="how many times the usual number of calls")
    given = machine.parse(options, argv, threads=1)
    if not kernel.takes(torch.device("cpu")):
        print(f"no kernel here: {kernel.KERNEL.why_not or 'this CPU has no AVX512-BF16'}", file=sys.stderr)
        return 2
    head, rows = machine.head(), list[AttentionRow]()
    for shape in SHAPES:
        rows += measure(shape, CASE_S * given.pace)
        results.write("attention_speed", head, {"rows": rows}, given.out)
    show(rows)
    return 0
