"""What must hold of the values of stored tensors: one check for from_pretrained, for `evaluate` and for live
modules.

Loaders compare shapes and types. Values can be damaged too, and the model would load and compute nonsense:
each layout lists by `flaws` what must hold of its own, as bools on the device of the tensors, and those of a
linear are read back together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import ModelError

Flaw = tuple[Tensor, str]  # a bool [] that is True where it is found, and what must hold


def flaw_of(flaws: Sequence[Flaw]) -> str | None:
    """What must hold and doesn't: the first of the flaws that is found."""
    found = torch.stack([flag for flag, _ in flaws]).tolist() if flaws else []
    return next((what for there, (_, what) in zip(found, flaws, strict=True) if there), None)


def require_sound(what: str, flaws: Sequence[Flaw]) -> None:
    """Refuse damaged tensors. Errors: ModelError, which calls them `what`."""
    if (why := flaw_of(flaws)) is not None:
        raise ModelError(f"{what} is damaged: {why}; take it again from its source")


def finite(tensor: Tensor, name: str) -> Flaw:
    """Numbers must be finite."""
    return ~tensor.isfinite().all(), f"{name} must be finite"


def within(tensor: Tensor, low: int, high: int, name: str) -> Flaw:
    """Integers must lie in low..high."""
    least, most = (
        tensor.aminmax() if tensor.numel() else (tensor.new_full((), low), tensor.new_full((), high))
    )
    return (least < low) | (most > high), f"{name} must lie in {low}..{high}"


def scaled_rows(scale_R: Tensor, codes_RC: Tensor, zero: int) -> Flaw:
    """A scale must be above zero, or zero where all codes of its row stand for zero, as `zero` does."""
    empty = codes_RC[(scale_R == 0).nonzero()[:, 0]]
    return (scale_R < 0).any() | (
        empty != zero
    ).any(), "weight scales must be positive, or zero for a row of zeros"
