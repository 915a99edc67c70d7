"""nf4 and fp4 linears in models that mix formats, which bitsandbytes' stock layout does not allow.

Codes and scales are those of bitsandbytes_layout.py under flat names (`weight_absmax` for `weight.absmax`),
because the dotted names need the stock loader. bitsandbytes keeps format, group_size and type in a tensor of
JSON; here they are in config.json. On a CPU our kernel multiplies few tokens with the stored tensors
(kernels/packed_gemm.py). Every other forward runs a stock module made from them (`prepare`), and thus the
stock kernels. That module holds a second copy of the codes, because the CPU kernel reorders its
own in place: 1 byte per weight in memory for 0.5 on disk. Without that module, for example when weights are
offloaded, every forward dequantises the weight. R rows (out), C columns (in), G = C / group_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout
from llmcompress.formats.base import DTYPES, Format, StoredLinear, hold
from llmcompress.formats.value_checks import Flaw, finite, require_sound
from llmcompress.kernels import operators, packed_gemm

if TYPE_CHECKING:
    from llmcompress.formats import bitsandbytes_linear

NESTED = ("weight_nested_absmax", "weight_nested_levels", "weight_offset")


@dataclass(frozen=True)
class FourBitLayout:
    """A linear in bitsandbytes' 4-bit format: `group_size` weights share a scale, which `double_quant` stores
    in 8 bits.

    Errors: ValueError.
    """

    format: bitsandbytes_layout.FourBitFormat
    group_size: int
    double_quant: bool = False

    def __post_init__(self) -> None:
        if (
            self.format not in ("nf4", "fp4")
            or type(self.group_size) is not int
            or self.group_size not in bitsandbytes_layout.GROUP_SIZES
        ):
            raise ValueError(
                f"no format {self.format!r} in groups of {self.group_size!r}; use a group_size of "
                f"{', '.join(map(str, bitsandbytes_layout.GROUP_SIZES))}"
            )
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant is true or false, not {self.double_quant!r}")

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type on disk of every tensor of a linear [rows, columns], without its bias. Errors:
        ModelError."""
        if columns % self.group_size or rows * columns % 2:
            raise ModelError(
                f"{rows} x {columns} weights don't divide into {self.format} groups of {self.group_size}"
            )
        scales = rows * columns // self.group_size
        shapes = {"weight": ((rows * columns // 2, 1), torch.uint8)}
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            **shapes,
            "weight_absmax": ((scales,), torch.float32),
        }
        if self.double_quant:
            found["weight_absmax"] = (scales,), torch.uint8
            sizes = (-(-scales // bitsandbytes_layout.NESTED_GROUP), 256, 1)
            found.update({name: ((size,), torch.float32) for name, size in zip(NESTED, sizes, strict=True)})
        return found

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of a linear's stored tensors. A scale may have any sign and may be zero."""
        if not self.double_quant:
            return [finite(tensors["weight_absmax"], "scales")]
        nested_absmax, levels, offset = (tensors[name] for name in NESTED)
        sound = [finite(tensor, "scales of scales") for tensor in (nested_absmax, levels, offset)]
        return [*sound, ((nested_absmax < 0).any(), "scales of scales must not be negative")]


def tensors(packed: bitsandbytes_layout.Packed) -> dict[str, Tensor]:
    """The tensors of one linear as they are stored on disk beside other formats, and in the state dict of a
    FourBitLinear."""
    found = {
        "weight": bitsandbytes_layout.tensors(packed)["weight"],
        "weight_absmax": packed.absmax_RG.reshape(-1),
    }
    if packed.nested is not None:
        found["weight_absmax"] = packed.nested.codes.reshape(-1)
        values = (packed.nested.nested_absmax, packed.nested.levels, packed.nested.offset.reshape(1))
        found.update(zip(NESTED, values, strict=True))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def read(
    tensors: Mapping[str, Tensor],
    scheme: FourBitLayout,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> bitsandbytes_layout.Packed:
    """The inverse of `tensors`, bit for bit; `dtype` is the type of the weight. Errors: ModelError."""
    seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if name != "bias"}
    if seen != scheme.shapes(rows, columns):
        raise ModelError(
            f"a linear of {rows} x {columns} in {scheme} has {scheme.shapes(rows, columns)}, not {seen}"
        )
    require_sound(f"a linear of {rows} x {columns}", scheme.flaws(tensors))
    codes = bitsandbytes_layout.codes_of(tensors["weight"], rows, columns)
    absmax, nested = tensors["weight_absmax"].reshape(rows, -1), None
    if scheme.double_quant:
        nested_absmax, levels, offset = (tensors[name] for name in NESTED)
        nested = bitsandbytes_layout.DoubleQuantized(absmax, nested_absmax, levels, offset.reshape(()))
        absmax = nested.decode()
    return bitsandbytes_layout.Packed(codes, absmax, scheme.format, scheme.group_size, dtype, nested)


_levels = functools.cache(bitsandbytes_layout.grid)


@operators.operator(
    "four_bit_linear",
    "Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_levels, Tensor? offset, "
    "Tensor? bias, str format, int group_size",
)
def four_bit_linear(
    x: Tensor,
    rows: int,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_levels: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    format: bitsandbytes_layout.FourBitFormat,
    group_size: int,
) -> Tensor:
    """Multiply x [..., C] by the stored tensors of a linear in nf4 or fp4, without a gradient: on a CPU by
    our kernel, for many tokens a piece of the weight at a time."""
    nested = None
    if nested_absmax is not None and nested_levels is not None and offset is not None:
        nested = nested_absmax, nested_levels, offset
    if packed_gemm.usable(x, bias, few=None) and group_size % packed_gemm.UNIT == 0:
        sizes = rows, x.shape[-1], group_size
        return packed_gemm.table_of(weight, _levels(format), absmax, *sizes, nested).linear(x, bias)
    stored = {"weight": weight, "weight_absmax": absmax, **dict(zip(NESTED, nested or (), strict=False))}
    layout = FourBitLayout(format, group_size, nested is not None)
    W_RC = bitsandbytes_layout.dequantize(read(stored, layout, rows, x.shape[-1]), x.dtype)
    return nn.functional.linear(x, W_RC, None if bias is None else bias.to(x.dtype))


class FourBitLinear(StoredLinear):
    """A linear in nf4 or fp4 under flat names, run by the stock kernels; `dtype` is that of the model."""

    scheme: FourBitLayout
    # in a tuple, so that it is not a submodule and is not saved
    kernel: tuple[bitsandbytes_linear.Linear4bit, ...] = ()
    table: tuple[packed_gemm.Table, ...] = ()  # the stored tensors as our kernel takes them, on a CPU

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the stock module, unless the weight is not in memory (meta) or its kernels refuse the
        shape."""
        self.kernel, self.table = (), self._tables() if self.weight.is_cpu else ()
        refused = bitsandbytes_layout.refusal(
            (self.out_features, self.in_features), self.scheme.format, self.scheme.group_size
        )
        if self.weight.device.type != "meta" and refused is None:
            # imported here, because it imports bitsandbytes
            from llmcompress.formats import bitsandbytes_linear

            self.kernel = (
                self.beside_weight(
                    lambda: bitsandbytes_linear.linear(self.packed(), None, device=self.weight.device)
                ),
            )

    def _tables(self) -> tuple[packed_gemm.Table, ...]:
        stored = {name: tensor.contiguous() for name, tensor in self.stored().items()}
        sizes = self.out_features, self.in_features, self.scheme.group_size
        nested = tuple(stored[name] for name in NESTED) if self.scheme.double_quant else ()
        levels = bitsandbytes_layout.grid(self.scheme.format)
        return (packed_gemm.Table(stored["weight"], levels, stored["weight_absmax"], *sizes, *nested),)

    def packed(self) -> bitsandbytes_layout.Packed:
        """The codes and scales. Errors: ModelError if the stored tensors are damaged."""
        return read(self.stored(), self.scheme, self.out_features, self.in_features, self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, C], bit-equal to bitsandbytes'."""
        return bitsandbytes_layout.dequantize(self.packed(), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        if operators.traced(input, self.bias):
            nested = tuple(getattr(self, name) if self.scheme.double_quant else None for name in NESTED)
            stored = self.weight, self.weight_absmax, *nested, self.bias
            product = torch.ops.llmcompress.four_bit_linear.default
            out: Tensor = product(
                input, self.out_features, *stored, self.scheme.format, self.scheme.group_size
            )
            return out
        if self.table and packed_gemm.usable(input, self.bias):
            return self.table[0].linear(input, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        # for other types the kernels compute nonsense
        if not self.kernel or input.dtype not in DTYPES.values():
            return nn.functional.linear(input, self.dequantized(input.dtype), bias)
        self.kernel[0].compute_dtype = input.dtype
        out = cast(Tensor, self.kernel[0](input))
        return out if bias is None else out + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBitLinear:
        super()._apply(fn, recurse)
        if self.kernel or self.table:
            self.prepare()  # anew, on the device where the codes are now
        return self

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return (
            f"{super().extra_repr()}, {self.scheme.format}, group_size={self.scheme.group_size}, "
            f"double_quant={self.scheme.double_quant}"
        )


def linear(
    packed: bitsandbytes_layout.Packed, bias: Tensor | None, *, device: torch.device | str = "cpu"
) -> FourBitLinear:
    """Return a live module, prepared and in eval mode, that holds copies of our codes and scales."""
    R, C = packed.codes_RC.shape
    scheme = FourBitLayout(packed.format, packed.group_size, packed.double_quant)
    module = FourBitLinear(C, R, scheme, bias=bias is not None, dtype=packed.dtype, device="meta")
    return hold(module, tensors(packed), bias, device)


FORMAT = Format(
    names=("nf4", "fp4"),
    layout=FourBitLayout,
    weight=bitsandbytes_layout.Packed,
    mark="weight_absmax",
    module=FourBitLinear,
    read=read,
    tensors=tensors,
    linear=linear,
)
