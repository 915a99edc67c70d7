"""Passes in bfloat16: on which devices they are faster, and what is computed in it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from llmcompress.kernels import attention


def half_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster on a device: on GPUs that have them, and on CPUs with
    AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ours: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and ours


@contextmanager
def half_precision(device: torch.device, enabled: bool) -> Iterator[None]:
    """Compute products and attention in bfloat16 within the context, if `enabled`.

    A generator must not yield inside of it, or its caller would compute in bfloat16 too.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=enabled))
        if enabled and attention.takes(device):
            stack.enter_context(attention.FastAttention())
        yield
