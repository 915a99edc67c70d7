"""What formats with a grid have in common for a solver: levels times scales, and each scale is for a group of
columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.hessian import Factors, retarget
from llmcompress.algorithms.learned_rounding import OnGrid, Trainable
from llmcompress.algorithms.quantize_weight import RoundedWeight, solve
from llmcompress.formats import registry
from llmcompress.formats.base import Inputs
from llmcompress.formats.solution import GridSolution, Solution
from llmcompress.kernels import column_loops


class GridScheme(ABC):
    """A format whose weights are levels of one grid times scales, each shared by a group of columns."""

    row_bits = 32  # on disk, which `bits` leaves out: a scale

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The levels, on the CPU."""

    @property
    @abstractmethod
    def signs(self) -> tuple[bool, ...]:
        """Whether scales may be negative; if both may be, both are tried."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits per weight on disk."""

    @abstractmethod
    def columns(self, shape: tuple[int, ...]) -> int:
        """How many columns share a scale."""

    @abstractmethod
    def snap(self, scale_RG: Tensor) -> Tensor:
        """The scales as they will be read back from disk."""

    @abstractmethod
    def store(self, result: RoundedWeight, input_scale: float | None = None) -> registry.StoredWeight:
        """Return the stored weight, from codes and scales that are not snapped yet."""

    def bits_of(self, shape: tuple[int, int]) -> float:
        """Bits per weight on disk of a linear [R, C], without `row_bits`."""
        return self.bits

    def solve(
        self,
        W_RC: Tensor,
        factors: Factors,
        input_scale: float | None = None,
        F_RB: Tensor | None = None,
    ) -> Solution:
        """Solve for codes and scales of a weight under the second moments of its inputs, against the full
        model's outputs if the moments know them.

        With the Fisher matrix `F_RB` of the linear's outputs, in blocks as `two_sided.add_blocks` leaves it,
        the codes are those of the least loss under both.
        """
        result = solve(
            retarget(W_RC.float(), factors.moments, factors=factors),
            factors.moments.H_CC,
            self.grid.to(W_RC.device),
            self.columns(tuple(W_RC.shape)),
            snap=self.snap,
            signs=self.signs,
            factor=factors.ordered,
            F_RB=F_RB,
            loops=column_loops.LOOPS,
        )
        return self.solution(result, input_scale)

    def solution(self, result: RoundedWeight, input_scale: float | None = None) -> GridSolution:
        """The solution of codes and scales that are not snapped yet."""
        return GridSolution(
            self.store(result, input_scale),
            # those of a whole layer are in memory at once, and a grid of all formats has at most 256 levels
            RoundedWeight(result.index_RC.to(torch.uint8), self.snap(result.scale_RG)),
            self.grid.to(result.index_RC.device),
            result.scale_RG,
        )

    def trainable(self, solution: Solution, device: torch.device) -> OnGrid:
        """A solution of this scheme as a training takes it."""
        assert isinstance(solution, GridSolution)
        return OnGrid(solution.rounded, solution.grid, self.snap)

    def trained(self, end: Trainable, input_scale: float | None = None) -> Solution:
        """The solution that a training ended in."""
        assert isinstance(end, OnGrid)
        return self.solution(end.rounded, input_scale)

    def inputs(self, input_scale: float | None = None) -> Inputs | None:
        """How the kernel rounds the inputs of a linear: None if it does not round them."""
        return None

    def static_scale(self, top: float) -> float | None:
        """The static scale for inputs whose largest magnitude is `top`, or None if the scheme has no static
        scale."""
        return None

    def received(self, parts: Mapping[str, Tensor], columns: int, input_scale: float | None) -> Solution:
        """Another process's solution for a linear of so many columns, from its parts."""
        return self.solution(RoundedWeight(parts["index"].long(), parts["scale"]), input_scale)
