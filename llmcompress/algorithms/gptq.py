"""GPTQ under static groups, and coordinate descent over codes that continues from its result.

Both minimise tr(E H E^T), the squared output error on the calibration inputs. GPTQ fixes the columns one by
one and lets the columns not yet fixed absorb the error; it does not revisit a column. Coordinate descent
revisits every column with all others fixed. Both work on W^T, so that a column is contiguous, and delay the
update of far columns into one matrix product per `width` columns. The plain forms are in the tests as the
reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.column_loops import PLAIN, ColumnLoops
from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.hessian import ordered_factor
from llmcompress.algorithms.scales import spread


def gptq(
    W_RC: Tensor,
    H_CC: Tensor,
    S_RG: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    width: int = 64,
    factor: tuple[Tensor, Tensor] | None = None,
    loops: ColumnLoops = PLAIN,
) -> Tensor:
    """Return level indices [R, C] of W under fixed scales, each column's error pushed onto the columns not
    yet rounded.

    Columns are processed in order of falling second moment (activation order). The scale of a column is that
    of its group and fixed beforehand, so any order is possible. `factor` is the `ordered_factor` of H, if it
    is known already.

    Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Differs: activation order under static groups.
    """
    C = W_RC.shape[1]
    order, U = factor or ordered_factor(H_CC, damp)
    W = W_RC.T[order].contiguous()
    S = S_RG.T[order // (C // S_RG.shape[1])].contiguous()
    index = torch.empty(W.shape, dtype=torch.int64, device=W.device)
    for start in range(0, C, width):
        stop = min(start + width, C)
        index[start:stop], E = loops.round_columns(
            W[start:stop], U[start:stop, start:stop], S[start:stop], grid
        )
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
    out = torch.empty_like(index)
    out[order] = index
    return out.T.contiguous()


def descend(
    W_RC: Tensor,
    H_CC: Tensor,
    index_RC: Tensor,
    S_RG: Tensor,
    grid: Grid,
    *,
    width: int = 64,
    loops: ColumnLoops = PLAIN,
) -> Tensor:
    """Return level indices [R, C] after one pass that moves each column to its best level, with all else
    fixed.

    tr(E H E^T) never rises. A column whose second moment is zero is left alone.

    Source: the coordinate descent of QuantEase, Behdin et al. 2023, arXiv:2309.01885, Algorithm 2, on this
    grid.
    """
    C = W_RC.shape[1]
    S = spread(S_RG, C // S_RG.shape[1]).T.contiguous()
    index = index_RC.T.clone(memory_format=torch.contiguous_format)
    Q = grid.levels[index] * S
    # minus half the gradient, [C, R]; kept up to date for the columns still to come
    P = H_CC @ (W_RC.T - Q)
    for start in range(0, C, width):
        stop = min(start + width, C)
        H_BB = H_CC[start:stop, start:stop]
        D = loops.move_columns(P[start:stop], H_BB, Q[start:stop], S[start:stop], grid, index[start:stop])
        P[stop:].addmm_(H_CC[stop:, start:stop], D, alpha=-1)
    return index.T.contiguous()
