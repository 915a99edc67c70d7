"""One linear as it lies in a checkpoint, whatever its format: found, read, written, what it computes.

Formats differ in their tensors (`native`, `integer`, `sparse_linear`, `factored`, `codebook_linear`) and in whether the kernel
rounds what the linear reads.
Whoever reads a checkpoint or a journal asks here and need not know which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.activation_quantization import round_but_outliers, round_static, round_tokens
from llmcompress.errors import ModelError, first_line
from llmcompress.formats import bitsandbytes_layout, codebook, four_bit, integer, low_rank, sparse
from llmcompress.formats.base import Inputs
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.integer import Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.formats.sparse import SparseLayout, SparseWeight
from llmcompress.io.checkpoint import BESIDE, FACTORS

StoredWeight = bitsandbytes_layout.Packed | Int8Weight | IntegerWeight | SparseWeight | FactoredWeight | CodebookWeight
RewrittenLayout = SparseLayout | FactoredLayout | CodebookLayout  # the layouts that are not of quantised linears
AnyLayout = (
    IntegerLayout | FourBitLayout | RewrittenLayout
)  # of a linear in a model that needs our plug-in, as config.json has it
KINDS: dict[Any, type[AnyLayout]] = {  # by format; every other is a Scheme
    **{"nf4": FourBitLayout, "fp4": FourBitLayout, "sparse": SparseLayout},
    **{"shared": FactoredLayout, "basis": FactoredLayout, "codebook": CodebookLayout},
}
RENAMED = {"block": "group_size"}  # fields of schemes, as config.json had them before 0.1
MARKS = (
    ".weight.absmax",
    ".SCB",
    ".weight_scale",
    ".weight_absmax",
    ".weight_mask",
    ".weight_right",
    ".weight_levels",
)  # a linear with one of these is no plain one


def quantized_linears(names: Mapping[str, Any]) -> list[str]:
    """The linears that are no plain ones among tensors, by full name, in their order; one that is only shared has no mark."""
    return [name.removesuffix(mark) for name in names for mark in MARKS if name.endswith(mark)]


def parts_of(linear: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the weight of one linear, bias apart, under the names that it has in the linear."""
    beside = {name: tensors[f"{linear}.{name}"] for name in ("weight", *BESIDE, *FACTORS) if f"{linear}.{name}" in tensors}
    return bitsandbytes_layout.parts_of(linear, tensors) if f"{linear}.weight.absmax" in tensors else beside


def read(parts: Mapping[str, Tensor], layout: AnyLayout | None = None, shape: tuple[int, int] | None = None) -> StoredWeight:
    """The linear [R, C] that the tensors of `parts_of` are; `layout` where it needs our plug-in, and then its shape.

    Errors: ModelError for damaged ones.
    """
    if isinstance(layout, FourBitLayout):
        assert shape is not None
        return four_bit.read(parts, layout, *shape, torch.float32)
    if isinstance(layout, SparseLayout):
        assert shape is not None
        return sparse.read(parts, layout, *shape)
    if isinstance(layout, FactoredLayout):
        assert shape is not None
        return low_rank.read(parts, layout, *shape)
    if isinstance(layout, CodebookLayout):
        assert shape is not None
        return codebook.read(parts, layout, *shape)
    if layout is not None:
        return integer.read(parts, layout, shape[1] if shape else None)
    return Int8Weight.read(parts) if "SCB" in parts else bitsandbytes_layout.unpack(parts)


def tensors_of(stored: StoredWeight) -> dict[str, Tensor]:
    """The tensors of a linear as they are written, by their names in it."""
    return bitsandbytes_layout.tensors(stored) if isinstance(stored, bitsandbytes_layout.Packed) else stored.tensors()


def dequantize(stored: StoredWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [R, C] that the codes stand for."""
    return (
        bitsandbytes_layout.dequantize(stored, dtype)
        if isinstance(stored, bitsandbytes_layout.Packed)
        else stored.dequantize(dtype)
    )


def layouts_of(schemes: Any) -> dict[str, AnyLayout]:
    """The layout of each linear by full name, from the `schemes` of config.json's `quantization_config`. Errors: ModelError."""
    if not isinstance(schemes, list | tuple):
        raise ModelError(f"config.json has schemes that are no list: {_shown(schemes)}; take it again from its source")
    found: dict[str, AnyLayout] = {}
    for entry in schemes:
        if not isinstance(entry, Mapping):
            raise ModelError(f"config.json has a scheme that is no object: {_shown(entry)}; take it again from its source")
        fields = {RENAMED.get(str(name), str(name)): value for name, value in entry.items() if name != "linears"}
        try:
            layout = KINDS.get(str(fields.get("format")), IntegerLayout)(**fields)
        except (TypeError, ValueError) as error:
            why = f"this llmcompress doesn't know: {first_line(error)}; update it, or take the model again from its source"
            raise ModelError(f"config.json has a scheme {_shown(fields)} that {why}") from None
        linears = entry.get("linears", ())
        if not isinstance(linears, list | tuple) or not all(isinstance(linear, str) for linear in linears):
            raise ModelError(
                f"config.json has linears that are no list of names: {_shown(linears)}; take it again from its source"
            )
        for linear in linears:
            if linear in found:
                raise ModelError(f"config.json gives {linear} two schemes; name each linear once")
            found[linear] = layout
    return found


def _shown(value: Any) -> str:
    return str(value)[:80]


def int8_inputs(threshold: float) -> Inputs:
    """How LLM.int8's kernel rounds what a linear reads, through float16; columns that reach `threshold` are left, if not 0."""

    def rounded(x: Tensor) -> Tensor:
        half = x.detach().to(torch.float16).to(x.dtype) + (x - x.detach())  # the gradient is that of x
        return round_but_outliers(half, threshold)

    return rounded


def layout_inputs(layout: AnyLayout, input_scale: Tensor | float | None) -> Inputs | None:
    """How the product of a linear that needs our plug-in rounds what it reads; None where it doesn't."""
    if not isinstance(layout, IntegerLayout) or layout.activations == "none":
        return None
    bits = layout.activation_bits
    return (lambda x: round_tokens(x, bits)) if input_scale is None else (lambda x: round_static(x, bits, input_scale))
