"""Random rotations that spread what stands out in one channel over all of them, and the product that applies
one.

A Hadamard matrix has entries of one size, so a channel that is a hundred times the others adds the same
little to every channel of the result; random signs see to it that channels which move together do not add up.
Where the width is no power of two, the odd factor that is left is turned by a random orthogonal matrix of its
own size: it is small in the models there are (9 of 576, 7 of 3584), and so costs little of the evenness. All
is float64 and made on the CPU, the same for the same seed. A matrix of width 4096 takes 128 MiB, and the
product costs D multiplications a weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHTS_AT_ONCE = 2**22  # in float64: 32 MiB


def hadamard(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix [n, n], float64 on the CPU: random signs times a Hadamard matrix, if n is a
    power of two.

    For n = 2^k m, m odd, it is the Kronecker product of the Hadamard matrix of 2^k and a random orthogonal
    one of m, its rows with random signs. Raises ValueError for n < 1. Source: arXiv:2404.00456, section 2.
    Differs: there the widths are those for which a Hadamard matrix is known; here any width is one.
    """
    if n < 1:
        raise ValueError(f"there is no rotation of {n} channels; give at least 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    even = n & -n  # 2^k
    signs_D = torch.randint(2, (n,), generator=generator, device="cpu").double() * 2 - 1
    Q_DD = torch.kron(_sylvester(even), _orthogonal(n // even, generator))
    return signs_D[:, None] * Q_DD


def turn(X_TD: Tensor, M_DD: Tensor) -> Tensor:
    """X M for X [..., D], computed in float64 a few rows at a time, in the dtype of X; M is float64 on the
    device of X."""
    flat_TD = X_TD.reshape(-1, len(M_DD))
    out_TD = torch.empty_like(flat_TD, memory_format=torch.contiguous_format)
    rows = max(1, WEIGHTS_AT_ONCE // len(M_DD))
    for start in range(0, len(flat_TD), rows):
        out_TD[start : start + rows] = flat_TD[start : start + rows].double() @ M_DD
    return out_TD.reshape(X_TD.shape)


def _sylvester(n: int) -> Tensor:
    """The Hadamard matrix [n, n] of a power of two over sqrt(n): H_2n = (H H | H -H)."""
    H = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H.div_(math.sqrt(n))


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [n, n], every one as likely: Q of a Gaussian matrix, R's diagonal made
    positive."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    normal = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    Q, R = torch.linalg.qr(normal)
    turned: Tensor = Q * R.diagonal().sign()
    return turned.contiguous()  # QR gives columns, kron wants rows
