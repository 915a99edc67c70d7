"""Passes in bfloat16: on which devices they are faster, and what is computed in it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from llmcompress.kernels import attention
from llmcompress.modeling.layerwise import LayerwiseModel


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


def runs_in_half(resident: LayerwiseModel) -> bool:
    """Whether passes that may be computed in bfloat16 are: if the model is stored in it, and the device
    multiplies it faster."""
    return resident.weight_dtype == torch.bfloat16 and half_is_fast(resident.device)


def compute_in_half(module: nn.Module, device: torch.device) -> None:
    """Let each forward pass of a module be computed in bfloat16 from here on."""
    running: list[AbstractContextManager[None]] = []

    def begin(module: nn.Module, args: Any) -> None:
        running.append(half_precision(device, True))
        running[-1].__enter__()

    def end(module: nn.Module, args: Any, out: Any) -> None:
        running.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
