"""Second moments of a linear's inputs, and the triangular factor of their inverse that GPTQ uses.

The squared output error of a linear over its calibration inputs is tr(E H E^T), with E the weight error and H
= X X^T. One C x C matrix holds all that the data says, so it is accumulated once and shared by every linear
that reads the same input. Everything is float32; sums are kept as means, so they stay far within its range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from llmcompress.algorithms.overflow import Overflow, all_finite

# columns of a block of X^T X, at least, and blocks, at most: products of narrower blocks are slower
BLOCK, BLOCKS = 192, 8
SMALL = 128  # columns of a triangular matrix that is inverted at once


class Moments:
    """Running means over tokens, float32, on the device of the inputs.

    `H_CC` is the mean of x x^T, of which only the upper part is accumulated. If the inputs f of the full
    model are given too, `gap_FC` is the mean of (f - x) x^T; it is accumulated as such, as it is small. If
    the full model has another number of columns, `full`, `gap_FC` is the mean of f x^T. `mean_C` is the mean
    of x and `full_C` that of f (of x if there is no f). `top_C` is the largest |x| of each column.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", full: int | None = None) -> None:
        self._H_CC = torch.zeros(columns, columns, device=device)
        self._mirrored = True  # whether the part of H below the diagonal is up to date
        self.gap_FC: Tensor | None = None
        self.mean_C, self.top_C = torch.zeros(columns, device=device), torch.zeros(columns, device=device)
        self.full_C = torch.zeros(full or columns, device=device)
        self.tokens = 0

    @property
    def H_CC(self) -> Tensor:
        """The mean of x x^T, [C, C]."""
        if not self._mirrored:
            _mirror(self._H_CC)
            self._mirrored = True
        return self._H_CC

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Accumulate inputs x [..., C] and, if given, the full model's inputs in their place.

        All memory is allocated before the first number changes: if it runs out, nothing was accumulated.
        """
        X_TC = x.reshape(-1, x.shape[-1])
        total = self.tokens + len(X_TC)
        if total == self.tokens:
            return
        if full is not None and self.gap_FC is None:
            self.gap_FC = self._H_CC.new_zeros(len(self.full_C), len(self._H_CC))
        self._accumulate(X_TC, None if full is None else full.reshape(-1, full.shape[-1]), total)
        self.tokens = total

    def _accumulate(self, X_TC: Tensor, F_TC: Tensor | None, total: int) -> None:
        """Accumulate at least one token; `total` counts those of before too."""
        kept, share = self.tokens / total, 1 / total
        X_TC, F_TC = X_TC.float(), None if F_TC is None else F_TC.float()
        gap_TF = F_TC - X_TC if F_TC is not None and F_TC.shape == X_TC.shape else F_TC
        self._accumulate_columns(X_TC, X_TC if F_TC is None else F_TC, total)
        if gap_TF is not None and self.gap_FC is not None:
            self.gap_FC.mul_(kept).addmm_(gap_TF.T, X_TC, alpha=share)
        self._H_CC.mul_(kept)
        _add_gram(self._H_CC, X_TC, share)
        self._mirrored = False

    def _accumulate_columns(self, X_TC: Tensor, F_TC: Tensor, total: int) -> None:
        """Accumulate what is known of each column alone, from float32 inputs."""
        sum_C, full_C, top_C = X_TC.sum(0), F_TC.sum(0), torch.maximum(self.top_C, X_TC.abs().amax(0))
        self._accumulate_sums(sum_C, full_C, total)
        self.top_C = top_C

    def _accumulate_sums(self, sum_C: Tensor, full_C: Tensor, total: int) -> None:
        """Accumulate the sums of x and of f over some tokens."""
        for mean_C, added_C in ((self.mean_C, sum_C), (self.full_C, full_C)):
            mean_C.mul_(self.tokens / total).add_(added_C, alpha=1 / total)

    @property
    def X_FC(self) -> Tensor | None:
        """The mean of f x^T, [columns of f, C]; None without f."""
        if self.gap_FC is None or len(self.full_C) != len(self.H_CC):
            return self.gap_FC
        return self.H_CC + self.gap_FC

    @property
    def finite(self) -> bool:
        """Whether all moments are finite, and with them the inputs, their squares and their sums."""
        return all(all_finite(part) for part in (self.H_CC, self.gap_FC, self.full_C) if part is not None)

    def pool(self, add: Callable[..., None], most: Callable[..., None]) -> None:
        """Make these the moments over the tokens of several processes.

        `add` replaces tensors by their sums over all processes, `most` by their maxima. A process may have
        seen no token.
        """
        seen = torch.tensor([self.tokens, self.gap_FC is not None], dtype=torch.float64)
        add(seen)
        total, has_gap = int(seen[0]), bool(seen[1])
        if has_gap and self.gap_FC is None:
            self.gap_FC = self.H_CC.new_zeros(len(self.full_C), len(self.H_CC))
        parts = [self.H_CC, self.mean_C, self.full_C]
        parts += [] if self.gap_FC is None else [self.gap_FC]
        for part in parts:
            part.mul_(self.tokens / max(1, total))
        add(*parts)
        most(self.top_C)
        self.tokens = total

    def blended(self, others: Moments, tokens: float) -> Moments:
        """Return the moments over these tokens and so many of `others`, as if those were read too."""
        both = Moments(len(self.H_CC), self.H_CC.device)
        both.tokens = self.tokens
        mine = self.tokens / (self.tokens + tokens) if self.tokens + tokens else 0.0

        def mean(one: Tensor, other: Tensor) -> Tensor:
            return one * mine + other * (1 - mine)

        both._H_CC = mean(self.H_CC, others.H_CC)
        both.mean_C, both.full_C = mean(self.mean_C, others.mean_C), mean(self.full_C, others.full_C)
        both.top_C = torch.maximum(self.top_C, others.top_C)
        known = [gap_FC for gap_FC in (self.gap_FC, others.gap_FC) if gap_FC is not None]
        if known:
            one, other = (
                torch.zeros_like(known[0]) if gap_FC is None else gap_FC
                for gap_FC in (self.gap_FC, others.gap_FC)
            )
            both.gap_FC = mean(one, other)
        return both

    def evened(self, tokens: float) -> Moments:
        """Return the moments over these tokens and so many whose inputs are independent and equally large:
        as large as these are on average, or 1 if there are none."""
        even, size = Moments(len(self.H_CC), self.H_CC.device), self.H_CC.diagonal().mean()
        even._H_CC = torch.eye(len(self.H_CC), device=size.device) * torch.where(size > 0, size, 1)
        even.mean_C, even.full_C = self.mean_C, self.full_C
        return self.blended(even, tokens)

    def joined(self, other: Moments) -> Moments:
        """Return the moments over the tokens of both.

        `gap_FC` is left out, since the two linears stand at different places of the full model.
        """
        both = Moments(len(self.H_CC), self.H_CC.device)
        both.tokens = self.tokens + other.tokens
        mine, others = (one.tokens / max(1, both.tokens) for one in (self, other))
        both._H_CC = self.H_CC * mine + other.H_CC * others
        both.mean_C = self.mean_C * mine + other.mean_C * others
        both.full_C = self.full_C * mine + other.full_C * others
        both.top_C = torch.maximum(self.top_C, other.top_C)
        return both


def _add_gram(H_CC: Tensor, X_TC: Tensor, alpha: float) -> None:
    """Add alpha X^T X to H in place, by blocks from the diagonal on; the blocks below it are left as they
    are."""
    for start, stop in _blocks(len(H_CC)):
        H_CC[start:stop, start:].addmm_(X_TC[:, start:stop].T, X_TC[:, start:], alpha=alpha)


def _mirror(H_CC: Tensor) -> None:
    """Copy what lies above the diagonal to below it, in place."""
    for start, stop in _blocks(len(H_CC)):
        square = H_CC[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        H_CC[stop:, start:stop] = H_CC[start:stop, stop:].T


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    """Cut columns into blocks: where each begins and ends."""
    width = max(BLOCK, -(-columns // BLOCKS))
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def damped(H_CC: Tensor, damp: float) -> Tensor:
    """Return H with `damp` times the mean of its diagonal added to the diagonal.

    A channel that is always zero gets the mean itself as its diagonal entry.
    """
    return _damp(H_CC.clone(), damp)


def _damp(H_CC: Tensor, damp: float) -> Tensor:
    """Damp H in place."""
    diagonal = H_CC.diagonal()
    mean, dead = diagonal.mean(), diagonal <= 0
    # without any input H becomes the identity, which means plain rounding
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += damp * mean
    diagonal[dead] = mean
    return H_CC


def inverse_factor(H_CC: Tensor, damp: float, order_C: Tensor | None = None) -> Tensor:
    """Return the upper triangular U with (H + damping)^-1 = U^T U; with `order_C`, for the columns of H in
    that order.

    The damping is raised tenfold until the Cholesky factorisation succeeds. So the factor is finite for
    constant channels, for channels that are always zero and for fewer tokens than columns.

    Source: Frantar et al. 2022, arXiv:2210.17323, step 3 of Algorithm 1, which inverts H and factors the
    inverse. Here H is factored from its last column on, and the factor is inverted: U is the same, for half
    of the operations. All of it happens in the memory of U.
    """
    columns_C = torch.arange(len(H_CC), device=H_CC.device) if order_C is None else order_C
    last_first_C, failed = columns_C.flip(0), torch.empty((), dtype=torch.int32, device=H_CC.device)
    for attempt in range(12):
        U_CC = _damp(_in_order(H_CC, last_first_C), damp * 10**attempt)
        torch.linalg.cholesky_ex(U_CC, out=(U_CC, failed))
        if failed:
            continue
        _invert_lower(U_CC)
        _turn(U_CC)
        if all_finite(U_CC):
            return U_CC
    raise Overflow("second moments are not finite")


def _in_order(H_CC: Tensor, order_C: Tensor) -> Tensor:
    """Return H with its rows and columns in an order, a copy."""
    found_CC = torch.empty_like(H_CC)
    for start, stop in _blocks(len(H_CC)):
        torch.index_select(H_CC[order_C[start:stop]], 1, order_C, out=found_CC[start:stop])
    return found_CC


def _turn(H_CC: Tensor) -> None:
    """Reverse the order of rows and of columns in place."""
    C = len(H_CC)
    for start, stop in _blocks(C // 2):
        upper_BC = H_CC[start:stop].flip(0, 1)
        H_CC[start:stop] = H_CC[C - stop : C - start].flip(0, 1)
        H_CC[C - stop : C - start] = upper_BC
    if C % 2:
        H_CC[C // 2] = H_CC[C // 2].flip(0)


def _invert_lower(L_CC: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: all but small blocks is matrix products."""
    C = len(L_CC)
    if C <= SMALL:
        eye_CC = torch.eye(C, dtype=L_CC.dtype, device=L_CC.device)
        L_CC.copy_(torch.linalg.solve_triangular(L_CC, eye_CC, upper=False))
        return
    half = -(-C // 2)
    first, below, last = L_CC[:half, :half], L_CC[half:, :half], L_CC[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    torch.mm(last @ below, first.neg(), out=below)


class Factors:
    """The factor of one `Moments` that the solvers of several linears share, computed on first use."""

    def __init__(self, moments: Moments, damp: float = 0.01) -> None:
        self.moments, self.damp = moments, damp

    @cached_property
    def ordered(self) -> tuple[Tensor, Tensor]:
        """`ordered_factor` of H: the order of columns [C] and the factor [C, C]."""
        return ordered_factor(self.moments.H_CC, self.damp)

    def divide(self, B_RC: Tensor) -> Tensor:
        """Return B (H + damping)^-1."""
        order_C, U_CC = self.ordered
        out_RC = torch.empty_like(B_RC)
        out_RC[:, order_C] = B_RC[:, order_C] @ U_CC.T @ U_CC
        return out_RC


def ordered_factor(H_CC: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return the columns in order of falling second moment (activation order) [C], and `inverse_factor` of H
    in that order."""
    order_C = torch.argsort(H_CC.diagonal(), descending=True, stable=True)
    return order_C, inverse_factor(H_CC, damp, order_C)


def retarget(W_RC: Tensor, moments: Moments, damp: float = 0.01, factors: Factors | None = None) -> Tensor:
    """Return the weight whose outputs on x come closest to those of W on the full model's inputs f.

    It is W + W (X - H) (H + damping)^-1, with X the mean of f x^T. It corrects the error of the layers
    before, as far as a linear map of x can; the damping keeps it near W.

    Source: Arai and Ichikawa 2025, arXiv:2504.09629, the corrected weight at full propagation.
    """
    if moments.gap_FC is None:
        return W_RC
    return W_RC + (factors or Factors(moments, damp)).divide(W_RC @ moments.gap_FC)


def translate(W_RF: Tensor, W_RC: Tensor, moments: Moments, damp: float = 0.01) -> Tensor:
    """Return the weight on inputs x whose outputs come closest to those of W_RF on the full model's inputs f,
    by least squares.

    It is W_RC + (W_RF X - W_RC H) (H + damping)^-1; the damping keeps it near W_RC. This is `retarget` for a
    full model whose inputs have another width.
    """
    X_FC = moments.X_FC
    assert X_FC is not None
    return W_RC + Factors(moments, damp).divide(W_RF @ X_FC - W_RC @ moments.H_CC)


def metric_factor(F_DD: Tensor, damp: float) -> Tensor:
    """Return the lower triangular R with R R^T = F + damping: the squared length of e R is the error e [D]
    weighted by F.

    F is first scaled to a mean diagonal of one, so that losses of different layers have the same size.
    """
    mean, eye = F_DD.diagonal().mean(), torch.eye(len(F_DD), device=F_DD.device)
    F = eye if mean == 0 else F_DD / mean
    for attempt in range(12):
        R_DD: Tensor
        R_DD, failed = torch.linalg.cholesky_ex(F + damp * 10**attempt * eye)
        if not failed and all_finite(R_DD):
            return R_DD
    raise Overflow("output Fisher matrix is not finite")
