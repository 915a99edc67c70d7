"""Products of inputs and packed indices on a CPU, by a small C kernel that is compiled on first use.

The kernel is csrc/lookup.c with csrc/lookup_wide.h; `compiled` builds and loads it. If there is none, the
caller uses another way. R rows (out), C columns (in), G codebooks, L levels, B bytes of a row, T tokens.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llmcompress.kernels.compiled import CompiledKernel

SMALL = 2**16  # up to this many weights a second thread does not pay off
# tokens at a time; for more, a CPU without AVX-512 is about as fast with expanded weights and a product of
# torch
FEW = 16
# weights expanded at a time: 16 MB; smaller pieces are no faster, and threads synchronise more often
PIECE = 2**22
# other CPUs multiply bfloat16 several times as slowly as float32
BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


def _declare(kernel: ctypes.CDLL) -> None:
    pointer, long, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernel.lookup_form.restype, kernel.lookup_form.argtypes = ctypes.c_char_p, ()
    kernel.lookup_halves.restype, kernel.lookup_halves.argtypes = small, ()
    kernel.lookup_matmul.argtypes = (*4 * (pointer,), *4 * (long,), small, small, small)
    kernel.lookup_expand.argtypes = (*3 * (pointer,), *4 * (long,), small, small, small)


KERNEL = CompiledKernel(
    "lookup", ("lookup.c", "lookup_wide.h"), _declare, "torch looks up codebook linears in each forward"
)


def form() -> str | None:
    """Return the instruction set of the kernel: avx512, avx2, or plain; None if there is no kernel."""
    kernel = KERNEL.loaded
    return None if kernel is None else str(kernel.lookup_form().decode())


def halves(bits: int) -> bool:
    """Whether `matmul` takes inputs in bfloat16 without a conversion."""
    kernel = KERNEL.loaded
    return kernel is not None and bits != 8 and bool(kernel.lookup_halves())


def product(x_TC: Tensor, packed_RB: Tensor, levels_GL: Tensor, rows: int, bits: int) -> Tensor:
    """Return x W^T [T, R] in the dtype of x, which may be any float dtype.

    Few tokens use `matmul`; for many tokens the weight is expanded a piece at a time. Sums are float32. If x
    is bfloat16 and the processor multiplies bfloat16, levels are rounded to bfloat16.
    """
    (T, C), R, half = x_TC.shape, len(packed_RB), x_TC.dtype == torch.bfloat16 and halves(bits)
    few = 2 * FEW if half else FEW
    if few >= T or (form() == "avx512" and bits != 8 and not half):
        inputs, levels_GL = (x_TC if half else x_TC.float()).contiguous(), levels_GL.float()
        parts = [matmul(part, packed_RB, levels_GL, rows, bits) for part in inputs.split(FEW)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(x_TC.dtype)
    dtype = torch.bfloat16 if x_TC.dtype == torch.bfloat16 and BFLOAT16 else torch.float32
    x_CT, levels_GL = x_TC.to(dtype).t(), levels_GL.to(dtype)
    height = min(R, max(1, PIECE // C))
    piece_RC, out_RT = torch.empty(height, C, dtype=dtype), torch.empty(R, T, dtype=dtype)
    for start in range(0, R, height):
        part_RT = out_RT[start : start + height]
        part_RC = expand(packed_RB, levels_GL, rows, bits, C, start=start, out=piece_RC[: len(part_RT)])
        torch.mm(part_RC, x_CT, out=part_RT)
    return out_RT.t().to(x_TC.dtype).contiguous()


def matmul(x_TC: Tensor, packed_RB: Tensor, levels_GL: Tensor, rows: int, bits: int) -> Tensor:
    """Return x W^T, float32 [T, R], from x float32 [T, C], indices of 2, 3, 4 or 8 bits and levels float32
    [G, 2^bits].

    All tensors are contiguous and on the CPU; `rows` adjacent rows share a codebook. It is meant for few
    tokens. With `halves`, x may be bfloat16, and levels are then rounded to bfloat16. Errors: ValueError,
    MemoryError.
    """
    T, C = x_TC.shape
    R = _checked(packed_RB, levels_GL, C, rows, bits)
    half = x_TC.dtype == torch.bfloat16 and halves(bits)
    right = (half or x_TC.dtype == torch.float32) and levels_GL.dtype == torch.float32
    if not right or not _plain(x_TC, packed_RB, levels_GL):
        raise ValueError(
            f"inputs and levels must be float32 and contiguous, got {x_TC.dtype} and {levels_GL.dtype}"
        )
    out_TR = torch.empty(T, R)
    done = KERNEL.required.lookup_matmul(
        x_TC.data_ptr(),
        packed_RB.data_ptr(),
        levels_GL.data_ptr(),
        out_TR.data_ptr(),
        T,
        R,
        C,
        rows,
        bits,
        half,
        _threads(R * C),
    )
    if not done:
        raise MemoryError(f"no memory for the inputs of a product of {T} tokens")
    return out_TR


def expand(
    packed_RB: Tensor,
    levels_GL: Tensor,
    rows: int,
    bits: int,
    columns: int,
    *,
    start: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight [R, columns] in the dtype of the levels, of 2 or 4 bytes.

    `out`, if given, receives as many rows as it has, beginning with row `start`. Errors: ValueError,
    MemoryError.
    """
    R = _checked(packed_RB, levels_GL, columns, rows, bits)
    out_RC = torch.empty(R - start, columns, dtype=levels_GL.dtype) if out is None else out
    fits = (
        out_RC.dtype == levels_GL.dtype
        and 0 <= start <= start + len(out_RC) <= R
        and out_RC.shape[1] == columns
    )
    if not fits or levels_GL.dtype.itemsize not in (2, 4) or not _plain(packed_RB, levels_GL, out_RC):
        raise ValueError(
            f"rows from {start} of {R} x {columns} do not go into {out_RC.dtype} {tuple(out_RC.shape)}"
        )
    done = KERNEL.required.lookup_expand(
        packed_RB.data_ptr(),
        levels_GL.data_ptr(),
        out_RC.data_ptr(),
        start,
        len(out_RC),
        columns,
        rows,
        bits,
        levels_GL.dtype.itemsize,
        _threads(out_RC.numel()),
    )
    if not done:
        raise MemoryError(f"no memory for a row of {columns} indices")
    return out_RC


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of a row of indices. Each row begins at a new byte; eight 3-bit indices fill three
    bytes."""
    return -(-columns // 8) * 3 if bits == 3 else -(-columns * bits // 8)


def _checked(packed_RB: Tensor, levels_GL: Tensor, columns: int, rows: int, bits: int) -> int:
    """Return the number of rows. Errors: ValueError for arguments with which the kernel would read out of
    bounds."""
    R = len(packed_RB)
    fits = bits in (2, 3, 4, 8) and rows > 0 and packed_RB.dtype == torch.uint8 and min(R, columns) > 0
    if (
        not fits
        or packed_RB.shape[1] != row_bytes(columns, bits)
        or levels_GL.shape != (-(-R // rows), 2**bits)
    ):
        raise ValueError(
            f"indices {tuple(packed_RB.shape)} of {bits} bits and levels {tuple(levels_GL.shape)} of {rows} "
            f"rows each are no weight of {columns} columns"
        )
    return R


def _plain(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)


def _threads(weights: int) -> int:
    return 1 if weights <= SMALL else torch.get_num_threads()
