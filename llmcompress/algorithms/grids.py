"""The grids that weights are rounded to, as sorted levels: tables of 4-bit formats, and integers.

A code in a checkpoint is an index into bitsandbytes' own table, which for FP4 is not sorted and holds zero
twice. Solvers need sorted, distinct levels, where the nearest one is a search and "one code up" has a
meaning. `Grid` keeps both. Integers are levels from -1 to 1 too, so that a scale is the absolute maximum on
every grid; their codes are the integers. Only llama.cpp's levels do not reach 1: they are its integers over a
power of two, so that level times scale is exactly its integer times its own scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

GridFormat = Literal["nf4", "fp4", "int4", "int8", "q4_0", "iq4_nl"]
LARGEST = {"int4": 7, "int8": 127}  # code of the level 1; the integer grids are symmetric

# Quantiles of a normal distribution scaled to [-1, 1], from QLoRA (arXiv:2305.14314, appendix E), as float32
# in bitsandbytes.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Sign, two exponent bits, one mantissa bit, over 12: bitsandbytes' own FP4 in its own code order; codes 8 to
# 15 are negative.
FP4_HALF = (0.0, 0.0625 / 12, 8.0 / 12, 12.0 / 12, 4.0 / 12, 6.0 / 12, 2.0 / 12, 3.0 / 12)


# The integers that llama.cpp multiplies its scales by, in code order; those of IQ4_NL are its kvalues_iq4nl.
GGML = {
    "q4_0": tuple(range(-8, 8)),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
GGML_UNIT = {"q4_0": 8, "iq4_nl": 128}  # the integer of the level 1

SEARCHED = 16  # a larger `largest` is rounded to, which takes a ninth of the time of a search


@dataclass(frozen=True)
class Grid:
    """Sorted distinct levels [L] of a format, the L - 1 midpoints between them, and the code [L] of each
    level."""

    levels: Tensor
    middles: Tensor
    codes: Tensor

    @cached_property
    def largest(self) -> int:
        """The integer L of an even grid, whose levels are -L / L to L / L; 0 of any other."""
        half = len(self.levels) // 2
        even = len(self.levels) % 2 == 1 and torch.equal(self.levels.cpu(), even_levels(half))
        return half if even else 0

    def to(self, device: torch.device | str) -> Grid:
        """The same grid on a device."""
        if self.levels.device == torch.device(device):
            return self
        return Grid(self.levels.to(device), self.middles.to(device), self.codes.to(device))

    def from_row(self, row: int) -> Grid:
        """The grid of the rows from `row` on: the same one, as all rows have one grid here."""
        return self

    def codes_of(self, index: Tensor) -> Tensor:
        """The codes of level indices, on the CPU; looked up where the indices are, as codes are smaller."""
        return self.codes.to(index.device)[index].cpu()

    def nearest(self, x: Tensor) -> Tensor:
        """Return the index (int64, into `levels`) of the level nearest to each x, with x in units of the
        scale."""
        if self.largest <= SEARCHED or x.dtype != torch.float32:
            return torch.bucketize(x.contiguous(), self.middles)
        # halves go down, as they do above; NaN to the last level
        index = (x * self.largest).sub_(0.5).ceil_().clamp_(-self.largest, self.largest)
        return index.nan_to_num_(self.largest).add_(self.largest).long()

    def position(self, x: Tensor) -> Tensor:
        """Return where x lies between the levels, as a fractional index: 3.25 is a quarter of the way from
        level 3 to level 4.

        Rounding a position rounds x to the nearest level. One unit is the local spacing of the codes,
        everywhere on the grid. x beyond the outermost levels is clamped to them.
        """
        x = x.clamp(self.levels[0], self.levels[-1])
        upper = torch.bucketize(x.contiguous(), self.levels).clamp(1, len(self.levels) - 1)
        below, above = self.levels[upper - 1], self.levels[upper]
        return (upper - 1) + (x - below) / (above - below)

    def spacing(self, index: Tensor) -> Tensor:
        """Return the mean distance from the level at `index` to its neighbours, in units of the scale."""
        above, below = (index + 1).clamp(max=len(self.levels) - 1), (index - 1).clamp(min=0)
        return (self.levels[above] - self.levels[below]) / (above - below)


def even_levels(largest: int) -> Tensor:
    """The multiples of 1 / largest from -1 to 1, float32 [2 largest + 1], on the CPU."""
    return torch.arange(-largest, largest + 1).float() / largest


@cache
def grid(format: GridFormat) -> Grid:
    """Return the grid of a format, on the CPU."""
    if format in LARGEST:
        codes = torch.arange(-LARGEST[format], LARGEST[format] + 1)
        levels = even_levels(LARGEST[format])
        return Grid(levels, (levels[1:] + levels[:-1]) / 2, codes.to(torch.int8))
    if format in GGML:
        levels = torch.tensor(GGML[format], dtype=torch.float32) / GGML_UNIT[format]
        codes = torch.arange(len(levels), dtype=torch.uint8)
        return Grid(levels, (levels[1:] + levels[:-1]) / 2, codes)
    table = torch.tensor(
        NF4 if format == "nf4" else (*FP4_HALF, *(-x for x in FP4_HALF)), dtype=torch.float32
    )
    levels, where = torch.unique(table, return_inverse=True)
    codes = torch.empty(len(levels), dtype=torch.uint8)
    # if two codes have one level (0 and -0 of FP4), the lower code is used
    for code in range(len(table) - 1, -1, -1):
        codes[where[code]] = code
    return Grid(levels, (levels[1:] + levels[:-1]) / 2, codes)
