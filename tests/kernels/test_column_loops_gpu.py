"""The Triton kernels of the solver against the plain loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llmcompress.algorithms import column_loops as plain
from llmcompress.algorithms.column_loops import ColumnLoops
from llmcompress.algorithms.grids import GridFormat, grid
from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.algorithms.quantize_weight import output_error, solve
from llmcompress.kernels import column_loops
from llmcompress.kernels import column_loops_gpu as gpu
from tests.kernels import solver_problems
from tests.kernels.on_gpu import DEVICE, marks
from tests.kernels.solver_problems import same_rows

pytestmark = marks(gpu.KERNELS)
by_format = pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
drawn, moments = (partial(make, device=DEVICE) for make in (solver_problems.drawn, solver_problems.moments))
LOOPS = ColumnLoops(gpu.search, gpu.round_columns, gpu.move_columns, plain.move_together)


@by_format
@pytest.mark.parametrize(("rows", "groups", "size"), [(5, 3, 64), (17, 1, 33), (2, 2, 1500), (1, 1, 1)])
def test_scales_lose_as_little(format: GridFormat, rows: int, groups: int, size: int) -> None:
    levels, W_RC, h_C = grid(format).to(DEVICE), drawn(rows, groups * size), drawn(groups * size).square()
    W_RC[0] = 0
    ratios = [1.0, 0.7, -0.7, 0.9, -0.9, 1.1]
    ours = gpu.search(W_RC, h_C, levels, size, ratios)
    theirs = plain.search(W_RC, h_C, levels, size, ratios)
    assert ours.shape == (rows, groups)
    differing = ours != theirs  # where two scales lose the same but for the order of a sum
    assert int(differing.sum()) <= 1
    lost = []
    for S_RG in (ours, theirs):
        S_RC = S_RG.repeat_interleave(size, 1)
        E_RC = W_RC - levels.levels[levels.nearest(W_RC / S_RC)] * S_RC
        lost.append((E_RC.square() * h_C).reshape(rows, groups, size).sum(-1))
    torch.testing.assert_close(lost[0], lost[1], rtol=1e-5, atol=0)


@by_format
@pytest.mark.parametrize(("columns", "rows", "dead"), [(64, 70, 0), (33, 32, 2), (1, 5, 0), (5, 1, 1)])
def test_a_block_of_columns_is_the_same(format: GridFormat, columns: int, rows: int, dead: int) -> None:
    levels, H_CC = grid(format).to(DEVICE), moments(columns + 3, dead=dead)
    near_BR, S_BR = drawn(columns, rows), drawn(columns, rows, seed=2).abs() + 0.5
    S_BR[:, ::3] *= -1
    U_BB, H_BB = inverse_factor(H_CC, 0.01)[3:, 3:], H_CC[3:, 3:]  # parts of larger matrices
    index, E_BR = gpu.round_columns(near_BR.clone(), U_BB, S_BR, levels)
    expected, expected_E = plain.round_columns(near_BR.clone(), U_BB, S_BR, levels)
    assert index.dtype == torch.int64
    assert int((~same_rows((index, E_BR), (expected, expected_E))).sum()) <= 2

    Q_BR = levels.levels[expected] * S_BR
    moved, known = expected.clone(), expected.clone()
    D_BR = gpu.move_columns(near_BR.clone(), H_BB, Q_BR, S_BR, levels, moved)
    expected_D = plain.move_columns(near_BR.clone(), H_BB, Q_BR, S_BR, levels, known)
    assert int((~same_rows((moved, D_BR), (known, expected_D))).sum()) <= 2
    if dead:
        assert torch.equal(moved[-dead:], expected[-dead:]) and not D_BR[-dead:].any()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_linear_is_solved_for_as_well(format: GridFormat) -> None:
    levels, W_RC, H_CC = grid(format).to(DEVICE), drawn(70, 192), moments(192, dead=5)
    ours = solve(W_RC, H_CC, levels, 64, loops=LOOPS)
    theirs = solve(W_RC, H_CC, levels, 64)
    errors = [output_error(W_RC, found.weight(levels), H_CC) for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)
    assert float((ours.index_RC == theirs.index_RC).float().mean()) > 0.99


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_solver_takes_them_on_a_gpu() -> None:
    levels, W_RC, H_CC = grid("nf4").to(DEVICE), drawn(70, 192), moments(192)
    assert gpu.takes(levels, W_RC, H_CC)
    found = solve(W_RC, H_CC, levels, 64, loops=column_loops.LOOPS)
    assert torch.equal(found.index_RC, solve(W_RC, H_CC, levels, 64, loops=LOOPS).index_RC)
