"""SparseGPT and its masks: which single weights become zero, what the others become, and how masks are
stored.

What stays is either a share of each row, or n of every m columns in a row. A share is taken per row as in
Wanda: each output has its own error, and rows of small weights are not emptied in favour of rows of large
ones. Where the scores of all rows are in the same units of error, as in SparseGPT, rows compete. Masks are
bool, True where a weight stays. The plain form of SparseGPT is in the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.algorithms.saliency import alive

Keep = float | tuple[int, int]  # a share of the weights, or n of every m columns


def keep_mask(score_RC: Tensor, keep: Keep) -> Tensor:
    """Return the mask of the weights with the highest scores, bool [R, C].

    It keeps the share `keep` of each row, or n of every m adjacent columns in a row. Of equal scores the
    first stays. A last group of fewer than m columns keeps up to n. To let rows compete, pass them as one
    row, `score_RC.reshape(1, -1)`.

    Source: Sun et al. 2023, arXiv:2306.11695, section 3 (comparison group: the weights of one output).
    """
    R, C = score_RC.shape
    if not isinstance(keep, tuple):
        return _highest(score_RC, round(keep * C))
    n, m = keep
    grouped = pad(score_RC, (0, -C % m), value=-torch.inf).reshape(-1, m)
    return _highest(grouped, n).reshape(R, -1)[:, :C]


def _highest(score_RN: Tensor, count: int) -> Tensor:
    """Return a mask that is True at the `count` highest scores of each row."""
    order = torch.argsort(score_RN, dim=1, descending=True, stable=True)
    return torch.zeros_like(score_RN, dtype=torch.bool).scatter_(1, order[:, :count], True)


def sparsegpt(W_RC: Tensor, H_CC: Tensor, keep: Keep, *, block: int = 128, damp: float = 0.01) -> Tensor:
    """Return W with zeros, each column's error pushed onto the columns not yet processed; the mask is what is
    not zero.

    Weights are chosen by w^2 / [H^-1]_cc, with the weights as updated so far and H over the columns still to
    come. A share is taken of each `block` of columns in all rows together; n of every m columns in each row.
    A column whose input is always zero goes first.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774, Algorithm 1. Differs: the numbers kept in the blocks
    add up exactly to the number kept in the whole matrix; the weights that stay in columns without input are
    not changed.
    """
    C = W_RC.shape[1]
    group = keep[1] if isinstance(keep, tuple) else block  # columns whose weights are ranked together
    width = max(block // group, 1) * group
    U, W = inverse_factor(H_CC, damp), W_RC.T.clone(memory_format=torch.contiguous_format)
    saliency_C = alive(H_CC) / U.diagonal().square()  # saliency of a weight of 1
    for start in range(0, C, width):
        stop = min(start + width, C)
        near, E = W[start:stop], torch.empty_like(W[start:stop])
        for c in range(stop - start):
            column, place = start + c, c % group
            if place == 0:
                end = min(column + group, C)
                cut = ~_chosen(W[column:end].T.square() * saliency_C[column:end], keep, column).T
            E[c] = torch.where(cut[place], near[c] / U[column, column], 0)
            near[c].masked_fill_(cut[place], 0)
            near[c + 1 :].addr_(U[column, column + 1 : stop], E[c], alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
    return W.T.contiguous()


def _chosen(score_RB: Tensor, keep: Keep, before: int) -> Tensor:
    """Return the mask of a block of columns that has `before` columns in front of it.

    The numbers kept are rounded so that their sum over blocks is the rounded number of the whole.
    """
    if isinstance(keep, tuple):
        return keep_mask(score_RB, keep)
    R, B = score_RB.shape
    count = round(keep * R * (before + B)) - round(keep * R * before)
    return _highest(score_RB.reshape(1, -1), count).view_as(score_RB)


def pack_mask(mask_RC: Tensor) -> Tensor:
    """Return the mask as bits, uint8 [R, ceil(C / 8)]: the first column in the lowest bit, each row from a
    new byte.

    The values stored beside it are `W_RC[mask_RC]`, row by row. This is the layout of compressed-tensors'
    sparse bitmask.
    """
    bits = pad(mask_RC.to(torch.uint8), (0, -mask_RC.shape[1] % 8)).unflatten(1, (-1, 8))
    bits_RB: Tensor = (bits << _places(bits)).sum(-1, dtype=torch.uint8)
    return bits_RB


def unpack_mask(bits_RB: Tensor, columns: int) -> Tensor:
    """Return the mask, bool [R, columns], that `pack_mask` packed."""
    mask_RC: Tensor = ((bits_RB[..., None] >> _places(bits_RB)) & 1).flatten(1)[:, :columns].bool()
    return mask_RC


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def fill(mask_RC: Tensor, values: Tensor) -> Tensor:
    """Return the weight [R, C] whose entries under the mask are `values`, row by row. Raises ValueError if
    their numbers differ."""
    if len(values) != int(mask_RC.sum()):
        raise ValueError(f"{len(values)} values do not fill a mask of {int(mask_RC.sum())}")
    W_RC = values.new_zeros(mask_RC.shape)
    W_RC[mask_RC] = values
    return W_RC
