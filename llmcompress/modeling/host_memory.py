"""What passes leave behind in the memory of the host: hidden states between two layers, and finished parts.

A GPU reads and writes page-locked memory several times as fast as other memory, and torch keeps what is freed
of it for the next layer's states. On a CPU, what rests between passes has memory of its own: among what
passes allocate and free it would fragment the heap.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

SPARE = 4  # times a tensor that must be free, or it is not page-locked: such memory can't be swapped out


OUTSIDE = 1 << 20  # bytes of a tensor that gets memory outside of the heap


def to_host(x: Tensor) -> Tensor:
    """Return x to rest on the CPU: a copy of its own if it is large or comes from a GPU, from there
    page-locked if there is room."""
    if x.is_cpu:
        return _outside_the_heap(x) if x.nbytes >= OUTSIDE and sys.platform == "linux" else x
    if not x.is_cuda or psutil.virtual_memory().available < SPARE * x.nbytes:
        return x.cpu()
    try:
        locked = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # the system locks no more pages
        return x.cpu()
    return locked.copy_(x)


def at_rest(output: Any) -> Any:
    """Return a module's output with its tensors resting on the CPU."""
    return tree_map(lambda value: to_host(value) if isinstance(value, Tensor) else value, output)


def moved(output: Any, device: torch.device) -> Any:
    """Return a module's output with its tensors on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, output)


def _outside_the_heap(x: Tensor) -> Tensor:
    """Return a copy of x in pages of its own, which go back to the system with it."""
    pages = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=x.dtype).view(x.shape).copy_(x)
