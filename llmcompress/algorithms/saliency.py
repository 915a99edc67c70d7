"""Saliency of the units of an axis, one score per function; units with the lowest saliency are removed first.

A unit is removed as a whole: a neuron of the feed-forward part, a head, or a group of heads. In a linear that
reads the axis, a unit is some columns; `unit_C` gives the unit of each column, or -1 for none. In a linear
that writes the axis, it is some rows; pass the transpose, `magnitude(W.T, unit_R, units)`. The scores of
several linears on one axis may be added. Only `obs` accounts for what the other units can make up for. Layers
have scores of their own: how far they turn the hidden states. Sums over a unit use a table of its columns, so
the order of summation, and with it the last bit, is always the same.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from llmcompress.algorithms.hessian import inverse_factor


def members(unit_C: Tensor, units: int) -> Tensor:
    """Return the columns of each unit, int64 [units, K], in ascending order.

    K is the number of columns of the largest unit; shorter rows are padded with -1 at the end.
    """
    unit_C, column = unit_C[unit_C >= 0], torch.nonzero(unit_C >= 0).flatten()
    order = torch.argsort(unit_C, stable=True)
    unit, column = unit_C[order], column[order]
    count = torch.bincount(unit, minlength=units)
    table = column.new_full((units, int(count.max())), -1)
    table[unit, torch.arange(len(unit), device=unit.device) - (count.cumsum(0) - count)[unit]] = column
    return table


def unit_sums(value_C: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """Return the sum [units] of the values of each unit's columns; 0 for a unit without columns."""
    return pad(value_C, (0, 1))[members(unit_C, units)].sum(1)  # index -1 is the padded zero


def magnitude(W_RC: Tensor, unit_C: Tensor, units: int, order: Literal[1, 2] = 2) -> Tensor:
    """Return the sum [units] of |w|, or of w^2, over the weights of each unit.

    Source: Li et al. 2017, arXiv:1608.08710 (order 1); LLM-Pruner, Ma et al. 2023, arXiv:2305.11627. Differs:
    no root is taken of the sum of squares, which gives the same ranking and lets scores be added.
    """
    return unit_sums(W_RC.abs().pow(order).sum(0), unit_C, units)


def wanda_weights(W_RC: Tensor, norm_C: Tensor) -> Tensor:
    """Return |w| times the norm of the input that it multiplies, [R, C]: the saliency of each single weight.

    norm_C is the root of the second moment, or anything proportional to it.

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1.
    """
    return W_RC.abs() * norm_C


def wanda(W_RC: Tensor, norm_C: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """Return the sum [units] of `wanda_weights` over each unit.

    Source: Sun et al. 2023, arXiv:2306.11695. Differs: summed over a unit; the paper cuts single weights.
    """
    return unit_sums(wanda_weights(W_RC, norm_C).sum(0), unit_C, units)


def activation(mean_abs_C: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """Return the mean [units] of the mean |x| of each unit's columns: its activation, whatever weights read
    it.

    Source: Minitron, Muralidharan et al. 2024, arXiv:2407.14679, with the mean over tokens. Differs: a head
    counts by the mean of its columns, not by their norm.
    """
    size_U = unit_sums(torch.ones_like(mean_abs_C), unit_C, units)
    return unit_sums(mean_abs_C, unit_C, units) / size_U.clamp_min(1)


def taylor(W_RC: Tensor, G_RC: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """Return |sum of w g| [units] over the weights of each unit, with g the gradient of the loss.

    This is the first-order change of the loss if the unit is removed. On a linear that reads the axis, the
    sum is that of each activation of the unit times its own gradient.

    Source: Molchanov et al. 2019, arXiv:1906.10771; LLM-Pruner, Ma et al. 2023, arXiv:2305.11627. Differs:
    not squared, which gives the same ranking.
    """
    return unit_sums((W_RC * G_RC).sum(0), unit_C, units).abs()


def alive(H_CC: Tensor) -> Tensor:
    """Return which inputs are ever non-zero, bool [C]; the others have no saliency.

    If no input is non-zero all are True, so that the weights decide.
    """
    fires_C = H_CC.diagonal() > 0
    return fires_C | ~fires_C.any()


def on_units(M_CC: Tensor, table: Tensor) -> Tensor:
    """Return the blocks [units, K, K] of M on the columns of each unit.

    `table` is that of `members`; a block is zero where its row of the table is padded.
    """
    real = table >= 0
    blocks = M_CC[table[:, :, None], table[:, None, :]]
    return blocks * (real[:, :, None] & real[:, None, :])


def block_costs(J_UKK: Tensor, G_UKK: Tensor) -> Tensor:
    """Return tr(J^-1 G) [units] from the blocks J of H^-1 and G of W^T W; both are zero beyond a unit's
    columns."""
    if J_UKK.shape[-1] == 1:  # one column per unit: a division is a hundred times as fast as a factorisation
        return (G_UKK / J_UKK.clamp_min(torch.finfo(J_UKK.dtype).tiny)).flatten().clamp_min(0)
    filled = J_UKK + torch.diag_embed((J_UKK.diagonal(dim1=1, dim2=2) == 0).to(J_UKK.dtype))
    lower, _ = torch.linalg.cholesky_ex(filled)
    return torch.cholesky_solve(G_UKK, lower).diagonal(dim1=1, dim2=2).sum(-1).clamp_min(0)


def obs(W_RC: Tensor, H_CC: Tensor, unit_C: Tensor, units: int, damp: float = 0.01) -> Tensor:
    """Return the squared output error [units] after removing each unit and solving anew for all other
    columns.

    The error is the sum over rows of W_P ([H^-1]_PP)^-1 W_P^T, with P the columns of the unit. It is in the
    units of tr(W H W^T), damping included. A unit whose inputs are always zero costs nothing. Stack linears
    that read the same input by rows.

    Source: ZipLM, Kurtic et al. 2023, arXiv:2302.04089; SlimGPT, Ling et al. 2024, arXiv:2412.18110.
    """
    table, U_CC, W = members(unit_C, units), inverse_factor(H_CC, damp), W_RC * alive(H_CC)
    return block_costs(on_units(U_CC.T @ U_CC, table), on_units(W.T @ W, table))


def block_influence(x: Tensor, y: Tensor) -> float:
    """Return 1 - the mean cosine between the input and the output of a layer, over tokens [..., D]; 0 if the
    layer turns nothing.

    Source: ShortGPT, Men et al. 2024, arXiv:2403.03853.
    """
    return 1 - float(cosine_similarity(x.float(), y.float(), dim=-1).mean())


def angular_distance(x: Tensor, y: Tensor) -> float:
    """Return the mean angle between hidden states as a share of pi, over tokens [..., D]. The paper uses the
    last token of each text.

    Source: Gromov et al. 2024, arXiv:2403.17887. Differs: computed from half angles, since an arc cosine
    loses half the digits of a small angle.
    """
    u, v = normalize(x.float(), dim=-1), normalize(y.float(), dim=-1)
    return float(torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)).mean()) * 2 / math.pi
