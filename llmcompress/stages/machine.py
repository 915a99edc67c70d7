"""How long this machine takes for the operations that stages are made of: each is timed for a moment.

An operation is timed on first use, at the shapes of the model if they are small enough, and remembered while
the process lives. Where a stage spends its time in a function of its own, such as the solver, that function
is what is timed, so an estimate follows it when it becomes faster. Larger shapes are scaled by the operations
that they take. On a CPU the time is that of the calling thread: other programs do not count, but for the
threads of one operation that wait for each other.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.algorithms.codebook import Palette, nearest
from llmcompress.algorithms.hessian import Factors, Moments, inverse_factor
from llmcompress.algorithms.learned_codebook import InCodebooks
from llmcompress.algorithms.learned_rounding import OnGrid, Trainable, learn
from llmcompress.algorithms.obs import remove
from llmcompress.algorithms.quantize_weight import RoundedWeight
from llmcompress.algorithms.smoothing import fitted
from llmcompress.formats import registry
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.schemes import QuantScheme
from llmcompress.kernels import moments as half_moments
from llmcompress.kernels.moments import HalfMoments
from llmcompress.modeling.half_precision import half_precision

RUNS, MOMENT_S = 5, 0.1  # an operation is timed as often, or for as long; the fastest run counts
IN_A_STAGE = 1.2  # over that time, where other operations empty the caches (evaluation/results/foretold.json)
# multiplications and additions, and outputs, of one product that is timed, at most
OPERATIONS, OUTPUTS = 2e9, 8192
NUMBERS = 1 << 22  # of one elementwise operation that is timed, at most
TOKENS = 2048  # inputs of an operation that is timed, at most
ROWS, NARROW, WIDE = 256, 256, 768  # of a weight that a solver is timed on
WIDEST = 1024  # columns of a square matrix that is timed
REMOVED, STEPS = 32, 4  # units and training steps that are timed
PART, FITTED = 4, 512  # of the inputs of a fit one in so many is timed, and columns at most
PIECE = 1 << 25  # bytes of a file that are read
Run = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """A device, and the seconds of the operations that were timed on it."""

    device: torch.device
    known: dict[Hashable, float] = field(default_factory=dict)

    def product(self, tokens: float, shape: tuple[int, int], *, half: bool = False) -> float:
        """Seconds to multiply inputs [tokens, C] by a weight [R, C] = `shape`; with `half` in bfloat16."""
        R, C = min(shape[0], OUTPUTS), shape[1]
        T = int(min(max(tokens, 1), TOKENS, max(64, OPERATIONS / (2 * R * C))))

        def made() -> Run:
            dtype = torch.bfloat16 if half else torch.float32
            X_TC, W_RC = self._random(T, C).to(dtype), self._random(R, C).to(dtype)
            return lambda: F.linear(X_TC, W_RC)

        return self._timed(("product", T, R, C, half), made) * tokens / T * shape[0] / R

    def attention(self, tokens: float, length: int, heads: int, width: int, *, half: bool = False) -> float:
        """Seconds of causal attention over sequences of `length`, in all `tokens`, without its products with
        weights; with `half` in bfloat16."""
        few = max(1, min(heads, int(OPERATIONS / (4 * length**2 * width))))

        def made() -> Run:
            q = self._random(1, few, length, width)

            def run() -> None:
                with half_precision(self.device, half):
                    F.scaled_dot_product_attention(q, q, q, is_causal=True)

            return run

        return self._timed(("attention", length, few, width, half), made) * tokens / length * heads / few

    def elementwise(self, tokens: float, width: int) -> float:
        """Seconds of one operation on each of [tokens, width] numbers."""
        T = int(min(max(tokens, 1), TOKENS, max(1, NUMBERS // width)))

        def made() -> Run:
            x = self._random(T, width)
            return lambda: torch.mul(x, x)

        return self._timed(("elementwise", T, width), made) * tokens / T

    def moments(self, tokens: float, columns: int, streams: int, *, half: bool = False) -> float:
        """Seconds to sum the second moments of inputs [tokens, columns]; with two streams also those of the
        gap between them, with `half` of a layer that is computed in bfloat16."""
        kind = HalfMoments if half and half_moments.takes(self.device) else Moments
        C, T = min(columns, WIDEST), int(min(max(tokens, 1), TOKENS))

        def made() -> Run:
            inputs = [self._random(T, C) for _ in range(streams)]
            return lambda: kind(C, self.device).add(*inputs)

        return self._timed(("moments", T, C, streams, kind), made) * tokens / T * (columns / C) ** 2

    def factor(self, columns: int) -> float:
        """Seconds of a triangular factor of the inverse of second moments [columns, columns]."""
        C = min(columns, WIDEST)

        def made() -> Run:
            H_CC = self._moments_of(C)
            return lambda: inverse_factor(H_CC, 0.01)

        return self._timed(("factor", C), made) * (columns / C) ** 3

    def solver(self, shape: tuple[int, int], scheme: QuantScheme) -> float:
        """Seconds to solve for a weight [R, C] = `shape` in a scheme, without factors of its second moments.

        A wide weight is timed at two widths, which tell apart what grows with the width and with its square.
        """
        R, C = shape
        rows = R if self.device.type == "cuda" else min(R, ROWS)
        if C <= WIDE:
            return self._solver(rows, C, scheme) * R / rows
        narrow, wide = (self._solver(rows, width, scheme) for width in (NARROW, WIDE))
        square = max(0.0, (wide - narrow * WIDE / NARROW) / (WIDE**2 - WIDE * NARROW))
        linear = max(0.0, wide / WIDE - square * WIDE)
        return (linear * C + square * C**2) * R / rows

    def _solver(self, R: int, C: int, scheme: QuantScheme) -> float:
        def made() -> Run:
            W_RC, moments = self._random(R, C), Moments(C, self.device)
            moments.add(self._random(2 * C, C))
            factors = Factors(moments)
            assert factors.ordered  # computed before the solver is timed
            return lambda: scheme.solve(W_RC, factors, scheme.static_scale(1.0))

        return self._timed(("solver", R, C, scheme), made)

    def nearest(self, shape: tuple[int, int], scheme: QuantScheme) -> float:
        """Seconds to round a weight [R, C] = `shape` to nearest and to read it back."""
        R, C = shape
        rows = min(R, ROWS)

        def made() -> Run:
            W_RC = self._random(rows, C)
            return lambda: registry.dequantize(scheme.nearest(W_RC, scheme.static_scale(1.0)))

        return self._timed(("nearest", rows, C, scheme), made) * R / rows

    def rounding(self, tokens: float, columns: int, scheme: QuantScheme) -> float:
        """Seconds to round inputs [tokens, columns] as the kernels of a format do."""
        if (rounded := scheme.inputs(scheme.static_scale(1.0))) is None:
            return 0.0
        T = int(min(max(tokens, 1), TOKENS))

        def made() -> Run:
            x = self._random(T, columns)
            return lambda: rounded(x)

        return self._timed(("rounding", T, columns, scheme), made) * tokens / T

    def smoothing(self, tokens: int, rows: int, columns: int) -> float:
        """Seconds to fit smoothing factors to inputs [tokens, columns] and a weight [rows, columns]."""
        C = min(columns, FITTED)

        def made() -> Run:
            X_TC, W_RC = self._random(tokens // PART, C), self._random(rows // PART, C)
            unit_C, ones_U = torch.arange(C, device=self.device), torch.ones(C, device=self.device)
            return lambda: fitted(
                X_TC, W_RC, unit_C, ones_U, input_largest=127, weight_largest=127, group_size=C
            )

        return self._timed(("smoothing", tokens, rows, C), made) * PART * columns / C

    def learning(self, shape: tuple[int, int], scheme: QuantScheme) -> float:
        """Seconds of one training step of the codes, and scales or levels, of a weight [R, C] = `shape`,
        without its passes."""
        R, C = shape
        rows = min(R, ROWS)

        def made() -> Run:
            W_RC = self._random(rows, C)
            start = self._start(W_RC, scheme)

            def loss(rounded: Mapping[str, Tensor], step: int) -> Tensor:
                return rounded[""].sum()

            return lambda: learn({"": W_RC}, {"": start}, loss, steps=STEPS)

        return self._timed(("learning", rows, C, scheme), made) / STEPS * R / rows

    def _start(self, W_RC: Tensor, scheme: QuantScheme) -> Trainable:
        """A start for a timed training: nearest codes, with scales of 1 or with evenly spaced levels."""
        R, C = W_RC.shape
        if isinstance(scheme, CodebookScheme):
            rows, L = scheme.layout.sharing(R), scheme.layout.entries
            levels_GL = torch.linspace(-1, 1, L, device=self.device).repeat(-(-R // rows), 1)
            return InCodebooks(Palette(nearest(W_RC, levels_GL, rows), levels_GL, rows), scheme.layout.snap)
        grid = scheme.grid.to(self.device)
        scale_RG = torch.ones(R, C // scheme.columns((R, C)), device=self.device)
        return OnGrid(RoundedWeight(grid.nearest(W_RC), scale_RG), grid, scheme.snap)

    def removal(self, columns: int, units: int, gone: int) -> float:
        """Seconds to remove `gone` of `units` units one after another, which `columns` columns belong to."""
        C = min(columns, WIDEST)
        few = max(REMOVED + 1, units * C // columns)

        def made(count: int) -> Run:
            W_RC, H_CC = self._random(C, C), self._moments_of(C)
            unit_C = torch.arange(C, device=self.device) * few // C
            return lambda: remove(W_RC, H_CC, unit_C, few, least=few - count)

        start, some = (
            self._timed(("removal", C, few, count), partial(made, count)) for count in (0, REMOVED)
        )
        each = max(0.0, some - start) / REMOVED
        return start * (columns / C) ** 3 + each * gone * (columns / C) ** 2

    def reading(self, file: Path, size_bytes: float) -> float:
        """Seconds to read and hash so many bytes, at the rate of the beginning of a file."""

        def made() -> Run:
            return lambda: hashlib.sha256(_beginning(file)).digest()

        piece = min(PIECE, file.stat().st_size)
        return self._timed(("reading", file), made) * size_bytes / piece

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _moments_of(self, columns: int) -> Tensor:
        X_TC = self._random(2 * columns, columns)
        return X_TC.T @ X_TC / len(X_TC)

    def _timed(self, key: Hashable, made: Callable[[], Run]) -> float:
        """Seconds of what `made` returns: the fastest of several runs."""
        if key not in self.known:
            run, times = made(), list[float]()
            while len(times) < RUNS and sum(times) < MOMENT_S:
                times.append(self._once(run))
            self.known[key] = IN_A_STAGE * min(times)
        return self.known[key]

    def _once(self, run: Run) -> float:
        if self.device.type == "cuda":
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - start
        start = time.thread_time()  # of the processor: other processes do not count
        run()
        return time.thread_time() - start


class UntimedMachine(Machine):
    """A machine on which nothing is timed and no operation takes time: for estimates of bytes alone."""

    def _timed(self, key: Hashable, made: Callable[[], Run]) -> float:
        return 0.0


@cache
def machine_of(device: torch.device) -> Machine:
    """The machine of a device; what was timed on it is known to all plans of the process."""
    return Machine(device)


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(PIECE)
