"""Single weights set to zero: which, what the others become, and how zeros are stored without their bytes.

What stays is either a share of each row or n of every m columns in a row. A share is per row as in Wanda:
each output has an error of its own, and small rows are not emptied for the sake of large ones. Where scores
of different rows are in the same units of error, as in SparseGPT, rows compete. Masks are bool, True where a
weight stays. The plain form of SparseGPT is in the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.algorithms.saliency import alive

Keep = float | tuple[int, int]  # a share of the weights, or n of every m columns


def keep_mask(score_RC: Tensor, keep: Keep) -> Tensor:
    """The weights of the highest score, bool [R, C]: the share `keep` of each row, or n of every m neighbours
    in a row.

    Of equals the first stays. A last group of fewer than m columns keeps up to n. To let rows compete pass
    them as one, `score_RC.reshape(1, -1)`.

    Source: Sun et al. 2023, arXiv:2306.11695, section 3 (comparison group: the weights of one output).
    """
    R, C = score_RC.shape
    if not isinstance(keep, tuple):
        return _highest(score_RC, round(keep * C))
    n, m = keep
    grouped = pad(score_RC, (0, -C % m), value=-torch.inf).reshape(-1, m)
    return _highest(grouped, n).reshape(R, -1)[:, :C]


def _highest(score_RN: Tensor, count: int) -> Tensor:
    """True at the `count` highest of each row."""
    order = torch.argsort(score_RN, dim=1, descending=True, stable=True)
    return torch.zeros_like(score_RN, dtype=torch.bool).scatter_(1, order[:, :count], True)


def sparsegpt(W_RC: Tensor, H_CC: Tensor, keep: Keep, *, block: int = 128, damp: float = 0.01) -> Tensor:
    """W with zeros, each column's error pushed onto the columns not yet passed; what stays is what is not
    zero.

    Weights are chosen as they are by then, by w^2 / [H^-1]_cc of the columns still to come: a share of each
    `block` of columns in all rows together, or n of every m columns in each row. A column whose input never
    fires goes first.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774, Algorithm 1. Differs: the shares of blocks add up to
    that of the whole to the weight; the weights that stay in columns without input are left as they are.
    """
    C = W_RC.shape[1]
    group = keep[1] if isinstance(keep, tuple) else block  # columns that are chosen from together
    width = max(block // group, 1) * group
    U, W = inverse_factor(H_CC, damp), W_RC.T.clone(memory_format=torch.contiguous_format)
    worth_C = alive(H_CC) / U.diagonal().square()  # of a weight of 1
    for start in range(0, C, width):
        stop = min(start + width, C)
        near, E = W[start:stop], torch.empty_like(W[start:stop])
        for c in range(stop - start):
            column, place = start + c, c % group
            if place == 0:
                end = min(column + group, C)
                cut = ~_chosen(W[column:end].T.square() * worth_C[column:end], keep, column).T
            E[c] = torch.where(cut[place], near[c] / U[column, column], 0)
            near[c].masked_fill_(cut[place], 0)
            near[c + 1 :].addr_(U[column, column + 1 : stop], E[c], alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
    return W.T.contiguous()


def _chosen(score_RB: Tensor, keep: Keep, before: int) -> Tensor:
    """The mask of a block of columns, with as many in front of it; shares of blocks are rounded so that their
    sum is."""
    if isinstance(keep, tuple):
        return keep_mask(score_RB, keep)
    R, B = score_RB.shape
    count = round(keep * R * (before + B)) - round(keep * R * before)
    return _highest(score_RB.reshape(1, -1), count).view_as(score_RB)


def pack_mask(mask_RC: Tensor) -> Tensor:
    """The mask as bits, uint8 [R, ceil(C / 8)]: the first column in the lowest bit, each row from a byte of
    its own.

    The values beside it are `W_RC[mask_RC]`, row by row. It is the layout of compressed-tensors' sparse
    bitmask.
    """
    bits = pad(mask_RC.to(torch.uint8), (0, -mask_RC.shape[1] % 8)).unflatten(1, (-1, 8))
    bits_RB: Tensor = (bits << _places(bits)).sum(-1, dtype=torch.uint8)
    return bits_RB


def unpack_mask(bits_RB: Tensor, columns: int) -> Tensor:
    """The mask, bool [R, columns], that `pack_mask` packed."""
    mask_RC: Tensor = ((bits_RB[..., None] >> _places(bits_RB)) & 1).flatten(1)[:, :columns].bool()
    return mask_RC


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def fill(mask_RC: Tensor, values: Tensor) -> Tensor:
    """The weight [R, C] whose entries under the mask are `values`, row by row; raises ValueError where their
    numbers differ."""
    if len(values) != int(mask_RC.sum()):
        raise ValueError(f"{len(values)} values do not fill a mask of {int(mask_RC.sum())}")
    W_RC = values.new_zeros(mask_RC.shape)
    W_RC[mask_RC] = values
    return W_RC
