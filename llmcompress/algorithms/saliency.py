"""How much a unit of an axis is worth: one score a function, the least goes first.

A unit is what is cut as a whole: a neuron of the feed-forward part, a head, a group of heads. Of a linear
that reads the axis it is some columns, told by `unit_C`, the unit of each column, -1 where there is none; of
a linear that writes it some rows, and one passes the transpose, `magnitude(W.T, unit_R, units)`. Those of
several linears on one axis may be added. Only `obs` knows what the other units can make up for. Blocks have
scores of their own: how far they turn the hidden states. Sums over a unit go through a table of its columns,
so their order, and with it the last bit, is the same every time.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from llmcompress.algorithms.hessian import inverse_factor


def members(unit_C: Tensor, units: int) -> Tensor:
    """The columns of each unit, int64 [units, K] in rising order, K those of the largest; shorter rows end in
    -1."""
    unit_C, column = unit_C[unit_C >= 0], torch.nonzero(unit_C >= 0).flatten()
    order = torch.argsort(unit_C, stable=True)
    unit, column = unit_C[order], column[order]
    count = torch.bincount(unit, minlength=units)
    table = column.new_full((units, int(count.max())), -1)
    table[unit, torch.arange(len(unit), device=unit.device) - (count.cumsum(0) - count)[unit]] = column
    return table


def unit_sums(value_C: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """The sum [units] of what the columns of each unit have; 0 for a unit without columns."""
    return pad(value_C, (0, 1))[members(unit_C, units)].sum(1)  # -1 is the zero at the end


def magnitude(W_RC: Tensor, unit_C: Tensor, units: int, order: Literal[1, 2] = 2) -> Tensor:
    """The sum [units] of |w|, or of w^2, over the weights of each unit.

    Source: Li et al. 2017, arXiv:1608.08710 (order 1); LLM-Pruner, Ma et al. 2023, arXiv:2305.11627. Differs:
    no root is taken of the squares, which ranks the same and adds up.
    """
    return unit_sums(W_RC.abs().pow(order).sum(0), unit_C, units)


def wanda_weights(W_RC: Tensor, norm_C: Tensor) -> Tensor:
    """|w| times the norm of the input that it meets, [R, C]: what a single weight is worth.

    norm_C is the root of the second moment, or anything proportional to it.

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1.
    """
    return W_RC.abs() * norm_C


def wanda(W_RC: Tensor, norm_C: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """The sum [units] of `wanda_weights` over each unit.

    Source: Sun et al. 2023, arXiv:2306.11695. Differs: summed over a unit; the paper cuts single weights.
    """
    return unit_sums(wanda_weights(W_RC, norm_C).sum(0), unit_C, units)


def activation(mean_abs_C: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """The mean [units] of the mean |x| of each unit's columns: how much it says, whoever listens.

    Source: Minitron, Muralidharan et al. 2024, arXiv:2407.14679, with the mean over tokens. Differs: a head
    counts by the mean of its columns, not by their norm.
    """
    size_U = unit_sums(torch.ones_like(mean_abs_C), unit_C, units)
    return unit_sums(mean_abs_C, unit_C, units) / size_U.clamp_min(1)


def taylor(W_RC: Tensor, G_RC: Tensor, unit_C: Tensor, units: int) -> Tensor:
    """|sum of w g| [units] over the weights of each unit, g the gradient of the loss: how the loss changes,
    to first order.

    On a linear that reads the axis, the sum is that of each activation of the unit times its own gradient.

    Source: Molchanov et al. 2019, arXiv:1906.10771; LLM-Pruner, Ma et al. 2023, arXiv:2305.11627. Differs:
    not squared, which ranks the same.
    """
    return unit_sums((W_RC * G_RC).sum(0), unit_C, units).abs()


def alive(H_CC: Tensor) -> Tensor:
    """The inputs that fire, bool [C], which alone are worth anything; all where none does, so that weights
    decide."""
    fires_C = H_CC.diagonal() > 0
    return fires_C | ~fires_C.any()


def on_units(M_CC: Tensor, table: Tensor) -> Tensor:
    """The blocks [units, K, K] of M on the columns of each unit, zero where a row of the table (from
    `members`) has ended."""
    real = table >= 0
    blocks = M_CC[table[:, :, None], table[:, None, :]]
    return blocks * (real[:, :, None] & real[:, None, :])


def block_costs(J_UKK: Tensor, G_UKK: Tensor) -> Tensor:
    """tr(J^-1 G) [units], with the blocks of H^-1 and of W^T W; both are zero beyond a unit's columns."""
    if J_UKK.shape[-1] == 1:  # a division each, where a factorisation each takes a hundred times as long
        return (G_UKK / J_UKK.clamp_min(torch.finfo(J_UKK.dtype).tiny)).flatten().clamp_min(0)
    filled = J_UKK + torch.diag_embed((J_UKK.diagonal(dim1=1, dim2=2) == 0).to(J_UKK.dtype))
    lower, _ = torch.linalg.cholesky_ex(filled)
    return torch.cholesky_solve(G_UKK, lower).diagonal(dim1=1, dim2=2).sum(-1).clamp_min(0)


def obs(W_RC: Tensor, H_CC: Tensor, unit_C: Tensor, units: int, damp: float = 0.01) -> Tensor:
    """The squared output error [units] that cutting each unit leaves when all other columns are solved for
    anew.

    sum over rows of W_P ([H^-1]_PP)^-1 W_P^T, P the columns of the unit, in the units of tr(W H W^T), damping
    included. A unit whose inputs never fire costs nothing. Linears that read the same input are stacked by
    rows.

    Source: ZipLM, Kurtic et al. 2023, arXiv:2302.04089; SlimGPT, Ling et al. 2024, arXiv:2412.18110.
    """
    table, U_CC, W = members(unit_C, units), inverse_factor(H_CC, damp), W_RC * alive(H_CC)
    return block_costs(on_units(U_CC.T @ U_CC, table), on_units(W.T @ W, table))


def block_influence(x: Tensor, y: Tensor) -> float:
    """1 - the mean cosine between what enters a layer and what leaves it, over tokens [..., D]: 0 where
    nothing turns.

    Source: ShortGPT, Men et al. 2024, arXiv:2403.03853.
    """
    return 1 - float(cosine_similarity(x.float(), y.float(), dim=-1).mean())


def angular_distance(x: Tensor, y: Tensor) -> float:
    """The mean angle between hidden states as a share of pi, over tokens [..., D]; the paper takes the last
    of each text.

    Source: Gromov et al. 2024, arXiv:2403.17887. Differs: by half angles, since an arc cosine loses half the
    digits of a small angle.
    """
    u, v = normalize(x.float(), dim=-1), normalize(y.float(), dim=-1)
    return float(torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)).mean()) * 2 / math.pi
