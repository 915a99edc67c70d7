"""The loops of `algorithms.column_loops` by Triton kernels (column_loops_triton.py), on GPUs.

They take float32 and any grid. A block of columns is one launch, where torch's operations are twenty for each
column. Sums are in another order than those of the plain loops, which moves hardly any code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Grid, grid
from llmcompress.kernels.triton_device import TritonKernels, launch, power

ROWS = 32  # of a block that a program takes, one for each thread of a warp
NUMBERS, WIDEST = 1024, 1024  # weights, and columns of a group, that a program of the search takes at a time
WARPS = 4  # of a program of the search


def _attempt(device: torch.device) -> None:
    levels, W_RC = grid("nf4").to(device), torch.ones(ROWS, 64, device=device)
    S_RG = search(W_RC, W_RC[0], levels, 32, [1.0])
    S_BR = S_RG[:, :1].expand(ROWS, 64).T.contiguous()
    index_BR, _ = round_columns(W_RC.T.contiguous(), torch.eye(64, device=device), S_BR, levels)
    move_columns(W_RC.T.contiguous(), torch.eye(64, device=device), S_BR, S_BR, levels, index_BR)


KERNELS = TritonKernels("column_loops_triton", _attempt, "the solver uses slower torch operations")


def takes(grid: Grid, *tensors: Tensor) -> bool:
    """Whether these kernels take such tensors. They take no grids of another kind, such as codebooks."""
    fits = type(grid) is Grid and all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors)
    return fits and KERNELS.compiles(tensors[0].device)


def search(W_RC: Tensor, h_C: Tensor, grid: Grid, group_size: int, ratios: Sequence[float]) -> Tensor:
    """As `algorithms.column_loops.search`."""
    R, C = W_RC.shape
    of_row, wide = C // group_size, min(WIDEST, power(group_size))
    many, groups = max(1, NUMBERS // wide), R * of_row
    S_RG = torch.empty(R, of_row, device=W_RC.device)
    launch(
        KERNELS.module.search,
        (-(-groups // many),),
        W_RC.contiguous(),
        h_C.contiguous(),
        *_levels(grid),
        torch.tensor(ratios, dtype=torch.float32, device=W_RC.device),
        len(ratios),
        S_RG,
        groups,
        of_row,
        group_size,
        HALVINGS=_halvings(grid),
        GROUPS=many,
        WIDE=wide,
        num_warps=WARPS,
    )
    return S_RG


def round_columns(near_BR: Tensor, U_BB: Tensor, S_BR: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """As `algorithms.column_loops.round_columns`; `near_BR` is left as it is."""
    index_BR = torch.empty(near_BR.shape, dtype=torch.int64, device=near_BR.device)
    return index_BR, _fixed(near_BR, U_BB, None, S_BR, grid, index_BR)


def move_columns(
    near_BR: Tensor, H_BB: Tensor, Q_BR: Tensor, S_BR: Tensor, grid: Grid, index_BR: Tensor
) -> Tensor:
    """As `algorithms.column_loops.move_columns`; `near_BR` is left as it is."""
    return _fixed(near_BR, H_BB, Q_BR, S_BR, grid, index_BR)


def _fixed(
    near_BR: Tensor, square_BB: Tensor, Q_BR: Tensor | None, S_BR: Tensor, grid: Grid, index_BR: Tensor
) -> Tensor:
    """Fix the columns of a block and return the step of each weight [B, R]."""
    B, R = near_BR.shape
    step_BR = torch.empty_like(near_BR)
    square_BB = square_BB if square_BB.stride(1) == 1 else square_BB.contiguous()
    launch(
        KERNELS.module.fix_columns,
        (-(-R // ROWS),),
        near_BR,
        square_BB,
        square_BB.stride(0),
        near_BR if Q_BR is None else Q_BR,
        S_BR,
        *_levels(grid),
        index_BR,
        step_BR,
        B,
        R,
        MOVE=Q_BR is not None,
        HALVINGS=_halvings(grid),
        WIDTH=power(B),
        ROWS=ROWS,
        num_warps=1,
    )
    return step_BR


def _levels(grid: Grid) -> tuple[Tensor, Tensor, int]:
    """Levels and midpoints of a grid, and the number of midpoints."""
    return grid.levels, grid.middles, len(grid.middles)


def _halvings(grid: Grid) -> int:
    """Steps of a binary search over the levels."""
    return len(grid.middles).bit_length()
