"""Products of low rank against the singular values of the whitened weight, which no other product can
beat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import damped
from llmcompress.algorithms.low_rank import DAMP, coefficients, root, shared_basis
from tests.algorithms.test_hessian import HARD, inputs, moments
from tests.models import noise

R, C = 9, 12


def metric(seed: int) -> Tensor:
    return moments(inputs(200, C, seed).double())


def weight(seed: int, rows: int = R) -> Tensor:
    return noise(rows, C, seed=100 + seed).double()


def lost(E_RC: Tensor, H_CC: Tensor) -> float:
    """tr(E H E^T)."""
    return float(torch.trace(E_RC @ H_CC @ E_RC.T))


def tail(W_RC: Tensor, H_CC: Tensor, rank: int) -> float:
    """The squares of the singular values of the weight times any root of H that a product of that rank must
    lose."""
    values, vectors = torch.linalg.eigh(H_CC)
    S_CC = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(W_RC @ S_CC)[rank:].square().sum())


# root


@pytest.mark.parametrize("case", HARD)
def test_a_root_is_one_of_the_damped_moments_however_hard_they_are(case: str) -> None:
    S_CC = root(HARD[case])
    assert S_CC.dtype == torch.float64 and bool(torch.isfinite(S_CC).all()) and torch.equal(S_CC, S_CC.tril())
    found = S_CC @ S_CC.T
    grown = [damped(HARD[case].double(), DAMP * 10**attempt) for attempt in range(12)]
    assert any(torch.allclose(found, H_CC, rtol=1e-9, atol=1e-12 * float(H_CC.abs().max())) for H_CC in grown)


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="second moments are not finite"):
        root(torch.full((C, C), torch.nan))


# the best product of one weight


@pytest.mark.parametrize("rank", range(1, R + 1))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_any_preference_it_is_the_truncated_singular_value_decomposition(
    rank: int, dtype: torch.dtype
) -> None:
    W_RC = weight(0)
    (left_RK,), basis_KC = shared_basis([W_RC.to(dtype)], [torch.eye(C, dtype=dtype)], rank)
    assert (
        left_RK.shape == (R, rank)
        and basis_KC.shape == (rank, C)
        and left_RK.dtype == basis_KC.dtype == dtype
    )
    U, values, Vt = torch.linalg.svd(W_RC, full_matrices=False)
    found = (left_RK @ basis_KC).double()
    torch.testing.assert_close(found, U[:, :rank] * values[:rank] @ Vt[:rank], rtol=0, atol=1e-5)
    assert float((found - W_RC).square().sum()) == pytest.approx(
        float(values[rank:].square().sum()), rel=1e-4, abs=1e-9
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), rank=st.integers(1, R - 1))
def test_what_is_lost_is_the_tail_of_the_whitened_singular_values_and_nothing_nearby_loses_less(
    seed: int, rank: int
) -> None:
    W_RC, H_CC = weight(seed), damped(metric(seed), DAMP)
    (left_RK,), basis_KC = shared_basis([W_RC], [metric(seed)], rank)
    found = lost(left_RK @ basis_KC - W_RC, H_CC)
    assert found == pytest.approx(tail(W_RC, H_CC, rank), rel=1e-6)
    for number in range(6):
        dA = 1e-2 * left_RK.abs().mean() * noise(R, rank, seed=seed + number)
        dB = 1e-2 * basis_KC.abs().mean() * noise(rank, C, seed=seed + number + 50)
        for A, B in ((left_RK + dA, basis_KC), (left_RK, basis_KC + dB), (left_RK + dA, basis_KC + dB)):
            assert found < lost(A @ B - W_RC, H_CC)


def test_it_loses_less_where_inputs_are_than_the_plain_decomposition() -> None:
    W_RC, H_CC = weight(0), metric(0)
    (left_RK,), basis_KC = shared_basis([W_RC], [H_CC], 4)
    U, values, Vt = torch.linalg.svd(W_RC, full_matrices=False)
    plain = U[:, :4] * values[:4] @ Vt[:4]
    assert lost(left_RK @ basis_KC - W_RC, H_CC) < 0.7 * lost(plain - W_RC, H_CC)
    assert float((left_RK @ basis_KC - W_RC).norm()) > float((plain - W_RC).norm())


# several weights


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), rank=st.integers(1, C - 1), count=st.integers(2, 4))
def test_on_the_same_inputs_the_common_basis_is_that_of_the_stacked_weights(
    seed: int, rank: int, count: int
) -> None:
    weights, H_CC = [weight(seed + number, 3 + number) for number in range(count)], metric(seed)
    lefts, basis_KC = shared_basis(weights, [H_CC] * count, rank)
    found = sum(lost(A @ basis_KC - W, damped(H_CC, DAMP)) for A, W in zip(lefts, weights, strict=True))
    expected = tail(torch.cat(weights), damped(H_CC, DAMP), rank)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_on_inputs_of_their_own_each_has_the_best_coefficients_for_the_common_basis() -> None:
    weights, metrics = [weight(0), weight(1)], [metric(0), 3 * metric(1)]
    lefts, basis_KC = shared_basis(weights, metrics, 5)
    for A, W, H in zip(lefts, weights, metrics, strict=True):
        H_CC = damped(H, DAMP)
        found = lost(A @ basis_KC - W, H_CC)
        assert found >= tail(W, H_CC, 5), "a basis of its own would be better"
        assert all(
            found < lost((A + 1e-3 * noise(R, 5, seed=seed)) @ basis_KC - W, H_CC) for seed in range(6)
        )
    _, of_sum_KC = shared_basis(weights, [metrics[0] + metrics[1]] * 2, 5)
    ratio = (basis_KC / of_sum_KC).abs()  # the vectors are the same, of another length and sign
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_full_rank_nothing_is_lost(count: int, dtype: torch.dtype) -> None:
    weights = [weight(number).to(dtype) for number in range(count)]
    lefts, basis_KC = shared_basis(weights, [metric(number).to(dtype) for number in range(count)], C)
    for A, W in zip(lefts, weights, strict=True):
        assert A.shape == (R, C) and basis_KC.shape == (C, C)
        torch.testing.assert_close(A @ basis_KC, W, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-4)


def test_one_weight_of_no_more_rows_than_the_rank_loses_nothing() -> None:
    W_RC = weight(0, 3)
    for rank in (3, 5):
        (left_RK,), basis_KC = shared_basis([W_RC], [metric(0)], rank)
        torch.testing.assert_close(left_RK @ basis_KC, W_RC, rtol=0, atol=1e-6)


# coefficients


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), rank=st.integers(1, C - 1), damp=st.sampled_from([1e-8, 1e-4, 0.1]))
def test_coefficients_are_the_least_squares_ones_on_the_inputs(seed: int, rank: int, damp: float) -> None:
    """The tokens are the samples, and one more for each channel, of the size of the damping."""
    x_TC, W_RC, basis_KC = inputs(200, C, seed).double(), weight(seed), noise(rank, C, seed=seed).double()
    H_CC = moments(x_TC)
    own = (damp * H_CC.diagonal().mean() * len(x_TC)).sqrt() * torch.eye(C, dtype=torch.float64)
    rows_TC = torch.cat([x_TC, own])
    expected = torch.linalg.lstsq(rows_TC @ basis_KC.T, rows_TC @ W_RC.T).solution.T
    torch.testing.assert_close(coefficients(W_RC, H_CC, basis_KC, damp), expected, rtol=1e-6, atol=1e-8)


def test_a_weight_in_the_span_of_the_basis_is_made_exactly() -> None:
    basis_KC, left_RK = noise(4, C).double(), noise(R, 4, seed=1).double()
    found = coefficients(left_RK @ basis_KC, metric(0), basis_KC)
    assert found.is_contiguous()
    torch.testing.assert_close(found, left_RK, rtol=1e-8, atol=1e-9)


# what is hard


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_hard_moments_give_finite_products(case: str, share: float) -> None:
    H_CC = HARD[case]
    columns = len(H_CC)
    rank, weights = max(1, int(share * columns)), [noise(R, columns, seed=number) for number in range(2)]
    for some in (weights[:1], weights):
        lefts, basis_KC = shared_basis(some, [H_CC] * len(some), rank)
        assert all(bool(torch.isfinite(part).all()) for part in (*lefts, basis_KC))
        for A, W in zip(lefts, some, strict=True):
            assert share < 1 or torch.allclose(A @ basis_KC, W, rtol=0, atol=0.01), (
                "at full rank nothing is lost"
            )


def test_a_channel_that_never_fires_costs_nothing_elsewhere() -> None:
    x_TC, W_RC = inputs(200, C).double(), weight(0)
    x_TC[:, 5] = 0
    (left_RK,), basis_KC = shared_basis([W_RC], [moments(x_TC)], 6)
    alive = torch.tensor([c for c in range(C) if c != 5])
    found = lost(left_RK @ basis_KC - W_RC, moments(x_TC))
    assert bool(torch.isfinite(left_RK @ basis_KC).all())
    assert found < 3 * tail(W_RC[:, alive], moments(x_TC)[alive][:, alive], 5), (
        "a rank is lost to it at the most"
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_the_difference_of_a_weight_from_itself_is_a_product_of_zeros(rank: int) -> None:
    (left_RK,), basis_KC = shared_basis([torch.zeros(R, C)], [metric(0).float()], rank)
    assert bool(torch.isfinite(basis_KC).all()) and left_RK.count_nonzero() == 0


def test_what_is_given_is_not_changed() -> None:
    weights, metrics = [weight(0), weight(1)], [metric(0), metric(1)]
    before = [tensor.clone() for tensor in (*weights, *metrics)]
    shared_basis(weights, metrics, 3)
    assert all(torch.equal(a, b) for a, b in zip((*weights, *metrics), before, strict=True))
