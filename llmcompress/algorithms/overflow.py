"""Numbers beyond the range of their dtype: how they are found, and the error that an algorithm raises."""

from __future__ import annotations

import torch
from torch import Tensor


class Overflow(ArithmeticError, ValueError):
    """Weights or activations are so large that a result is NaN or infinite, or cannot be stored in its
    dtype."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN or infinite value.

    Least and largest value tell, as NaN is both of any tensor that has one. torch.isfinite takes ten times as
    long and several times the memory.
    """
    if not tensor.numel():
        return True
    ends = torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.detach().half())
    return bool(torch.stack([ends.min, ends.max]).isfinite().all())


def require_within(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise Overflow if the values of a tensor exceed the range of `dtype`; `what` names them in the
    message."""
    top, most = float(tensor.abs().max()) if tensor.numel() else 0.0, torch.finfo(dtype).max
    if not top <= most:
        raise Overflow(
            f"{what} up to {top:.3g} don't fit {str(dtype).removeprefix('torch.')}, which ends at {most:.3g}"
        )
