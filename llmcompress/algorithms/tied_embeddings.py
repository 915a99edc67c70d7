"""One matrix for the input embedding and the untied lm_head of a model, fitted row by row to both.

Rows of the embedding are looked up, so an error e of row v costs e F e^T, the model's sensitivity to it, as
often as the token occurs. Rows of the head are multiplied by its input, so an error costs e H e^T, as often
as the token is predicted. A shared row is the least-squares compromise of the two. A gain g on each channel
of the head's input costs nothing, since the norm before the head absorbs it. It lets the two use the channels
differently and is solved for in turn with the rows. V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DAMP = 1e-6  # of F, so that channels without sensitivity keep the values of the embedding
GAIN_DAMP = 1e-4  # towards the gain of 1
PIECE = 1 << 22  # weights copied to float64 at a time


def fit_rows(
    E_VD: Tensor, O_VD: Tensor, seen_V: Tensor, said_V: Tensor, F_DD: Tensor, H_DD: Tensor, gain_D: Tensor
) -> Tensor:
    """Return M [V, D] with the least sum over rows of seen (m - e) F (m - e)^T + said (m g - o) H (m g -
    o)^T, in the dtype of E.

    seen_V, said_V: positive weights of rows; F, H: positive semi-definite. Each row has its own linear
    system; one change of basis makes all of them diagonal. With A = F + damping = L L^T and L^-1 (g H g) L^-T
    = U diag(l) U^T, the basis is Q = L^-T U.
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
    """Return the gain g [D], float64, with the least sum over rows of said (m g - o) H (m g - o)^T.

    It solves ((M^T S M) * H) g = sum over rows of M * S O H, damped towards a gain of 1.
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
    """Return the matrix M [V, D] for both embedding E and head O, and the gain [D] on the head's input.

    `balance` is the weight of the embedding's errors. At 1 both metrics give the two matrices the same mean
    size. The best balance depends on how sensitive the model's predictions are to errors, so the caller
    measures it. Sums are in float64.
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
    """Yield slices of rows that are small enough to copy in float64."""
    step = max(1, PIECE // W_VD.shape[1])
    return (slice(start, start + step) for start in range(0, len(W_VD), step))


def _size(W_VD: Tensor, metric_DD: Tensor) -> Tensor:
    """Return the mean over rows of w M w^T."""
    sizes = [((W_VD[rows].double() @ metric_DD) * W_VD[rows].double()).sum() for rows in _pieces(W_VD)]
    return (torch.stack(sizes).sum() / len(W_VD)).clamp_min(torch.finfo(metric_DD.dtype).tiny)
