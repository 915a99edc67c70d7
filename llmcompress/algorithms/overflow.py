"""What a method says of numbers that are beyond the range of the type they are in."""

from __future__ import annotations

import torch
from torch import Tensor


class Overflow(ArithmeticError, ValueError):
    """Weights or activations are so large that a result is NaN or infinite, or can't be stored in its
    type."""


def require_within(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    """Refuse values that a type can't hold. Errors: Overflow, which says `what` they are."""
    top, most = float(tensor.abs().max()) if tensor.numel() else 0.0, torch.finfo(dtype).max
    if not top <= most:
        raise Overflow(
            f"{what} up to {top:.3g} don't fit {str(dtype).removeprefix('torch.')}, which ends at {most:.3g}"
        )
