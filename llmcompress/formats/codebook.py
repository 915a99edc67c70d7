"""A linear whose weights are indices into a small codebook, shared by some or all of its rows or one per row,
run by look-up.

A codebook has `entries` levels, for example in float16, and serves `rows` adjacent rows; each weight is an
index of 2, 3, 4 or 8 bits. `weight` has a first axis of size 1, which no plain linear has, so a stock loader
refuses it. On a CPU the kernel multiplies by the packed indices (kernels/lut_gemm.py), so memory holds what
the disk does; on a GPU few tokens have a kernel too (kernels/lookup_dispatch.py). With gradients, for many
tokens on a GPU and without a C compiler, torch looks up the weight at each forward and drops it again. R rows
(out), C columns (in), G codebooks, L levels, B bytes of a row, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llmcompress.algorithms.codebook import ENTRIES, Palette, look_up
from llmcompress.errors import ModelError
from llmcompress.formats.base import DTYPES, Format, StoredLinear, hold
from llmcompress.formats.value_checks import Flaw, finite, require_sound
from llmcompress.kernels import lookup_dispatch, lut_gemm, operators


@dataclass(frozen=True)
class CodebookLayout:
    """The number of levels of a codebook, how many adjacent rows share it (None: all rows of a linear), and
    the type of a level.

    Errors: ValueError.
    """

    entries: int
    rows: int | None
    dtype: str
    format: Literal["codebook"] = "codebook"

    def __post_init__(self) -> None:
        if type(self.entries) is not int or self.entries not in ENTRIES:
            raise ValueError(
                f"no codebook of {self.entries!r} levels; use one of {', '.join(map(str, ENTRIES))}"
            )
        if self.rows is not None and (
            isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1
        ):
            raise ValueError(
                f"rows that share a codebook are a whole number from 1, or none for all, not {self.rows!r}"
            )
        if self.format != "codebook" or self.dtype not in DTYPES:
            raise ValueError(f"no format {self.format!r} of {self.dtype!r}; levels are {', '.join(DTYPES)}")

    @property
    def name(self) -> str:
        """The name in reports: `codebook of 16 a row`."""
        shared = "a linear" if self.rows is None else "a row" if self.rows == 1 else f"for {self.rows} rows"
        return f"codebook of {self.entries} {shared}"

    @property
    def index_bits(self) -> int:
        """Bits of an index."""
        return self.entries.bit_length() - 1

    def sharing(self, rows: int) -> int:
        """The number of rows that share a codebook in a linear of `rows` rows."""
        return min(self.rows or rows, rows)

    def snap(self, levels_GL: Tensor) -> Tensor:
        """The storable levels nearest to these, in the type of `levels_GL`; `algorithms.codebook` restricts
        its levels to them."""
        dtype = DTYPES[self.dtype]
        largest = torch.finfo(dtype).max
        return levels_GL.clamp(-largest, largest).to(dtype).to(levels_GL.dtype)

    def bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight on disk of a linear [R, C], codebooks included."""
        stored = sum(torch.Size(of).numel() * dtype.itemsize for of, dtype in self.shapes(*shape).values())
        return 8 * stored / (shape[0] * shape[1])

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] is not stored in this format, or None."""
        bits, plain = self.bits(shape), 8 * DTYPES[self.dtype].itemsize
        small = (
            f"{shape[0]} x {shape[1]} weights take {bits:.3g} bits each in a {self.name}, and {plain} as "
            "they are"
        )
        return small if bits >= plain else None

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type on disk of every tensor of a linear [rows, columns], without its bias, by name."""
        return {
            "weight": ((1, rows, lut_gemm.row_bytes(columns, self.index_bits)), torch.uint8),
            "weight_levels": ((-(-rows // self.sharing(rows)), self.entries), DTYPES[self.dtype]),
        }

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of a linear's stored tensors. Every index has a level, so only the levels are
        checked."""
        return [finite(tensors["weight_levels"], "levels")]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> CodebookWeight:
        """The inverse of `CodebookWeight.tensors`, bit for bit. Errors: ModelError."""
        return read(tensors, self, tensors["weight"].shape[1] if tensors["weight"].dim() == 3 else 0, columns)

    def inputs(self, input_scale: float | Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """How the kernel rounds the inputs of a linear: it does not round them."""
        return None


def unit(bits: int) -> tuple[int, int]:
    """The fewest indices of `bits` bits that fill whole bytes, and the number of these bytes."""
    return (8, 3) if bits == 3 else (8 // bits, 1)


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack indices into bytes, uint8 [R, B]. The first column is in the highest bits, and each row starts at
    a new byte."""
    count, size = unit(bits)
    codes = pad(codes_RC.to(torch.uint8), (0, -codes_RC.shape[1] % count)).unflatten(1, (-1, count)).int()
    shift = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=codes.device) * bits
    word = (codes << shift).sum(-1, dtype=torch.int32)
    parts = [(word >> 8 * place) & 0xFF for place in range(size - 1, -1, -1)]
    return torch.stack(parts, -1).to(torch.uint8).flatten(1)


def unpack(packed_RB: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `pack`: indices, uint8 [R, columns]."""
    count, size = unit(bits)
    shift = range((count - 1) * bits, -1, -bits)
    if size == 1:
        codes = torch.stack([(packed_RB >> place) & (2**bits - 1) for place in shift], -1)
    else:
        high, middle, low = packed_RB.unflatten(1, (-1, size)).int().unbind(-1)
        word = high << 16 | middle << 8 | low
        codes = torch.stack([((word >> place) & (2**bits - 1)).to(torch.uint8) for place in shift], -1)
    return codes.flatten(1)[:, :columns].contiguous()


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """One linear: codes_RC uint8 [R, C] are indices into levels_GL [G, L], which have the type of the
    layout."""

    codes_RC: Tensor
    levels_GL: Tensor
    layout: CodebookLayout

    @classmethod
    def of(cls, palette: Palette, layout: CodebookLayout) -> CodebookWeight:
        """Return the weight of a solved linear. Errors: ValueError if its codebooks do not match the layout
        or its levels are not storable."""
        (R, C), levels = palette.index_RC.shape, palette.levels_GL
        G = layout.shapes(R, C)["weight_levels"][0]
        if tuple(levels.shape) != G or layout.sharing(R) != min(palette.rows, R):
            raise ValueError(f"codebooks {tuple(levels.shape)} for {palette.rows} rows each are not {layout}")
        if not torch.equal(layout.snap(levels), levels):
            raise ValueError(f"levels are not values of {layout.dtype}; snap them")
        return cls(palette.index_RC.to(torch.uint8).cpu(), levels.to(DTYPES[layout.dtype]).cpu(), layout)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as they are stored on disk and named in the state dict of a
        CodebookLinear."""
        return {"weight": pack(self.codes_RC, self.layout.index_bits)[None], "weight_levels": self.levels_GL}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C]."""
        return look_up(self.codes_RC.int(), self.levels_GL.to(dtype), self.layout.sharing(len(self.codes_RC)))


def read(tensors: Mapping[str, Tensor], layout: CodebookLayout, rows: int, columns: int) -> CodebookWeight:
    """The inverse of `CodebookWeight.tensors`, bit for bit. Errors: ModelError if the tensors can't be a
    linear [rows, columns]."""
    seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if name != "bias"}
    if rows < 1 or seen != layout.shapes(rows, columns):
        wanted = layout.shapes(max(rows, 1), columns)
        raise ModelError(f"a linear of {rows} x {columns} in {layout} has {wanted}, not {seen}")
    require_sound(f"a linear of {rows} x {columns}", layout.flaws(tensors))
    codes_RC = unpack(tensors["weight"][0], columns, layout.index_bits)
    return CodebookWeight(codes_RC, tensors["weight_levels"], layout)


def _weight(
    packed: Tensor, levels_GL: Tensor, sharing: int, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight [R, C], looked up by torch."""
    codes_RC = unpack(packed[0], columns, bits)
    return look_up(codes_RC.int(), levels_GL.to(dtype), sharing)


@operators.operator("codebook_linear", "Tensor weight, Tensor levels, int sharing, int bits")
def codebook_linear(
    x: Tensor, rows: int, packed: Tensor, levels_GL: Tensor, sharing: int, bits: int
) -> Tensor:
    """Multiply x [..., C] by the stored tensors of a CodebookLinear, with a kernel where one can run.
    `sharing` adjacent rows share a codebook."""
    C = x.shape[-1]
    if lookup_dispatch.usable(x):
        out_TR = lookup_dispatch.few_tokens(x.reshape(-1, C), packed[0], levels_GL, bits, sharing=sharing)
    elif _usable(x, packed, levels_GL):
        out_TR = lut_gemm.product(x.reshape(-1, C), packed[0], levels_GL, sharing, bits)
    else:
        return nn.functional.linear(x, _weight(packed, levels_GL, sharing, bits, C, x.dtype))
    return out_TR.reshape(*x.shape[:-1], rows)


class _LookUp(torch.autograd.Function):
    """The product. The backward pass looks up the weight again, so none is kept between the passes."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rows: int, packed: Tensor, levels_GL: Tensor, sharing: int, bits: int
    ) -> Tensor:
        ctx.save_for_backward(packed, levels_GL)
        ctx.sharing, ctx.bits, ctx.columns = sharing, bits, input.shape[-1]
        return codebook_linear(input, rows, packed, levels_GL, sharing, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        packed, levels_GL = ctx.saved_tensors
        W_RC = _weight(packed, levels_GL, ctx.sharing, ctx.bits, ctx.columns, grads[0].dtype)
        return grads[0] @ W_RC, None, None, None, None, None


def _usable(input: Tensor, *stored: Tensor) -> bool:
    """Whether the kernel supports this input and these stored tensors."""
    here = input.is_cpu and input.numel() > 0 and input.dtype in DTYPES.values()
    return (
        here
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in stored)
        and lut_gemm.KERNEL.available
    )


class CodebookLinear(StoredLinear):
    """A linear [in_features -> out_features] whose weights share codebook levels; `dtype` is that of the
    model.

    Gradients go to the input and the bias; the weight has none.
    """

    scheme: CodebookLayout
    weight_levels: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        sharing, bits = self.scheme.sharing(self.out_features), self.scheme.index_bits
        stored = self.weight, self.weight_levels, sharing, bits
        out: Tensor
        if operators.traced(input, self.bias):
            out = torch.ops.llmcompress.codebook_linear.default(input, self.out_features, *stored)
        elif torch.compiler.is_compiling():
            W_RC = _weight(*stored, self.in_features, input.dtype)
            return nn.functional.linear(input, W_RC, bias)
        elif torch.is_grad_enabled() and input.requires_grad:
            out = _LookUp.apply(input, self.out_features, *stored)  # type: ignore[no-untyped-call]
        else:
            out = codebook_linear(input, self.out_features, *stored)
        return out if bias is None else out + bias

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.name}, {self.scheme.dtype}"


def linear(
    weight: CodebookWeight, bias: Tensor | None, *, device: torch.device | str = "cpu"
) -> CodebookLinear:
    """Return a live module, in eval mode, that holds copies of our indices and levels."""
    (R, C), dtype = weight.codes_RC.shape, DTYPES[weight.layout.dtype]
    module = CodebookLinear(C, R, weight.layout, bias=bias is not None, dtype=dtype, device="meta")
    return hold(module, weight.tensors(), bias, device)


FORMAT = Format(
    names=("codebook",),
    layout=CodebookLayout,
    weight=CodebookWeight,
    mark="weight_levels",
    module=CodebookLinear,
    read=read,
    tensors=CodebookWeight.tensors,
    linear=linear,
)
