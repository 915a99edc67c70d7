"""Factors against their formulas in plain loops, and the fit against the error it is said to lower: computed
and rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.smoothing import EXPONENTS, WIDEST, awq, fitted, smoothquant

ALPHAS = st.floats(0, 1)


def sizes(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp()


def centred(raw: list[float]) -> list[float]:
    """Divided by their geometric mean."""
    middle = math.exp(sum(map(math.log, raw)) / len(raw))
    return [value / middle for value in raw]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), count=st.integers(1, 40), alpha=ALPHAS)
def test_smoothquant_is_its_formula(seed: int, count: int, alpha: float) -> None:
    x, w = sizes(seed, count), sizes(seed + 1, count)
    raw = [a**alpha / b ** (1 - alpha) for a, b in zip(x.tolist(), w.tolist(), strict=True)]
    torch.testing.assert_close(smoothquant(x, w, alpha), torch.tensor(centred(raw)), rtol=1e-4, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), count=st.integers(1, 40), alpha=ALPHAS)
def test_awq_is_its_formula(seed: int, count: int, alpha: float) -> None:
    x = sizes(seed, count)
    torch.testing.assert_close(
        awq(x, alpha), torch.tensor(centred([a**alpha for a in x.tolist()])), rtol=1e-4, atol=0
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), alpha=ALPHAS, size=st.sampled_from([1e-6, 1.0, 1e4]))
def test_the_mean_size_is_one_and_the_size_of_the_inputs_as_a_whole_is_nothing(
    seed: int, alpha: float, size: float
) -> None:
    x, w = sizes(seed, 24), sizes(seed + 1, 24)
    for factor, moved in (
        (smoothquant(x, w, alpha), smoothquant(x * size, w, alpha)),
        (awq(x, alpha), awq(x * size, alpha)),
    ):
        assert float(factor.double().log().mean().exp()) == pytest.approx(1.0, rel=1e-5)
        torch.testing.assert_close(moved, factor, rtol=1e-4, atol=0)


def test_dead_channels_stay_and_the_others_are_as_they_would_be_without_them() -> None:
    x, w = sizes(0, 12), sizes(1, 12)
    x[[2, 7]], w[[7, 9]] = 0, 0
    live = (x > 0) & (w > 0)
    found = smoothquant(x, w, 0.6)
    assert found[~live].tolist() == [1, 1, 1]
    torch.testing.assert_close(found[live], smoothquant(x[live], w[live], 0.6))
    found = awq(x, 0.6)
    assert found[x == 0].tolist() == [1, 1]
    torch.testing.assert_close(found[x > 0], awq(x[x > 0], 0.6))


def test_where_all_channels_are_dead_all_factors_are_one() -> None:
    none = torch.zeros(5)
    assert smoothquant(none, sizes(0, 5), 0.5).tolist() == [1] * 5
    assert smoothquant(sizes(0, 5), none, 0.5).tolist() == [1] * 5
    assert awq(none, 0.5).tolist() == [1] * 5


def test_factors_have_the_shape_of_the_channels() -> None:
    x, w = sizes(0, 24), sizes(1, 24)
    assert torch.equal(
        smoothquant(x.reshape(2, 3, 4), w.reshape(2, 3, 4), 0.4).flatten(), smoothquant(x, w, 0.4)
    )
    assert torch.equal(awq(x.reshape(6, 4), 0.4).flatten(), awq(x, 0.4))


def test_exponents_zero_and_one_look_at_one_side_only() -> None:
    x, w = sizes(0, 12), sizes(1, 12)
    torch.testing.assert_close(smoothquant(x, w, 0.0), smoothquant(torch.ones(12), w, 0.0))
    torch.testing.assert_close(smoothquant(x, w, 1.0), awq(x, 1.0))
    assert awq(x, 0.0).tolist() == pytest.approx([1] * 12)


def test_factors_of_any_channels_are_positive_finite_and_within_what_half_precision_holds() -> None:
    x = torch.tensor([1e-38, 1e38, 1.0, 0.0, 1e-20, 1e20])
    for alpha in EXPONENTS:
        for factor in (smoothquant(x, x.flip(0), alpha), awq(x, alpha)):
            assert bool(((factor >= 1 / WIDEST) & (factor <= WIDEST)).all())


@dataclass(frozen=True)
class Case:
    """Inputs [T, C] with outlier channels, and the weights that read them, under a format."""

    X_TC: Tensor
    W_RC: Tensor
    input_largest: int | None
    weight_largest: int
    group_size: int

    def fit(self, unit_C: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        unit_C = torch.arange(self.X_TC.shape[1]) if unit_C is None else unit_C
        start = torch.ones(int(unit_C.max()) + 1) if start is None else start
        return fitted(
            self.X_TC, self.W_RC, unit_C, start,
            input_largest=self.input_largest, weight_largest=self.weight_largest, group_size=self.group_size,
        )  # fmt: skip

    def expected(self, factor_C: Tensor) -> float:
        """The squared error of a token that the fit is to lower, as its docstring says it, in float64."""
        s, X, W = factor_C.double(), self.X_TC.double(), self.W_RC.double()
        total = 0.0
        if self.input_largest is not None:
            weights = sum(float(s[c] ** 2 * W[:, c].norm() ** 2) for c in range(len(s)))
            tops = [float((token / s).abs().max()) ** 2 for token in X]
            total += sum(tops) / len(tops) * weights / self.input_largest**2
        for first in range(0, len(s), self.group_size):
            columns = slice(first, first + self.group_size)
            inputs = float((X[:, columns] / s[columns]).square().mean(0).sum())
            tops = [float((row[columns] * s[columns]).abs().max()) ** 2 for row in W]
            total += sum(tops) * inputs / self.weight_largest**2
        return total

    def real(self, factor_C: Tensor) -> float:
        """The squared error of a token when inputs and weights are really rounded to whole steps of absmax
        over largest."""
        s, X, W = factor_C.double(), self.X_TC.double(), self.W_RC.double()
        aim, X, W = X @ W.T, X / s, W * s
        if self.input_largest is not None:
            step = X.abs().amax(1, keepdim=True) / self.input_largest
            X = (X / step).round() * step
        groups = W.reshape(len(W), -1, self.group_size)
        step = groups.abs().amax(2, keepdim=True) / self.weight_largest
        W = ((groups / step).round() * step).reshape(W.shape)
        return float((X @ W.T - aim).square().sum(1).mean())

    def smoothed(self) -> list[Tensor]:
        """What SmoothQuant makes of it, for every exponent."""
        return [smoothquant(self.X_TC.abs().amax(0), self.W_RC.abs().amax(0), alpha) for alpha in EXPONENTS]


def case(format: str, outlier: float = 20, seed: int = 0, T: int = 512, R: int = 256, C: int = 64) -> Case:
    generator = torch.Generator().manual_seed(seed)
    X_TC = torch.randn(T, C, generator=generator)
    X_TC[:, [3, 17, 40]] *= outlier
    limits: dict[str, tuple[int | None, int, int]] = {
        "w8a8": (127, 127, C),
        "w4a8": (127, 7, 16),
        "w4a4": (7, 7, 32),
        "w4a16": (None, 7, 16),
    }
    return Case(X_TC, torch.randn(R, C, generator=generator) * 0.05, *limits[format])


by_format = pytest.mark.parametrize("format", ["w8a8", "w4a8", "w4a4", "w4a16"])


@pytest.mark.slow(keep=1)
@by_format
@pytest.mark.parametrize("outlier", [10, 30])
def test_the_fit_lowers_the_error_to_expect_and_the_real_one_below_the_start_and_every_exponent(
    format: str, outlier: float
) -> None:
    problem = case(format, outlier)
    found = problem.fit()
    for error in (problem.expected, problem.real):
        assert error(found) < 0.6 * error(torch.ones_like(found))
        assert error(found) < min(map(error, problem.smoothed()))


def test_the_error_to_expect_is_twelve_times_what_eight_bits_really_cost() -> None:
    problem = case("w8a8", 10)
    # the formula leaves out 1 / 12 of a step's square, as it is everywhere
    for factor in (torch.ones(64), problem.fit()):
        assert problem.real(factor) == pytest.approx(problem.expected(factor) / 12, rel=0.15)


@by_format
def test_a_fit_that_starts_from_what_a_fit_has_found_stays_there(format: str) -> None:
    problem = case(format, T=128, R=64)
    found = problem.fit()
    again = problem.fit(start=found)
    assert problem.expected(again) == pytest.approx(problem.expected(found), rel=0.01)
    assert problem.expected(again) <= problem.expected(found) * (1 + 1e-3)


@by_format
def test_columns_of_one_unit_share_its_factor_and_the_fit_serves_them_all(format: str) -> None:
    problem = case(format, T=256, R=128)
    # as keys that several queries read: 32 units, twice each
    unit_C = torch.arange(64) % 16 + 16 * (torch.arange(64) // 32)
    found = problem.fit(unit_C)
    assert found.shape == (32,)
    assert problem.expected(found[unit_C]) < 0.8 * problem.expected(torch.ones(64))
    top_U, weight_U = torch.zeros(32), torch.zeros(32)
    top_U.scatter_reduce_(0, unit_C, problem.X_TC.abs().amax(0), "amax")
    weight_U.scatter_reduce_(0, unit_C, problem.W_RC.abs().amax(0), "amax")
    shared = [smoothquant(top_U, weight_U, alpha)[unit_C] for alpha in EXPONENTS]
    assert problem.expected(found[unit_C]) < min(map(problem.expected, shared))


def test_the_names_of_the_units_mean_nothing() -> None:
    problem = case("w8a8", T=128, R=64)
    unit_C, order = torch.arange(64) // 2, torch.randperm(32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(problem.fit(order[unit_C])[order], problem.fit(unit_C), rtol=1e-3, atol=0)


@by_format
def test_fitted_factors_are_positive_have_mean_size_one_and_are_the_same_each_time(format: str) -> None:
    problem = case(format, T=64, R=32)
    found = problem.fit()
    assert bool(((found >= 1 / WIDEST) & (found <= WIDEST)).all())
    assert float(found.double().log().mean().exp()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(problem.fit(), found)


def test_a_factor_for_all_columns_together_changes_nothing_in_the_error_to_expect() -> None:
    problem = case("w4a4", T=64, R=32)
    found = problem.fit()
    assert problem.expected(found * 7) == pytest.approx(problem.expected(found))
    torch.testing.assert_close(problem.fit(start=torch.full((64,), 7.0)), found, rtol=1e-2, atol=0)


@pytest.mark.slow(keep=1)
@by_format
@pytest.mark.parametrize("dead", ["one input", "one weight", "all inputs", "all weights"])
def test_channels_that_nothing_enters_or_leaves_give_finite_factors(format: str, dead: str) -> None:
    problem = case(format, T=64, R=32)
    X_TC, W_RC = problem.X_TC.clone(), problem.W_RC.clone()
    (X_TC if "input" in dead else W_RC)[:, slice(5, 6) if "one" in dead else slice(None)] = 0
    found = replace(problem, X_TC=X_TC, W_RC=W_RC).fit()
    assert bool(found.isfinite().all() and (found > 0).all())


def test_the_fit_leaves_what_it_is_given() -> None:
    problem, start = case("w8a8", T=32, R=16), torch.ones(64)
    X_TC, W_RC = problem.X_TC.clone(), problem.W_RC.clone()
    found = problem.fit(start=start)
    assert (
        torch.equal(problem.X_TC, X_TC)
        and torch.equal(problem.W_RC, W_RC)
        and torch.equal(start, torch.ones(64))
    )
    assert not found.requires_grad
