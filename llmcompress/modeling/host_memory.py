"""What passes leave behind in the memory of the host: hidden states between two layers, and finished parts.

A GPU reads and writes page-locked memory several times as fast as other memory, and torch keeps what is freed
of it for the next layer's states.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")
SPARE = 4  # times a tensor that must be free, or it is not page-locked: such memory can't be swapped out


def to_host(x: Tensor) -> Tensor:
    """Return x on the CPU: itself, if it is there, else a copy, page-locked if there is room."""
    if not x.is_cuda or psutil.virtual_memory().available < SPARE * x.nbytes:
        return x.cpu()
    try:
        locked = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # the system locks no more pages
        return x.cpu()
    return locked.copy_(x)


def moved(output: Any, device: torch.device) -> Any:
    """Return a module's output with its tensors on a device."""
    move = to_host if device == CPU else lambda x: x.to(device)
    return tree_map(lambda value: move(value) if isinstance(value, Tensor) else value, output)
