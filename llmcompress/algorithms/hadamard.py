"""Random rotations that spread the outliers of single channels over all channels, and the product that
applies them.

All entries of a Hadamard matrix have the same size, so a channel a hundred times as large as the others adds
equally little to every channel of the result. Random signs keep channels that move together from adding up.
If the width is not a power of two, its odd factor is rotated by a random orthogonal matrix of that size. The
factor is small in existing models (9 of 576, 7 of 3584), so this costs little of the evenness. Everything is
float64 and computed on the CPU, and the same seed gives the same matrix. A matrix of width 4096 takes 128
MiB, and the product costs D multiplications per weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHTS_AT_ONCE = 2**22  # of the product; in float64: 32 MiB


def hadamard(n: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix [n, n], float64 on the CPU: random signs times a Hadamard matrix, if
    n is a power of two.

    For n = 2^k m with m odd, it is the Kronecker product of the Hadamard matrix of 2^k and a random
    orthogonal one of m, with random signs for its rows. Raises ValueError for n < 1.

    Source: arXiv:2404.00456, section 2. Differs: there the widths are those for which a Hadamard matrix is
    known; here any width is possible.
    """
    if n < 1:
        raise ValueError(f"there is no rotation of {n} channels; give at least 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    even = n & -n  # 2^k
    signs_D = torch.randint(2, (n,), generator=generator, device="cpu").double() * 2 - 1
    Q_DD = torch.kron(_sylvester(even), _orthogonal(n // even, generator))
    return signs_D[:, None] * Q_DD


def turn(X_TD: Tensor, M_DD: Tensor) -> Tensor:
    """Return X M for X [..., D], in the dtype of X, computed in float64 a few rows at a time.

    M is float64 on the device of X.
    """
    flat_TD = X_TD.reshape(-1, len(M_DD))
    out_TD = torch.empty_like(flat_TD, memory_format=torch.contiguous_format)
    rows = max(1, WEIGHTS_AT_ONCE // len(M_DD))
    for start in range(0, len(flat_TD), rows):
        out_TD[start : start + rows] = flat_TD[start : start + rows].double() @ M_DD
    return out_TD.reshape(X_TD.shape)


def _sylvester(n: int) -> Tensor:
    """Return the Hadamard matrix [n, n] of a power of two over sqrt(n): H_2n = (H H | H -H)."""
    H = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H.div_(math.sqrt(n))


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Return a uniformly random orthogonal matrix [n, n]: Q of a Gaussian matrix, with the diagonal of R made
    positive."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    normal = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    Q, R = torch.linalg.qr(normal)
    turned: Tensor = Q * R.diagonal().sign()
    return turned.contiguous()  # QR returns column-major, kron needs row-major
