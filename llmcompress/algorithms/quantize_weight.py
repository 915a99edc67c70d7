"""Quantise one linear from its weight and second moments: scale search, GPTQ, then scales and codes in turn.

Each step minimises the same tr(E H E^T) with the result of the step before held fixed: scales under the
nearest codes, codes under these scales, scales in closed form under these codes, codes by descent. More than
three rounds do not pay off. The error is a sum over rows, so each row goes on from the better of several
starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmcompress.algorithms.column_loops import PLAIN, ColumnLoops
from llmcompress.algorithms.gptq import descend, gptq
from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.scales import fit_scales, search_scales, spread
from llmcompress.algorithms.two_sided import damped_blocks, descend_together

Snap = Callable[[Tensor], Tensor]  # scales [R, G] -> the nearest storable scales


@dataclass(frozen=True)
class RoundedWeight:
    """A linear on a grid: level indices [R, C], of any integer dtype, and one scale per row and group of
    columns [R, G]."""

    index_RC: Tensor
    scale_RG: Tensor

    def weight(self, grid: Grid) -> Tensor:
        """Return the weight [R, C] that the codes stand for."""
        levels_RC = grid.levels.index_select(0, self.index_RC.int().flatten()).view_as(self.index_RC)
        return levels_RC * spread(self.scale_RG, self.index_RC.shape[1] // self.scale_RG.shape[1])


def solve(
    W_RC: Tensor,
    H_CC: Tensor,
    grid: Grid,
    group_size: int,
    *,
    snap: Snap | None = None,
    signs: Sequence[bool] = (True,),
    rounds: int = 3,
    damp: float = 0.01,
    factor: tuple[Tensor, Tensor] | None = None,
    F_RB: Tensor | None = None,
    loops: ColumnLoops = PLAIN,
) -> RoundedWeight:
    """Return codes and scales of W under the second moments H of its inputs.

    `signs` are the starts that are tried: with scales of both signs (True), with positive ones (False). With
    `snap`, codes are for the storable scales nearest to the fitted ones; the scales are returned before
    snapping. `factor` is the `ordered_factor` of H, if it is known already. With the Fisher matrix `F_RB` of
    the outputs, in blocks as `two_sided.add_blocks` leaves it, codes then descend on tr(F E H E^T).

    Source: GPTQ (arXiv:2210.17323) between a scale search and alternating least squares; each group of
    columns has one scale.
    """
    snap = snap or (lambda scale_RG: scale_RG)
    product_RC, starts = W_RC @ H_CC, list[_Start]()
    for signed in signs:
        found = search_scales(W_RC, H_CC.diagonal(), grid, group_size, signed=signed, loops=loops)
        scale = snap(found)
        starts.append(
            _Start(gptq(W_RC, H_CC, scale, grid, damp=damp, factor=factor, loops=loops), found, scale)
        )
    index, found, scale = starts[0] if len(starts) == 1 else _best_rows(starts, W_RC, H_CC, grid, snap)
    for _ in range(rounds):
        found = fit_scales(W_RC, H_CC, grid.levels[index], scale, product_RC)
        scale = snap(found)
        index = descend(W_RC, H_CC, index, scale, grid, loops=loops)
    if F_RB is not None:
        index = descend_together(W_RC, H_CC, damped_blocks(F_RB), index, scale, grid, loops=loops)
    return RoundedWeight(index, found)


class _Start(NamedTuple):
    """Level indices, and the scales for which they were found, as found and as stored."""

    index_RC: Tensor
    found_RG: Tensor
    scale_RG: Tensor


def _best_rows(starts: Sequence[_Start], W_RC: Tensor, H_CC: Tensor, grid: Grid, snap: Snap) -> _Start:
    """Return a start of which each row is that of the one with the least error."""
    index, found = starts[0].index_RC, starts[0].found_RG
    least_R = torch.full((len(W_RC),), float("inf"), device=W_RC.device)
    for start in starts:
        E_RC = W_RC - RoundedWeight(start.index_RC, start.scale_RG).weight(grid)
        lost_R = torch.sum((E_RC @ H_CC) * E_RC, 1)
        better = (lost_R < least_R)[:, None]
        index, found = torch.where(better, start.index_RC, index), torch.where(better, start.found_RG, found)
        least_R = torch.minimum(lost_R, least_R)
    return _Start(index, found, snap(found))


def output_error(W_RC: Tensor, Q_RC: Tensor, H_CC: Tensor) -> float:
    """Return the relative output error, sqrt(tr(E H E^T) / tr(W H W^T)); 0 if the output is zero."""
    E = W_RC - Q_RC
    lost, whole = torch.sum((E @ H_CC) * E), torch.sum((W_RC @ H_CC) * W_RC)
    # squares of large weights may overflow
    if not bool(torch.isfinite(lost + whole)) and W_RC.dtype is not torch.float64:
        return output_error(W_RC.double(), Q_RC.double(), H_CC.double())
    return float((lost.clamp_min(0) / whole).sqrt()) if whole > 0 else 0.0


def weight_error(W_RC: Tensor, Q_RC: Tensor) -> float:
    """Return the norm of the weight error over the norm of the weight; 0 if the weight is zero."""
    whole = W_RC.norm()
    if not bool(torch.isfinite(whole)) and W_RC.dtype is not torch.float64:
        return weight_error(W_RC.double(), Q_RC.double())
    return float((W_RC - Q_RC).norm() / whole) if whole > 0 else 0.0
