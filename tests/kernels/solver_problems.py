"""Problems for the kernels of the solver, and how two solutions of a block are held against each other."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def moments(C: int, seed: int = 0, dead: int = 0, device: str = "cpu") -> Tensor:
    """Second moments of inputs of very different sizes, the last `dead` of which are zero."""
    X_TC = drawn(3 * C, C, seed=seed) * drawn(C, seed=seed + 1).exp()
    X_TC[:, C - dead :] = 0
    return (X_TC.T @ X_TC / len(X_TC)).to(device)


def same_rows(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Tensor:
    """Return which rows [R] have the same codes in two solutions of a block, codes and steps [B, R].

    There the steps must be the same too. Of a row where a code is on the border all that follows may differ.
    """
    (index_BR, step_BR), (other_BR, expected_BR) = found, expected
    same = (index_BR == other_BR).all(0)
    torch.testing.assert_close(step_BR[:, same], expected_BR[:, same], rtol=1e-3, atol=1e-4)
    return same
