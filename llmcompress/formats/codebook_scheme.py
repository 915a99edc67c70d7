"""Codebooks as a solver sees them: levels that are solved for with the indices, and no scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.algorithms.codebook import Palette, solve_codebook, solve_nearest
from llmcompress.algorithms.hessian import Factors, retarget
from llmcompress.algorithms.learned_codebook import InCodebooks
from llmcompress.algorithms.learned_rounding import Trainable
from llmcompress.algorithms.overflow import require_within
from llmcompress.algorithms.two_sided import damped_blocks
from llmcompress.algorithms.two_sided_codebook import solve_together
from llmcompress.formats import registry
from llmcompress.formats.base import DTYPES, Inputs
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.solution import Solution
from llmcompress.kernels import codebook_loops


@dataclass(frozen=True)
class CodebookScheme:
    """Indices into a small codebook, whose levels are solved for with the indices. There are no scales."""

    layout: CodebookLayout
    row_bits = 0
    input_largest = None

    @property
    def format(self) -> str:
        """The name in reports."""
        return self.layout.name

    @property
    def bits(self) -> float:
        """Bits of an index, levels excluded."""
        return self.layout.index_bits

    @property
    def weight_largest(self) -> int:
        """Steps from zero to the largest level, as if the levels were even."""
        return max(1, self.layout.entries // 2 - 1)

    def bits_of(self, shape: tuple[int, int]) -> float:
        """Bits per weight on disk of a linear [R, C], levels included."""
        return self.layout.bits(shape)

    def columns(self, shape: tuple[int, ...]) -> int:
        """How many columns share a codebook: all."""
        return shape[1]

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] is not stored in this format, or None."""
        return self.layout.refusal(shape)

    def solve(
        self,
        W_RC: Tensor,
        factors: Factors,
        input_scale: float | None = None,
        F_RB: Tensor | None = None,
    ) -> Solution:
        """Solve for indices and levels of a weight under the second moments of its inputs, against the full
        model's outputs if the moments know them.

        With the Fisher matrix `F_RB` of the linear's outputs, in blocks as `two_sided.add_blocks` leaves it,
        both then go on to the least loss under both. Errors: Overflow for weights beyond the levels' dtype.
        """
        require_within(W_RC, DTYPES[self.layout.dtype], "weights")
        target_RC, H_CC = retarget(W_RC.float(), factors.moments, factors=factors), factors.moments.H_CC
        palette = solve_codebook(
            target_RC,
            H_CC,
            self.layout.entries,
            self.layout.sharing(len(W_RC)),
            snap=self.layout.snap,
            factor=factors.ordered,
            loops=codebook_loops.LOOPS,
        )
        if F_RB is not None:
            F_RB, snap = damped_blocks(F_RB), self.layout.snap
            palette = solve_together(target_RC, H_CC, F_RB, palette, snap=snap, loops=codebook_loops.LOOPS)
        return Solution(CodebookWeight.of(palette, self.layout))

    def trainable(self, solution: Solution, device: torch.device) -> InCodebooks:
        """A solution of this scheme as a training takes it."""
        stored = solution.stored
        assert isinstance(stored, CodebookWeight)
        index_RC, levels_GL = stored.codes_RC.to(device).long(), stored.levels_GL.to(device).float()
        return InCodebooks(Palette(index_RC, levels_GL, self.layout.sharing(len(index_RC))), self.layout.snap)

    def trained(self, end: Trainable, input_scale: float | None = None) -> Solution:
        """The solution that a training ended in."""
        assert isinstance(end, InCodebooks)
        return Solution(CodebookWeight.of(end.palette, self.layout))

    def received(self, parts: Mapping[str, Tensor], columns: int, input_scale: float | None) -> Solution:
        """Another process's solution for a linear of so many columns, from its parts."""
        return Solution(self.read({name: part.cpu() for name, part in parts.items()}, columns))

    def inputs(self, input_scale: float | None = None) -> Inputs | None:
        """How the kernel rounds the inputs of a linear: it does not round them."""
        return None

    def static_scale(self, top: float) -> float | None:
        """The static scale for inputs whose largest magnitude is `top`, or None if the scheme has no static
        scale."""
        return None

    def nearest(self, W_RC: Tensor, input_scale: float | None = None) -> registry.StoredWeight:
        """The levels of k-means on the weights alone, and the nearest of them. Errors: Overflow for weights
        beyond the levels' dtype."""
        require_within(W_RC, DTYPES[self.layout.dtype], "weights")
        rows = self.layout.sharing(len(W_RC))
        palette = solve_nearest(
            W_RC.float(), self.layout.entries, rows, snap=self.layout.snap, loops=codebook_loops.LOOPS
        )
        return CodebookWeight.of(palette, self.layout)

    def read(self, parts: Mapping[str, Tensor], columns: int) -> registry.StoredWeight:
        """Read the weight back from its tensors on disk."""
        return self.layout.read(parts, columns)
