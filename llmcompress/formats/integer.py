"""Weights and activations as integers: the layout on disk, what it means, and the rounding of tokens.

There are two layouts. LLM.int8's (`Int8Weight`) is bitsandbytes' own, and plain transformers loads it. Ours
(`IntegerWeight`) is for products of two integer factors. It has int8 codes with a per-channel scale, or int4
codes in groups of columns with an integer multiplier per group. Code times multiplier still fits int8, so ONE
float scale per row remains, the sum over all columns stays in integers, and bitsandbytes' int8 kernel
computes it. No kernel here supports int4: such a weight takes 0.5 byte on disk and is expanded to 1 byte to
be multiplied. A stock loader must not take our tensors for a float weight, because it would silently load
codes as numbers. So every `weight` has a shape that no plain linear has, and the stock loader refuses it. R
rows (out), C columns (in), G = ceil(C / group_size) groups of columns, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor

from llmcompress.algorithms import activation_quantization
from llmcompress.algorithms.overflow import Overflow
from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout
from llmcompress.formats.value_checks import Flaw, finite, flaw_of, scaled_rows, within

IntegerFormat = Literal["w8a8", "w4a8", "w4a4", "w8a16", "w4a16"]
Activations = Literal["dynamic", "static", "none"]
FORMATS: tuple[IntegerFormat, ...] = ("w8a8", "w4a8", "w4a4", "w8a16", "w4a16")
ACTIVATIONS: tuple[Activations, ...] = ("dynamic", "static", "none")
LARGEST = activation_quantization.LARGEST
HIGH = 256  # a 16-bit code is 256 times one int8 code plus another
MULTIPLIER = 18  # 7 * 18 = 126, the largest that fits int8
WIDEST = (2**31 - 1) // 127**2  # columns for which the sum of products of codes still fits int32


@dataclass(frozen=True)
class IntegerLayout:
    """How a linear is stored and multiplied: bits of weights and activations, scales of activations, and
    columns per multiplier.

    Activations are rounded by each token's absmax ("dynamic"), by one stored scale ("static"), or not at all
    ("none": the weight is dequantised). `group_size` applies to 4-bit weights only; the last group of a row
    may be shorter. Errors: ValueError.
    """

    format: IntegerFormat
    activations: Activations = "dynamic"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS or self.activations not in ACTIVATIONS:
            raise ValueError(
                f"no scheme {self.format!r} with {self.activations!r} activations: use one of "
                f"{', '.join(FORMATS)} "
                f"with {', '.join(ACTIVATIONS)}"
            )
        if self.weight_bits == 8 and self.group_size is not None:
            raise ValueError(
                f"{self.format} has one scale per row and no group, got group_size {self.group_size}"
            )
        if self.weight_bits == 4 and (type(self.group_size) is not int or not 1 <= self.group_size <= WIDEST):
            raise ValueError(f"{self.format} needs a group of 1 to {WIDEST} columns, got {self.group_size!r}")

    @property
    def weight_bits(self) -> int:
        """8 or 4."""
        return int(self.format[1])

    @property
    def activation_bits(self) -> int:
        """16, 8 or 4."""
        return int(self.format[3:])

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type on disk of every tensor of a linear [rows, columns], without its bias, by name."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.group_size is None:
            shapes["weight"] = (1, rows, columns), torch.int8
        else:
            shapes["weight"] = (rows, -(-columns // 2)), torch.uint8
            shapes["weight_multiplier"] = (rows, -(-columns // self.group_size)), torch.uint8
        shapes["weight_scale"] = (rows,), torch.float32
        if self.activations == "static":
            shapes["input_scale"] = (1,), torch.float32
        return shapes

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of a linear's stored tensors, given by their names in the linear."""
        weight, scale_R = tensors["weight"], tensors["weight_scale"]
        largest, codes = LARGEST[self.weight_bits], f"codes of {self.format}"
        if self.group_size is None:
            found = [within(weight, -largest, largest, codes), scaled_rows(scale_R, weight[0], 0)]
        else:  # the code -8 is stored as a half byte of zero
            lowest = (weight < 16).any() | ((weight & 15) == 0).any()
            found = [
                (lowest, f"{codes} must lie in -{largest}..{largest}"),
                scaled_rows(scale_R, weight, 0x88),
            ]
        return [
            *found,
            *self.flaws_of_scales(scale_R, tensors.get("weight_multiplier"), tensors.get("input_scale")),
        ]

    def flaws_of_scales(
        self, scale_R: Tensor, multiplier_RG: Tensor | None, input_scale: Tensor | None
    ) -> list[Flaw]:
        """The checks of the tensors that are stored beside the codes."""
        found = [finite(scale_R, "weight scales")]
        if multiplier_RG is not None:
            found.append(within(multiplier_RG, 1, MULTIPLIER, "multipliers"))
        if input_scale is not None:
            sound = (input_scale > 0) & input_scale.isfinite()
            found.append((~sound.all(), "the scale of the activations must be positive and finite"))
        return found


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """One linear in integers: W [R, C] = scale_R * codes_RC * multiplier_RG, and x = input_scale * code if
    input_scale is stored.

    codes_RC int8 [R, C] in -127..127 (4 bits: -7..7), scale_R float32 [R], multiplier_RG uint8 [R, G] in
    1..18 (4 bits only), input_scale float32 [] > 0 (static activations only). Errors: ValueError.
    """

    codes_RC: Tensor
    scale_R: Tensor
    scheme: IntegerLayout
    multiplier_RG: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        R, C = self.codes_RC.shape
        shapes = self.scheme.shapes(R, C)
        found = {
            "weight_scale": self.scale_R,
            "weight_multiplier": self.multiplier_RG,
            "input_scale": self.input_scale,
        }
        for name, tensor in found.items():
            if (tensor is None) == (name in shapes):
                raise ValueError(f"{self.scheme} {'needs' if tensor is None else 'has no'} {name}")
            shape, dtype = shapes.get(name, ((), torch.float32))
            if tensor is not None and (
                tensor.shape != (() if name == "input_scale" else shape) or tensor.dtype != dtype
            ):
                raise ValueError(
                    f"{name} of {R} x {C} codes under {self.scheme} can't be {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
        if self.codes_RC.dtype != torch.int8 or C > WIDEST:
            raise ValueError(
                f"codes must be int8 of at most {WIDEST} columns, got {self.codes_RC.dtype} with {C}"
            )
        if (why := flaw_of(self._flaws())) is not None:
            raise (ValueError if bool(self.scale_R.isfinite().all()) else Overflow)(why)

    def _flaws(self) -> list[Flaw]:
        """The checks of `IntegerLayout.flaws`, for codes that are not packed."""
        largest = LARGEST[self.scheme.weight_bits]
        codes = within(self.codes_RC, -largest, largest, f"codes of {self.scheme.format}")
        scales = self.scheme.flaws_of_scales(self.scale_R, self.multiplier_RG, self.input_scale)
        return [codes, scaled_rows(self.scale_R, self.codes_RC, 0), *scales]

    def expanded(self) -> Tensor:
        """The integers that the kernel multiplies, codes times multipliers: int8 [R, C]."""
        return expand(self.codes_RC, self.multiplier_RG, self.scheme.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C], computed in float32 and rounded once to `dtype`."""
        return (self.expanded().float() * self.scale_R[:, None]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as they are stored on disk and named in the state dict of an
        IntegerLinear.

        int8: `weight` int8 [1, R, C], three axes ON PURPOSE: a loader that has not imported llmcompress must
        fail at the shapes instead of loading codes as floats. int4: `weight` uint8 [R, ceil(C / 2)], code +
        8, even columns in the high nibble, and `weight_multiplier` uint8 [R, G]. Both: `weight_scale` float32
        [R]; static: `input_scale` float32 [1].
        """
        found = {"weight": self.codes_RC[None] if self.multiplier_RG is None else pack(self.codes_RC)}
        found["weight_scale"] = self.scale_R
        if self.multiplier_RG is not None:
            found["weight_multiplier"] = self.multiplier_RG
        if self.input_scale is not None:
            found["input_scale"] = self.input_scale.reshape(1)
        return {name: tensor.contiguous() for name, tensor in found.items()}


def read(tensors: Mapping[str, Tensor], scheme: IntegerLayout, columns: int | None = None) -> IntegerWeight:
    """The inverse of `IntegerWeight.tensors`, bit for bit. For 4 bits, an odd number of `columns` must be
    given.

    Errors: ModelError if the tensors are not those of a linear in this scheme.
    """
    weight = tensors.get("weight", torch.empty(0, 0))
    rows = weight.shape[-2] if weight.dim() > 1 else 0
    C = columns if columns is not None else weight.shape[-1] * (1 if scheme.group_size is None else 2)
    expected = scheme.shapes(rows, C)
    seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if name != "bias"}
    if seen != expected:
        raise ModelError(f"a linear of {rows} x {C} in {scheme} has the tensors {expected}, not {seen}")
    codes = weight[0] if scheme.group_size is None else unpack(weight, C)
    scale = tensors["input_scale"].reshape(()) if "input_scale" in tensors else None
    try:
        return IntegerWeight(codes, tensors["weight_scale"], scheme, tensors.get("weight_multiplier"), scale)
    except ValueError as error:
        raise ModelError(f"a linear of {rows} x {C} in the checkpoint is damaged: {error}") from None


def pack(codes_RC: Tensor) -> Tensor:
    """Pack codes in -8..7, int8 [R, C], two per byte, uint8 [R, ceil(C / 2)]. A row of odd length is padded
    with a code of zero."""
    biased = (codes_RC + 8).to(torch.uint8)
    if biased.shape[1] % 2:
        biased = torch.nn.functional.pad(biased, (0, 1), value=8)
    return (biased[:, ::2] << 4) | biased[:, 1::2]


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: int8 [R, columns]."""
    codes = torch.stack((packed >> 4, packed & 15), dim=2).reshape(packed.shape[0], -1).to(torch.int8)
    return codes.sub_(8)[:, :columns].contiguous()


def expand(codes_RC: Tensor, multiplier_RG: Tensor | None, group_size: int | None) -> Tensor:
    """Return codes times the multipliers of their groups, int8 [R, C], or the codes themselves without
    multipliers."""
    if multiplier_RG is None or group_size is None:
        return codes_RC
    C = codes_RC.shape[1]
    return codes_RC * multiplier_RG.to(torch.int8).repeat_interleave(min(group_size, C), dim=1)[:, :C]


def quantize_tokens(
    x: Tensor, bits: int, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise activations [..., C] to codes [T, C] int8 (16 bits: int16; or `dtype`) and scales float32 [T,
    1], or the given [] or [1].

    Symmetric, round half to even. A dynamic scale is absmax / largest code; a row of zeros gets codes of zero
    and a finite scale, and a row that is not finite gets a scale that is not finite. With a given scale,
    codes are clipped. Computed in float32, so bfloat16 keeps its range.
    """
    largest, whole = LARGEST[bits], dtype or (torch.int16 if bits > 8 else torch.int8)
    x_TC = x.reshape(-1, x.shape[-1])
    if scale is not None:
        return (x_TC.float() / scale.float()).round_().clamp_(-largest, largest).to(whole), scale
    if x.is_cuda and x.dtype == torch.float16 and bits == 8 and x.numel():  # all that the kernel supports
        codes, absmax, _ = bitsandbytes_layout.stock().int8_vectorwise_quant(x_TC.contiguous())
        return codes.to(whole), (absmax / largest)[:, None]
    x_TC = x_TC.float()
    # below it, divisions are not exact enough to stay within the codes
    tiny = torch.finfo(torch.float32).tiny
    scale = x_TC.abs().amax(dim=1, keepdim=True).div_(largest).clamp_min_(tiny)
    return (x_TC / scale).round_().to(whole), scale


def split(codes_TC: Tensor) -> Tensor:
    """Split 16-bit codes into two int8 codes, int8 [2 T, C]: first those to multiply by HIGH, then those to
    add."""
    high = (codes_TC + HIGH // 2) >> 8
    return torch.cat((high, codes_TC - HIGH * high)).to(torch.int8)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """One linear in LLM.int8's layout: W = codes * absmax / 127; codes_RC int8 [R, C], absmax_R float32 [R].

    Errors: ValueError.
    Source: arXiv 2208.07339.
    """

    codes_RC: Tensor
    absmax_R: Tensor

    def __post_init__(self) -> None:
        if self.codes_RC.dtype != torch.int8 or self.absmax_R.dtype != torch.float32:
            raise ValueError(
                f"codes must be int8 and scales float32, got {self.codes_RC.dtype} and {self.absmax_R.dtype}"
            )
        if self.codes_RC.dim() != 2 or self.absmax_R.shape != self.codes_RC.shape[:1]:
            raise ValueError(
                f"codes {tuple(self.codes_RC.shape)} can't have scales {tuple(self.absmax_R.shape)}"
            )
        if not bool(self.absmax_R.isfinite().all()):
            raise Overflow("scales must be finite")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C], bit-equal to bitsandbytes' int8_vectorwise_dequant, rounded once to `dtype`."""
        # bitsandbytes' 1 / 127
        return (self.codes_RC * self.absmax_R[:, None] * 7.874015748698502e-3).to(dtype)

    def as_integer(self) -> IntegerWeight:
        """The same codes in our layout, for models that mix formats; it has no float path for LLM.int8's
        outlier columns."""
        return IntegerWeight(self.codes_RC, self.absmax_R / 127, IntegerLayout("w8a8"))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as bitsandbytes names them on disk: `weight`, `SCB`, `weight_format`."""
        return {
            "weight": self.codes_RC,
            "SCB": self.absmax_R,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Int8Weight:
        """The inverse of `tensors`, bit for bit. Errors: ModelError if they are not those of one linear."""
        form = tensors.get("weight_format", torch.tensor(0))  # absent in old files
        if not {"weight", "SCB"} <= tensors.keys() or form.numel() != 1 or int(form):
            raise ModelError(
                f"an int8 linear has `weight`, `SCB` and a `weight_format` of 0, not {sorted(tensors)}"
            )
        try:
            return cls(tensors["weight"], tensors["SCB"])
        except ValueError as error:
            raise ModelError(f"an int8 linear in the checkpoint is damaged: {error}") from None


def quantize_nearest(weight: Tensor) -> Int8Weight:
    """Quantise as stock LLM.int8: the scale of a row is its largest magnitude. weight [R, C] of any float
    type is first cast to float16, as there.

    Bit-equal to what bitsandbytes stores for the same weight on a CPU. Files from other devices differ in
    rows of zeros, whose codes are zeros here. Errors: Overflow for weights beyond float16.
    """
    half = weight.detach().to(torch.float16)
    absmax = half.abs().amax(dim=1).float()
    if not bool(absmax.isfinite().all()):
        raise Overflow("LLM.int8 takes weights through float16, which ends at 65504")
    steps = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    return Int8Weight(torch.round(half * steps[:, None]).to(torch.int8), absmax)


def int8_config(threshold: float, skip: Sequence[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config` of LLM.int8; `skip` is as in
    bitsandbytes_layout.quantization_config.

    Columns of the activations with a magnitude of at least `threshold` are multiplied in floats; with 0 none
    are.
    """
    config = cast(Any, transformers.BitsAndBytesConfig)(
        load_in_8bit=True, llm_int8_threshold=float(threshold), llm_int8_skip_modules=sorted(set(skip))
    )
    return cast(dict[str, Any], json.loads(json.dumps(config.to_dict())))  # plain JSON values, no enums
