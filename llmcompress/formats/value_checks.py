"""Checks of the values of stored tensors, shared by from_pretrained, `evaluate` and live modules.

Loaders compare shapes and types only. Damaged values would load, and the model would compute nonsense. The
`flaws` method of each layout lists what must hold, as bools on the device of the tensors. The bools of one
linear are read back together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import ModelError

Flaw = tuple[Tensor, str]  # a bool [] that is True if the check fails, and what must hold


def flaw_of(flaws: Sequence[Flaw]) -> str | None:
    """Return the requirement of the first check that fails, or None."""
    found = torch.stack([flag for flag, _ in flaws]).tolist() if flaws else []
    return next((what for there, (_, what) in zip(found, flaws, strict=True) if there), None)


def require_sound(what: str, flaws: Sequence[Flaw]) -> None:
    """Raise ModelError if a check fails; the message calls the tensors `what`."""
    if (why := flaw_of(flaws)) is not None:
        raise ModelError(f"{what} is damaged: {why}; take it again from its source")


def finite(tensor: Tensor, name: str) -> Flaw:
    """Check that all numbers are finite."""
    return ~tensor.isfinite().all(), f"{name} must be finite"


def within(tensor: Tensor, low: int, high: int, name: str) -> Flaw:
    """Check that integers lie in low..high."""
    least, most = (
        tensor.aminmax() if tensor.numel() else (tensor.new_full((), low), tensor.new_full((), high))
    )
    return (least < low) | (most > high), f"{name} must lie in {low}..{high}"


def scaled_rows(scale_R: Tensor, codes_RC: Tensor, zero: int) -> Flaw:
    """Check that each scale is above zero, or zero where all codes of its row are `zero`, the code of the
    value zero."""
    empty = codes_RC[(scale_R == 0).nonzero()[:, 0]]
    return (scale_R < 0).any() | (
        empty != zero
    ).any(), "weight scales must be positive, or zero for a row of zeros"
