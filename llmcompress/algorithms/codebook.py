"""Codebook quantisation: weights share a few values; values and codes are chosen for the least output error.

`rows` adjacent rows of a linear share one codebook of L levels; the last group may have fewer rows. If `rows`
is the number of rows, the whole linear has one codebook. Levels start from a weighted k-means. Then codes and
levels are optimised in turn to minimise tr(E H E^T): codes by GPTQ and by coordinate descent as on any grid,
each row in its own codebook, and levels by least squares for fixed codes. There are no scales: a level is the
weight itself. G codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.algorithms import gptq as columnwise
from llmcompress.algorithms.codebook_loops import PLAIN, CodebookLoops, Product, gathered, places
from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.hessian import ordered_factor

Snap = Callable[[Tensor], Tensor]  # levels [G, L] -> the nearest storable levels
ENTRIES = (4, 8, 16, 256)
PIECE = 2**23  # weights sorted at a time: 300 MB


@dataclass(frozen=True)
class Palette:
    """A linear with shared values: index_RC int64 [R, C] into the levels levels_GL [G, L], ascending, of the
    codebook of each row."""

    index_RC: Tensor
    levels_GL: Tensor
    rows: int

    def weight(self) -> Tensor:
        """The weight [R, C] that the codes stand for."""
        return look_up(self.index_RC, self.levels_GL, self.rows)


@dataclass(frozen=True)
class Codebooks(Grid):
    """The levels of all codebooks in one table, as a grid for columns [R] whose rows each use their own part
    of it.

    `levels` [G L], `middles` [G, L - 1]; `codes` [G L] are the indices within a codebook. An index counts
    through the whole table. `rows` adjacent rows share a codebook; `first` is the row at which the rows that
    are asked about begin.
    """

    rows: int
    first: int = 0

    @classmethod
    def of(cls, levels_GL: Tensor, rows: int) -> Codebooks:
        """The grid of ascending levels [G, L], each codebook shared by `rows` rows."""
        G, L = levels_GL.shape
        middles = (levels_GL[:, 1:] + levels_GL[:, :-1]) / 2
        return cls(levels_GL.flatten(), middles, torch.arange(L, device=levels_GL.device).repeat(G), rows)

    def to(self, device: torch.device | str) -> Codebooks:
        """The same grid on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("levels", "middles", "codes")}
        return replace(self, **moved)

    def from_row(self, row: int) -> Codebooks:
        """The grid of the rows from `row` on."""
        return replace(self, first=self.first + row)

    def nearest(self, x: Tensor) -> Tensor:
        """Index (int64, into `levels`) of the level nearest to the weights of each row, [R] or [R, C]."""
        x_RC = x[:, None] if x.dim() == 1 else x
        book_R = self.books(len(x_RC))
        own_RC = torch.searchsorted(self.middles[book_R], x_RC.contiguous())
        return (own_RC + book_R[:, None] * self.entries).reshape(x.shape)

    @property
    def entries(self) -> int:
        """The number of levels of a codebook."""
        return self.middles.shape[1] + 1

    def books(self, R: int) -> Tensor:
        """The codebook of each row, int64 [R]."""
        return (self.first + torch.arange(R, device=self.levels.device)) // self.rows

    def offsets(self, R: int) -> Tensor:
        """Where the codebook of each row begins in the table, int64 [R]."""
        return self.books(R) * self.entries


def look_up(index_RC: Tensor, levels_GL: Tensor, rows: int) -> Tensor:
    """Return the level of each weight, [R, C], from codebooks that `rows` adjacent rows share."""
    return levels_GL.flatten()[places(index_RC, rows, levels_GL.shape[1])]


def nearest(W_RC: Tensor, levels_GL: Tensor, rows: int) -> Tensor:
    """Return the index (int64) [R, C] of the level nearest to each weight, in the ascending levels of its
    row."""
    grid = Codebooks.of(levels_GL, rows)
    return grid.codes[grid.nearest(W_RC)]


def gptq(
    W_RC: Tensor,
    H_CC: Tensor,
    levels_GL: Tensor,
    rows: int,
    *,
    damp: float = 0.01,
    factor: tuple[Tensor, Tensor] | None = None,
    loops: CodebookLoops = PLAIN,
) -> Tensor:
    """Return the index [R, C] of the level that each weight takes, found as `algorithms.gptq.gptq` does on a
    single grid. `factor` is the `ordered_factor` of H, if it is known already.

    Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Differs: each row has the levels of its
    codebook.
    """
    grid, ones = Codebooks.of(levels_GL, rows), W_RC.new_ones(len(W_RC), 1)
    found = columnwise.gptq(W_RC, H_CC, ones, grid, damp=damp, factor=factor, loops=loops.columns)
    return grid.codes[found]


def descend(
    W_RC: Tensor,
    H_CC: Tensor,
    index_RC: Tensor,
    levels_GL: Tensor,
    rows: int,
    *,
    loops: CodebookLoops = PLAIN,
) -> Tensor:
    """Return the index [R, C] after one pass that moves each column to its best level, all others fixed.

    tr(E H E^T) never rises.

    Source: the coordinate descent of QuantEase, Behdin et al. 2023, arXiv:2309.01885, Algorithm 2, in
    codebooks.
    """
    grid, ones = Codebooks.of(levels_GL, rows), W_RC.new_ones(len(W_RC), 1)
    start = index_RC + grid.offsets(len(W_RC))[:, None]
    return grid.codes[columnwise.descend(W_RC, H_CC, start, ones, grid, loops=loops.columns)]


def kmeans(
    W_RC: Tensor,
    h_C: Tensor,
    entries: int,
    rows: int,
    *,
    steps: int = 100,
    loops: CodebookLoops = PLAIN,
) -> Tensor:
    """Return ascending levels [G, entries] near the minimum of the sum of h (W - level)^2 over each group of
    `rows` rows.

    A group with no more than `entries` distinct values gets these values as levels, the largest repeated. A
    column without input counts as if its second moment were a millionth of the mean.

    Source: SqueezeLLM, Kim et al. 2023, arXiv:2306.07629, equation 4. Differs: weighted by the second moments
    of the inputs. For up to 16 levels k-means starts from the best clusters of 128 bins, found by dynamic
    programming, which leaves it within 1 % of the minimum. For 256 levels it starts from as many bins,
    without such a guarantee.
    """
    floor = float(h_C.mean()) * 1e-6
    h_C = h_C.clamp_min(floor) if floor > 0 else torch.ones_like(h_C)
    whole = len(W_RC) // rows * rows
    parts = [*W_RC[:whole].split(max(1, PIECE // (rows * len(h_C))) * rows), W_RC[whole:]]
    groups = [part.reshape(-1, min(rows, len(part)) * len(h_C)) for part in parts if len(part)]
    return torch.cat([loops.cluster(W_GN, h_C.double(), entries, steps) for W_GN in groups])


def fit_levels(
    W_RC: Tensor,
    H_CC: Tensor,
    index_RC: Tensor,
    levels_GL: Tensor,
    rows: int,
    *,
    steps: int = 8,
    pull_RC: Tensor | None = None,
    loops: CodebookLoops = PLAIN,
) -> Tensor:
    """Return levels [G, L] that minimise tr((W - Q) H (W - Q)^T) for fixed codes, each codebook by itself.

    The levels returned need not ascend. The normal equations are solved by conjugate gradients from the given
    levels, preconditioned by the total second moment of the weights that take each level. So a step costs one
    product with H for any L, or one with the normal matrices if `loops` know them; no step raises the
    objective, and levels that no weight takes do not change. `pull_RC` is (W - Q) H, if it is known already.
    """
    place_RC = places(index_RC, rows, levels_GL.shape[1])
    if pull_RC is None:
        pull_RC = (W_RC - levels_GL.flatten()[place_RC]) @ H_CC
    weighs = gathered(H_CC.diagonal().expand_as(W_RC), place_RC, levels_GL.shape)
    slope_GL = gathered(pull_RC, place_RC, levels_GL.shape)
    bends = loops.normal_product(H_CC, index_RC, rows, levels_GL.shape[1])
    return solve_levels(levels_GL, slope_GL, weighs, bends, steps)


def solve_levels(
    levels_GL: Tensor, slope_GL: Tensor, weighs_GL: Tensor, bends: Product, steps: int, *, joint: bool = False
) -> Tensor:
    """Return levels [G, L] after `steps` of conjugate gradients, each codebook by itself or all `joint`.

    `slope_GL` is minus half the gradient at the given levels, `weighs_GL` the diagonal that preconditions,
    and `bends` multiplies by the normal matrices. Levels that do not stay finite are left as they were.
    """
    over = (0, 1) if joint else (1,)
    unit = torch.where(weighs_GL > 0, 1 / weighs_GL, 0)
    found, slope, ahead = levels_GL, slope_GL, unit * slope_GL
    size = (slope * ahead).sum(over, keepdim=True)
    for _ in range(steps):
        turn = bends(ahead)
        bend = (ahead * turn).sum(over, keepdim=True)
        length = torch.where(bend > 0, size / bend, 0)
        found, slope = found + length * ahead, slope - length * turn
        before, size = size, (slope * unit * slope).sum(over, keepdim=True)
        ahead = unit * slope + torch.where(before > 0, size / before, 0) * ahead
    return torch.where(torch.isfinite(found).all(over, keepdim=True), found, levels_GL)


def losses(W_RC: Tensor, palette: Palette, H_CC: Tensor) -> Tensor:
    """Return tr(E H E^T) over the rows of each codebook, [G]."""
    return _losses(W_RC, palette, H_CC)[0]


def _losses(W_RC: Tensor, palette: Palette, H_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Return tr(E H E^T) over the rows of each codebook, [G], and E H [R, C]."""
    E_RC = W_RC - palette.weight()
    pull_RC = E_RC @ H_CC
    lost_R = E_RC.mul_(pull_RC).sum(1)
    lost_G = pad(lost_R, (0, -len(lost_R) % palette.rows)).reshape(-1, palette.rows).sum(1).clamp_min(0)
    return lost_G, pull_RC


def solve_codebook(
    W_RC: Tensor,
    H_CC: Tensor,
    entries: int,
    rows: int,
    *,
    snap: Snap | None = None,
    rounds: int = 3,
    damp: float = 0.01,
    factor: tuple[Tensor, Tensor] | None = None,
    loops: CodebookLoops = PLAIN,
) -> Palette:
    """Return codes and levels of W under the second moments H of its inputs; `snap` makes levels storable.
    `factor` is the `ordered_factor` of H, if it is known already.

    Each codebook is the best one found, by tr(E H E^T) under storable levels: first the nearest levels of
    k-means, then the result of GPTQ, then that of each round of fitted levels and descended codes. So it
    never loses more than k-means, and loses nothing where a group of rows has at most `entries` distinct
    values, all of them storable. Errors: ValueError.

    Source: SqueezeLLM's k-means (arXiv:2306.07629), GPTQ (arXiv:2210.17323), then alternating least squares.
    Differs: the levels for GPTQ are weighted by 1 / [H^-1]_cc, the part of a column's input that the other
    columns cannot make up for.
    """
    if entries not in ENTRIES or rows < 1:
        raise ValueError(
            f"no codebooks of {entries} levels for {rows} rows; levels are {', '.join(map(str, ENTRIES))}"
        )
    rows = min(rows, len(W_RC))
    snap = snap or (lambda levels_GL: levels_GL)
    order_C, U_CC = factor = factor or ordered_factor(H_CC, damp)
    levels = snap(kmeans(W_RC, H_CC.diagonal(), entries, rows, loops=loops))
    best = Palette(nearest(W_RC, levels, rows), levels, rows)
    least = losses(W_RC, best, H_CC)
    own_C = torch.empty_like(order_C, dtype=U_CC.dtype)
    own_C[order_C] = 1 / U_CC.square().sum(0)
    levels = snap(kmeans(W_RC, own_C, entries, rows, loops=loops))
    index = gptq(W_RC, H_CC, levels, rows, damp=damp, factor=factor, loops=loops)
    new = Palette(index, levels, rows)
    for _ in range(rounds):
        lost, pull_RC = _losses(W_RC, new, H_CC)
        best, least = _better(new, lost, best, least)
        fitted = fit_levels(W_RC, H_CC, new.index_RC, new.levels_GL, rows, pull_RC=pull_RC, loops=loops)
        levels, order = snap(fitted).sort(dim=1, stable=True)
        index = look_up(new.index_RC, order.argsort(dim=1), rows)
        new = Palette(descend(W_RC, H_CC, index, levels, rows, loops=loops), levels, rows)
    return _better(new, losses(W_RC, new, H_CC), best, least)[0]


def solve_nearest(
    W_RC: Tensor, entries: int, rows: int, *, snap: Snap, loops: CodebookLoops = PLAIN
) -> Palette:
    """Return the levels of k-means on the weights alone, and the nearest of them for each weight."""
    rows = min(rows, len(W_RC))
    levels = snap(kmeans(W_RC, W_RC.new_ones(W_RC.shape[1]), entries, rows, loops=loops))
    return Palette(nearest(W_RC, levels, rows), levels, rows)


def _better(new: Palette, lost: Tensor, old: Palette, least: Tensor) -> tuple[Palette, Tensor]:
    """Return the codebooks with the lower loss [G], the old one if equal, and their losses."""
    won = lost < least
    index = torch.where(
        won.repeat_interleave(new.rows)[: len(new.index_RC), None], new.index_RC, old.index_RC
    )
    levels = torch.where(won[:, None], new.levels_GL, old.levels_GL)
    return Palette(index, levels, new.rows), torch.where(won, lost, least)
