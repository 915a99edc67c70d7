"""Codebook quantisation: weights share a few values; values and codes are chosen for the least output error.

`rows` adjacent rows of a linear share one codebook of L levels; the last group may have fewer rows. If `rows`
is the number of rows, the whole linear has one codebook. Levels start from a weighted k-means. Then codes and
levels are optimised in turn to minimise tr(E H E^T): codes by GPTQ and by coordinate descent as on any grid,
each row in its own codebook, and levels by least squares for fixed codes. There are no scales: a level is the
weight itself. G codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.algorithms import gptq as columnwise
from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.hessian import inverse_factor

Snap = Callable[[Tensor], Tensor]  # levels [G, L] -> the nearest storable levels
ENTRIES = (4, 8, 16, 256)
BINS = 128  # of sorted weights, which are then clustered
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
    through the whole table.
    """

    rows: int

    @classmethod
    def of(cls, levels_GL: Tensor, rows: int) -> Codebooks:
        """The grid of ascending levels [G, L], each codebook shared by `rows` rows."""
        G, L = levels_GL.shape
        middles = (levels_GL[:, 1:] + levels_GL[:, :-1]) / 2
        return cls(levels_GL.flatten(), middles, torch.arange(L, device=levels_GL.device).repeat(G), rows)

    def nearest(self, x: Tensor) -> Tensor:
        """Index (int64, into `levels`) of the level nearest to the weights of each row, [R] or [R, C]."""
        x_RC = x[:, None] if x.dim() == 1 else x
        x_GN = pad(x_RC, (0, 0, 0, -len(x) % self.rows)).reshape(len(self.middles), -1)
        own_RC = torch.searchsorted(self.middles, x_GN).reshape(-1, x_RC.shape[1])[: len(x)]
        return (own_RC + self.offsets(len(x))[:, None]).reshape(x.shape)

    def offsets(self, R: int) -> Tensor:
        """Where the codebook of each row begins in the table, int64 [R]."""
        return torch.arange(R, device=self.levels.device) // self.rows * (self.middles.shape[1] + 1)


def look_up(index_RC: Tensor, levels_GL: Tensor, rows: int) -> Tensor:
    """Return the level of each weight, [R, C], from codebooks that `rows` adjacent rows share."""
    offsets_R = torch.arange(len(index_RC), device=levels_GL.device) // rows * levels_GL.shape[1]
    return levels_GL.flatten()[index_RC + offsets_R[:, None]]


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
) -> Tensor:
    """Return the index [R, C] of the level that each weight takes, found as `algorithms.gptq.gptq` does on a
    single grid. `factor` is the `ordered_factor` of H, if it is known already.

    Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Differs: each row has the levels of its
    codebook.
    """
    grid, ones = Codebooks.of(levels_GL, rows), W_RC.new_ones(len(W_RC), 1)
    return grid.codes[columnwise.gptq(W_RC, H_CC, ones, grid, damp=damp, factor=factor)]


def descend(W_RC: Tensor, H_CC: Tensor, index_RC: Tensor, levels_GL: Tensor, rows: int) -> Tensor:
    """Return the index [R, C] after one pass that moves each column to its best level, all others fixed.

    tr(E H E^T) never rises.

    Source: the coordinate descent of QuantEase, Behdin et al. 2023, arXiv:2309.01885, Algorithm 2, in
    codebooks.
    """
    grid, ones = Codebooks.of(levels_GL, rows), W_RC.new_ones(len(W_RC), 1)
    start = index_RC + grid.offsets(len(W_RC))[:, None]
    return grid.codes[columnwise.descend(W_RC, H_CC, start, ones, grid)]


def kmeans(W_RC: Tensor, h_C: Tensor, entries: int, rows: int, *, steps: int = 100) -> Tensor:
    """Return ascending levels [G, entries] near the minimum of the sum of h (W - level)^2 over each group of
    `rows` rows.

    A group with no more than `entries` distinct values gets these values as levels, the largest repeated. A
    column without input counts as if its second moment were a millionth of the mean.

    Source: SqueezeLLM, Kim et al. 2023, arXiv:2306.07629, equation 4. Differs: weighted by the second moments
    of the inputs. For up to 16 levels k-means starts from the best clusters of BINS bins, found by dynamic
    programming, which leaves it within 1 % of the minimum. For 256 levels it starts from as many bins,
    without such a guarantee.
    """
    floor = float(h_C.mean()) * 1e-6
    h_C = h_C.clamp_min(floor) if floor > 0 else torch.ones_like(h_C)
    whole = len(W_RC) // rows * rows
    parts = [*W_RC[:whole].split(max(1, PIECE // (rows * len(h_C))) * rows), W_RC[whole:]]
    return torch.cat(
        [_kmeans(part, h_C, entries, min(rows, len(part)), steps) for part in parts if len(part)]
    )


def _kmeans(W_RC: Tensor, h_C: Tensor, entries: int, rows: int, steps: int) -> Tensor:
    x_GN, order = W_RC.reshape(-1, rows * len(h_C)).sort(dim=1, stable=True)
    N = x_GN.shape[1]
    if entries >= N:
        return _distinct(x_GN, x_GN[:, -1:].expand(-1, entries))
    h_GN = h_C.double()[order % len(h_C)]
    sums = [pad((h_GN * x_GN.double() ** power).cumsum(1), (1, 0)) for power in range(3)]
    if entries < BINS:
        edges = _bins(x_GN, h_GN, min(BINS, N))
        at_once = 8 if W_RC.device.type == "cpu" else 64  # their costs stay in the cache of a core
        mass, moment, square = (part.gather(1, edges).split(at_once) for part in sums)
        cuts = [_best_cuts(*part, entries) for part in zip(mass, moment, square, strict=True)]
        edges = edges.gather(1, torch.cat(cuts))
    else:
        edges = _bins(x_GN, h_GN, entries)
    levels = x_GN.gather(1, edges[:, :-1]).double()
    for _ in range(steps):
        inside, total = (part.gather(1, edges).diff(dim=1) for part in sums[:2])
        moved = torch.where(inside > 0, total / inside, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
        borders = torch.searchsorted(x_GN, ((levels[:, 1:] + levels[:, :-1]) / 2).to(x_GN.dtype))
        edges = pad(pad(borders, (1, 0)), (0, 1), value=N)
    return _distinct(x_GN, levels.to(x_GN.dtype).sort(dim=1).values)


def _bins(x_GN: Tensor, h_GN: Tensor, bins: int) -> Tensor:
    """Return where bins of sorted weights begin, and the end of the last, int64 [G, bins + 1]. No bin is
    empty.

    Bins are as dense as the cube root of the density, as the levels of a fine quantiser are (Panter and Dite
    1951).
    """
    N, place = x_GN.shape[1], torch.arange(1, bins, device=x_GN.device)
    density = (h_GN[:, 1:] + h_GN[:, :-1]) / 2  # times the width of an interval
    reach = (density.pow(1 / 3) * x_GN.diff(dim=1).double().pow(2 / 3)).cumsum(1)
    found = torch.searchsorted(reach, reach[:, -1:] * place / bins) + 1
    found = ((found - place).cummax(1).values.clamp(0, N - bins)) + place
    return pad(pad(found, (1, 0)), (0, 1), value=N)


def _best_cuts(mass: Tensor, moment: Tensor, square: Tensor, entries: int) -> Tensor:
    """Return where the clusters of bins with the least loss begin, and the end of the last, int64 [G, entries
    + 1].

    The arguments are running sums [G, bins + 1].

    Source: the dynamic programme for k-means in one dimension, Wang and Song 2011, Ckmeans.1d.dp.
    """
    mass, moment, square = (part[:, None] - part[:, :, None] for part in (mass, moment, square))
    cost = (square - moment.square() / mass).clamp_min(0)  # [G, first edge, last edge] of a cluster
    bins = cost.shape[1] - 1
    cost.masked_fill_(torch.ones_like(cost[0], dtype=torch.bool).tril(), torch.inf)
    cost = (cost / cost[:, :1, -1:].clamp_min(1e-300)).float()
    least, back = cost[:, 0], []
    for _ in range(entries - 1):
        least, last = (least[:, :, None] + cost).min(1)
        back.append(last)
    cuts = [torch.full_like(back[0][:, :1], bins)]
    for last in reversed(back):
        cuts.append(last.gather(1, cuts[-1]))
    return torch.cat([torch.zeros_like(cuts[0]), *reversed(cuts)], 1)


def _distinct(x_GN: Tensor, levels_GL: Tensor) -> Tensor:
    """Return the levels; for a group with at most L distinct values, return these values instead."""
    L = levels_GL.shape[1]
    place = pad((x_GN.diff(dim=1) != 0).cumsum(1), (1, 0))
    few = place[:, -1:] < L
    values = x_GN[:, -1:].repeat(1, L).scatter(1, place.clamp_max(L - 1), x_GN)
    return torch.where(few, values, levels_GL)


def fit_levels(
    W_RC: Tensor, H_CC: Tensor, index_RC: Tensor, levels_GL: Tensor, rows: int, *, steps: int = 8
) -> Tensor:
    """Return levels [G, L] that minimise tr((W - Q) H (W - Q)^T) for fixed codes, each codebook by itself.

    The levels returned need not ascend. The normal equations are solved by conjugate gradients from the given
    levels, preconditioned by the total second moment of the weights that take each level. So a step costs one
    product with H for any L, no step raises the objective, and levels that no weight takes do not change.
    """
    place_RC = index_RC + (torch.arange(len(W_RC), device=W_RC.device) // rows * levels_GL.shape[1])[:, None]

    def gathered(value_RC: Tensor) -> Tensor:
        sums = torch.zeros_like(levels_GL).flatten().index_add_(0, place_RC.flatten(), value_RC.flatten())
        return sums.view_as(levels_GL)

    weighs = gathered(H_CC.diagonal().expand_as(W_RC))
    unit = torch.where(weighs > 0, 1 / weighs, 0)
    found, slope = levels_GL, gathered((W_RC - levels_GL.flatten()[place_RC]) @ H_CC)
    ahead = unit * slope
    size = (slope * ahead).sum(1, keepdim=True)
    for _ in range(steps):
        turn = gathered(ahead.flatten()[place_RC] @ H_CC)
        bend = (ahead * turn).sum(1, keepdim=True)
        length = torch.where(bend > 0, size / bend, 0)
        found, slope = found + length * ahead, slope - length * turn
        before, size = size, (slope * unit * slope).sum(1, keepdim=True)
        ahead = unit * slope + torch.where(before > 0, size / before, 0) * ahead
    return torch.where(torch.isfinite(found).all(1, keepdim=True), found, levels_GL)


def losses(W_RC: Tensor, palette: Palette, H_CC: Tensor) -> Tensor:
    """Return tr(E H E^T) over the rows of each codebook, [G]."""
    E_RC = W_RC - palette.weight()
    lost_R = ((E_RC @ H_CC) * E_RC).sum(1)
    return pad(lost_R, (0, -len(lost_R) % palette.rows)).reshape(-1, palette.rows).sum(1).clamp_min(0)


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
    levels = snap(kmeans(W_RC, H_CC.diagonal(), entries, rows))
    best = Palette(nearest(W_RC, levels, rows), levels, rows)
    least = losses(W_RC, best, H_CC)
    levels = snap(kmeans(W_RC, 1 / inverse_factor(H_CC, damp).square().sum(0), entries, rows))
    index = gptq(W_RC, H_CC, levels, rows, damp=damp, factor=factor)
    best, least = _better(W_RC, H_CC, Palette(index, levels, rows), best, least)
    for _ in range(rounds):
        levels, order = snap(fit_levels(W_RC, H_CC, index, levels, rows)).sort(dim=1, stable=True)
        index = look_up(index, order.argsort(dim=1), rows)
        index = descend(W_RC, H_CC, index, levels, rows)
        best, least = _better(W_RC, H_CC, Palette(index, levels, rows), best, least)
    return best


def solve_nearest(W_RC: Tensor, entries: int, rows: int, *, snap: Snap) -> Palette:
    """Return the levels of k-means on the weights alone, and the nearest of them for each weight."""
    rows = min(rows, len(W_RC))
    levels = snap(kmeans(W_RC, W_RC.new_ones(W_RC.shape[1]), entries, rows))
    return Palette(nearest(W_RC, levels, rows), levels, rows)


def _better(W_RC: Tensor, H_CC: Tensor, new: Palette, old: Palette, least: Tensor) -> tuple[Palette, Tensor]:
    """Return the codebooks with the lower loss, the old one if equal, and their losses [G]."""
    lost = losses(W_RC, new, H_CC)
    won = lost < least
    index = torch.where(won.repeat_interleave(new.rows)[: len(W_RC), None], new.index_RC, old.index_RC)
    return Palette(index, torch.where(won[:, None], new.levels_GL, old.levels_GL), new.rows), torch.where(
        won, lost, least
    )
