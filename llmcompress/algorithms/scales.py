"""Scales of groups: searched before the codes are known, and solved for once they are.

A scale is the stored absmax of a group of columns. It may be negative: NF4's levels are not symmetric, so the
sign is a free bit that selects which tail gets the finer steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.column_loops import PLAIN, ColumnLoops
from llmcompress.algorithms.grids import Grid

LEAST = 1e-6  # the scale of a group of zeros, where no level is zero


def groups_of(W_RC: Tensor, group_size: int) -> Tensor:
    """Return W as [R, G, group_size]."""
    return W_RC.reshape(len(W_RC), -1, group_size)


def spread(S_RG: Tensor, group_size: int) -> Tensor:
    """Return one scale per weight, [R, C]."""
    return S_RG.repeat_interleave(group_size, dim=1)


def search_scales(
    W_RC: Tensor,
    h_C: Tensor,
    grid: Grid,
    group_size: int,
    *,
    signed: bool = True,
    steps: int = 24,
    loops: ColumnLoops = PLAIN,
) -> Tensor:
    """Return scales [R, G] that minimise the rounding error of each group, weighted by the second moment h of
    each column.

    It tries the group's absolute maximum, then multiples of it between 0.65 and 1.15, with both signs. The
    first of equals is kept, so a group whose inputs are all zero keeps its absolute maximum. A group of zeros
    gets scale 1, or `LEAST` on a grid without a level of zero.
    """
    ratios = (1.0, *torch.linspace(0.65, 1.15, steps).tolist())
    signs = (1, -1) if signed else (1,)
    found_RG = loops.search(W_RC, h_C, grid, group_size, [ratio * sign for ratio in ratios for sign in signs])
    if bool((grid.levels == 0).any()):
        return found_RG
    zero_RG = groups_of(W_RC, group_size).abs().amax(-1) == 0
    return torch.where(zero_RG, torch.full_like(found_RG, LEAST), found_RG)


def fit_scales(
    W_RC: Tensor, H_CC: Tensor, Q_RC: Tensor, S_RG: Tensor, product_RC: Tensor | None = None
) -> Tensor:
    """Return scales [R, G] that minimise tr((W - QS) H (W - QS)^T) for fixed levels Q [R, C], in closed form,
    row by row. `product_RC` is W H, if it is known already.

    A row keeps its old scales if its system is singular (all levels of some group are zero) or its solution
    is not usable.
    """
    R, G = S_RG.shape
    # rows whose systems are solved at once: 64 MiB, on a GPU more, as each takes many small launches
    rows = max(1, (2**26 if Q_RC.is_cuda else 2**24) // (G * G))
    product_RC = W_RC @ H_CC if product_RC is None else product_RC
    if rows < R:
        parts = zip(*(whole.split(rows) for whole in (W_RC, Q_RC, S_RG, product_RC)), strict=True)
        return torch.cat([fit_scales(W, H_CC, Q, S, P) for W, Q, S, P in parts])
    group_size = Q_RC.shape[1] // G
    Q = groups_of(Q_RC, group_size)
    A_RGG = torch.zeros(R, G, G, device=Q_RC.device)  # its lower triangle
    for g in range(G):
        start = g * group_size
        read = Q[:, g] @ H_CC[start : start + group_size, start:]
        A_RGG[:, g:, g] = (groups_of(read, group_size) * Q[:, g:]).sum(-1)
    b_RG = (groups_of(product_RC, group_size) * Q).sum(-1)
    diagonal = A_RGG.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30
    lower_RGG, failed = torch.linalg.cholesky_ex(A_RGG)
    fitted = torch.cholesky_solve(b_RG[..., None], lower_RGG)[..., 0]
    usable = torch.isfinite(fitted).all(-1, keepdim=True) & (failed == 0)[:, None]
    usable = usable & (fitted.abs() > 1e-3 * S_RG.abs()).all(-1, keepdim=True)
    return torch.where(usable, fitted, S_RG)


def integer_scales(S_RG: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Approximate positive scales [R, G] by a step per row [R] times integer multipliers [R, G] in
    1..`largest`.

    The largest scale of a row gets a multiplier between half of `largest` and `largest`: the one with the
    least relative error over the row.
    """
    top = S_RG.amax(1).clamp_min(torch.finfo(torch.float32).tiny * largest)
    # a fitted scale may be negative, which no multiplier reaches
    S_RG = S_RG.maximum(top[:, None] / (2 * largest))
    best = torch.full_like(top, float("inf"))
    step, multiplier = top / largest, torch.ones_like(S_RG)
    for count in range(largest, largest // 2, -1):
        tried = top / count
        whole = (S_RG / tried[:, None]).round().clamp(1, largest)
        error = (whole * tried[:, None] / S_RG - 1).square().sum(1)
        better = error < best
        best, step = torch.where(better, error, best), torch.where(better, tried, step)
        multiplier = torch.where(better[:, None], whole, multiplier)
    return step, multiplier
