"""Second moments against the mean outer product, and their factors against plain float64 inverses."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import Moments, damped, inverse_factor, metric_factor, retarget, translate

DAMP = 0.01


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated channels of different size [T, C]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    X_TC: Tensor = torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    return X_TC


def moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def _near_singular() -> Tensor:
    x = inputs(200, 24)
    x[:, 12:] = x[:, :12] * (1 + 1e-6 * inputs(200, 12, seed=1))
    return moments(x)


def _dead() -> Tensor:
    x = inputs(200, 24)
    x[:, 3] = x[:, 20] = 0
    return moments(x)


def _constant() -> Tensor:
    x = inputs(200, 24)
    x[:, 3], x[:, 20] = 7, -7
    return moments(x)


HARD = {
    "dead channels": _dead(),
    "constant channels": _constant(),
    "nothing but constants": torch.full((24, 24), 9.0),
    "fewer tokens than columns": moments(inputs(5, 24)),
    "one token": moments(inputs(1, 24)),
    "no input": torch.zeros(24, 24),
    "tiny": moments(inputs(200, 24)) * 1e-30,
    "huge": moments(inputs(200, 24)) * 1e30,
    "tiny and few": moments(inputs(5, 24)) * 1e-30,
    "huge and few": moments(inputs(5, 24)) * 1e30,
    "near singular": _near_singular(),
    "one channel far above the rest": moments(inputs(200, 24) * torch.tensor([1e6] + [1.0] * 23)),
    "one column": torch.full((1, 1), 3.0),
    "indefinite by rounding": moments(inputs(5, 24)) - 1e-3 * torch.eye(24),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 40), max_size=8))
def test_streamed_moments_are_the_mean_outer_product_however_the_tokens_are_cut(
    seed: int, cuts: list[int]
) -> None:
    x, seen = inputs(40, 6, seed), Moments(6)
    edges = [0, *sorted(cuts), 40]
    for start, stop in itertools.pairwise(edges):  # equal edges make an empty batch
        seen.add(x[start:stop])
    assert seen.tokens == 40
    torch.testing.assert_close(seen.H_CC.double(), moments(x.double()), rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_tokens() -> None:
    x, flat, shaped = inputs(24, 5), Moments(5), Moments(5)
    flat.add(x)
    shaped.add(x.reshape(2, 3, 4, 5))
    assert (shaped.tokens, flat.tokens) == (24, 24)
    assert torch.equal(shaped.H_CC, flat.H_CC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, seen = inputs(300, 6).to(dtype), Moments(6)
    for batch in x.split(7):
        seen.add(batch)
    assert seen.H_CC.dtype == torch.float32
    torch.testing.assert_close(seen.H_CC.double(), moments(x.double()), rtol=1e-5, atol=1e-5)


def test_no_tokens_leave_zero_moments() -> None:
    seen = Moments(3)
    seen.add(torch.zeros(0, 3))
    assert seen.tokens == 0
    assert torch.equal(seen.H_CC, torch.zeros(3, 3))


def test_an_empty_batch_changes_nothing() -> None:
    seen = Moments(6)
    seen.add(inputs(40, 6))
    before = seen.H_CC.clone()
    seen.add(torch.zeros(2, 0, 6))
    assert torch.equal(seen.H_CC, before)


def test_inputs_whose_sum_would_overflow_have_finite_moments() -> None:
    seen = Moments(1)
    for _ in range(100):
        seen.add(torch.full((4, 1), 1e19))  # squares of 1e38 in a range of 3.4e38
    torch.testing.assert_close(seen.H_CC, torch.full((1, 1), 1e38))


def test_damping_adds_a_share_of_the_mean_diagonal_and_gives_dead_channels_the_mean() -> None:
    H_CC = torch.diag(torch.tensor([1.0, 0.0, 5.0]))
    torch.testing.assert_close(damped(H_CC, 0.1), torch.diag(torch.tensor([1.2, 2.0, 5.2])))
    assert H_CC[1, 1] == 0, "the moments themselves were changed"


@pytest.mark.parametrize("seed", range(5))
def test_the_factor_is_that_of_the_damped_inverse(seed: int) -> None:
    H_CC = moments(inputs(200, 32, seed))
    U_CC = inverse_factor(H_CC, DAMP).double()
    expected = torch.linalg.inv(damped(H_CC.double(), DAMP))
    assert torch.linalg.norm(U_CC.T @ U_CC - expected) <= 1e-4 * torch.linalg.norm(expected)
    again = inverse_factor(H_CC.double(), DAMP)
    torch.testing.assert_close(again.T @ again, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", HARD)
def test_the_factor_is_finite_upper_triangular_with_a_positive_diagonal(case: str) -> None:
    U_CC = inverse_factor(HARD[case], DAMP)
    assert bool(torch.isfinite(U_CC).all())
    assert bool((U_CC.diagonal() > 0).all())
    assert torch.equal(U_CC, U_CC.triu())


@pytest.mark.parametrize("case", [case for case in HARD if case != "indefinite by rounding"])
def test_the_factor_of_a_hard_matrix_inverts_it_too(case: str) -> None:
    U_CC = inverse_factor(HARD[case], DAMP).double()
    expected = torch.linalg.inv(damped(HARD[case].double(), DAMP))
    assert torch.linalg.norm(U_CC.T @ U_CC - expected) <= 2e-3 * torch.linalg.norm(expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    columns=st.integers(1, 24),
    tokens=st.integers(1, 30),
    dead=st.integers(0, 23),
    decade=st.integers(-30, 30),
)
def test_any_moments_have_a_finite_factor(
    seed: int, columns: int, tokens: int, dead: int, decade: int
) -> None:
    x = inputs(tokens, columns, seed)
    x[:, :dead] = 0
    U_CC = inverse_factor(moments(x) * 10.0**decade, DAMP)
    assert bool(torch.isfinite(U_CC).all()) and bool((U_CC.diagonal() > 0).all())


def test_a_dead_channel_is_tied_to_no_other() -> None:
    U_CC = inverse_factor(HARD["dead channels"], DAMP)
    for dead in (3, 20):
        assert U_CC[dead].count_nonzero() == U_CC[:, dead].count_nonzero() == 1


def test_without_inputs_the_factor_is_the_identity() -> None:
    torch.testing.assert_close(inverse_factor(torch.zeros(6, 6), DAMP), torch.eye(6))


def test_a_matrix_that_needs_it_is_damped_tenfold() -> None:
    # least eigenvalue -0.08, mean diagonal 2.03
    H_CC = torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 0.6], [0.0, 0.6, 0.1]])
    U_CC = inverse_factor(H_CC, DAMP)
    torch.testing.assert_close(torch.linalg.inv(U_CC.T @ U_CC), damped(H_CC, 10 * DAMP))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_moments_that_are_not_finite_are_refused(bad: float, place: tuple[int, int]) -> None:
    H_CC = moments(inputs(50, 6))
    H_CC[place] = H_CC[place[::-1]] = bad
    with pytest.raises(ValueError, match="second moments are not finite"):
        inverse_factor(H_CC, DAMP)
    with pytest.raises(ValueError, match="output Fisher matrix is not finite"):
        metric_factor(H_CC, DAMP)


@pytest.mark.parametrize(
    "case", ["fewer tokens than columns", "tiny", "huge", "dead channels", "constant channels"]
)
def test_the_length_of_an_error_in_the_metric_is_its_weighed_error(case: str) -> None:
    F_DD, e_TD = HARD[case], inputs(50, 24, seed=3)
    R_DD = metric_factor(F_DD, 0.05)
    assert torch.equal(R_DD, R_DD.tril())
    F = F_DD.double() / F_DD.double().diagonal().mean()
    expected = ((e_TD.double() @ F) * e_TD.double()).sum(-1) + 0.05 * e_TD.double().square().sum(-1)
    torch.testing.assert_close((e_TD @ R_DD).square().sum(-1).double(), expected, rtol=1e-4, atol=0)


def test_without_a_fisher_matrix_every_error_counts_the_same() -> None:
    R_DD = metric_factor(torch.zeros(6, 6), 0.05)
    torch.testing.assert_close(R_DD, math.sqrt(1.05) * torch.eye(6))


def test_an_error_that_the_model_does_not_feel_counts_least() -> None:
    R_DD = metric_factor(torch.diag(torch.tensor([0.0, 0.001, 2.0])), 0.05)
    lengths = R_DD.diagonal().tolist()
    assert lengths == sorted(lengths)


def drifted(tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Inputs [T, C], and the same as the full model has them."""
    full = inputs(tokens, columns)
    return full + 0.3 * inputs(tokens, columns, 7) @ inputs(columns, columns, 8) / columns**0.5, full


def test_the_cross_moments_are_the_mean_outer_product_with_the_full_inputs_however_the_tokens_are_cut() -> (
    None
):
    (x, full), seen = drifted(60, 6), Moments(6)
    for start, stop in ((0, 7), (7, 7), (7, 40), (40, 60)):
        seen.add(x[start:stop], full[start:stop])
    assert seen.X_FC is not None
    torch.testing.assert_close(seen.X_FC.double(), full.double().T @ x.double() / 60, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.H_CC.double(), moments(x.double()), rtol=1e-5, atol=1e-5)


def test_the_means_are_those_of_both_inputs_however_the_tokens_are_cut() -> None:
    (x, full), seen, alone = drifted(60, 6), Moments(6), Moments(6)
    for start, stop in ((0, 7), (7, 7), (7, 40), (40, 60)):
        seen.add(x[start:stop], full[start:stop])
        alone.add(x[start:stop])
    for found, expected in ((seen.mean_C, x), (seen.full_C, full), (alone.mean_C, x), (alone.full_C, x)):
        torch.testing.assert_close(found.double(), expected.double().mean(0), rtol=1e-5, atol=1e-5)


def test_the_retargeted_weight_is_the_least_squares_one() -> None:
    x, full = drifted(400, 12)
    W_RC, seen = inputs(5, 12, 9), Moments(12)
    seen.add(x, full)
    expected = torch.linalg.lstsq(x.double(), full.double() @ W_RC.T.double()).solution.T
    torch.testing.assert_close(retarget(W_RC, seen, damp=1e-9).double(), expected, rtol=1e-3, atol=1e-4)


def test_damping_draws_the_retargeted_weight_to_the_weight_itself() -> None:
    x, full = drifted(400, 12)
    W_RC, seen = inputs(5, 12, 9), Moments(12)
    seen.add(x, full)
    moved = [float((retarget(W_RC, seen, damp) - W_RC).norm()) for damp in (0.01, 1, 100, 1e4)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-3 * moved[0]


def test_a_weight_whose_inputs_are_the_full_models_stays_as_it_is() -> None:
    x, W_RC = inputs(100, 12), inputs(5, 12, 9)
    unknown, same = Moments(12), Moments(12)
    unknown.add(x)
    same.add(x, x)
    assert retarget(W_RC, unknown) is W_RC
    torch.testing.assert_close(retarget(W_RC, same), W_RC)


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_and_dead_channels_retarget_to_finite_weights(tokens: int) -> None:
    x, full = drifted(tokens, 24)
    x[:, 3] = 0
    seen = Moments(24)
    seen.add(x, full)
    assert torch.isfinite(retarget(inputs(5, 24, 9), seen)).all()


def test_translate_is_the_least_squares_fit_from_one_width_to_another() -> None:
    full, here = inputs(400, 24), inputs(400, 10, seed=3)
    here = here + full[:, :10]
    seen = Moments(10, full=24)
    seen.add(here[:150], full[:150])
    seen.add(here[150:], full[150:])
    assert seen.X_FC is not None and seen.X_FC.shape == (24, 10)
    W_RF = inputs(8, 24, seed=1)
    found = translate(W_RF, torch.zeros(8, 10), seen, damp=1e-9)
    expected = torch.linalg.lstsq(here.double(), (full @ W_RF.T).double()).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_translate_keeps_what_is_exact_already() -> None:
    x = inputs(300, 16)
    seen = Moments(8, full=16)
    x[:, 8:] = 0
    seen.add(x[:, :8], x)
    W_RF = inputs(5, 16, seed=2)
    torch.testing.assert_close(translate(W_RF, W_RF[:, :8], seen), W_RF[:, :8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 2, 7, 300])
def test_the_factor_of_columns_in_an_order_is_that_of_the_ordered_moments(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    H_CC, order_C = x.T @ x, torch.randperm(columns, generator=generator)
    before = H_CC.clone()
    U_CC = inverse_factor(H_CC, DAMP, order_C)
    assert torch.equal(H_CC, before), "H was changed"
    assert torch.equal(U_CC, U_CC.triu())
    expected = torch.linalg.inv(damped(H_CC, DAMP))[order_C][:, order_C]
    torch.testing.assert_close(U_CC.T @ U_CC, expected)
