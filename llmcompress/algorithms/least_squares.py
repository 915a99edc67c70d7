"""The weights that stay, solved for anew, so that they make up for those that went.

Cutting columns of a linear loses what they said. What the other columns can say of it, given how the inputs
go together, is a least-squares problem with a closed answer, that of the optimal brain surgeon; the damping
keeps it near the weight as it was, so that keeping all changes nothing. Where the inputs have drifted from
the full model's too, `hessian.retarget` comes first: it finds the best weight on all inputs, this the best on
those kept, and the two in turn are the best at once,

    repair(retarget(W, moments, damp), moments.H_CC, kept, damp) = W_P + (W X_:P - W_P H_PP) (H_PP +
    damping)^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import inverse_factor


def repair(W_RC: Tensor, H_CC: Tensor, kept: Tensor, damp: float = 0.01) -> Tensor:
    """The weight [R, P] on the columns `kept` (int64 [P], in any order) whose outputs come closest to those
    of W on all.

    W_P + W_N H_NP (H_PP + damping)^-1, N the columns that went: found by one triangular solve, as W_P - W_N
    U_NN^-1 U_NP with H^-1 = U^T U and N in front. tr(E (H + damping) E^T) is the least there is, the damping
    that of all of H.

    Source: Hassibi and Stork 1992, Optimal Brain Surgeon; for groups of columns ZipLM, Kurtic et al. 2023,
    arXiv:2302.04089.
    """
    went = torch.ones(len(H_CC), dtype=torch.bool, device=H_CC.device)
    went[kept] = False
    lost = torch.nonzero(went).flatten()
    order, n = torch.cat([lost, kept]), len(lost)
    U = inverse_factor(H_CC[order][:, order], damp)
    lost_RN: Tensor = torch.linalg.solve_triangular(U[:n, :n], W_RC[:, lost], upper=True, left=False)
    return W_RC[:, kept] - lost_RN @ U[:n, n:]


def bias_shift(W_RC: Tensor, full_C: Tensor, W_RP: Tensor, mean_P: Tensor) -> Tensor:
    """What to add to the bias [R], so that the mean output is that of W on inputs of mean `full_C`.

    W_RP reads inputs of mean `mean_P` in its place. With a W_RP from `repair` on centred moments, H - m m^T,
    both together are the least-squares fit with an intercept; on plain moments the shift still takes away the
    mean error, and never adds to the error.

    Source: FLAP, An et al. 2023, arXiv:2312.11983, bias compensation.
    """
    shift_R: Tensor = W_RC @ full_C - W_RP @ mean_P
    return shift_R
