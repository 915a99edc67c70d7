"""One matrix for the input embedding and the output head of a model that has two: the best of both, row by row.

The embedding's rows are looked up, so an error e of row v costs what the model feels of it, e F e^T, as often as the token
comes. The head's rows are multiplied by what it reads: an error costs e H e^T, as often as the token is predicted. One row that
is to be both is their least-squares compromise. A gain g on each channel that the head reads is free, for a norm is there; it
lets the two use the channels differently, and is solved for in turn with the rows. V vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMP = 1e-6  # of F, so that channels that nothing feels are kept as the embedding has them
GAIN_DAMP = 1e-4  # towards the gain of 1


def fit_rows(E_VD: Tensor, O_VD: Tensor, seen_V: Tensor, said_V: Tensor, F_DD: Tensor, H_DD: Tensor, gain_D: Tensor) -> Tensor:
    """M [V, D] with the least sum over rows of seen (m - e) F (m - e)^T + said (m g - o) H (m g - o)^T.

    seen_V, said_V: positive weights of rows; F, H: positive semi-definite. Each row has a system of its own, which one change
    of basis makes diagonal for all: with A = F + damping = L L^T and L^-1 (g H g) L^-T = U diag(l) U^T, the basis Q = L^-T U.
    """
    A_DD = F_DD.clone()
    A_DD.diagonal().add_(DAMP * F_DD.diagonal().mean().clamp_min(torch.finfo(F_DD.dtype).tiny))
    lower = torch.linalg.cholesky(A_DD)
    B_DD = gain_D[:, None] * H_DD * gain_D
    inner = torch.linalg.solve_triangular(lower, torch.linalg.solve_triangular(lower, B_DD, upper=False).T, upper=False)
    lengths_D, U_DD = torch.linalg.eigh((inner + inner.T) / 2)
    Q_DD = torch.linalg.solve_triangular(lower.T, U_DD, upper=True)
    right_VD = seen_V[:, None] * (E_VD @ A_DD) + said_V[:, None] * (O_VD @ H_DD * gain_D)
    M_VD: Tensor = right_VD @ Q_DD / (seen_V[:, None] + said_V[:, None] * lengths_D.clamp_min(0)) @ Q_DD.T
    return M_VD


def fit_gain(M_VD: Tensor, O_VD: Tensor, said_V: Tensor, H_DD: Tensor) -> Tensor:
    """The gain g [D] with the least sum over rows of said (m g - o) H (m g - o)^T: ((M^T S M) * H) g = sum(M * S O H)."""
    A_DD = (M_VD.T @ (said_V[:, None] * M_VD)) * H_DD
    right_D = (M_VD * said_V[:, None] * (O_VD @ H_DD)).sum(0)
    damp = GAIN_DAMP * A_DD.diagonal().mean()
    A_DD.diagonal().add_(damp)
    gain_D: Tensor = torch.linalg.solve(A_DD, right_D + damp)
    return gain_D


def tie(
    E_VD: Tensor,
    O_VD: Tensor,
    seen_V: Tensor,
    said_V: Tensor,
    F_DD: Tensor,
    H_DD: Tensor,
    balance: float,
    *,
    gain: bool = True,
    rounds: int = 20,
) -> tuple[Tensor, Tensor]:
    """The matrix M [V, D] for both embedding E and head O, and the gain [D] on what the head reads.

    `balance` is the share of the embedding's errors: at 1 both metrics give the two matrices the same mean size, so which
    balance is best depends on how a model's predictions bear errors, and is for the caller to measure. Float64 inside.
    """
    E, O, seen, said, F, H = (x.double() for x in (E_VD, O_VD, seen_V, said_V, F_DD, H_DD))  # noqa: E741 the paper-sized names
    F = F * balance / _size(E, F)
    H = H / _size(O, H)
    seen, said = seen / seen.mean(), said / said.mean()
    g_D = torch.ones_like(H[0])
    for _ in range(rounds if gain else 0):
        g_D = fit_gain(fit_rows(E, O, seen, said, F, H, g_D), O, said, H)
    M_VD = fit_rows(E, O, seen, said, F, H, g_D)
    return M_VD.to(E_VD.dtype), g_D.to(E_VD.dtype)


def _size(W_VD: Tensor, metric_DD: Tensor) -> Tensor:
    """The mean over rows of w M w^T."""
    return ((W_VD @ metric_DD) * W_VD).sum(1).mean().clamp_min(torch.finfo(W_VD.dtype).tiny)
