"""The loops of `algorithms.column_loops` by a small C kernel (csrc/solver.c) on CPUs, by Triton on GPUs.

The C kernel takes float32, grids that are even or have at most 16 levels, and codebooks in the column loops;
`column_loops_gpu` takes float32 and any one grid. Anything else, and a machine without a compiler, takes the
plain loops. Scales of 4 bits are the same to the bit on a CPU. Sums of the column loops may differ in the
last bit, which moves hardly any code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.algorithms import column_loops as plain
from llmcompress.algorithms.codebook import Codebooks
from llmcompress.algorithms.column_loops import ColumnLoops
from llmcompress.algorithms.grids import Grid
from llmcompress.kernels import column_loops_gpu as gpu
from llmcompress.kernels.compiled import CompiledKernel

LEVELS = 16  # that fit a register
ROWS = 64  # that `move_together` takes


def _declare(kernel: ctypes.CDLL) -> None:
    pointer, long, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernel.solver_search.argtypes = (*4 * (pointer,), small, pointer, small, *3 * (long,), pointer, small)
    kernel.solver_round.argtypes = (*2 * (pointer,), long, *3 * (pointer,), small, *3 * (long,))
    kernel.solver_round.argtypes += (*2 * (pointer,), small)
    kernel.solver_move.argtypes = (*2 * (pointer,), long, *4 * (pointer,), small, *3 * (long,))
    kernel.solver_move.argtypes += (*2 * (pointer,), small)
    kernel.solver_move_together.argtypes = (*2 * (pointer,), long, *5 * (pointer,), small, *4 * (long,))
    kernel.solver_move_together.argtypes += (*2 * (pointer,),)


KERNEL = CompiledKernel("solver", ("solver.c",), _declare, "torch solves for codes")


def search(W_RC: Tensor, h_C: Tensor, grid: Grid, group_size: int, ratios: Sequence[float]) -> Tensor:
    """As `algorithms.column_loops.search`."""
    if gpu.takes(grid, W_RC, h_C):
        return gpu.search(W_RC, h_C, grid, group_size, ratios)
    if not _takes(grid, W_RC, h_C):
        return plain.search(W_RC, h_C, grid, group_size, ratios)
    (R, C), tried = W_RC.shape, torch.tensor(ratios, dtype=torch.float32)
    W, h, S_RG = W_RC.contiguous(), h_C.contiguous(), torch.empty(R, C // group_size)
    KERNEL.required.solver_search(
        *_at(W, h, grid.levels, grid.middles),
        len(grid.levels),
        *_at(tried),
        len(tried),
        R,
        C,
        group_size,
        *_at(S_RG),
        torch.get_num_threads(),
    )
    return S_RG


def round_columns(near_BR: Tensor, U_BB: Tensor, S_BR: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """As `algorithms.column_loops.round_columns`."""
    contiguous = near_BR.is_contiguous() and S_BR.is_contiguous()
    if contiguous and gpu.takes(grid, near_BR, U_BB, S_BR):
        return gpu.round_columns(near_BR, U_BB, S_BR, grid)
    if not (contiguous and _takes(grid, near_BR, U_BB, S_BR)):
        return plain.round_columns(near_BR, U_BB, S_BR, grid)
    (B, R), U = near_BR.shape, U_BB.contiguous()
    index_BR, E_BR = torch.empty(B, R, dtype=torch.int64), torch.empty(B, R)
    KERNEL.required.solver_round(
        *_at(near_BR, U), B, *_at(S_BR), *_levels(grid), B, R, *_at(index_BR, E_BR), torch.get_num_threads()
    )
    return index_BR, E_BR


def move_columns(
    near_BR: Tensor, H_BB: Tensor, Q_BR: Tensor, S_BR: Tensor, grid: Grid, index_BR: Tensor
) -> Tensor:
    """As `algorithms.column_loops.move_columns`."""
    contiguous = all(tensor.is_contiguous() for tensor in (near_BR, Q_BR, S_BR, index_BR))
    if contiguous and gpu.takes(grid, near_BR, H_BB, Q_BR, S_BR):
        return gpu.move_columns(near_BR, H_BB, Q_BR, S_BR, grid, index_BR)
    if not (contiguous and _takes(grid, near_BR, H_BB, Q_BR, S_BR)):
        return plain.move_columns(near_BR, H_BB, Q_BR, S_BR, grid, index_BR)
    (B, R), H = near_BR.shape, H_BB.contiguous()
    D_BR = torch.empty(B, R)
    KERNEL.required.solver_move(
        *_at(near_BR, H),
        B,
        *_at(Q_BR, S_BR),
        *_levels(grid),
        B,
        R,
        *_at(index_BR, D_BR),
        torch.get_num_threads(),
    )
    return D_BR


def move_together(
    near_BR: Tensor, H_BB: Tensor, F_RR: Tensor, Q_BR: Tensor, S_BR: Tensor, grid: Grid, index_BR: Tensor
) -> Tensor:
    """As `algorithms.column_loops.move_together`; for tensors of a GPU it runs on the CPU, as weight follows
    weight."""
    if not near_BR.is_cpu:
        near, H, F, Q, S, index = (part.cpu() for part in (near_BR, H_BB, F_RR, Q_BR, S_BR, index_BR))
        D_BR = move_together(near, H, F, Q, S, grid.to("cpu"), index)
        index_BR.copy_(index)
        return D_BR.to(near_BR.device)
    contiguous = all(tensor.is_contiguous() for tensor in (near_BR, F_RR, Q_BR, S_BR, index_BR))
    fits = contiguous and near_BR.shape[1] <= ROWS
    if not (fits and _takes(grid, near_BR, H_BB, F_RR, Q_BR, S_BR)):
        return plain.move_together(near_BR, H_BB, F_RR, Q_BR, S_BR, grid, index_BR)
    (B, R), H = near_BR.shape, H_BB.contiguous()
    D_BR = torch.empty(B, R)
    KERNEL.required.solver_move_together(
        *_at(near_BR, H),
        B,
        *_at(F_RR, Q_BR, S_BR),
        *_levels(grid),
        grid.first if isinstance(grid, Codebooks) else 0,
        B,
        R,
        *_at(index_BR, D_BR),
    )
    return D_BR


LOOPS = ColumnLoops(search, round_columns, move_columns, move_together)


def _takes(grid: Grid, *tensors: Tensor) -> bool:
    """Whether the kernel takes such tensors."""
    if isinstance(grid, Codebooks):
        entries = grid.entries
        fits = entries & (entries - 1) == 0 and len(grid.levels) < 2**31
    else:
        fits = len(grid.levels) <= LEVELS or grid.largest > 0
    return fits and all(t.is_cpu and t.dtype == torch.float32 for t in tensors) and KERNEL.available


def _levels(grid: Grid) -> tuple[int, int, int, int]:
    """Where levels and midpoints of a grid are, the number of levels, and how many rows share a codebook, 0
    if all rows have one grid."""
    count, rows = len(grid.levels), 0
    if isinstance(grid, Codebooks):
        count, rows = grid.entries, grid.rows
    return grid.levels.data_ptr(), grid.middles.data_ptr(), count, rows


def _at(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
