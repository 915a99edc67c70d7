"""The inner loops of the solver, which go scale by scale or column by column; `kernels.column_loops` has them
in C.

Matrices are transposed, [B, R] for a block of B columns, so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Grid


def search(W_RC: Tensor, h_C: Tensor, grid: Grid, group_size: int, ratios: Sequence[float]) -> Tensor:
    """Return the scales [R, G] with the least rounding error of each group, weighted by h.

    Tried are the group's absolute maximum (1 for a group of zeros) times each of `ratios`. The first of
    equals is kept.
    """
    W, h = W_RC.reshape(len(W_RC), -1, group_size), h_C.reshape(1, -1, group_size)
    top = W.abs().amax(-1, keepdim=True)
    top = torch.where(top > 0, top, torch.ones_like(top))
    best, least = top, torch.full_like(top, float("inf"))
    for ratio in ratios:
        scale = top * ratio
        error = (W - grid.levels[grid.nearest(W / scale)] * scale).square_().mul_(h).sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.squeeze(-1)


def round_columns(near_BR: Tensor, U_BB: Tensor, S_BR: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round the columns of a block one by one, as GPTQ does, each error pushed onto the columns after it.

    `near_BR`, the columns, is used up; U is the block of the inverse factor. Returns the level indices int64
    [B, R], and the errors over the diagonal of U [B, R], with which the columns after the block are updated.
    """
    index_BR = torch.empty(near_BR.shape, dtype=torch.int64, device=near_BR.device)
    E_BR = torch.empty_like(near_BR)
    for c in range(len(near_BR)):
        index_BR[c] = grid.nearest(near_BR[c] / S_BR[c])
        E_BR[c] = (near_BR[c] - grid.levels[index_BR[c]] * S_BR[c]) / U_BB[c, c]
        near_BR[c + 1 :].addr_(U_BB[c, c + 1 :], E_BR[c], alpha=-1)
    return index_BR, E_BR


def move_columns(
    near_BR: Tensor, H_BB: Tensor, Q_BR: Tensor, S_BR: Tensor, grid: Grid, index_BR: Tensor
) -> Tensor:
    """Move the columns of a block one by one to their best levels, with all else fixed.

    `near_BR`, minus half the gradient of the columns, is used up; H is the block of the second moments, Q the
    weights. Updates the level indices in place and returns by how much each weight changes [B, R]. A column
    whose second moment is zero is left alone.
    """
    D_BR = torch.zeros_like(near_BR)
    for c, curvature in enumerate(H_BB.diagonal().tolist()):
        if curvature > 0:
            index_BR[c] = grid.nearest((Q_BR[c] + near_BR[c] / curvature) / S_BR[c])
            D_BR[c] = grid.levels[index_BR[c]] * S_BR[c] - Q_BR[c]
            near_BR[c + 1 :].addr_(H_BB[c + 1 :, c], D_BR[c], alpha=-1)
    return D_BR


def move_together(
    near_BR: Tensor, H_BB: Tensor, F_RR: Tensor, Q_BR: Tensor, S_BR: Tensor, grid: Grid, index_BR: Tensor
) -> Tensor:
    """Move the weights of a block one by one, along each column in turn, to their best levels, with all else
    fixed.

    As `move_columns`, but rows count together by F, and `near_BR` is minus half the gradient under both. A
    row whose diagonal entry in F is zero is left alone too.
    """
    D_BR = torch.zeros_like(near_BR)
    weighs = F_RR.diagonal().tolist()
    for c, curvature in enumerate(H_BB.diagonal().tolist()):
        for r, weigh in enumerate(weighs):
            if curvature > 0 and weigh > 0:
                best_R = Q_BR[c] + near_BR[c] / (curvature * weigh)
                index_BR[c, r] = grid.nearest(best_R / S_BR[c])[r]
                D_BR[c, r] = grid.levels[index_BR[c, r]] * S_BR[c, r] - Q_BR[c, r]
                near_BR[c:].addr_(H_BB[c:, c] * D_BR[c, r], F_RR[r], alpha=-1)
    return D_BR


@dataclass(frozen=True)
class ColumnLoops:
    """The loops that a solver uses: these, or faster ones that do the same."""

    search: Callable[[Tensor, Tensor, Grid, int, Sequence[float]], Tensor]
    round_columns: Callable[[Tensor, Tensor, Tensor, Grid], tuple[Tensor, Tensor]]
    move_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Grid, Tensor], Tensor]
    move_together: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Grid, Tensor], Tensor]


PLAIN = ColumnLoops(search, round_columns, move_columns, move_together)
