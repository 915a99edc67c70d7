"""The formats as a solver sees them: how a linear is solved for, what is stored of it, and the result.

There is one class for each kind of layout, all with the same interface: what they store of weights, and how
their kernels round the inputs of a linear. Those with a grid are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmcompress.algorithms.grids import GGML_UNIT, Grid, grid
from llmcompress.algorithms.hessian import Factors
from llmcompress.algorithms.overflow import require_within
from llmcompress.algorithms.quantize_weight import RoundedWeight
from llmcompress.algorithms.scales import groups_of, integer_scales
from llmcompress.formats import bitsandbytes_layout, integer, registry
from llmcompress.formats.base import Inputs
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.ggml import GROUP_SIZE, GgmlLayout, GgmlWeight, storable
from llmcompress.formats.grid_scheme import GridScheme
from llmcompress.formats.integer import Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.solution import Solution


@dataclass(frozen=True)
class FourBitScheme(GridScheme):
    """NF4 or FP4 in bitsandbytes' layout: a scale per group, in float32 or in 8 bits."""

    format: Literal["nf4", "fp4"]
    group_size: int
    double_quant: bool
    dtype: torch.dtype  # the type of the stored base weights, and the compute type of the kernels
    row_bits = 0

    @property
    def grid(self) -> Grid:
        """The levels, on the CPU."""
        return grid(self.format)

    @property
    def signs(self) -> tuple[bool, ...]:
        """Whether scales may be negative. Negative scales use the uneven grid better, but span a range that 8
        bits resolve less finely."""
        return (True, False) if self.double_quant else (True,)

    @property
    def layout(self) -> FourBitLayout:
        """The config.json entry of such a linear in a model that needs our plug-in."""
        return FourBitLayout(self.format, self.group_size, self.double_quant)

    @property
    def bits(self) -> float:
        """Bits per weight on disk, scales included."""
        return 4 + (8 + 32 / bitsandbytes_layout.NESTED_GROUP if self.double_quant else 32) / self.group_size

    @property
    def input_largest(self) -> int | None:
        """Steps from zero to the largest input code; None, as inputs are not rounded."""
        return None

    @property
    def weight_largest(self) -> int:
        """Steps from zero to the largest weight under one scale, as if the grid were even."""
        return 7

    def columns(self, shape: tuple[int, ...]) -> int:
        """How many columns share a scale."""
        return self.group_size

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] can't be stored in this format, or None."""
        return bitsandbytes_layout.refusal(shape, self.format, self.group_size)

    def snap(self, scale_RG: Tensor) -> Tensor:
        """The scales as they will be read back from disk."""
        return bitsandbytes_layout.double_quantize(scale_RG).decode() if self.double_quant else scale_RG

    def store(self, result: RoundedWeight, input_scale: float | None = None) -> registry.StoredWeight:
        """Return the stored weight, from codes and scales that are not snapped yet."""
        nested = bitsandbytes_layout.double_quantize(result.scale_RG.cpu()) if self.double_quant else None
        codes_RC = self.grid.codes_of(result.index_RC)
        scale_RG = nested.decode() if nested else result.scale_RG.cpu()
        return bitsandbytes_layout.Packed(
            codes_RC, scale_RG, self.format, self.group_size, self.dtype, nested
        )

    def nearest(self, W_RC: Tensor, input_scale: float | None = None) -> registry.StoredWeight:
        """Stock bitsandbytes: absmax scales, nearest codes. Errors: Overflow for weights beyond `dtype`."""
        require_within(W_RC, self.dtype, "weights")
        return bitsandbytes_layout.quantize_nearest(
            W_RC.to(self.dtype), self.format, self.group_size, self.double_quant
        )

    def read(self, parts: Mapping[str, Tensor], columns: int) -> registry.StoredWeight:
        """Read the weight back from its tensors on disk."""
        return registry.read(parts)


@dataclass(frozen=True)
class Int8Scheme(GridScheme):
    """LLM.int8's layout: a per-channel scale, and activations that the kernel rounds to 8 bits per token,
    except outliers."""

    threshold: float
    format: Literal["int8"] = "int8"
    bits = 8.0
    input_largest = 127
    weight_largest = 127
    signs = (False,)

    @property
    def grid(self) -> Grid:
        """The levels, on the CPU."""
        return grid("int8")

    def columns(self, shape: tuple[int, ...]) -> int:
        """How many columns share a scale."""
        return shape[1]

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] can't be stored in this format, or None."""
        return None

    def snap(self, scale_RG: Tensor) -> Tensor:
        """The scales as they will be read back from disk."""
        return scale_RG

    def store(self, result: RoundedWeight, input_scale: float | None = None) -> registry.StoredWeight:
        """Return the stored weight, from codes and scales."""
        return Int8Weight(self.grid.codes_of(result.index_RC), result.scale_RG[:, 0].cpu())

    def inputs(self, input_scale: float | None = None) -> Inputs | None:
        """How the kernel rounds the inputs of a linear."""
        return registry.int8_inputs(self.threshold)

    def static_scale(self, top: float) -> float | None:
        """The static scale for inputs whose largest magnitude is `top`, or None if the scheme has no static
        scale."""
        return None

    def nearest(self, W_RC: Tensor, input_scale: float | None = None) -> registry.StoredWeight:
        """Quantise as stock bitsandbytes."""
        return integer.quantize_nearest(W_RC.cpu())

    def read(self, parts: Mapping[str, Tensor], columns: int) -> registry.StoredWeight:
        """Read the weight back from its tensors on disk."""
        return registry.read(parts)


@dataclass(frozen=True)
class IntegerScheme(GridScheme):
    """W8A8, W4A8 and W4A4 in our own layout: a per-channel scale; 4-bit codes also have an integer multiplier
    per group."""

    scheme: IntegerLayout
    range: str = "mse"  # how a static scale of inputs is chosen
    signs = (False,)

    @property
    def format(self) -> str:
        """The name in a recipe."""
        return self.scheme.format

    @property
    def grid(self) -> Grid:
        """The levels, on the CPU."""
        return grid("int8" if self.scheme.weight_bits == 8 else "int4")

    @property
    def layout(self) -> IntegerLayout:
        """The config.json entry of such a linear in a model that needs our plug-in."""
        return self.scheme

    @property
    def bits(self) -> float:
        """Bits per weight on disk, multipliers included, per-channel scales excluded."""
        return self.scheme.weight_bits + (8 / self.scheme.group_size if self.scheme.group_size else 0)

    @property
    def input_largest(self) -> int | None:
        """Steps from zero to the largest input code; None if inputs are not rounded."""
        return None if self.scheme.activations == "none" else integer.LARGEST[self.scheme.activation_bits]

    @property
    def weight_largest(self) -> int:
        """Steps from zero to the largest weight under one scale."""
        return integer.LARGEST[self.scheme.weight_bits]

    def columns(self, shape: tuple[int, ...]) -> int:
        """How many columns share a scale."""
        return self.scheme.group_size or shape[1]

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] can't be stored in this format, or None."""
        C, group_size = shape[1], self.scheme.group_size
        return (
            f"{self.format} rows of {C} weights don't divide into groups of {group_size}"
            if group_size and C % group_size
            else None
        )

    def snap(self, scale_RG: Tensor) -> Tensor:
        """The scales as they will be read back from disk."""
        if self.scheme.group_size is None:
            return scale_RG
        step_R, multiplier_RG = integer_scales(scale_RG, integer.MULTIPLIER)
        return step_R[:, None] * multiplier_RG

    def store(self, result: RoundedWeight, input_scale: float | None = None) -> registry.StoredWeight:
        """Return the stored weight, from codes and scales that are not snapped yet."""
        largest, multiplier = integer.LARGEST[self.scheme.weight_bits], None
        step_R = result.scale_RG[:, 0]
        if self.scheme.group_size is not None:
            step_R, found_RG = integer_scales(result.scale_RG, integer.MULTIPLIER)
            multiplier = found_RG.to(torch.uint8).cpu()
        scale_R = (step_R / largest).cpu()
        # a fitted scale may be negative, or so small that it is zero: the sign moves into the codes
        codes_RC = self.grid.codes_of(result.index_RC) * scale_R.sign().to(torch.int8)[:, None]
        scale = (
            None if input_scale is None else torch.tensor(max(input_scale, torch.finfo(torch.float32).tiny))
        )
        return IntegerWeight(codes_RC, scale_R.abs(), self.scheme, multiplier, scale)

    def inputs(self, input_scale: float | None = None) -> Inputs | None:
        """How the kernel rounds the inputs of a linear; None if only weights are rounded."""
        return registry.layout_inputs(self.scheme, input_scale)

    @property
    def static(self) -> bool:
        """Whether inputs are rounded by one stored scale."""
        return self.scheme.activations == "static"

    def static_scale(self, top: float) -> float | None:
        """The static scale for inputs whose largest magnitude is `top`, or None if the scheme has no static
        scale."""
        return top / integer.LARGEST[self.scheme.activation_bits] if self.static else None

    def nearest(self, W_RC: Tensor, input_scale: float | None = None) -> registry.StoredWeight:
        """Quantise to the nearest codes under absmax scales."""
        scale_RG = groups_of(W_RC, self.columns(tuple(W_RC.shape))).abs().amax(-1)
        scale_RG = torch.where(scale_RG > 0, scale_RG, torch.ones_like(scale_RG))
        snapped = self.snap(scale_RG).repeat_interleave(self.columns(tuple(W_RC.shape)), dim=1)
        return self.store(
            RoundedWeight(self.grid.to(W_RC.device).nearest(W_RC / snapped), scale_RG), input_scale
        )

    def read(self, parts: Mapping[str, Tensor], columns: int) -> registry.StoredWeight:
        """Read the weight back from its tensors on disk."""
        return integer.read(parts, self.scheme, columns)


@dataclass(frozen=True)
class GgmlScheme(GridScheme):
    """llama.cpp's Q4_0 and IQ4_NL: 16 levels, and a float16 scale of either sign per group of 32 columns."""

    layout: GgmlLayout
    bits = 4 + 16 / GROUP_SIZE
    row_bits = 0
    input_largest = None
    weight_largest = 7
    signs = (True,)

    @property
    def format(self) -> str:
        """The name in a recipe."""
        return self.layout.format

    @property
    def grid(self) -> Grid:
        """The levels, on the CPU."""
        return grid(self.layout.format)

    @property
    def unit(self) -> int:
        """A scale of the solver over llama.cpp's own, which is of integers."""
        return GGML_UNIT[self.layout.format]

    def columns(self, shape: tuple[int, ...]) -> int:
        """How many columns share a scale."""
        return GROUP_SIZE

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] can't be stored in this format, or None."""
        return self.layout.refusal(shape)

    def snap(self, scale_RG: Tensor) -> Tensor:
        """The scales as they will be read back from disk."""
        return storable(scale_RG / self.unit).to(scale_RG.dtype) * self.unit

    def store(self, result: RoundedWeight, input_scale: float | None = None) -> registry.StoredWeight:
        """Return the stored weight, from codes and scales that are not snapped yet."""
        scale_RG = storable(result.scale_RG / self.unit).cpu()
        return GgmlWeight(self.grid.codes_of(result.index_RC), scale_RG, self.layout)

    def solve(
        self,
        W_RC: Tensor,
        factors: Factors,
        input_scale: float | None = None,
        F_RB: Tensor | None = None,
    ) -> Solution:
        """As for any grid. Errors: Overflow for weights whose scales float16 does not hold."""
        require_within(W_RC / self.unit, torch.float16, f"scales of {self.format}")
        return super().solve(W_RC, factors, input_scale, F_RB)

    def nearest(self, W_RC: Tensor, input_scale: float | None = None) -> registry.StoredWeight:
        """Give the largest weight of a group the outermost level, and the others the nearest.

        What is stored of q4_0 is what llama.cpp's reference stores: codes are taken before the scale is
        rounded, and halves go up. Errors: Overflow for weights whose scales float16 does not hold.
        """
        require_within(W_RC / self.unit, torch.float16, f"scales of {self.format}")
        W_RGS = groups_of(W_RC.float(), GROUP_SIZE)
        top_RG1 = W_RGS.gather(-1, W_RGS.abs().argmax(-1, keepdim=True))
        values = self.grid.levels.to(W_RC.device) * self.unit
        scale_RG1 = top_RG1 / values[0]
        half_RG1 = scale_RG1.to(torch.float16)
        x_RGS = W_RGS * torch.where(half_RG1 == 0, 0.0, 1 / scale_RG1)
        if self.format == "q4_0":
            codes_RGS = (x_RGS + 8.5).floor().clamp(0, 15)
        else:
            codes_RGS = torch.bucketize(x_RGS, (values[1:] + values[:-1]) / 2, right=True)
        return GgmlWeight(codes_RGS.flatten(1).to(torch.uint8).cpu(), half_RG1[..., 0].cpu(), self.layout)

    def read(self, parts: Mapping[str, Tensor], columns: int) -> registry.StoredWeight:
        """Read the weight back from its tensors on disk."""
        return self.layout.read(parts, columns)


QuantScheme = FourBitScheme | GgmlScheme | Int8Scheme | IntegerScheme | CodebookScheme
