"""Embedding and head in the dtype in which they are stored, computed with in the working precision.

With a large vocabulary these two matrices are most of a small model: 262 thousand rows of 640 take 336 MB in
bfloat16 and 671 MB in float32. They stay as they are stored. A look-up converts the rows of its tokens, and a
product converts a few rows at a time, so the numbers are those of a float32 copy that is never made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Module = TypeVar("Module", bound=nn.Module)
STORED = (torch.bfloat16, torch.float16)  # dtypes that a matrix stays in
SLICE = 1 << 20  # weights that are converted at once: 4 MB in float32, which stay in a processor's cache


def compute_from_stored(module: nn.Module, dtype: torch.dtype) -> None:
    """Let an embedding or a linear with a weight of another dtype compute in `dtype`."""
    forward: Callable[..., Tensor] = _look_up if isinstance(module, nn.Embedding) else _multiply
    # a plain reference would be a circle, which keeps the matrix after the model is gone
    module.forward = partial(forward, weakref.ref(module), dtype)


def widen(module: nn.Module, dtype: torch.dtype) -> None:
    """Undo `compute_from_stored`: convert the weight to `dtype`, with which the module's own forward runs."""
    vars(module).pop("forward", None)
    weight = module.get_parameter("weight")
    weight.data = weight.data.to(dtype)


def _look_up(to: weakref.ref[nn.Embedding], dtype: torch.dtype, input: Tensor) -> Any:
    """The embedding's own forward on the rows of its tokens."""
    module = _present(to)
    weight = module.get_parameter("weight")
    if weight.dtype == dtype:
        return type(module).forward(module, input)
    tokens, places = input.unique(return_inverse=True)
    padding, rows = module.padding_idx, nn.Parameter(weight.data[tokens].to(dtype), requires_grad=False)
    module._parameters["weight"], module.padding_idx = rows, None  # which can be beyond the rows
    try:
        return type(module).forward(module, places)
    finally:
        module._parameters["weight"], module.padding_idx = weight, padding


def _multiply(to: weakref.ref[nn.Linear], dtype: torch.dtype, input: Tensor) -> Tensor:
    """x W^T + b, [..., V], of inputs [..., D]."""
    module = _present(to)
    if module.weight.dtype == input.dtype:
        return type(module).forward(module, input)
    product: Tensor = _Product.apply(input, module.weight.data)  # type: ignore[no-untyped-call]
    return product if module.bias is None else product + module.bias


def _present(to: weakref.ref[Module]) -> Module:
    module = to()
    assert module is not None, "its own forward is running"
    return module


class _Product(torch.autograd.Function):
    """x W^T of inputs [..., D] and a weight [V, D] of another dtype, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_VD: Tensor) -> Tensor:
        ctx.save_for_backward(W_VD)
        X_TD = x.reshape(-1, x.shape[-1])
        product_TV = X_TD.new_empty(len(X_TD), len(W_VD))
        for rows in _slices(W_VD):
            torch.mm(X_TD, W_VD[rows].to(x.dtype).T, out=product_TV[:, rows])
        return product_TV.view(*x.shape[:-1], len(W_VD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (W_VD,) = ctx.saved_tensors
        g_TV = grad.reshape(-1, grad.shape[-1])
        dX_TD = g_TV.new_zeros(len(g_TV), W_VD.shape[1])
        for rows in _slices(W_VD):
            dX_TD.addmm_(g_TV[:, rows], W_VD[rows].to(grad.dtype))
        return dX_TD.view(*grad.shape[:-1], W_VD.shape[1]), None


def _slices(W_VD: Tensor) -> list[slice]:
    """Slices of rows with at most SLICE weights each."""
    step = max(1, SLICE // max(1, W_VD.shape[1]))
    return [slice(start, start + step) for start in range(0, len(W_VD), step)]
