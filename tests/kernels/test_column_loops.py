"""The C loops of the solver against the plain ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms import column_loops as plain
from llmcompress.algorithms.codebook import Codebooks
from llmcompress.algorithms.grids import Grid, GridFormat, grid
from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.algorithms.quantize_weight import output_error, solve
from llmcompress.kernels import column_loops, compiled
from tests.kernels.solver_problems import drawn, moments, same_rows

FORMATS: tuple[GridFormat, ...] = ("nf4", "fp4", "int4", "int8", "q4_0", "iq4_nl")
needs_kernel = pytest.mark.skipif(
    not column_loops.KERNEL.available,
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)


@needs_kernel
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 70),
    format=st.sampled_from(FORMATS),
)
def test_scales_are_the_same(seed: int, rows: int, groups: int, group_size: int, format: GridFormat) -> None:
    W_RC, h_C = drawn(rows, groups * group_size, seed=seed), drawn(groups * group_size, seed=1).square()
    W_RC[0] = 0
    ratios = [1.0, 0.7, -0.7, 0.9, -0.9, 1.1]
    ours = column_loops.search(W_RC, h_C, grid(format), group_size, ratios)
    theirs = plain.search(W_RC, h_C, grid(format), group_size, ratios)
    differing = ours != theirs  # where two scales lose the same but for the order of a sum
    lost = [_lost(W_RC, h_C, S_RG, grid(format), group_size) for S_RG in (ours, theirs)]
    torch.testing.assert_close(lost[0][differing], lost[1][differing], rtol=1e-5, atol=0)
    assert float(differing.float().mean()) < 0.02 or differing.sum() <= 1


def _lost(W_RC: Tensor, h_C: Tensor, S_RG: Tensor, levels: Grid, group_size: int) -> Tensor:
    S_RC = S_RG.repeat_interleave(group_size, 1)
    E_RC = W_RC - levels.levels[levels.nearest(W_RC / S_RC)] * S_RC
    return (E_RC.square() * h_C).reshape(len(W_RC), -1, group_size).sum(-1)


@needs_kernel
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    columns=st.integers(1, 64),
    rows=st.integers(1, 150),
    dead=st.integers(0, 3),
    format=st.sampled_from(FORMATS),
)
def test_a_block_of_columns_is_the_same(
    seed: int, columns: int, rows: int, dead: int, format: GridFormat
) -> None:
    levels, H_CC = grid(format), moments(columns, seed, min(dead, columns - 1))
    near_BR, S_BR = drawn(columns, rows, seed=seed), drawn(columns, rows, seed=seed + 2).abs() + 0.5
    S_BR[:, ::3] *= -1
    U_CC = inverse_factor(H_CC, 0.01)
    ours, theirs = near_BR.clone(), near_BR.clone()
    index, E_BR = column_loops.round_columns(ours, U_CC, S_BR, levels)
    expected, expected_E = plain.round_columns(theirs, U_CC, S_BR, levels)
    assert index.dtype == torch.int64
    same = same_rows((index, E_BR), (expected, expected_E))
    assert float(same.float().mean()) > 0.98 or int((~same).sum()) <= 1

    Q_BR = levels.levels[expected] * S_BR
    moved, known = expected.clone(), expected.clone()
    D_BR = column_loops.move_columns(near_BR.clone(), H_CC, Q_BR, S_BR, levels, moved)
    expected_D = plain.move_columns(near_BR.clone(), H_CC, Q_BR, S_BR, levels, known)
    same = same_rows((moved, D_BR), (known, expected_D))
    assert float(same.float().mean()) > 0.98 or int((~same).sum()) <= 1


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_is_solved_for_as_well(format: GridFormat, threads: int) -> None:
    W_RC, H_CC, before = drawn(300, 256), moments(256, dead=5), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = solve(W_RC, H_CC, grid(format), 64, loops=column_loops.LOOPS)
    finally:
        torch.set_num_threads(before)
    theirs = solve(W_RC, H_CC, grid(format), 64)
    errors = [output_error(W_RC, found.weight(grid(format)), H_CC) for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert float((ours.index_RC == theirs.index_RC).float().mean()) > 0.99


@needs_kernel
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 17), (64, 40)])
def test_rows_that_count_together_move_as_the_plain_loop_moves_them(
    rows: int, columns: int, format: GridFormat
) -> None:
    levels, H_CC, F_RR = (
        grid(format),
        moments(columns, 3, dead=columns // 8),
        moments(rows, 5, dead=rows // 8),
    )
    near_BR, S_BR = drawn(columns, rows, seed=1), drawn(columns, rows, seed=2).abs() + 0.5
    S_BR[:, ::3] *= -1
    index = levels.nearest(drawn(columns, rows, seed=4))
    Q_BR = levels.levels[index] * S_BR
    ours, theirs = index.clone(), index.clone()
    D_BR = column_loops.move_together(near_BR.clone(), H_CC, F_RR, Q_BR, S_BR, levels, ours)
    expected_BR = plain.move_together(near_BR.clone(), H_CC, F_RR, Q_BR, S_BR, levels, theirs)
    assert torch.equal(ours, theirs)
    assert rows == 1 or not torch.equal(ours, index)
    torch.testing.assert_close(D_BR, expected_BR, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours[:, rows - rows // 8 :], index[:, rows - rows // 8 :]), "a dead row was moved"


@needs_kernel
@pytest.mark.parametrize("entries", [4, 16, 256])
@pytest.mark.parametrize(("shared", "first"), [(1, 0), (3, 4), (100, 0)])
def test_rows_of_codebooks_move_as_the_plain_loop_moves_them(entries: int, shared: int, first: int) -> None:
    B, R = 17, 9
    levels_GL = drawn(-(-(first + R) // shared), entries, seed=6).sort(dim=1).values
    levels = Codebooks.of(levels_GL, shared).from_row(first)
    H_CC, F_RR = moments(B, 3, dead=2), moments(R, 5, dead=1)
    near_BR, ones_BR = drawn(B, R, seed=1), torch.ones(B, R)
    index = levels.nearest(drawn(R, B, seed=4)).T.contiguous()
    Q_BR, ours, theirs = levels.levels[index], index.clone(), index.clone()
    D_BR = column_loops.move_together(near_BR.clone(), H_CC, F_RR, Q_BR, ones_BR, levels, ours)
    expected_BR = plain.move_together(near_BR.clone(), H_CC, F_RR, Q_BR, ones_BR, levels, theirs)
    assert torch.equal(ours, theirs) and not torch.equal(ours, index)
    assert torch.equal(ours // entries, index // entries), "a level of another codebook"
    torch.testing.assert_close(D_BR, expected_BR, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_the_form_for_other_processors_computes_the_same(
    fresh: None, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    W_RC, H_CC = drawn(70, 96), moments(96)
    wide = [solve(W_RC, H_CC, grid(format), 32, loops=column_loops.LOOPS) for format in FORMATS]
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    others = tuple(flag for flag in compiled.FLAGS if flag != "-march=native")
    monkeypatch.setattr(compiled, "FLAGS", others)
    column_loops.KERNEL.forget()
    for format, before in zip(FORMATS, wide, strict=True):
        narrow = solve(W_RC, H_CC, grid(format), 32, loops=column_loops.LOOPS)
        assert float((before.index_RC == narrow.index_RC).float().mean()) > 0.99


def test_what_the_kernel_does_not_take_goes_the_plain_way(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    W_RC, h_C = drawn(4, 64), drawn(64).square()
    cubes = torch.linspace(-1, 1, 17) ** 3
    uneven = Grid(cubes, (cubes[1:] + cubes[:-1]) / 2, torch.arange(17))
    for levels, weight in ((uneven, W_RC), (grid("nf4"), W_RC.double())):
        found = column_loops.search(weight, h_C.to(weight), levels, 32, [1.0, 0.9])
        assert torch.equal(found, plain.search(weight, h_C.to(weight), levels, 32, [1.0, 0.9]))
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("LLMCOMPRESS_CACHE", "/dev/null/no-folder")
    column_loops.KERNEL.forget()
    for _ in range(2):
        found = column_loops.search(W_RC, h_C, grid("nf4"), 32, [1.0, 0.9])
        assert torch.equal(found, plain.search(W_RC, h_C, grid("nf4"), 32, [1.0, 0.9]))
    (record,) = caplog.records
    assert "slower than the C kernel" in record.getMessage()
