"""Every weight format: detected, read, written and put into a model through one interface.

`FORMATS` lists our own formats, which config.json describes; a new one is a file with a `FORMAT` and a line
in that list. The two native layouts of bitsandbytes stand beside them and need no plug-in. Code that reads a
checkpoint or a journal goes through this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from llmcompress.algorithms.activation_quantization import (
    round_but_outliers,
    round_static,
    round_tokens,
    straight_through,
)
from llmcompress.errors import ModelError, first_line
from llmcompress.formats import (
    bitsandbytes_layout,
    codebook,
    four_bit,
    ggml,
    integer_linear,
    low_rank,
    sparse,
)
from llmcompress.formats.base import Format, Inputs
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.ggml import GgmlLayout, GgmlWeight
from llmcompress.formats.integer import Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.formats.sparse import SparseLayout, SparseWeight
from llmcompress.io.checkpoint import is_beside

FORMATS: tuple[Format, ...] = (
    four_bit.FORMAT,
    ggml.FORMAT,
    sparse.FORMAT,
    low_rank.FORMAT,
    codebook.FORMAT,
    integer_linear.FORMAT,
)
StoredWeight = (
    bitsandbytes_layout.Packed
    | GgmlWeight
    | Int8Weight
    | IntegerWeight
    | SparseWeight
    | FactoredWeight
    | CodebookWeight
)
# layouts of linears that are not quantised
RewrittenLayout = SparseLayout | FactoredLayout | CodebookLayout
# of a linear in a model that needs our plug-in
AnyLayout = IntegerLayout | FourBitLayout | GgmlLayout | RewrittenLayout
NATIVE_MARKS = ("weight.absmax", "SCB")
RENAMED = {"block": "group_size"}  # old names of scheme fields in config.json, from before 0.1


def format_of(layout: AnyLayout) -> Format:
    """Return the format that a layout belongs to."""
    return next(each for each in FORMATS if isinstance(layout, each.layout))


def quantized_linears(names: Mapping[str, Any]) -> list[str]:
    """The full names of the linears that are not plain, in the order of the tensors. A linear that is only
    shared has no mark."""
    marks = [f".{mark}" for mark in (*NATIVE_MARKS, *(each.mark for each in FORMATS))]
    return [name.removesuffix(mark) for name in names for mark in marks if name.endswith(mark)]


def parts_of(linear: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of one linear's weight, without its bias, by their names in the linear."""
    if f"{linear}.weight.absmax" in tensors:
        return bitsandbytes_layout.parts_of(linear, tensors)
    inside = {
        name.removeprefix(f"{linear}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{linear}.")
    }
    return {name: tensor for name, tensor in inside.items() if name == "weight" or is_beside(name)}


@overload
def read(parts: Mapping[str, Tensor]) -> StoredWeight: ...


@overload
def read(parts: Mapping[str, Tensor], layout: AnyLayout | None, shape: tuple[int, int]) -> StoredWeight: ...


def read(
    parts: Mapping[str, Tensor], layout: AnyLayout | None = None, shape: tuple[int, int] = (0, 0)
) -> StoredWeight:
    """Return the linear that the tensors of `parts_of` store.

    `layout` is None for the native layouts of bitsandbytes, which store their own shape; any other layout
    needs the shape [R, C]. Errors: ModelError for damaged tensors.
    """
    if layout is None:
        return Int8Weight.read(parts) if "SCB" in parts else bitsandbytes_layout.unpack(parts)
    found: StoredWeight = format_of(layout).read(parts, layout, *shape)
    return found


def tensors_of(weight: StoredWeight, *, native: bool = True) -> dict[str, Tensor]:
    """The tensors of a linear as they are written, by their names in it; 4-bit codes use the stock layout if
    `native`."""
    if not isinstance(weight, bitsandbytes_layout.Packed):
        return weight.tensors()
    return bitsandbytes_layout.tensors(weight) if native else four_bit.tensors(weight)


def linear_of(
    weight: StoredWeight, bias: Tensor | None, *, native: bool, threshold: float, device: torch.device | str
) -> nn.Module:
    """Return a live module that holds copies of a weight and runs on its kernels; `threshold` is
    LLM.int8's."""
    if isinstance(weight, Int8Weight):
        return integer_linear.stock(weight, bias, threshold=threshold, device=device)
    if native and isinstance(weight, bitsandbytes_layout.Packed):
        # imported here, because it imports bitsandbytes
        from llmcompress.formats import bitsandbytes_linear

        return bitsandbytes_linear.linear(weight, bias, device=device)
    own = next(each for each in FORMATS if isinstance(weight, each.weight))
    return own.linear(weight, bias, device=device)


def dequantize(
    stored: StoredWeight, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The weight [R, C] that the codes represent, on `device`, by default where they are."""
    if isinstance(stored, bitsandbytes_layout.Packed):
        return bitsandbytes_layout.dequantize(stored if device is None else stored.to(device), dtype)
    weight: Tensor = stored.dequantize(dtype)
    return weight if device is None else weight.to(device)


def layouts_of(schemes: Any) -> dict[str, AnyLayout]:
    """The layout of each linear by full name, from the `schemes` of config.json's `quantization_config`.
    Errors: ModelError."""
    if not isinstance(schemes, list | tuple):
        raise ModelError(
            f"config.json has schemes that are not a list: {_shown(schemes)}; take it again from its source"
        )
    found: dict[str, AnyLayout] = {}
    for entry in schemes:
        if not isinstance(entry, Mapping):
            raise ModelError(
                f"config.json has a scheme that is not an object: {_shown(entry)}; take it again from its "
                "source"
            )
        fields = {
            RENAMED.get(str(name), str(name)): value for name, value in entry.items() if name != "linears"
        }
        try:
            layout = _layout(str(fields.get("format")))(**fields)
        except (TypeError, ValueError) as error:
            why = (
                f"this llmcompress doesn't know: {first_line(error)}; update it, or take the model again "
                "from its source"
            )
            raise ModelError(f"config.json has a scheme {_shown(fields)} that {why}") from None
        linears = entry.get("linears", ())
        if not isinstance(linears, list | tuple) or not all(isinstance(linear, str) for linear in linears):
            raise ModelError(
                f"config.json has linears that are not a list of names: {_shown(linears)}; take it again "
                "from its source"
            )
        for linear in linears:
            if linear in found:
                raise ModelError(f"config.json gives {linear} two schemes; name each linear once")
            found[linear] = layout
    return found


def _layout(name: str) -> type[AnyLayout]:
    """The layout class of a format name. Names that no other format has belong to the integer format."""
    return next(each.layout for each in FORMATS if name in each.names or not each.names)


def _shown(value: Any) -> str:
    return str(value)[:80]


def int8_inputs(threshold: float) -> Inputs:
    """Return how LLM.int8's kernel rounds the inputs of a linear, through float16. Columns that reach
    `threshold` are not rounded, unless it is 0."""

    def rounded(x: Tensor) -> Tensor:
        half = straight_through(x, x.detach().to(torch.float16).to(x.dtype))
        return round_but_outliers(half, threshold)

    return rounded


def layout_inputs(layout: AnyLayout, input_scale: Tensor | float | None) -> Inputs | None:
    """Return how a linear that needs our plug-in rounds its inputs, or None if it does not."""
    if not isinstance(layout, IntegerLayout) or layout.activations == "none":
        return None
    bits = layout.activation_bits
    return (
        (lambda x: round_tokens(x, bits))
        if input_scale is None
        else (lambda x: round_static(x, bits, input_scale))
    )
