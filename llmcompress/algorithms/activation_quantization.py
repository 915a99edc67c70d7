"""Activations as an integer kernel sees them: rounded to integers under one scale per token or one for all
tokens.

The functions return the values that the codes stand for, in the dtype of the input, so that a floating-point
model computes what the kernels will (up to the order of sums). The gradient passes the rounding as if it were
the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
# largest code by bits; codes are symmetric; a 16-bit code is 256 times one int8 code plus another
LARGEST = {4: 7, 8: 127, 16: 127 * 256 + 127}


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Return x [..., C] rounded under the absolute maximum of each token, on 2 * LARGEST[bits] + 1 levels."""
    top = x.detach().float().abs().amax(-1, keepdim=True) if x.numel() else x.detach().float()[..., :1]
    return _rounded(x, top / LARGEST[bits], bits)


def round_static(x: Tensor, bits: int, scale: Tensor | float) -> Tensor:
    """Return x rounded to integer multiples of one `scale`; codes beyond LARGEST[bits] are clipped to it."""
    return _rounded(x, torch.as_tensor(scale, dtype=torch.float32, device=x.device), bits)


def round_but_outliers(x: Tensor, threshold: float) -> Tensor:
    """Return x [..., C] rounded to 8 bits per token, except outlier columns, where some token reaches
    `threshold`.

    This is the decomposition of LLM.int8. The absolute maximum of a token is taken over its elements below
    the threshold, including those in outlier columns, as in bitsandbytes. A threshold of 0 rounds everything.
    Outlier columns are found over all tokens of x together.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.2.
    """
    if threshold <= 0:
        return round_tokens(x, 8)
    beyond = x.detach().abs() >= threshold
    outlier = beyond.reshape(-1, x.shape[-1]).any(0)
    return torch.where(outlier, x, round_tokens(torch.where(beyond, 0.0, x), 8))


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    largest = LARGEST[bits]
    value = (x.detach().float() / scale.clamp_min(TINY)).round().clamp_(-largest, largest) * scale
    return straight_through(x, value.to(x.dtype))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, exactly, with the gradient of x where one is asked for."""
    return rounded + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded


class Magnitudes:
    """A histogram of |x| over all inputs added, in bins of 0.7 % from 2^-40 to 2^40, and their maximum."""

    BINS, SPAN = 8192, 40

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(self.BINS, device=device, dtype=torch.float64)
        self.top = torch.zeros((), device=device)

    def add(self, x: Tensor) -> None:
        """Add x, of any shape."""
        size = x.detach().float().abs().flatten()
        if size.numel() == 0:
            return
        self.top = torch.maximum(self.top, size.max())
        place = (size.clamp_min(TINY).log2() / self.SPAN + 1) * (self.BINS / 2)
        self.counts += torch.bincount(place.long().clamp_(0, self.BINS - 1), minlength=self.BINS)

    def values(self) -> Tensor:
        """Return the middle of each bin, float64 [BINS]."""
        middles = torch.arange(self.BINS, device=self.counts.device, dtype=torch.float64) + 0.5
        return torch.exp2((middles / (self.BINS / 2) - 1) * self.SPAN)

    def quantile(self, share: float) -> float:
        """Return the magnitude that a share `share` of all elements do not exceed, to the width of a bin."""
        part = self.counts.cumsum(0) / self.counts.sum().clamp_min(1)
        place = int(torch.searchsorted(part, torch.tensor(share, dtype=torch.float64, device=part.device)))
        return min(float(self.values()[min(place, self.BINS - 1)]), float(self.top))


def static_scale(seen: Magnitudes, bits: int, method: str) -> float:
    """Return one scale for an input.

    `minmax` covers the maximum, `percentile` 99.99 % of all elements, and `mse` has the least squared error.
    """
    largest = LARGEST[bits]
    if method == "minmax":
        return float(seen.top) / largest
    if method == "percentile":
        return seen.quantile(0.9999) / largest
    values, best, least = seen.values(), 0.0, float("inf")
    for ratio in torch.linspace(0.05, 1.0, 96).tolist():
        scale = float(seen.top) * ratio / largest
        error = (
            (values / max(scale, TINY)).round().clamp_(max=largest) * scale - values
        ).square() @ seen.counts
        best, least = (scale, float(error)) if float(error) < least else (best, least)
    return best
