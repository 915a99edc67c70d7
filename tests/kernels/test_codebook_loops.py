"""The C loops of codebooks against the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms import codebook, column_loops
from llmcompress.algorithms import codebook_loops as plain
from llmcompress.algorithms.codebook import Codebooks, kmeans, losses, nearest, solve_codebook
from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.kernels import codebook_loops, compiled
from llmcompress.kernels import column_loops as columns
from tests.kernels.solver_problems import drawn, moments, same_rows

needs_kernel = pytest.mark.skipif(
    not (codebook_loops.KERNEL.available and columns.KERNEL.available),
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)
# weights that make another of an array of normal ones
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "heavy": lambda w: w / w.flip(1).square().add(0.02).sqrt(),
    "bfloat16": lambda w: w.bfloat16().float(),
    "constant": lambda w: torch.full_like(w, -0.25),
    "zero": lambda w: w.sign() * 0.0,
    "few": lambda w: w.mul(2).round().div(2),
    "all but one equal": lambda w: torch.where(w == w.amax(1, keepdim=True), w, 0.5),
    "far from zero": lambda w: w * 1e-3 + 100,
    "tiny": lambda w: w * 1e-30,
    "large": lambda w: w * 1e30,
}


def clustering_loss(W_GN: Tensor, h_C: Tensor, levels_GL: Tensor) -> Tensor:
    """What each group loses to its nearest levels, [G]."""
    E_GN = W_GN.double() - levels_GL.double().gather(1, nearest(W_GN, levels_GL, 1))
    return (E_GN.square() * h_C.repeat(W_GN.shape[1] // len(h_C))).sum(1)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    groups=st.integers(1, 12),
    rows=st.integers(1, 3),
    columns=st.integers(1, 300),
    entries=st.sampled_from([4, 8, 16, 256]),
)
def test_levels_are_the_same(
    kind: str, seed: int, groups: int, rows: int, columns: int, entries: int
) -> None:
    W_GN = KINDS[kind](drawn(groups, rows * columns, seed=seed))
    h_C = drawn(columns, seed=seed + 1).double().exp()
    ours = codebook_loops.cluster(W_GN, h_C, entries, 100)
    theirs = plain.cluster(W_GN, h_C, entries, 100)
    assert ours.dtype == torch.float32 and bool((ours.diff(dim=1) >= 0).all())
    differing = (ours != theirs).any(1)  # where a border is moved by the last bit of a sum
    assert int(differing.sum()) <= 1
    lost = [clustering_loss(W_GN, h_C, levels)[differing] for levels in (ours, theirs)]
    torch.testing.assert_close(lost[0], lost[1], rtol=1e-3, atol=1e-9 * float(W_GN.double().square().mean()))


@needs_kernel
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_levels_of_real_sizes_are_the_same_bit_for_bit(entries: int) -> None:
    W_GN, h_C = drawn(300, 576), drawn(576, seed=1).double().exp()
    assert torch.equal(
        codebook_loops.cluster(W_GN, h_C, entries, 100), plain.cluster(W_GN, h_C, entries, 100)
    )


@needs_kernel
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_stops_after_as_many_steps(steps: int) -> None:
    W_GN, h_C = drawn(20, 400, seed=3), drawn(400, seed=4).double().exp()
    found = codebook_loops.cluster(W_GN, h_C, 16, steps)
    assert torch.equal(found, plain.cluster(W_GN, h_C, 16, steps))
    assert not torch.equal(found, plain.cluster(W_GN, h_C, 16, 100))


@needs_kernel
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    R=st.integers(1, 140),
    C=st.integers(1, 200),
    rows=st.integers(1, 5),
    entries=st.sampled_from([4, 8, 16]),
    dead=st.integers(0, 3),
)
def test_products_with_normal_matrices_are_the_same(
    seed: int, R: int, C: int, rows: int, entries: int, dead: int
) -> None:
    H_CC, rows = moments(C, seed, min(dead, C - 1)), min(rows, R)
    index = torch.randint(entries, (R, C), generator=torch.Generator().manual_seed(seed))
    levels = drawn(-(-R // rows), entries, seed=seed)
    ours = codebook_loops.normal_product(H_CC, index, rows, entries)(levels)
    theirs = plain.normal_product(H_CC.double(), index, rows, entries)(levels.double())
    size = float(plain.normal_product(H_CC.abs(), index, rows, entries)(levels.abs()).max())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * size)


def grid_of(R: int, rows: int, entries: int, seed: int) -> Codebooks:
    levels = drawn(-(-R // rows), entries, seed=seed).sort(dim=1).values
    return Codebooks.of(levels, rows)


@needs_kernel
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    B=st.integers(1, 64),
    R=st.integers(1, 150),
    rows=st.sampled_from([1, 3, 64, 150]),
    entries=st.sampled_from([4, 8, 16, 256]),
    dead=st.integers(0, 3),
)
def test_a_block_of_columns_is_the_same(
    seed: int, B: int, R: int, rows: int, entries: int, dead: int
) -> None:
    grid, H_CC = grid_of(R, min(rows, R), entries, seed), moments(B, seed, min(dead, B - 1))
    near_BR, S_BR = drawn(B, R, seed=seed + 1), drawn(B, R, seed=seed + 2).abs() + 0.5
    U_CC = inverse_factor(H_CC, 0.01)
    index, E_BR = columns.round_columns(near_BR.clone(), U_CC, S_BR, grid)
    expected, expected_E = column_loops.round_columns(near_BR.clone(), U_CC, S_BR, grid)
    assert index.dtype == torch.int64
    same = same_rows((index, E_BR), (expected, expected_E))
    assert float(same.float().mean()) > 0.98 or int((~same).sum()) <= 1

    Q_BR = grid.levels[expected] * S_BR
    moved, known = expected.clone(), expected.clone()
    D_BR = columns.move_columns(near_BR.clone(), H_CC, Q_BR, S_BR, grid, moved)
    expected_D = column_loops.move_columns(near_BR.clone(), H_CC, Q_BR, S_BR, grid, known)
    same = same_rows((moved, D_BR), (known, expected_D))
    assert float(same.float().mean()) > 0.98 or int((~same).sum()) <= 1


def rounded(levels_GL: Tensor) -> Tensor:
    return levels_GL.half().float()


@needs_kernel
@pytest.mark.parametrize("kind", ["heavy", "bfloat16", "few"])
@pytest.mark.parametrize(("entries", "rows"), [(4, 1), (8, 1), (16, 1), (16, 7), (16, 60), (256, 1)])
def test_a_linear_is_solved_for_as_well(kind: str, entries: int, rows: int) -> None:
    W_RC, H_CC, before = KINDS[kind](drawn(60, 200)), moments(200, dead=5), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ours = solve_codebook(W_RC, H_CC, entries, rows, snap=rounded, loops=codebook_loops.LOOPS)
    finally:
        torch.set_num_threads(before)
    theirs = solve_codebook(W_RC, H_CC, entries, rows, snap=rounded)
    lost = [float(losses(W_RC, found, H_CC).sum()) for found in (ours, theirs)]
    assert lost[0] == pytest.approx(lost[1], rel=2e-3, abs=1e-12)
    assert float((ours.weight() == theirs.weight()).float().mean()) > 0.99


@needs_kernel
@pytest.mark.parametrize("columns", [1, 3, 17, 60, 127, 128, 129])
def test_short_rows_and_inputs_that_never_fire(columns: int) -> None:
    W_RC = drawn(9, columns)
    for H_CC in (moments(columns, dead=columns // 2), torch.zeros(columns, columns)):
        for entries in (4, 16, 256):
            ours = solve_codebook(W_RC, H_CC, entries, 1, loops=codebook_loops.LOOPS)
            theirs = solve_codebook(W_RC, H_CC, entries, 1)
            assert bool(torch.isfinite(ours.levels_GL).all())
            assert float(losses(W_RC, ours, H_CC).sum()) == pytest.approx(
                float(losses(W_RC, theirs, H_CC).sum()), rel=2e-3, abs=1e-10
            )
            levels = kmeans(W_RC, H_CC.diagonal(), entries, 1, loops=codebook_loops.LOOPS)
            torch.testing.assert_close(levels, kmeans(W_RC, H_CC.diagonal(), entries, 1))


@needs_kernel
def test_the_form_for_other_processors_computes_the_same(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    W_RC, H_CC = drawn(70, 200), moments(200)
    wide = solve_codebook(W_RC, H_CC, 16, 1, loops=codebook_loops.LOOPS)
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", tuple(flag for flag in compiled.FLAGS if flag != "-march=native"))
    for kernel in (columns.KERNEL, codebook_loops.KERNEL):
        kernel.forget()
    narrow = solve_codebook(W_RC, H_CC, 16, 1, loops=codebook_loops.LOOPS)
    assert len([*tmp_path.rglob("codebook-*.so")]) == 1, "it was compiled anew"
    assert float((wide.index_RC == narrow.index_RC).float().mean()) > 0.99


def test_what_the_kernels_do_not_take_goes_the_plain_way(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    W_GN, h_C, H_CC = drawn(4, 64), drawn(64).double().exp(), moments(64)
    index = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    levels, doubles = drawn(4, 256), W_GN.double()
    assert torch.equal(codebook_loops.cluster(doubles, h_C, 8, 9), plain.cluster(doubles, h_C, 8, 9))
    found = codebook_loops.normal_product(H_CC, index, 1, 256)(levels)
    assert torch.equal(found, plain.normal_product(H_CC, index, 1, 256)(levels))
    odd = Codebooks.of(drawn(4, 5).sort(dim=1).values, 1)
    args = W_GN.T.contiguous(), inverse_factor(H_CC, 0.01), torch.ones(64, 4), odd
    ours, theirs = (loops.round_columns(args[0].clone(), *args[1:]) for loops in (columns, column_loops))
    assert all(map(torch.equal, ours, theirs))

    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("LLMCOMPRESS_CACHE", "/dev/null/no-folder")
    codebook_loops.KERNEL.forget()
    for _ in range(2):
        found = codebook_loops.cluster(W_GN, h_C, 8, 9)
        assert torch.equal(found, plain.cluster(W_GN, h_C, 8, 9))
    (record,) = caplog.records
    assert "slower than the C kernel" in record.getMessage()


@needs_kernel
def test_the_arguments_are_left_as_they_were() -> None:
    W_RC, H_CC = drawn(9, 150), moments(150)
    index = nearest(W_RC, kmeans(W_RC, H_CC.diagonal(), 16, 2), 2)
    given = (W_RC, H_CC, index)
    before = [tensor.clone() for tensor in given]
    solve_codebook(W_RC, H_CC, 16, 2, loops=codebook_loops.LOOPS)
    levels = kmeans(W_RC, H_CC.diagonal(), 16, 2, loops=codebook_loops.LOOPS)
    codebook.descend(W_RC, H_CC, index, levels, 2, loops=codebook_loops.LOOPS)
    assert all(map(torch.equal, given, before))
