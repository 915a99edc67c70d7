"""The refit against torch's least squares, with and without drifted inputs and an intercept, and what it
promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import Moments, damped, retarget
from llmcompress.algorithms.least_squares import bias_shift, repair
from tests.algorithms.test_gptq import problem
from tests.algorithms.test_hessian import HARD, drifted, inputs, moments

C = 12
KEPT = torch.tensor([7, 0, 3, 11, 4, 8, 2])  # in any order
TINY = 1e-12  # damping that does not show in float64


def lost(W_RC: Tensor, W_RP: Tensor, H_CC: Tensor, kept: Tensor) -> float:
    """tr(E H E^T)."""
    E_RC = W_RC.clone()
    E_RC[:, kept] -= W_RP
    return float(((E_RC @ H_CC) * E_RC).sum())


def fit(x: Tensor, y: Tensor) -> Tensor:
    """The weight that makes y of x, by torch's least squares."""
    solution: Tensor = torch.linalg.lstsq(x, y).solution.T
    return solution


@pytest.mark.parametrize("seed", range(4))
def test_the_repaired_weight_is_the_least_squares_one(seed: int) -> None:
    x, W_RC = inputs(400, C, seed).double(), inputs(5, C, 9).double()
    torch.testing.assert_close(
        repair(W_RC, moments(x), KEPT, TINY), fit(x[:, KEPT], x @ W_RC.T), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("damp", [1e-4, 0.01, 1])
def test_damping_is_a_penalty_on_moving_away_from_the_weight(damp: float) -> None:
    x, W_RC = inputs(400, C).double(), inputs(5, C, 9).double()
    H_CC = moments(x)
    pull = (damp * H_CC.diagonal().mean() * len(x)).sqrt() * torch.eye(C, dtype=torch.float64)
    rows = torch.cat([x, pull])  # each weight a sample of its own
    torch.testing.assert_close(repair(W_RC, H_CC, KEPT, damp), fit(rows[:, KEPT], rows @ W_RC.T))


def seen(x: Tensor, full: Tensor) -> Moments:
    """Moments in float64, so that identities show."""
    found = Moments(x.shape[1])
    found._H_CC, found.gap_FC = moments(x), (full - x).T @ x / len(x)
    return found


def test_with_drifted_inputs_retarget_and_repair_are_the_least_squares_weight_on_those_kept() -> None:
    x, full = (t.double() for t in drifted(400, C))
    W_RC, both = inputs(5, C, 9).double(), seen(x, full)
    found = repair(retarget(W_RC, both, TINY), both.H_CC, KEPT, TINY)
    torch.testing.assert_close(found, fit(x[:, KEPT], full @ W_RC.T), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("damp", [1e-4, 0.01, 1])
def test_with_drifted_inputs_the_damping_is_that_of_one_fit_and_not_of_two(damp: float) -> None:
    x, full = (t.double() for t in drifted(400, C))
    W_RC, both = inputs(5, C, 9).double(), seen(x, full)
    assert both.X_FC is not None
    H = damped(both.H_CC, damp)[KEPT][:, KEPT]
    miss = W_RC @ both.X_FC[:, KEPT] - W_RC[:, KEPT] @ both.H_CC[KEPT][:, KEPT]
    expected = W_RC[:, KEPT] + torch.linalg.solve(H, miss.T).T
    torch.testing.assert_close(repair(retarget(W_RC, both, damp), both.H_CC, KEPT, damp), expected)


def test_keeping_all_changes_nothing_and_in_another_order_only_the_order() -> None:
    W_RC, H_CC = problem(0, R=5, C=C)
    assert torch.equal(repair(W_RC, H_CC, torch.arange(C)), W_RC)
    assert torch.equal(repair(W_RC, H_CC, torch.arange(C).flip(0)), W_RC.flip(1))


def test_the_order_of_the_kept_columns_is_that_of_the_result() -> None:
    W_RC, H_CC = problem(0, R=5, C=C)
    ordered = KEPT.sort()
    torch.testing.assert_close(
        repair(W_RC, H_CC, KEPT)[:, ordered.indices], repair(W_RC, H_CC, ordered.values)
    )


def test_keeping_none_leaves_no_columns() -> None:
    W_RC, H_CC = problem(0, R=5, C=C)
    assert repair(W_RC, H_CC, torch.tensor([], dtype=torch.int64)).shape == (5, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), order=st.permutations(range(C)), damp=st.sampled_from([1e-6, 0.01, 1.0]))
def test_more_kept_is_never_worse(seed: int, order: list[int], damp: float) -> None:
    W_RC, H_CC = problem(seed, R=5, C=C)
    kept = [torch.tensor(order[:count], dtype=torch.int64) for count in range(C + 1)]
    losses = [lost(W_RC, repair(W_RC, H_CC, some, damp), damped(H_CC, damp), some) for some in kept]
    assert all(more <= less * (1 + 1e-9) + 1e-15 for less, more in itertools.pairwise(losses))
    assert losses[-1] == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), count=st.integers(1, C - 1), damp=st.sampled_from([1e-6, 0.01, 1.0]))
def test_no_weight_nearby_loses_less(seed: int, count: int, damp: float) -> None:
    W_RC, H_CC = problem(seed, R=5, C=C)
    kept, H = torch.arange(count), damped(H_CC, damp)
    found = repair(W_RC, H_CC, kept, damp)
    nearby = found + 1e-3 * torch.randn(
        found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert lost(W_RC, found, H, kept) < lost(W_RC, nearby, H, kept)
    assert lost(W_RC, found, H, kept) < lost(W_RC, W_RC[:, kept], H, kept), "worse than the plain cut"


def test_columns_of_zeros_are_not_missed() -> None:
    W_RC, H_CC = problem(0, R=5, C=C)
    W_RC[:, 5:] = 0
    assert torch.equal(repair(W_RC, H_CC, torch.arange(5)), W_RC[:, :5])


def test_what_the_kept_columns_say_too_is_not_lost() -> None:
    x, W_RC = inputs(400, C).double(), inputs(5, C, 9).double()
    x[:, 5] = 0.5 * x[:, 0] - 2 * x[:, 11]
    kept = torch.tensor([c for c in range(C) if c != 5])
    torch.testing.assert_close(
        x[:, kept] @ repair(W_RC, moments(x), kept, 1e-10).T, x @ W_RC.T, rtol=1e-5, atol=1e-6
    )


def test_weights_of_inputs_that_never_fire_stay_as_they_are() -> None:
    W_RC, kept = inputs(5, 24, 9), torch.arange(12)
    found = repair(W_RC, HARD["dead channels"], kept)
    assert torch.equal(found[:, 3], W_RC[:, 3]) and not torch.equal(found[:, 4], W_RC[:, 4])


@pytest.mark.parametrize("case", HARD)
def test_hard_moments_give_finite_weights(case: str) -> None:
    columns = len(HARD[case])
    assert bool(torch.isfinite(repair(inputs(5, columns, 9), HARD[case], torch.arange(0, columns, 2))).all())


def offset(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [T, C] with means far from zero, the same as the full model has them, and weights, float64."""
    x, full = (t.double() for t in drifted(400, C))
    mean = 3 * inputs(2, C, seed).double()
    return x + mean[0], full + mean[1], inputs(5, C, 9).double()


def test_on_centred_moments_weight_and_shift_are_the_least_squares_fit_with_an_intercept() -> None:
    x, _, W_RC = offset(1)
    mean = x.mean(0)
    found = repair(W_RC, moments(x) - mean.outer(mean), KEPT, TINY)
    shift = bias_shift(W_RC, mean, found, mean[KEPT])
    expected = fit(torch.cat([x[:, KEPT], torch.ones(len(x), 1, dtype=torch.float64)], 1), x @ W_RC.T)
    torch.testing.assert_close(torch.cat([found, shift[:, None]], 1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_the_shift_takes_away_the_mean_error_and_with_it_a_part_of_the_error(seed: int) -> None:
    x, full, W_RC = offset(seed)
    found = repair(W_RC, moments(x), KEPT)
    error = full @ W_RC.T - x[:, KEPT] @ found.T
    shift = bias_shift(W_RC, full.mean(0), found, x.mean(0)[KEPT])
    torch.testing.assert_close((error - shift).mean(0), torch.zeros(5, dtype=torch.float64))
    assert (error - shift).square().sum() < error.square().sum()


def test_where_all_is_kept_and_nothing_has_drifted_there_is_no_shift() -> None:
    x, _, W_RC = offset(0)
    assert bias_shift(W_RC, x.mean(0), W_RC, x.mean(0)).count_nonzero() == 0
