"""Solving one linear: better than its first step, which is better than nearest, and only with scales that can
be stored.

Under exact scales no round can raise the objective. A coarse `snap` can, since it moves the scales off their
optimum; what is promised then is that the scales returned are ones it gave.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.gptq import descend, gptq
from llmcompress.algorithms.grids import GridFormat, grid
from llmcompress.algorithms.quantize_weight import RoundedWeight, Snap, output_error, solve, weight_error
from llmcompress.algorithms.scales import groups_of, search_scales
from llmcompress.formats import bitsandbytes_layout
from tests.algorithms.test_gptq import lost, nearest, problem

FORMATS: tuple[GridFormat, ...] = ("nf4", "fp4")


def exact(S_RG: Tensor) -> Tensor:
    return S_RG


def coarse(S_RG: Tensor) -> Tensor:
    """The nearest multiple of 1/64 that isn't zero."""
    return torch.where(S_RG < 0, -1, 1) * (S_RG.abs() * 64).round().clamp_min(1) / 64


def doubly(S_RG: Tensor) -> Tensor:
    """What bitsandbytes' double quantisation makes of the scales; not idempotent, for it takes their mean
    anew."""
    return bitsandbytes_layout.double_quantize(S_RG).decode()


def single(seed: int, R: int = 32, C: int = 64, tokens: int = 256) -> tuple[Tensor, Tensor]:
    W_RC, H_CC = problem(seed, R, C, tokens)
    return W_RC.float(), H_CC.float()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_solving_beats_gptq_alone_which_beats_nearest(format: GridFormat, group_size: int, seed: int) -> None:
    W_RC, H_CC = single(seed)
    levels = grid(format)
    searched, absmax = (
        search_scales(W_RC, H_CC.diagonal(), levels, group_size),
        groups_of(W_RC, group_size).abs().amax(-1),
    )
    solved = solve(W_RC, H_CC, levels, group_size, snap=exact)
    objectives = [
        lost(W_RC, solved.index_RC, solved.scale_RG, H_CC, levels),
        lost(W_RC, gptq(W_RC, H_CC, searched, levels), searched, H_CC, levels),
        lost(W_RC, nearest(W_RC, searched, levels), searched, H_CC, levels),
        lost(W_RC, nearest(W_RC, absmax, levels), absmax, H_CC, levels),
    ]
    assert objectives[0] < 0.9 * objectives[1] < 0.9 * objectives[2]
    assert objectives[1] < objectives[3]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    R=st.integers(1, 6),
    G=st.integers(1, 4),
    group_size=st.sampled_from([2, 8, 16]),
    tokens=st.integers(1, 90),
    format=st.sampled_from(FORMATS),
)
def test_a_further_round_never_loses_under_exact_scales(
    seed: int, R: int, G: int, group_size: int, tokens: int, format: GridFormat
) -> None:
    W_RC, H_CC = single(seed, R, G * group_size, tokens)
    levels = grid(format)
    results = [solve(W_RC, H_CC, levels, group_size, snap=exact, rounds=rounds) for rounds in range(5)]
    objectives = [lost(W_RC, result.index_RC, result.scale_RG, H_CC, levels) for result in results]
    slack = 2e-5 * float(((W_RC @ H_CC) * W_RC).sum())  # float32, and the ridge under the fitted scales
    assert all(after <= before + slack for before, after in itertools.pairwise(objectives))


def test_without_rounds_solving_is_a_search_and_gptq() -> None:
    W_RC, H_CC = single(0)
    levels = grid("nf4")
    solved = solve(W_RC, H_CC, levels, 16, snap=exact, rounds=0, damp=0.05)
    assert torch.equal(solved.scale_RG, search_scales(W_RC, H_CC.diagonal(), levels, 16))
    assert torch.equal(solved.index_RC, gptq(W_RC, H_CC, solved.scale_RG, levels, damp=0.05))


@pytest.mark.parametrize("snap", [coarse, doubly])
@pytest.mark.parametrize("format", FORMATS)
def test_the_scales_returned_are_those_snapped_last_and_the_codes_are_made_for_them_snapped(
    format: GridFormat, snap: Snap
) -> None:
    W_RC, H_CC = single(1)
    levels = grid(format)
    asked: list[Tensor] = []

    def noted(S_RG: Tensor) -> Tensor:
        asked.append(S_RG)
        return snap(S_RG)

    solved = solve(W_RC, H_CC, levels, 16, snap=noted)
    assert len(asked) == 4, "once for the search, once a round"
    assert torch.equal(solved.scale_RG, asked[-1])
    stored = snap(solved.scale_RG)
    again = descend(W_RC, H_CC, solved.index_RC, stored, levels)
    ours, better = (lost(W_RC, index, stored, H_CC, levels) for index in (solved.index_RC, again))
    assert better >= 0.9 * ours, "the codes are far from their best under these scales"


@pytest.mark.parametrize("snap", [exact, coarse])
def test_each_row_goes_on_from_its_better_start(snap: Snap) -> None:
    W_RC, H_CC = single(5)
    levels = grid("nf4")

    def rows(result: RoundedWeight) -> Tensor:
        E_RC = W_RC - RoundedWeight(result.index_RC, snap(result.scale_RG)).weight(levels)
        return ((E_RC @ H_CC) * E_RC).sum(1)

    both, positive = (
        rows(solve(W_RC, H_CC, levels, 16, snap=snap, signs=(signed,), rounds=0)) for signed in (True, False)
    )
    assert bool((both < positive).any()) and bool((positive < both).any()), "one start is always better"
    for signs in ((True, False), (False, True)):
        found = rows(solve(W_RC, H_CC, levels, 16, snap=snap, signs=signs, rounds=0))
        torch.testing.assert_close(found, torch.minimum(both, positive), rtol=1e-5, atol=0)


@pytest.mark.parametrize("snap", [exact, coarse, doubly])
@pytest.mark.parametrize("seed", range(3))
def test_codes_make_up_for_storable_scales(snap: Snap, seed: int) -> None:
    W_RC, H_CC = single(seed)
    levels, stored = grid("nf4"), snap(groups_of(W_RC, 16).abs().amax(-1))
    solved = solve(W_RC, H_CC, levels, 16, snap=snap)
    stock = lost(W_RC, nearest(W_RC, stored, levels), stored, H_CC, levels)
    assert lost(W_RC, solved.index_RC, snap(solved.scale_RG), H_CC, levels) < 0.5 * stock


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "case", ["no weights", "no inputs", "dead channels", "a group of zeros", "one token"]
)
def test_degenerate_linears_end_in_finite_weights(format: GridFormat, case: str) -> None:
    W_RC, H_CC = single(3, tokens=1 if case == "one token" else 256)
    if case == "no weights":
        W_RC = torch.zeros_like(W_RC)
    elif case == "no inputs":
        H_CC = torch.zeros_like(H_CC)
    elif case == "dead channels":
        H_CC[:20], H_CC[:, :20] = 0, 0
    elif case == "a group of zeros":
        W_RC[:, 16:32] = 0
    solved = solve(W_RC, H_CC, grid(format), 16, snap=exact)
    Q_RC = solved.weight(grid(format))
    assert bool(torch.isfinite(Q_RC).all()) and bool((solved.scale_RG != 0).all())
    assert output_error(W_RC, Q_RC, H_CC) < 0.2
    if case in ("no weights", "no inputs"):
        assert weight_error(W_RC, Q_RC) < 0.2


def test_a_linear_on_the_grid_comes_back_as_it_was() -> None:
    _, H_CC = single(4)
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(16, (32, 64), generator=generator)
    index[:, ::16] = 15  # the largest magnitude of every layer is its scale, as stock bitsandbytes writes it
    W_RC = RoundedWeight(index, torch.rand(32, 4, generator=generator) + 0.1).weight(grid("nf4"))
    solved = solve(W_RC, H_CC, grid("nf4"), 16, snap=exact)
    assert torch.equal(solved.index_RC, index)
    torch.testing.assert_close(solved.weight(grid("nf4")), W_RC, rtol=1e-4, atol=1e-5)


def test_the_arguments_are_left_as_they_were() -> None:
    W_RC, H_CC = single(5, R=1)
    before = W_RC.clone(), H_CC.clone()
    solve(W_RC, H_CC, grid("nf4"), 16, snap=exact)
    assert torch.equal(W_RC, before[0]) and torch.equal(H_CC, before[1])


def test_a_rounded_weight_is_level_times_scale() -> None:
    rounded = RoundedWeight(
        torch.tensor([[0, 15, 7, 8], [15, 0, 15, 0]]), torch.tensor([[2.0, 10.0], [-1.0, 0.5]])
    )
    weight = rounded.weight(grid("nf4"))
    torch.testing.assert_close(
        weight, torch.tensor([[-2.0, 2.0, 0.0, 0.7958029955625534], [-1.0, 1.0, 0.5, -0.5]])
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_output_error_is_that_of_the_outputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    X_TC, W_RC = torch.randn(100, 24, generator=generator), torch.randn(8, 24, generator=generator)
    Q_RC = W_RC + 0.1 * torch.randn(8, 24, generator=generator)
    wrong, right = X_TC @ Q_RC.T - X_TC @ W_RC.T, X_TC @ W_RC.T
    expected = float(wrong.norm() / right.norm())
    assert output_error(W_RC, Q_RC, X_TC.T @ X_TC / 100) == pytest.approx(expected, rel=1e-4)
    assert weight_error(W_RC, Q_RC) == pytest.approx(float((Q_RC - W_RC).norm() / W_RC.norm()))


def test_errors_are_zero_of_an_exact_copy_and_one_of_a_cut_linear() -> None:
    W_RC, H_CC = single(6)
    assert output_error(W_RC, W_RC, H_CC) == weight_error(W_RC, W_RC) == 0
    assert output_error(W_RC, 0 * W_RC, H_CC) == weight_error(W_RC, 0 * W_RC) == 1


def test_errors_are_zero_where_there_is_no_output_or_no_weight() -> None:
    W_RC, H_CC = single(6)
    assert output_error(W_RC, 2 * W_RC, 0 * H_CC) == 0
    assert weight_error(0 * W_RC, W_RC) == 0
