"""The inner loops of codebooks, which go weight by weight; `kernels.codebook_loops` has them in C.

G groups of rows share a codebook of L levels each; a group has N weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.algorithms import column_loops
from llmcompress.algorithms.column_loops import ColumnLoops

BINS = 128  # of sorted weights, which are then clustered
Product = Callable[[Tensor], Tensor]  # levels [G, L] -> their products with the normal matrices [G, L]


def cluster(W_GN: Tensor, h_C: Tensor, entries: int, steps: int) -> Tensor:
    """Return the ascending levels [G, entries] of k-means in each group, after so many steps at most.

    `h_C`, float64, weighs the weights of a column; the column of weight n is n % C. Up to 16 levels start
    from the best clusters of BINS bins, more from bins. A group with no more than `entries` distinct values
    gets these, the largest repeated.
    """
    x_GN, order = W_GN.sort(dim=1, stable=True)
    N = x_GN.shape[1]
    if entries >= N:
        return _distinct(x_GN, x_GN[:, -1:].expand(-1, entries))
    h_GN = h_C[order % len(h_C)]
    sums = [pad((h_GN * x_GN.double() ** power).cumsum(1), (1, 0)) for power in range(3)]
    if entries < BINS:
        edges = _bins(x_GN, h_GN, min(BINS, N))
        at_once = 8 if W_GN.device.type == "cpu" else 64  # their costs stay in the cache of a core
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


def normal_product(H_CC: Tensor, index_RC: Tensor, rows: int, entries: int) -> Product:
    """Return the function that multiplies levels [G, L] by the normal matrices of their codebooks, which are
    sums of B^T H B over `rows` adjacent rows; the columns of B [C, L] say which weights of a row take which
    level.
    """
    place_RC = places(index_RC, rows, entries)
    return lambda levels_GL: gathered(levels_GL.flatten()[place_RC] @ H_CC, place_RC, levels_GL.shape)


def places(index_RC: Tensor, rows: int, entries: int) -> Tensor:
    """Return where the level of each weight stands in the flattened levels of all codebooks, from its index
    in the codebook that `rows` adjacent rows share."""
    book_R = torch.arange(len(index_RC), device=index_RC.device) // rows
    return index_RC + (book_R * entries)[:, None]


def gathered(value_RC: Tensor, place_RC: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return sums of the values at each place in a tensor of a shape."""
    sums = value_RC.new_zeros(shape).flatten()
    return sums.index_add_(0, place_RC.flatten(), value_RC.flatten()).view(shape)


@dataclass(frozen=True)
class CodebookLoops:
    """The loops that the solver of codebooks uses: these, or faster ones that do the same."""

    columns: ColumnLoops
    cluster: Callable[[Tensor, Tensor, int, int], Tensor]
    normal_product: Callable[[Tensor, Tensor, int, int], Product]


PLAIN = CodebookLoops(column_loops.PLAIN, cluster, normal_product)
