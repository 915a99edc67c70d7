"""One matrix for the input embedding and the output head of a model that has two: the best of both, row by
row.

The embedding's rows are looked up, so an error e of row v costs what the model feels of it, e F e^T, as often
as the token comes. The head's rows are multiplied by what it reads: an error costs e H e^T, as often as the
token is predicted. One row that is to be both is their least-squares compromise. A gain g on each channel
that the head reads is free, for a norm is there; it lets the two use the channels differently, and is solved
for in turn with the rows. V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DAMP = 1e-6  # of F, so that channels that nothing feels are kept as the embedding has them
GAIN_DAMP = 1e-4  # towards the gain of 1
PIECE = 1 << 22  # weights of which there are copies in float64 at a time


def fit_rows(
    E_VD: Tensor, O_VD: Tensor, seen_V: Tensor, said_V: Tensor, F_DD: Tensor, H_DD: Tensor, gain_D: Tensor
) -> Tensor:
    """M [V, D] with the least sum over rows of seen (m - e) F (m - e)^T + said (m g - o) H (m g - o)^T, in
    the type of E.

    seen_V, said_V: positive weights of rows; F, H: positive semi-definite. Each row has a system of its own,
    which one change of basis makes diagonal for all: with A = F + damping = L L^T and L^-1 (g H g) L^-T = U
    diag(l) U^T, the basis Q = L^-T U.
    """
    F, H, gain = F_DD.double(), H_DD.double(), gain_D.double()
    A_DD = F.clone()
    A_DD.diagonal().add_(DAMP * F.diagonal().mean().clamp_min(torch.finfo(F.dtype).tiny))
    lower = torch.linalg.cholesky(A_DD)
    inner = torch.linalg.solve_triangular(lower, gain[:, None] * H * gain, upper=False)
    inner = torch.linalg.solve_triangular(lower, inner.T, upper=False)
    lengths_D, U_DD = torch.linalg.eigh((inner + inner.T) / 2)
    Q_DD = torch.linalg.solve_triangular(lower.T, U_DD, upper=True)
    M_VD = torch.empty_like(E_VD)
    for rows in _pieces(E_VD):
        seen, said = seen_V[rows, None].double(), said_V[rows, None].double()
        right = seen * (E_VD[rows].double() @ A_DD) + said * (O_VD[rows].double() @ H * gain)
        M_VD[rows] = (right @ Q_DD / (seen + said * lengths_D.clamp_min(0)) @ Q_DD.T).to(M_VD.dtype)
    return M_VD


def fit_gain(M_VD: Tensor, O_VD: Tensor, said_V: Tensor, H_DD: Tensor) -> Tensor:
    """The gain g [D], float64, with the least sum over rows of said (m g - o) H (m g - o)^T.

    ((M^T S M) * H) g = sum over rows of M * S O H, damped towards a gain of 1.
    """
    H = H_DD.double()
    A_DD, right_D = torch.zeros_like(H), torch.zeros_like(H[0])
    for rows in _pieces(M_VD):
        M, weighed = M_VD[rows].double(), said_V[rows, None].double() * M_VD[rows].double()
        A_DD.addmm_(M.T, weighed)
        right_D += (weighed * (O_VD[rows].double() @ H)).sum(0)
    A_DD *= H
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

    `balance` is the share of the embedding's errors: at 1 both metrics give the two matrices the same mean
    size, so which balance is best depends on how a model's predictions bear errors, and is for the caller to
    measure. Sums are in float64.
    """
    F, H = F_DD.double(), H_DD.double()
    F = F * balance / _size(E_VD, F)
    H = H / _size(O_VD, H)
    seen, said = seen_V / seen_V.mean(), said_V / said_V.mean()
    gain_D = torch.ones_like(H[0])
    for _ in range(rounds if gain else 0):
        gain_D = fit_gain(fit_rows(E_VD, O_VD, seen, said, F, H, gain_D), O_VD, said, H)
    return fit_rows(E_VD, O_VD, seen, said, F, H, gain_D), gain_D.to(E_VD.dtype)


def _pieces(W_VD: Tensor) -> Iterator[slice]:
    """Rows so many at a time that float64 copies of them are small."""
    step = max(1, PIECE // W_VD.shape[1])
    return (slice(start, start + step) for start in range(0, len(W_VD), step))


def _size(W_VD: Tensor, metric_DD: Tensor) -> Tensor:
    """The mean over rows of w M w^T."""
    sizes = [((W_VD[rows].double() @ metric_DD) * W_VD[rows].double()).sum() for rows in _pieces(W_VD)]
    return (torch.stack(sizes).sum() / len(W_VD)).clamp_min(torch.finfo(metric_DD.dtype).tiny)
