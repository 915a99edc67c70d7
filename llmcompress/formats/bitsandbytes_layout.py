"""The bitsandbytes border: our 4-bit codes in the layout that plain transformers loads and the stock kernels
run. The modules that run them are in `bitsandbytes_linear`.

The layout has one byte for two codes, row by row, and one float32 scale (`absmax`, of any sign) for each
`group_size` consecutive weights of a row; double quantisation stores those scales in 8 bits. The tensors are
written by bitsandbytes' own functions, so names and bytes are theirs. Decoding is plain torch, bit-equal to
bitsandbytes wherever bitsandbytes is correct (see `refusal`). R rows (out), C columns (in), G = C /
group_size groups per row. Codes take one byte per weight until `tensors` packs them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module

from llmcompress.errors import ModelError, first_line
from llmcompress.formats.value_checks import finite, require_sound

# bitsandbytes warns of an absent optional package when it is imported
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# and of the cast to float16 at each int8 product
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

FourBitFormat = Literal["nf4", "fp4"]
GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what the kernels accept
NESTED_GROUP = 256  # scales that share one nested scale; bitsandbytes' kernels support no other number
ROWS = 32  # the AVX512-BF16 kernel needs a multiple of 32 rows
# transformers' names for the heads of other tasks
NEW_HEADS = ("score", "classifier", "qa_outputs", "multiple_choice_head")


def stock() -> Any:
    """bitsandbytes' functions, which are typed in part only. It is imported when it is first needed: that
    takes more than a second, and shapes and configs need none of it."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def has_native_library() -> bool:
    """Whether bitsandbytes found its compiled library for this machine."""
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary as NoLibrary

    return not isinstance(stock().lib, NoLibrary)


def multiplies_packed() -> bool:
    """Whether bitsandbytes multiplies packed 4-bit weights on this CPU instead of dequantising them in each
    forward."""
    return bool(stock().has_avx512bf16())


def grid(format: FourBitFormat) -> Tensor:
    """The levels of a format, float32 [16], indexed by code; fp4's are not sorted."""
    return cast(Tensor, stock().get_4bit_type(format, device="cpu"))


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """Scales in 8 bits: `levels[codes] * nested_absmax + offset`. Each nested_absmax is shared by 256
    consecutive scales.

    codes uint8 [R, G] (any shape), nested_absmax float32 [ceil(R G / 256)] >= 0, levels float32 [256]
    ascending, offset [].
    """

    codes: Tensor
    nested_absmax: Tensor
    levels: Tensor
    offset: Tensor

    def to(self, device: torch.device | str) -> DoubleQuantized:
        """The same scales on a device."""
        parts = (self.codes, self.nested_absmax, self.levels, self.offset)
        return DoubleQuantized(*(part.to(device) for part in parts))

    def decode(self) -> Tensor:
        """The scales, float32, in the shape of `codes`, bit-equal to what bitsandbytes decodes on a CPU."""
        place = torch.arange(self.codes.numel(), device=self.codes.device).reshape(self.codes.shape)
        return self.levels[self.codes.int()] * self.nested_absmax[place // NESTED_GROUP] + self.offset


def double_quantize(absmax: Tensor) -> DoubleQuantized:
    """Quantise scales of any shape to 8 bits, bit-equal to bitsandbytes' double quantisation of the same
    scales in row-major order."""
    flat = absmax.float().cpu().reshape(-1)  # on the CPU, so that every device gives the same bytes
    offset = flat.mean()
    codes, state = stock().quantize_blockwise(flat - offset, blocksize=NESTED_GROUP)
    found = (codes.reshape(absmax.shape), state.absmax, state.code, offset)
    return DoubleQuantized(*found).to(absmax.device)


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantised linear: codes_RC uint8 [R, C] in 0..15, absmax_RG float32 [R, C / group_size], and the
    dtype of the weight.

    With double quantisation, `nested` stores the scales and absmax_RG is exactly what it decodes to. Errors:
    ValueError.
    """

    codes_RC: Tensor
    absmax_RG: Tensor
    format: FourBitFormat
    group_size: int
    dtype: torch.dtype
    nested: DoubleQuantized | None = None

    def __post_init__(self) -> None:
        R, C = self.codes_RC.shape
        if self.codes_RC.dtype != torch.uint8 or self.absmax_RG.dtype != torch.float32:
            raise ValueError(
                f"codes must be uint8 and scales float32, got {self.codes_RC.dtype} and "
                f"{self.absmax_RG.dtype}"
            )
        if C % self.group_size or self.absmax_RG.shape != (R, C // self.group_size):
            raise ValueError(
                f"codes {R} x {C} in groups of {self.group_size} can't have scales "
                f"{tuple(self.absmax_RG.shape)}"
            )
        if self.nested is not None and not torch.equal(self.nested.decode(), self.absmax_RG):
            raise ValueError("the scales are not what their double quantisation decodes to")

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested is not None

    def to(self, device: torch.device | str) -> Packed:
        """The same linear on a device."""
        nested = None if self.nested is None else self.nested.to(device)
        codes_RC, absmax_RG = self.codes_RC.to(device), self.absmax_RG.to(device)
        return replace(self, codes_RC=codes_RC, absmax_RG=absmax_RG, nested=nested)


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [R, C] in `dtype` (packed.dtype unless given), bit-equal to bitsandbytes'
    dequantize_4bit."""
    levels = grid(packed.format).to(packed.codes_RC.device)[packed.codes_RC.int()]
    R, G = packed.absmax_RG.shape
    # float32 here, rounded once below
    weight = levels.reshape(R, G, packed.group_size) * packed.absmax_RG[..., None]
    return weight.reshape(R, -1).to(dtype or packed.dtype)


def quantize_nearest(weight: Tensor, format: FourBitFormat, group_size: int, double_quant: bool) -> Packed:
    """Quantise weight [R, C] float as stock bitsandbytes does: the scale is a group's largest magnitude,
    codes are the nearest levels."""
    data, state = stock().quantize_4bit(
        weight, blocksize=group_size, compress_statistics=double_quant, quant_type=format
    )
    return read(data, state)


def tensors(packed: Packed) -> dict[str, Tensor]:
    """The tensors of one linear as its state dict stores them: `weight`, `weight.absmax`, `weight.quant_map`,
    ..."""
    codes = packed.codes_RC.reshape(-1)
    data = ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)  # [R C / 2, 1], the even column in the high nibble
    return {"weight": data, **_stats(packed)}


def unpack(tensors: Mapping[str, Tensor]) -> Packed:
    """The inverse of `tensors`, bit for bit. Raises ModelError if the tensors are not a 4-bit weight, or if
    its scales are damaged or were rounded by a forward."""
    data = tensors["weight"]
    stats = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    try:
        state = stock().QuantState.from_dict(stats, device=data.device)
    except (
        ValueError,
        KeyError,
    ) as error:  # for example tensors of another format for which config.json has no scheme
        raise ModelError(
            f"a quantised linear has {', '.join(sorted(tensors))}, which is no 4-bit weight of bitsandbytes "
            f"({first_line(error)}), and config.json names no other format for it; take the model again "
            "from its source"
        ) from None
    return read(data, state)


def parts_of(linear: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one linear in a checkpoint, named as `unpack` expects them."""
    weight = f"{linear}.weight"
    return {
        name.removeprefix(f"{linear}."): t
        for name, t in tensors.items()
        if name == weight or name.startswith(f"{weight}.")
    }


def _stats(packed: Packed) -> dict[str, Tensor]:
    """All tensors of a linear except its codes, written by bitsandbytes itself."""
    state = stock().QuantState(
        absmax=packed.absmax_RG.reshape(-1).contiguous(),
        shape=packed.codes_RC.shape,
        code=grid(packed.format).to(packed.codes_RC.device),
        blocksize=packed.group_size,
        quant_type=packed.format,
        dtype=packed.dtype,
    )
    if packed.nested is not None:
        nested = packed.nested
        state.absmax, state.offset, state.nested = nested.codes.reshape(-1).contiguous(), nested.offset, True
        state.state2 = stock().QuantState(
            nested.nested_absmax, code=nested.levels, blocksize=NESTED_GROUP, dtype=torch.float32
        )
    return {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}


def codes_of(data: Tensor, rows: int, columns: int) -> Tensor:
    """The codes of packed bytes of any shape, uint8 [rows, columns]; the high half of a byte is the first of
    its two codes.

    The bytes may be stored as a tensor of another type (`bnb_4bit_quant_storage`).
    """
    flat = data.reshape(-1).view(torch.uint8)
    return torch.stack((flat >> 4, flat & 15), dim=1).reshape(rows, columns)


def read(data: Tensor, state: Any) -> Packed:
    """Return a Packed from bitsandbytes' own objects, in the layout on disk."""
    (R, C), group_size = state.shape, state.blocksize
    if not state.nested and state.absmax.dtype != torch.float32:
        raise ModelError(
            f"a 4-bit weight {R} x {C} has {state.absmax.dtype} scales, not float32: it was saved after a "
            "forward on a CPU had rounded them; take the checkpoint it was made from"
        )
    codes = codes_of(data, R, C)
    absmax, nested = state.absmax.reshape(R, -1), None
    if state.nested:
        nested = DoubleQuantized(absmax, state.state2.absmax, state.state2.code, state.offset)
        absmax = nested.decode()
    require_sound(f"a 4-bit linear of {R} x {C}", [finite(absmax, "scales")])
    return Packed(codes, absmax, cast(FourBitFormat, state.quant_type), group_size, state.dtype, nested)


def refusal(shape: Sequence[int], format: FourBitFormat, group_size: int) -> str | None:
    """Return why the kernels can't run a linear [R, C] in this format, or None.

    Measured with bitsandbytes 0.50.2 on an AVX512-BF16 CPU, for both formats, C from 32 to 4096 and every
    group_size:
    - rows of whole groups and R % 32 == 0: the no-grad kernel runs with a relative error of 2.6e-3 to 3.8e-3
      (it computes in bfloat16);
    - R of 1, 7, 8, 16, 24, 31, 33, 48, 63: AssertionError in the repacking before the kernel;
    - C % group_size != 0 (group_size > C included): RuntimeError in the repacking. Groups then run across
      rows, and bitsandbytes' dequantisation itself is wrong for most weights where it takes its vector path
      (C = 96 or 160 at group_size 64, 384 at 256, 768 at 512). It is correct elsewhere (C = 100, 172, 200).
    """
    R, C = shape
    if C % group_size:
        fitting = [size for size in GROUP_SIZES if C % size == 0]
        advice = f"use group_size {max(fitting)}" if fitting else "no group_size fits"
        return f"{format} rows of {C} weights don't divide into groups of {group_size} ({advice})"
    if R % ROWS:
        return (
            f"{R} output rows are no multiple of {ROWS}, which the 4-bit kernel on CPUs with AVX512-BF16 "
            "needs"
        )
    return None


def skip_list(kept: Sequence[str], quantised: Collection[str], prefix: str) -> list[str]:
    """Return the entries of `llm_int8_skip_modules`, given the full names of the linears that stay plain and
    of those that are quantised.

    A list replaces transformers' own rule, so it also names the heads that the classes of other tasks have in
    place of the causal one. Those heads are new and must be plain to be initialised and trained. Names are
    also listed without the `prefix` of the base model, for the classes that lack it. No entry matches a
    quantised linear.
    """
    shorter = [name.removeprefix(f"{prefix}.") for name in kept]
    beside = [
        entry
        for entry in (*shorter, *NEW_HEADS)
        if all(should_convert_module(name, [entry]) for name in quantised)
    ]
    return sorted({*kept, *beside})


def quantization_config(
    format: FourBitFormat, double_quant: bool, compute_dtype: torch.dtype, skip: Sequence[str]
) -> dict[str, Any]:
    """Return config.json's `quantization_config`; `skip` names every linear that is not quantised, as
    `skip_list` returns them.

    transformers skips a module if an entry matches its name from the start up to a dot (as a regular
    expression) or is its suffix. A full name from `named_modules()` therefore skips that module and its
    submodules, and nothing else.
    """
    config = cast(Any, transformers.BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=sorted(set(skip)),  # replaces the default list, which would include the head
    )
    return cast(dict[str, Any], json.loads(json.dumps(config.to_dict())))  # plain JSON values, no enums
