"""One quantised linear as it lies in a checkpoint, whatever its format: found, read, written, and what it computes.

Formats differ in their tensors (`native`, `integer`) and in whether the kernel rounds what the linear reads. Whoever reads a
checkpoint or a journal asks here and need not know which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmcompress import integer, native
from llmcompress.block import Inputs
from llmcompress.checkpoint import BESIDE
from llmcompress.integer import Int8Weight, IntegerWeight, Scheme
from llmcompress.methods.activations import round_but_outliers, round_static, round_tokens

Stored = native.Packed | Int8Weight | IntegerWeight
MARKS = (".weight.absmax", ".SCB", ".weight_scale")  # a linear that has one of these is quantised


def quantized_linears(names: Mapping[str, Any]) -> list[str]:
    """The linears among the tensors of a checkpoint that are quantised, by full name, in the order of their tensors."""
    return [name.removesuffix(mark) for name in names for mark in MARKS if name.endswith(mark)]


def parts_of(linear: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the weight of one linear, bias apart, under the names that it has in the linear."""
    beside = {name: tensors[f"{linear}.{name}"] for name in ("weight", *BESIDE) if f"{linear}.{name}" in tensors}
    return native.parts_of(linear, tensors) if f"{linear}.weight.absmax" in tensors else beside


def read(parts: Mapping[str, Tensor], scheme: Scheme | None = None, columns: int | None = None) -> Stored:
    """The linear that the tensors of `parts_of` are; `scheme` where it is one of ours. Errors: ModelError for damaged ones."""
    if scheme is not None:
        return integer.read(parts, scheme, columns)
    return Int8Weight.read(parts) if "SCB" in parts else native.unpack(parts)


def tensors_of(stored: Stored) -> dict[str, Tensor]:
    """The tensors of a linear as they are written, by their names in it."""
    return native.tensors(stored) if isinstance(stored, native.Packed) else stored.tensors()


def dequantize(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [R, C] that the codes stand for."""
    return native.dequantize(stored, dtype) if isinstance(stored, native.Packed) else stored.dequantize(dtype)


def schemes_of(quantization: Mapping[str, Any] | None) -> dict[str, Scheme]:
    """The scheme of every linear in one of our formats, from config.json's `quantization_config`."""
    found: dict[str, Scheme] = {}
    for entry in (quantization or {}).get("schemes", ()):
        scheme = Scheme(entry["format"], entry.get("activations", "dynamic"), entry.get("block"))
        found |= dict.fromkeys(entry["linears"], scheme)
    return found


def int8_inputs(threshold: float) -> Inputs:
    """How LLM.int8's kernel rounds what a linear reads, through float16; columns that reach `threshold` are left, if not 0."""

    def rounded(x: Tensor) -> Tensor:
        half = x.detach().to(torch.float16).to(x.dtype) + (x - x.detach())  # the gradient is that of x
        return round_but_outliers(half, threshold)

    return rounded


def scheme_inputs(scheme: Scheme, input_scale: Tensor | float | None) -> Inputs | None:
    """How our integer product rounds what a linear reads; None where it doesn't."""
    if scheme.activations == "none":
        return None
    bits = scheme.activation_bits
    return (lambda x: round_tokens(x, bits)) if input_scale is None else (lambda x: round_static(x, bits, input_scale))
