"""Codes of all rows of a linear chosen together, so that an error of one output makes up for those of others.

GPTQ minimises tr(E H E^T), which treats every output alike and by itself. The loss does not: to second order
an error e of a linear's outputs costs e F e^T / 2 nats, with F the Fisher matrix of these outputs, which may
be far from diagonal. Here tr(F E H E^T) is minimised: H weighs the columns of the weight error E, F its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.column_loops import PLAIN, ColumnLoops
from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.scales import spread

TOGETHER = 1024  # rows that are weighed together; F has a block for each so many, and is zero elsewhere
ROWS = 64  # rows that go through the columns together
PASSES = 6
DAMP = 0.03  # added to the diagonal of F, over its mean


def blocks_of(R: int) -> list[slice]:
    """The rows of each block of F."""
    return [slice(start, min(start + TOGETHER, R)) for start in range(0, R, TOGETHER)]


def add_blocks(F_RB: Tensor, G_TR: Tensor) -> None:
    """Add the sum of g^T g over the rows g of G to the blocks of F, in place.

    F_RB: the blocks below each other; those that are narrower than TOGETHER are padded with zeros.
    """
    for rows in blocks_of(len(F_RB)):
        G_TB = G_TR[:, rows]
        F_RB[rows, : G_TB.shape[1]].addmm_(G_TB.T, G_TB)


def weighed(F_RB: Tensor, X_RC: Tensor) -> Tensor:
    """Return F X [R, C], F in blocks as `add_blocks` leaves it."""
    return torch.cat([F_RB[rows, : _size(rows)] @ X_RC[rows] for rows in blocks_of(len(X_RC))])


def diagonal(F_RB: Tensor) -> Tensor:
    """Return the diagonal [R] of F, in blocks as `add_blocks` leaves it."""
    return torch.cat([F_RB[rows, : _size(rows)].diagonal() for rows in blocks_of(len(F_RB))])


def loss(E_RC: Tensor, H_CC: Tensor, F_RB: Tensor) -> Tensor:
    """Return tr(F E H E^T), F in blocks as `add_blocks` leaves it."""
    return (weighed(F_RB, E_RC) * (E_RC @ H_CC)).sum()


def damped_blocks(F_RB: Tensor, damp: float = DAMP) -> Tensor:
    """Return F over the mean of its diagonal, with `damp` added to the diagonal; the identity for F = 0."""
    found_RB, mean = torch.zeros_like(F_RB), diagonal(F_RB).mean()
    for rows in blocks_of(len(F_RB)):
        block_BB, eye_BB = (
            F_RB[rows, : _size(rows)],
            torch.eye(_size(rows), dtype=F_RB.dtype, device=F_RB.device),
        )
        found_RB[rows, : _size(rows)] = block_BB / mean + damp * eye_BB if mean > 0 else eye_BB
    return found_RB


def descend_together(
    W_RC: Tensor,
    H_CC: Tensor,
    F_RB: Tensor,
    index_RC: Tensor,
    S_RG: Tensor,
    grid: Grid,
    *,
    passes: int = PASSES,
    rows: int = ROWS,
    width: int = 64,
    loops: ColumnLoops = PLAIN,
) -> Tensor:
    """Return level indices [R, C] after passes that move each weight to its best level, with all else fixed.

    tr(F E H E^T) never rises. `rows` rows at a time go through the columns, `width` columns at a time; the
    update of far columns and of far rows is delayed into matrix products. `F_RB` is in blocks, as
    `add_blocks` leaves it. A column whose second moment is zero is left alone, and a row whose Fisher
    information is.

    Source: the objective of YAQA, Tseng et al. 2025, arXiv:2505.22988. Differs: by the coordinate descent of
    QuantEase (arXiv:2309.01885) from GPTQ's codes, in place of feedback along rows and columns; H is that of
    GPTQ, and F is the Fisher matrix of the outputs of single tokens.
    """
    found_RC, size_RC = index_RC.clone(), spread(S_RG, W_RC.shape[1] // S_RG.shape[1])
    E_RC = W_RC - grid.levels[index_RC] * size_RC
    for block in blocks_of(len(W_RC)):
        F_BB = F_RB[block, : _size(block)]
        for _ in range(passes):
            for start in range(0, _size(block), rows):
                here = slice(block.start + start, min(block.start + start + rows, block.stop))
                place = slice(start, start + _size(here))
                # minus half the gradient of these rows, [C, rows]
                P_CR = H_CC @ (E_RC[block].T @ F_BB[:, place])
                own = grid.from_row(here.start)
                found_RC[here] = _moved(
                    P_CR, H_CC, F_BB[place, place], found_RC[here], size_RC[here], own, width, loops
                )
                E_RC[here] = W_RC[here] - grid.levels[found_RC[here]] * size_RC[here]
    return found_RC


def _moved(
    P_CR: Tensor,
    H_CC: Tensor,
    F_RR: Tensor,
    index_RC: Tensor,
    size_RC: Tensor,
    grid: Grid,
    width: int,
    loops: ColumnLoops,
) -> Tensor:
    """Return the level indices of some rows after one pass over their columns; P, minus half their gradient,
    is used up."""
    index, S = index_RC.T.contiguous(), size_RC.T.contiguous()
    Q, F_RR = grid.levels[index] * S, F_RR.contiguous()
    for start in range(0, len(P_CR), width):
        stop = min(start + width, len(P_CR))
        H_BB = H_CC[start:stop, start:stop]
        D = loops.move_together(
            P_CR[start:stop], H_BB, F_RR, Q[start:stop], S[start:stop], grid, index[start:stop]
        )
        P_CR[stop:].addmm_(H_CC[stop:, start:stop], D @ F_RR, alpha=-1)
    return index.T.contiguous()


def _size(rows: slice) -> int:
    return int(rows.stop - rows.start)
