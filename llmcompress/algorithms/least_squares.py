"""Solve the remaining weights of a linear anew, so that they make up for the removed columns.

Removing columns of a linear loses their part of the output. How far the other columns can replace it, given
how the inputs correlate, is a least-squares problem with a closed solution: that of the optimal brain
surgeon. The damping keeps the result near the original weight, so that keeping all columns changes nothing.
If the inputs have also drifted from those of the full model, `hessian.retarget` comes first. It finds the
best weight on all inputs, and this the best on those kept; the two in turn give the joint optimum,

    repair(retarget(W, moments, damp), moments.H_CC, kept, damp)
      = W_P + (W X_:P - W_P H_PP) (H_PP + damping)^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import inverse_factor


def repair(W_RC: Tensor, H_CC: Tensor, kept: Tensor, damp: float = 0.01) -> Tensor:
    """Return the weight [R, P] on the columns `kept` (int64 [P], in any order) whose outputs come closest to
    those of W on all columns.

    It is W_P + W_N H_NP (H_PP + damping)^-1, with N the removed columns. One triangular solve finds it as W_P
    - W_N U_NN^-1 U_NP, with H^-1 = U^T U and N in front. It minimises tr(E (H + damping) E^T), with the
    damping of the whole H.

    Source: Hassibi and Stork 1992, Optimal Brain Surgeon; for groups of columns ZipLM, Kurtic et al. 2023,
    arXiv:2302.04089.
    """
    went = torch.ones(len(H_CC), dtype=torch.bool, device=H_CC.device)
    went[kept] = False
    lost = torch.nonzero(went).flatten()
    order, n = torch.cat([lost, kept]), len(lost)
    U = inverse_factor(H_CC, damp, order)
    lost_RN: Tensor = torch.linalg.solve_triangular(U[:n, :n], W_RC[:, lost], upper=True, left=False)
    return W_RC[:, kept] - lost_RN @ U[:n, n:]


def bias_shift(W_RC: Tensor, full_C: Tensor, W_RP: Tensor, mean_P: Tensor) -> Tensor:
    """Return what to add to the bias [R] to keep the mean output of W on inputs with mean `full_C`.

    W_RP reads inputs with mean `mean_P` instead. If W_RP comes from `repair` on centred moments, H - m m^T,
    both together are the least-squares fit with an intercept. On plain moments the shift still removes the
    mean error and never adds to the error.

    Source: FLAP, An et al. 2023, arXiv:2312.11983, bias compensation.
    """
    shift_R: Tensor = W_RC @ full_C - W_RP @ mean_P
    return shift_R
