"""Scores against sums written out, `obs` against the fit without the unit, and what every score must do with
its units."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import damped
from llmcompress.algorithms.saliency import (
    activation,
    alive,
    angular_distance,
    block_influence,
    magnitude,
    members,
    obs,
    taylor,
    unit_sums,
    wanda,
    wanda_weights,
)
from tests.algorithms.test_gptq import problem
from tests.algorithms.test_hessian import HARD, inputs, moments

DAMP = 0.01
# four units of 3, 3, 2, 2 columns, two columns of none
UNIT_C = torch.tensor([1, 0, -1, 2, 1, 1, 0, -1, 3, 2, 3, 0])
UNITS = 4
C = len(UNIT_C)


def linear(seed: int = 0, columns: int = C) -> tuple[Tensor, Tensor]:
    """Weights [7, C] and second moments, float64."""
    return problem(seed, R=7, C=columns)


def _with_gradient(W_RC: Tensor, H_CC: Tensor, unit_C: Tensor) -> Tensor:
    return taylor(W_RC, W_RC.flip(1) * H_CC.diagonal(), unit_C, UNITS)


SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "L1": lambda W, H, unit_C: magnitude(W, unit_C, UNITS, 1),
    "L2": lambda W, H, unit_C: magnitude(W, unit_C, UNITS),
    "wanda": lambda W, H, unit_C: wanda(W, H.diagonal().sqrt(), unit_C, UNITS),
    "taylor": _with_gradient,
    "activation": lambda W, H, unit_C: activation(H.diagonal().sqrt(), unit_C, UNITS),
    "obs": lambda W, H, unit_C: obs(W, H, unit_C, UNITS),
}
OF_WEIGHTS = [name for name in SCORES if name != "activation"]


def fitted_loss(W_RC: Tensor, H_CC: Tensor, cut: Tensor, damp: float = DAMP) -> float:
    """tr(E H E^T) under damped moments, the columns `cut` (bool) gone and the rest by the normal
    equations."""
    H, kept = damped(H_CC, damp), ~cut
    E_RC = W_RC.clone()
    E_RC[:, kept] -= torch.linalg.solve(H[kept][:, kept], H[kept] @ W_RC.T).T
    return float(((E_RC @ H) * E_RC).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(unit=st.lists(st.integers(-1, 5), min_size=1, max_size=30).filter(lambda unit: max(unit) >= 0))
def test_the_table_has_every_column_of_a_unit_once_in_rising_order(unit: list[int]) -> None:
    table = members(torch.tensor(unit), 6).tolist()
    assert [[c for c in row if c >= 0] for row in table] == [
        [c for c, u in enumerate(unit) if u == own] for own in range(6)
    ]
    assert all(row == sorted(row, key=lambda c: c < 0) for row in table), "a row goes on after it has ended"


def test_sums_of_units_leave_out_columns_of_none() -> None:
    value_C = torch.arange(1.0, C + 1)
    assert unit_sums(value_C, UNIT_C, UNITS + 1).tolist() == [2 + 7 + 12, 1 + 5 + 6, 4 + 10, 9 + 11, 0]


@pytest.mark.parametrize("order", [1, 2])
def test_magnitude_is_the_sum_of_powers(order: int) -> None:
    W_RC, _ = linear()
    expected = [sum(abs(w) ** order for w in W_RC[:, UNIT_C.eq(u)].flatten().tolist()) for u in range(UNITS)]
    found = magnitude(W_RC, UNIT_C, UNITS, 1 if order == 1 else 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_rows_of_a_writer_are_scored_by_its_transpose() -> None:
    W_RC, _ = linear()
    torch.testing.assert_close(
        magnitude(W_RC.T.contiguous().T, UNIT_C, UNITS), magnitude(W_RC, UNIT_C, UNITS)
    )
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    expected = torch.stack([W_RC[rows == u].square().sum() for u in range(3)])
    torch.testing.assert_close(magnitude(W_RC.T, rows, 3), expected)


def test_wanda_weighs_each_weight_with_the_norm_of_its_input() -> None:
    W_RC, H_CC = linear()
    norm_C = H_CC.diagonal().sqrt()
    expected = torch.tensor(
        [[abs(float(w)) * float(norm_C[c]) for c, w in enumerate(row)] for row in W_RC], dtype=torch.float64
    )
    torch.testing.assert_close(wanda_weights(W_RC, norm_C), expected)
    by_unit = torch.stack([expected[:, UNIT_C.eq(u)].sum() for u in range(UNITS)])
    torch.testing.assert_close(wanda(W_RC, norm_C, UNIT_C, UNITS), by_unit)


def test_activation_is_the_mean_over_a_units_columns_whatever_their_number() -> None:
    assert activation(torch.arange(1.0, C + 1), UNIT_C, UNITS + 1).tolist() == [7, 4, 7, 10, 0]
    assert activation(torch.tensor([3.0, 5, 8]), torch.tensor([1, 0, 0]), 2).tolist() == [6.5, 3]


def test_taylor_is_the_change_of_the_loss_to_first_order() -> None:
    W_RC, _ = linear()
    x = inputs(50, C).double()

    def loss(W: Tensor) -> Tensor:
        return torch.tanh(x @ W.T).square().sum()

    G_RC = torch.func.grad(loss)(W_RC)
    step = 1e-6
    changes = [
        float(loss(W_RC) - loss(W_RC * (1 - step * UNIT_C.eq(u).double()))) / step for u in range(UNITS)
    ]
    torch.testing.assert_close(
        taylor(W_RC, G_RC, UNIT_C, UNITS), torch.tensor(changes).double().abs(), rtol=1e-4, atol=1e-6
    )


def test_taylor_of_a_reader_is_that_of_its_activations() -> None:
    W_RC, _ = linear()
    x = inputs(50, C).double().requires_grad_()
    W_RC.requires_grad_()
    torch.tanh(x @ W_RC.T).square().sum().backward()
    assert x.grad is not None and W_RC.grad is not None
    expected = unit_sums((x * x.grad).sum(0), UNIT_C, UNITS).abs()
    torch.testing.assert_close(taylor(W_RC, W_RC.grad, UNIT_C, UNITS), expected)


@pytest.mark.parametrize("seed", range(4))
def test_obs_is_the_loss_of_the_best_fit_without_the_unit(seed: int) -> None:
    W_RC, H_CC = linear(seed)
    expected = [fitted_loss(W_RC, H_CC, UNIT_C.eq(u)) for u in range(UNITS)]
    torch.testing.assert_close(
        obs(W_RC, H_CC, UNIT_C, UNITS, DAMP), torch.tensor(expected, dtype=torch.float64)
    )


def test_obs_of_single_columns_is_the_surgeons_saliency() -> None:
    W_RC, H_CC = linear()
    expected = W_RC.square().sum(0) / torch.linalg.inv(damped(H_CC, DAMP)).diagonal()
    torch.testing.assert_close(obs(W_RC, H_CC, torch.arange(C), C, DAMP), expected)


def test_obs_of_single_columns_is_the_same_when_a_larger_unit_makes_them_blocks() -> None:
    W_RC, H_CC = linear()
    unit_C = torch.tensor([*range(C - 1), 0])
    alone = obs(W_RC, H_CC, torch.arange(C), C, DAMP)
    torch.testing.assert_close(obs(W_RC, H_CC, unit_C, C - 1, DAMP)[1:], alone[1:-1])


def test_obs_spares_what_only_one_unit_says() -> None:
    x = inputs(400, 4).double()
    x[:, 1] = 2 * x[:, 0]  # either of the two can say it, however loud the second
    x[:, 2:] *= 0.1
    W_RC = torch.ones(3, 4, dtype=torch.float64)
    cost = obs(W_RC, moments(x), torch.arange(4), 4, damp=1e-6)
    assert max(cost[0], cost[1]) < 1e-3 * min(cost[2], cost[3])
    assert magnitude(W_RC, torch.arange(4), 4).unique().numel() == 1, "by size all would be equal"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), order=st.permutations(range(UNITS)))
@pytest.mark.parametrize("name", SCORES)
def test_renaming_the_units_renames_the_scores(name: str, seed: int, order: list[int]) -> None:
    W_RC, H_CC = linear(seed)
    renamed = torch.where(UNIT_C >= 0, torch.tensor(order)[UNIT_C], -1)
    expected = SCORES[name](W_RC, H_CC, UNIT_C)
    torch.testing.assert_close(SCORES[name](W_RC, H_CC, renamed)[torch.tensor(order)], expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), order=st.permutations(range(C)))
@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_the_columns_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    W_RC, H_CC = linear(seed)
    p = torch.tensor(order)
    flipped = W_RC.flip(1) * H_CC.diagonal()  # the gradient of `taylor` travels with its columns
    if name == "taylor":
        found, expected = (
            taylor(W_RC[:, p], flipped[:, p], UNIT_C[p], UNITS),
            taylor(W_RC, flipped, UNIT_C, UNITS),
        )
    else:
        found, expected = SCORES[name](W_RC[:, p], H_CC[p][:, p], UNIT_C[p]), SCORES[name](W_RC, H_CC, UNIT_C)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize("unit", range(UNITS))
def test_a_unit_of_zeros_is_worth_nothing_and_all_others_something(name: str, unit: int) -> None:
    W_RC, H_CC = linear()
    W_RC[:, UNIT_C.eq(unit)] = 0
    score = SCORES[name](W_RC, H_CC, UNIT_C).tolist()
    assert score.pop(unit) == 0 and min(score) > 0


@pytest.mark.parametrize("name", ["wanda", "activation", "obs"])
def test_a_unit_whose_inputs_never_fire_is_worth_nothing(name: str) -> None:
    W_RC, H_CC = linear()
    H_CC[UNIT_C.eq(1)] = H_CC[:, UNIT_C.eq(1)] = 0
    score = SCORES[name](W_RC, H_CC, UNIT_C).tolist()
    assert score.pop(1) == 0 and min(score) > 0


def test_without_any_input_obs_goes_by_the_size_of_the_weights() -> None:
    W_RC, _ = linear()
    H_CC = torch.zeros(C, C, dtype=torch.float64)
    assert alive(H_CC).all()
    torch.testing.assert_close(obs(W_RC, H_CC, UNIT_C, UNITS), magnitude(W_RC, UNIT_C, UNITS))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("case", HARD)
def test_costs_under_hard_moments_are_finite_and_not_negative(case: str, size: int) -> None:
    columns = len(HARD[case])
    cost = obs(inputs(7, columns, 3), HARD[case], torch.arange(columns) // size, -(-columns // size))
    assert bool(torch.isfinite(cost).all()) and bool((cost >= 0).all())


def rotated(x: Tensor, angle: float) -> Tensor:
    """Each pair of neighbouring channels turned by `angle`, and the length changed."""
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    turned: Tensor = 1.7 * (x.unflatten(-1, (-1, 2)).double() @ turn).flatten(-2)
    return turned


@pytest.mark.parametrize("angle", [0, 1e-4, 0.3, math.pi / 2, 3, math.pi])
def test_blocks_are_scored_by_how_far_they_turn_the_states_and_not_by_their_length(angle: float) -> None:
    x = inputs(30, 8).reshape(3, 10, 8)
    y = rotated(x, angle)
    assert block_influence(x, y) == pytest.approx(1 - math.cos(angle), abs=1e-6)
    assert angular_distance(x, y) == pytest.approx(angle / math.pi, abs=1e-6)


def test_scores_of_blocks_are_means_over_tokens() -> None:
    x = inputs(4, 8)
    y = torch.cat([x[:1], -x[1:2], rotated(x[2:], math.pi / 2).float()])
    assert block_influence(x, y) == pytest.approx((0 + 2 + 1 + 1) / 4, abs=1e-6)
    assert angular_distance(x, y) == pytest.approx((0 + 1 + 0.5 + 0.5) / 4, abs=1e-6)


def test_states_in_bfloat16_are_scored_in_float32() -> None:
    x, y = inputs(100, 64).bfloat16(), inputs(100, 64, 1).bfloat16()
    assert block_influence(x, y) == block_influence(x.float(), y.float())
    assert angular_distance(x, y) == angular_distance(x.float(), y.float())
