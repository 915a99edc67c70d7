"""Attention in bfloat16 by a C kernel (csrc/attention.c), on CPUs with AVX512-BF16.

torch's own attention takes nearly as long as all products of a small decoder layer together
(evaluation/results/attention_speed.json). Within `FastAttention`, calls of `scaled_dot_product_attention` go
to the kernel where it computes the same: in bfloat16 under autocast, causal or without a mask.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmcompress.kernels.compiled import CompiledKernel


def _declare(kernel: ctypes.CDLL) -> None:
    pointer, long, small, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    kernel.attention_works.restype = small
    if not kernel.attention_works():
        return
    kernel.attention_largest_head.restype = small
    for room in (kernel.attention_packed, kernel.attention_back_packed):
        room.argtypes, room.restype = (long, long), long
    kernel.attention_room.restype = kernel.attention_back_room.restype = long
    last = (*5 * (long,), number, small, pointer, pointer, small)
    kernel.attention.argtypes, kernel.attention.restype = (*6 * (pointer,), *last), None
    kernel.attention_back.argtypes, kernel.attention_back.restype = (*10 * (pointer,), *last), None


KERNEL = CompiledKernel("attention", ("attention.c",), _declare, "torch computes attention")


def takes(device: torch.device) -> bool:
    """Whether attention in bfloat16 is computed by the kernel on a device."""
    return device.type == "cpu" and KERNEL.available and bool(KERNEL.required.attention_works())


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """Return softmax(scale q k^T) v, bfloat16 [B, H, L, D], for q [B, H, L, D], k and v [B, G, L, D].

    Each of G heads of keys serves H / G heads of queries in a row. `causal`: a token sees itself and those
    before it. `scale` is 1 / sqrt(D) by default. D is even and at most 256.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """The kernel and its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        q, k, v = (_with_heads_whole(x) for x in (q, k, v))
        (B, H, L, D), G = q.shape, k.shape[1]
        out = torch.empty(B, L, H, D, dtype=torch.bfloat16)
        logs = torch.empty(B, H, L) if any(ctx.needs_input_grad) else None
        kernel, threads = KERNEL.required, torch.get_num_threads()
        packed = torch.empty(B * G * kernel.attention_packed(L, D), dtype=torch.int32)
        room = torch.empty(threads * kernel.attention_room(), dtype=torch.uint8)
        strides = _strides(q, k, v)
        kernel.attention(
            *map(_at, (q, k, v, strides, out, logs)),
            *(B, H, G, L, D, scale, causal),
            *map(_at, (packed, room)),
            threads,
        )
        out = out.transpose(1, 2)
        if logs is not None:
            ctx.save_for_backward(q, k, v, out, logs)
            ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, logs = ctx.saved_tensors
        (B, H, L, D), G, grad = q.shape, k.shape[1], _with_heads_whole(grads[0])
        dq, dk, dv = (torch.empty(B, L, heads, D, dtype=torch.bfloat16) for heads in (H, G, G))
        kernel, threads = KERNEL.required, torch.get_num_threads()
        packed = torch.empty(threads * kernel.attention_back_packed(L, D), dtype=torch.int32)
        room = torch.empty(threads * kernel.attention_back_room(), dtype=torch.uint8)
        strides = _strides(q, k, v, out, grad)
        kernel.attention_back(
            *map(_at, (q, k, v, out, grad, strides, logs, dq, dk, dv)),
            *(B, H, G, L, D, ctx.scale, ctx.causal),
            *map(_at, (packed, room)),
            threads,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


class FastAttention(TorchFunctionMode):
    """Within the context, attention is computed by the kernel where it can be."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or the kernel in its place."""
        if function is F.scaled_dot_product_attention:
            found = _instead(*args, **(kwargs or {}))
            if found is not None:
                return found
        return function(*args, **(kwargs or {}))


def _instead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The output of attention by the kernel; None where torch must compute it. The arguments are torch's."""
    known = attn_mask is None and not dropout_p and torch.is_autocast_enabled("cpu")
    if not known or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return None
    if any(x.dim() != 4 or x.device.type != "cpu" for x in (query, key, value)):
        return None
    B, H, L, D = query.shape
    G = key.shape[1]
    if key.shape != (B, G, L, D) or value.shape != key.shape or H % G or (H != G and not enable_gqa):
        return None
    if D % 2 or KERNEL.required.attention_largest_head() < D or not query.numel():
        return None
    return attention(query, key, value, causal=is_causal, scale=scale)


def _with_heads_whole(x: Tensor) -> Tensor:
    """The same, with the numbers of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    """How far apart sequences, heads and tokens lie in each."""
    return torch.tensor([x.stride()[:3] for x in tensors], dtype=torch.int64)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
