"""Products of few tokens and packed weights of 8 or 4 bits on a CPU, by a small C kernel.

The kernel is csrc/packed.c with csrc/lookup_wide.h; `compiled` builds and loads it. It reads each weight
once, in its packed form, as decoding needs it. If there is none, the caller uses another way. R rows (out), C
columns (in), G = ceil(C / group_size) groups per row, T tokens.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from llmcompress.algorithms.activation_quantization import LARGEST
from llmcompress.kernels.compiled import CompiledKernel

# tokens up to which the kernels are faster than expanded weights and a product of torch
FEW = 8
FEW_INTEGERS = 16  # of int8 by int8, which take less time per token
PIECE = 2**20  # weights expanded at a time: 4 MB, which stay in a cache
UNIT = 32  # columns of which groups are multiples
SMALL = 2**16  # up to this many weights a second thread does not pay off
HALVES = torch.bfloat16  # the type of inputs and outputs that the kernel has beside float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# other CPUs multiply bfloat16 several times as slowly as float32
FAST_HALVES = torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
SCALES = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}  # types of scales, as packed.c numbers them
NESTED = 3
TABLES: Any = WeakTensorKeyDictionary()  # packed weight -> its Table
ROUNDINGS = {"dynamic": 0, "static": 1, "llm_int8": 2}  # as packed.c numbers them
Rounding = Literal["dynamic", "static", "llm_int8"]


def _declare(kernel: ctypes.CDLL) -> None:
    pointer, long, small, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    kernel.packed_form.restype, kernel.packed_form.argtypes = ctypes.c_char_p, ()
    scales = (pointer, small, *4 * (pointer,))
    kernel.packed_table.argtypes = (
        pointer,
        small,
        *2 * (pointer,),
        *scales,
        *2 * (pointer,),
        *4 * (long,),
        small,
    )
    kernel.packed_expand.argtypes = (*2 * (pointer,), *scales, pointer, small, *4 * (long,), small)
    kernel.packed_floats.argtypes = (pointer, small, *4 * (pointer,), *3 * (long,), small)
    kernel.packed_integers.argtypes = (pointer, small, number, small, *6 * (pointer,), *4 * (long,), small)


KERNEL = CompiledKernel(
    "packed", ("packed.c", "lookup_wide.h"), _declare, "torch multiplies packed weights of few tokens"
)


def form() -> str | None:
    """Return the instruction set of the kernel: avx512, avx2, or plain; None if there is no kernel."""
    kernel = KERNEL.loaded
    return None if kernel is None else str(kernel.packed_form().decode())


def usable(x: Tensor, bias: Tensor | None = None, few: int | None = FEW) -> bool:
    """Whether the kernel multiplies inputs [..., C]: at most `few` tokens (None: any number) in a float type
    on the CPU, where no gradient is asked for and neither torch.compile nor autocast decides what is run."""
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and x.numel() > 0
        and (few is None or x.numel() <= few * x.shape[-1])
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and KERNEL.available
    )


def tokens(x: Tensor) -> Tensor:
    """Inputs [..., C] as the kernel takes them: [T, C] in float32 or bfloat16."""
    x_TC = x.reshape(-1, x.shape[-1])
    return x_TC.float() if x_TC.dtype == torch.float16 else x_TC


@dataclass(frozen=True, eq=False)
class Table:
    """A weight [R, C] of 4-bit codes: levels[code] times the scale of its group, times that of its row if
    there is one.

    packed uint8, R * ceil(C / 2) bytes of any shape, the even column in the high half of a byte; levels
    float32 [16]; scales [R, G] of any shape in float32, float16 or uint8. Nested scales are stored in 8 bits:
    scale = nested_levels[code] * nested[place / 256] + offset, all float32. row_scale float32 [R]. All
    tensors are contiguous and on the CPU. Errors: ValueError.
    """

    packed: Tensor
    levels: Tensor
    scales: Tensor
    rows: int
    columns: int
    group_size: int
    nested: Tensor | None = None
    nested_levels: Tensor | None = None
    offset: Tensor | None = None
    row_scale: Tensor | None = None

    def __post_init__(self) -> None:
        R, C = self.rows, self.columns
        G = -(-C // self.group_size) if self.group_size > 0 else 0
        floats = (self.levels, self.nested, self.nested_levels, self.offset, self.row_scale)
        sizes = (16, -(-R * G // 256), 256, 1, R)
        fits = (
            min(R, C, G) > 0
            and (self.group_size % UNIT == 0 or G == 1)
            and (self.packed.dtype, self.packed.numel()) == (torch.uint8, R * -(-C // 2))
            and self.scales.dtype in SCALES
            and self.scales.numel() == R * G
        )
        for tensor, size in zip(floats, sizes, strict=True):
            fits = fits and (tensor is None or (tensor.dtype, tensor.numel()) == (torch.float32, size))
        if not fits or not _plain(self.packed, self.scales, *floats):
            raise ValueError(
                f"codes {tuple(self.packed.shape)} and scales {tuple(self.scales.shape)} in "
                f"{self.scales.dtype} are no weight of {R} x {C} in groups of {self.group_size}"
            )

    def holds(self, packed: Tensor, scales: Tensor, row_scale: Tensor | None = None) -> bool:
        """Whether these are its codes and scales, where they are now."""
        now = packed.data_ptr(), scales.data_ptr(), _at(row_scale)
        return (self.packed.data_ptr(), self.scales.data_ptr(), _at(self.row_scale)) == now

    @property
    def _scales(self) -> tuple[int | None, ...]:
        """What the kernel is told of the scales."""
        kind = SCALES[self.scales.dtype] if self.nested is None else NESTED
        parts = (self.nested, self.nested_levels, self.offset, self.row_scale)
        return self.scales.data_ptr(), kind, *map(_at, parts)

    @property
    def _group_size(self) -> int:
        """A group that is the whole row may have any size."""
        return max(self.group_size, UNIT * -(-self.columns // UNIT)) if self._one else self.group_size

    @property
    def _one(self) -> bool:
        return self.group_size >= self.columns

    def product(self, x_TC: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + bias, [T, R] in the type of x, for few tokens. Sums are float32. Errors: ValueError,
        MemoryError."""
        x_TC, out_TR, bias = _operands(x_TC, self.rows, self.columns, bias)
        done = KERNEL.required.packed_table(
            x_TC.data_ptr(),
            x_TC.dtype == HALVES,
            self.packed.data_ptr(),
            self.levels.data_ptr(),
            *self._scales,
            _at(bias),
            out_TR.data_ptr(),
            len(x_TC),
            self.rows,
            self.columns,
            self._group_size,
            _threads(self.rows * self.columns),
        )
        return _checked(done, out_TR)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + bias, [..., R] in the type of x, for any number of tokens in any float type.

        For many tokens the weight is expanded a piece at a time. Sums are float32. If x is bfloat16 and the
        processor multiplies bfloat16, weights are then rounded to it. Errors: ValueError, MemoryError.
        """
        x_TC, shape = tokens(x), (*x.shape[:-1], self.rows)
        if len(x_TC) <= FEW:
            return self.product(x_TC, bias).to(x.dtype).reshape(shape)
        dtype = HALVES if x.dtype == HALVES and FAST_HALVES else torch.float32
        x_CT, height = x_TC.to(dtype).t(), min(self.rows, max(1, PIECE // self.columns))
        piece_RC, out_RT = (
            torch.empty(height, self.columns, dtype=dtype),
            x_CT.new_empty(self.rows, len(x_TC)),
        )
        for start in range(0, self.rows, height):
            part_RT = out_RT[start : start + height]
            torch.mm(self.expand(dtype, start=start, out=piece_RC[: len(part_RT)]), x_CT, out=part_RT)
        out_TR = out_RT.t() if bias is None else out_RT.t() + bias.detach()
        return out_TR.to(x.dtype).reshape(shape)

    def expand(self, dtype: torch.dtype, *, start: int = 0, out: Tensor | None = None) -> Tensor:
        """Return the weight [R, C] in float32 or bfloat16, computed in float32 and rounded once.

        `out`, if given, receives as many rows as it has, beginning with row `start`. Errors: ValueError,
        MemoryError.
        """
        out_RC = torch.empty(self.rows - start, self.columns, dtype=dtype) if out is None else out
        fits = 0 <= start <= start + len(out_RC) <= self.rows and out_RC.shape[1] == self.columns
        if not fits or out_RC.dtype not in (torch.float32, HALVES) or not _plain(out_RC):
            raise ValueError(
                f"rows from {start} of {self.rows} x {self.columns} do not go into {out_RC.dtype} "
                f"{tuple(out_RC.shape)}"
            )
        done = KERNEL.required.packed_expand(
            self.packed.data_ptr(),
            self.levels.data_ptr(),
            *self._scales,
            out_RC.data_ptr(),
            out_RC.dtype == HALVES,
            start,
            len(out_RC),
            self.columns,
            self._group_size,
            _threads(out_RC.numel()),
        )
        return _checked(done, out_RC)


def table_of(
    packed: Tensor,
    levels: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    group_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    row_scale: Tensor | None = None,
) -> Table:
    """Return the Table of stored tensors; it is kept while these tensors are where they are.

    Takes what Table takes; `nested` is the nested scales, their levels and the offset. Errors: ValueError.
    """
    table: Table | None = TABLES.get(packed)
    if table is None or not table.holds(packed, scales, row_scale):
        parts = (None, None, None) if nested is None else nested
        kept = [None if one is None else one.detach() for one in (*parts, row_scale)]
        table = Table(packed.detach(), levels, scales.detach(), rows, columns, group_size, *kept)
        TABLES[packed] = table
    return table


def floats_product(x_TC: Tensor, codes_RC: Tensor, scale_R: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (x codes^T) * scale + bias, [T, R] in the type of x, for few tokens and int8 codes. Sums are
    float32. Errors: ValueError, MemoryError."""
    R, C = _codes(codes_RC, scale_R)
    x_TC, out_TR, bias = _operands(x_TC, R, C, bias)
    done = KERNEL.required.packed_floats(
        x_TC.data_ptr(),
        x_TC.dtype == HALVES,
        codes_RC.data_ptr(),
        scale_R.data_ptr(),
        _at(bias),
        out_TR.data_ptr(),
        len(x_TC),
        R,
        C,
        _threads(R * C),
    )
    return _checked(done, out_TR)


def integers_product(
    x_TC: Tensor,
    codes_RC: Tensor,
    scale_R: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    rounding: Rounding = "dynamic",
    step: Tensor | None = None,
) -> Tensor:
    """Return the product of tokens, rounded to integers, and int8 codes, [T, R] in the type of x, for few
    tokens.

    Codes of tokens, sums and outputs are those of integer.quantize_tokens and integer_linear.scaled, bit for
    bit; with the rounding `llm_int8` those of bitsandbytes, for inputs that float16 has. Errors: ValueError,
    MemoryError.
    """
    R, C = _codes(codes_RC, scale_R)
    return _integers(x_TC, codes_RC, None, scale_R, bias, (R, C, C), bits, rounding, step)


def nibbles_product(
    x_TC: Tensor,
    packed_RB: Tensor,
    multiplier_RG: Tensor,
    scale_R: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    step: Tensor | None = None,
) -> Tensor:
    """Return the same as `integers_product` from 4-bit codes, code + 8 with the even column in the high half
    of a byte, and an integer multiplier per group. Errors: ValueError, MemoryError."""
    (R, B), C = packed_RB.shape, x_TC.shape[1]
    fits = (packed_RB.dtype, multiplier_RG.dtype, scale_R.dtype) == (torch.uint8, torch.uint8, torch.float32)
    fits = fits and -(-C // 2) == B and scale_R.shape == (R,) and takes_groups(group_size, C)
    if not fits or multiplier_RG.shape != (R, -(-C // group_size)):
        raise ValueError(
            f"codes {tuple(packed_RB.shape)} and multipliers {tuple(multiplier_RG.shape)} are no weight of "
            f"{C} columns in groups of {group_size}"
        )
    if not _plain(packed_RB, multiplier_RG, scale_R):
        raise ValueError("codes, multipliers and scales must be contiguous and on the CPU")
    group = group_size if group_size < C else UNIT * -(-C // UNIT)
    rounding: Rounding = "dynamic" if step is None else "static"
    return _integers(x_TC, packed_RB, multiplier_RG, scale_R, bias, (R, C, group), bits, rounding, step)


def takes_groups(group_size: int, columns: int) -> bool:
    """Whether the kernels take groups of this size."""
    return group_size % UNIT == 0 or group_size >= columns


def _integers(
    x_TC: Tensor,
    codes: Tensor,
    multiplier_RG: Tensor | None,
    scale_R: Tensor,
    bias: Tensor | None,
    sizes: tuple[int, int, int],
    bits: int,
    rounding: Rounding,
    step: Tensor | None,
) -> Tensor:
    R, C, group = sizes
    if (rounding == "static") != (step is not None):
        raise ValueError(f"a rounding that is {rounding} {'has no' if step is not None else 'needs a'} step")
    x_TC, out_TR, bias = _operands(x_TC, R, C, bias)
    done = KERNEL.required.packed_integers(
        x_TC.data_ptr(),
        x_TC.dtype == HALVES,
        float(LARGEST[bits]),
        ROUNDINGS[rounding],
        _at(step),
        codes.data_ptr(),
        _at(multiplier_RG),
        scale_R.data_ptr(),
        _at(bias),
        out_TR.data_ptr(),
        len(x_TC),
        R,
        C,
        group,
        _threads(R * C),
    )
    return _checked(done, out_TR)


def _codes(codes_RC: Tensor, scale_R: Tensor) -> tuple[int, int]:
    """The rows and columns of int8 codes. Errors: ValueError."""
    fits = codes_RC.dim() == 2 and (codes_RC.dtype, scale_R.dtype) == (torch.int8, torch.float32)
    if (
        not fits
        or scale_R.shape != codes_RC.shape[:1]
        or not codes_RC.numel()
        or not _plain(codes_RC, scale_R)
    ):
        raise ValueError(
            f"codes {tuple(codes_RC.shape)} in {codes_RC.dtype} and scales {tuple(scale_R.shape)} in "
            f"{scale_R.dtype} are no int8 weight"
        )
    return codes_RC.shape[0], codes_RC.shape[1]


def _operands(
    x_TC: Tensor, rows: int, columns: int, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as the kernel takes them, room for the outputs, and the bias as floats. Errors:
    ValueError."""
    if (
        x_TC.dim() != 2
        or x_TC.shape[1] != columns
        or not x_TC.is_cpu
        or x_TC.dtype not in (torch.float32, HALVES)
    ):
        raise ValueError(
            f"inputs {tuple(x_TC.shape)} in {x_TC.dtype} on {x_TC.device} are not [T, {columns}]"
        )
    if bias is not None:
        bias = bias.detach().float().contiguous()
        if bias.shape != (rows,):
            raise ValueError(f"a bias of {rows} rows can't be {tuple(bias.shape)}")
    return x_TC.contiguous(), torch.empty(len(x_TC), rows, dtype=x_TC.dtype), bias


def _checked(done: int, out: Tensor) -> Tensor:
    if not done:
        raise MemoryError(f"no memory beside an output of {tuple(out.shape)}")
    return out


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _plain(*tensors: Tensor | None) -> bool:
    return all(tensor is None or (tensor.is_contiguous() and tensor.is_cpu) for tensor in tensors)


def _threads(weights: int) -> int:
    return 1 if weights <= SMALL else torch.get_num_threads()
