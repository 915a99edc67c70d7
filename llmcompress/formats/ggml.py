"""q4_0 and iq4_nl linears: 4-bit formats of llama.cpp, with a float16 scale per group of 32 columns.

A weight is one of 16 integers times the scale of its group, which may have either sign. The tensors are those
of llama.cpp's Q4_0 and IQ4_NL in another order, so that an export to GGUF changes no number. They take 4.5
bits per weight, on disk and in memory. On a CPU a kernel multiplies few tokens with the packed weight and
expands it a piece at a time for many (kernels/packed_gemm.py); on a GPU few tokens have a kernel too
(kernels/lookup_dispatch.py). Elsewhere, and where gradients are asked for, each forward dequantises the
weight and drops it again. `weight` has a first axis of size 1, which no plain linear has, so a stock loader
refuses it. R rows (out), C columns (in), G = C / 32 groups, S = 32 columns of a group.

Source: llama.cpp's block_q4_0 and block_iq4_nl, as in the `gguf` package (gguf.quants).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.algorithms.grids import GGML
from llmcompress.errors import ModelError
from llmcompress.formats.base import Format, StoredLinear, hold
from llmcompress.formats.codebook import pack, unpack
from llmcompress.formats.value_checks import Flaw, finite, require_sound
from llmcompress.kernels import lookup_dispatch, operators, packed_gemm

GROUP_SIZE = 32
SCALE = "weight_group_scale"
LEVELS = {format: torch.tensor(levels, dtype=torch.float32) for format, levels in GGML.items()}


@dataclass(frozen=True)
class GgmlLayout:
    """A linear in one of the two formats; there is nothing else to choose. Errors: ValueError."""

    format: Literal["q4_0", "iq4_nl"]

    def __post_init__(self) -> None:
        if self.format not in GGML:
            raise ValueError(f"no format {self.format!r}; use one of {', '.join(GGML)}")

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] can't be stored in this format, or None."""
        return (
            f"{self.format} rows of {shape[1]} weights don't divide into groups of {GROUP_SIZE}"
            if shape[1] % GROUP_SIZE
            else None
        )

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type on disk of every tensor of a linear [rows, columns], without its bias. Errors:
        ModelError."""
        if why := self.refusal((rows, columns)):
            raise ModelError(why)
        return {
            "weight": ((1, rows, columns // 2), torch.uint8),
            SCALE: ((rows, columns // GROUP_SIZE), torch.float16),
        }

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of a linear's stored tensors. Every code has a level, and a scale may have any sign and
        may be zero."""
        return [finite(tensors[SCALE], "scales")]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> GgmlWeight:
        """The inverse of `GgmlWeight.tensors`, bit for bit. Errors: ModelError."""
        return read(tensors, self, tensors["weight"].shape[1] if tensors["weight"].dim() == 3 else 0, columns)


@dataclass(frozen=True, eq=False)
class GgmlWeight:
    """One linear: codes_RC uint8 [R, C] in 0..15 in llama.cpp's order, scale_RG float16 [R, G]. Errors:
    ValueError."""

    codes_RC: Tensor
    scale_RG: Tensor
    layout: GgmlLayout

    def __post_init__(self) -> None:
        R, C = self.codes_RC.shape
        right = (self.codes_RC.dtype, self.scale_RG.dtype) == (torch.uint8, torch.float16)
        if not right or self.scale_RG.shape != (R, C // GROUP_SIZE) or C % GROUP_SIZE:
            raise ValueError(
                f"codes {tuple(self.codes_RC.shape)} in {self.codes_RC.dtype} can't have scales "
                f"{tuple(self.scale_RG.shape)} in {self.scale_RG.dtype}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as they are stored on disk and named in the state dict of a
        GgmlLinear."""
        return {"weight": pack(self.codes_RC, 4)[None], SCALE: self.scale_RG.contiguous()}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C], computed in float32 and rounded once to `dtype`."""
        return _weight(pack(self.codes_RC, 4), self.scale_RG, self.layout.format, dtype)


def storable(scale_RG: Tensor) -> Tensor:
    """The nearest scales in float16 that are neither zero nor infinite."""
    largest, least = torch.finfo(torch.float16).max, torch.finfo(torch.float16).smallest_normal / 1024
    half_RG = scale_RG.clamp(-largest, largest).to(torch.float16)
    # of zero a search could not go on; the least number of float16 is next to nothing
    return torch.where(half_RG == 0, torch.copysign(torch.full_like(half_RG, least), half_RG), half_RG)


def read(tensors: Mapping[str, Tensor], layout: GgmlLayout, rows: int, columns: int) -> GgmlWeight:
    """The inverse of `GgmlWeight.tensors`, bit for bit. Errors: ModelError if the tensors can't be a linear
    [rows, columns]."""
    seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if name != "bias"}
    if rows < 1 or seen != layout.shapes(rows, columns):
        wanted = layout.shapes(max(rows, 1), columns)
        raise ModelError(f"a linear of {rows} x {columns} in {layout} has {wanted}, not {seen}")
    require_sound(f"a linear of {rows} x {columns}", layout.flaws(tensors))
    return GgmlWeight(unpack(tensors["weight"][0], columns, 4), tensors[SCALE], layout)


def _weight(packed_RB: Tensor, scale_RG: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The weight [R, C] of packed codes and scales. The two integers of a byte are looked up at once."""
    values = LEVELS[format].to(packed_RB.device)
    byte = torch.arange(256, device=packed_RB.device)
    pairs = torch.stack((values[byte >> 4], values[byte & 15]), dim=1).view(torch.int64)[:, 0]
    found = pairs.index_select(0, packed_RB.flatten().int()).view(torch.float32)
    return (found.view(*scale_RG.shape, GROUP_SIZE) * scale_RG.float()[..., None]).flatten(1).to(dtype)


@operators.operator("ggml_linear", "Tensor weight, Tensor scale, Tensor? bias, str format")
def ggml_linear(
    x: Tensor, rows: int, weight: Tensor, scale_RG: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    """Multiply x [..., C] by the stored tensors of a GgmlLinear: on a CPU and, for few tokens, on a GPU by
    our kernels, unless a gradient is asked for."""
    if weight.is_cpu and packed_gemm.usable(x, bias, few=None):
        sizes = rows, x.shape[-1], GROUP_SIZE
        stored = weight.contiguous(), LEVELS[format], scale_RG.contiguous()
        return packed_gemm.table_of(*stored, *sizes).linear(x, bias)
    if lookup_dispatch.usable(x, bias):
        out_TR = lookup_dispatch.few_tokens(
            x.reshape(-1, x.shape[-1]),
            weight[0],
            lookup_dispatch.on(x.device, LEVELS[format])[None],
            4,
            scale_RG=scale_RG,
            group_size=GROUP_SIZE,
            bias=bias,
        )
        return out_TR.reshape(*x.shape[:-1], rows)
    W_RC = _weight(weight[0], scale_RG, format, x.dtype)
    return nn.functional.linear(x, W_RC, None if bias is None else bias.to(x.dtype))


class GgmlLinear(StoredLinear):
    """A linear [in_features -> out_features] in q4_0 or iq4_nl; `dtype` is that of the model.

    Gradients go to the input and the bias; the weight has none.
    """

    scheme: GgmlLayout
    weight_group_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        stored = self.out_features, self.weight, self.weight_group_scale, self.bias, self.scheme.format
        if operators.traced(input, self.bias):
            out: Tensor = torch.ops.llmcompress.ggml_linear.default(input, *stored)
            return out
        return ggml_linear(input, *stored)

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.format}"


def linear(weight: GgmlWeight, bias: Tensor | None, *, device: torch.device | str = "cpu") -> GgmlLinear:
    """Return a live module, in eval mode, that holds copies of our codes and scales."""
    R, C = weight.codes_RC.shape
    module = GgmlLinear(C, R, weight.layout, bias=bias is not None, device="meta")
    return hold(module, weight.tensors(), bias, device)


FORMAT: Format = Format(
    names=tuple(GGML),
    layout=GgmlLayout,
    weight=GgmlWeight,
    mark=SCALE,
    module=GgmlLinear,
    read=read,
    tensors=GgmlWeight.tensors,
    linear=linear,
)
