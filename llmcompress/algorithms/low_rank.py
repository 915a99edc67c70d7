"""Low-rank factors of weights with the least output error on given inputs; several layers can share one
factor.

The squared output error of W is tr(E H E^T), with H the second moments of the inputs. After multiplication by
a root S of H it is a plain Frobenius norm, for which a truncated singular value decomposition is optimal;
this is the purpose of whitening. Layers whose whitened weights are stacked share the right singular vectors,
a common basis for their inputs, and each layer has its own coefficients. R rows, C columns, K the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import damped
from llmcompress.algorithms.overflow import Overflow, all_finite

DAMP = 1e-4


def root(H_CC: Tensor, damp: float = DAMP) -> Tensor:
    """Return the lower triangular S with S S^T = H + damping, float64. The damping is raised until S
    exists."""
    for attempt in range(12):
        S_CC: Tensor
        S_CC, failed = torch.linalg.cholesky_ex(damped(H_CC.double(), damp * 10**attempt))
        if not failed and all_finite(S_CC):
            return S_CC
    raise Overflow("second moments are not finite")


def shared_basis(
    weights: Sequence[Tensor], moments: Sequence[Tensor], rank: int
) -> tuple[list[Tensor], Tensor]:
    """Return the coefficients [R, K] of each weight [R, C] and their common basis [K, C]; for one weight, its
    best product of rank K.

    `moments` are those of the inputs of each weight; the basis is optimal for their sum. With K = C nothing
    is lost.

    Source: Basis Sharing, Wang et al. 2024, arXiv:2410.03765, section 3; for one weight SVD-LLM, Wang et al.
    2024, arXiv:2403.07378, truncation-aware whitening. Differs: coefficients are solved for on each layer's
    own inputs.
    """
    summed = torch.stack([H_CC.double() for H_CC in moments]).mean(0)
    S_CC = root(summed)
    whitened = torch.cat([W_RC.double() @ S_CC for W_RC in weights])
    # its leading vectors are the right singular vectors, also with fewer rows than columns
    gram = whitened.T @ whitened
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    V_KC = vectors.flip(1)[:, :rank].T
    basis_KC = torch.linalg.solve_triangular(S_CC.T, V_KC.T, upper=True).T
    lefts = [
        coefficients(W_RC, H_CC, basis_KC.to(W_RC.dtype)) for W_RC, H_CC in zip(weights, moments, strict=True)
    ]
    return lefts, basis_KC.to(weights[0].dtype)


def coefficients(W_RC: Tensor, H_CC: Tensor, basis_KC: Tensor, damp: float = DAMP) -> Tensor:
    """Return the left factor A [R, K] that minimises tr((A B - W) H (A B - W)^T): W H B^T (B H B^T)^-1, H
    damped."""
    H = damped(H_CC.double(), damp)
    B_KC = basis_KC.double()
    BH_KC = B_KC @ H
    inner = BH_KC @ B_KC.T
    left_RK: Tensor = (
        torch.linalg.solve((inner + inner.T) / 2, BH_KC @ W_RC.double().T).T.to(W_RC.dtype).contiguous()
    )
    return left_RK
