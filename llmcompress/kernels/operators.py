"""Our products as operators of torch, so that torch.compile and torch.export keep them as they are.

A compiler can't trace a kernel that is called through ctypes. It calls an operator as a whole, and needs only
the shape of its output. The choice between few and many tokens is made inside the operator, where the number
of tokens is known, so it neither breaks a graph nor compiles it again. Each format defines its own operator
beside its module. An operator is called while a compiler traces; all else calls the functions themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMESPACE = "llmcompress"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# kept, because the operators are gone with it; Library.impl costs 3 microseconds per call, custom_op 14
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
Product = TypeVar("Product", bound=Callable[..., Tensor])


def operator(name: str, arguments: str) -> Callable[[Product], Product]:
    """Register a product on the CPU as `llmcompress::name`.

    It takes inputs x [..., C], the number of rows R of the weight and `arguments`, which are spelled as in
    schemas of torch. It returns a new contiguous tensor [..., R] in the type of x, and has no gradient.
    """

    def registered(product: Product) -> Product:
        schema = f"{name}(Tensor x, int rows, {arguments}) -> Tensor"
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, lambda *args: product(*args).contiguous(), "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _shape, lib=LIBRARY)
        return product

    return registered


def _shape(x: Tensor, rows: int, *_: Any) -> Tensor:
    """An output without values."""
    return x.new_empty((*x.shape[:-1], rows))


def traced(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a compiler is tracing a product on the CPU for which nobody asks a gradient or autocast."""
    return (
        torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.is_autocast_enabled("cpu")
    )
