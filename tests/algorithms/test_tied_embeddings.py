"""One matrix for two against plain solves of its normal equations, row by row and channel by channel, in
float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms import tied_embeddings
from llmcompress.algorithms.tied_embeddings import DAMP, GAIN_DAMP, fit_gain, fit_rows, tie
from tests.algorithms.test_hessian import inputs, moments
from tests.models import noise

V, D = 23, 7


class Problem(NamedTuple):
    """Two matrices [V, D], how much each row counts, and both metrics, float64."""

    E: Tensor
    O: Tensor  # noqa: E741
    seen: Tensor
    said: Tensor
    F: Tensor
    H: Tensor


def problem(seed: int, *, tokens: int = 100) -> Problem:
    """A head that has something of the embedding, on channels of another size; metrics of so many tokens."""
    E = noise(V, D, seed=seed).double()
    O = (E * (1 + 0.5 * noise(D, seed=seed + 1)) + 0.7 * noise(V, D, seed=seed + 2)).double()  # noqa: E741
    seen, said = (noise(V, seed=seed + number).double().exp() for number in (3, 4))
    F, H = (moments(inputs(tokens, D, seed + number).double()) for number in (5, 6))
    return Problem(E, O, seen, said, F, H)


def gain_of(seed: int) -> Tensor:
    return 1 + 0.3 * noise(D, seed=seed).double()


def damping(p: Problem) -> Tensor:
    """F as `fit_rows` has it."""
    return p.F + DAMP * p.F.diagonal().mean() * torch.eye(D, dtype=torch.float64)


def lost(W_VD: Tensor, target_VD: Tensor, weight_V: Tensor, metric_DD: Tensor) -> float:
    """The sum over rows of weight e M e^T."""
    return sum(
        float(weight * (e @ metric_DD @ e)) for weight, e in zip(weight_V, W_VD - target_VD, strict=True)
    )


def objective(p: Problem, M_VD: Tensor, gain_D: Tensor, balance: float) -> float:
    """What `tie` minimises, spelled out: both metrics scaled to the mean size of their matrix, rows to a mean
    weight of one."""
    of_E, of_O = (torch.stack([row @ m @ row for row in W]).mean() for W, m in ((p.E, p.F), (p.O, p.H)))
    of_embedding = lost(M_VD, p.E, p.seen / p.seen.mean(), p.F / of_E)
    return balance * of_embedding + lost(M_VD * gain_D, p.O, p.said / p.said.mean(), p.H / of_O)


# fit_rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), tokens=st.sampled_from([3, 100]))
def test_each_row_solves_its_own_normal_equations(seed: int, tokens: int) -> None:
    p, g = problem(seed, tokens=tokens), gain_of(seed)
    A, G = damping(p), g.diag()
    rows = [
        torch.linalg.solve(seen * A + said * G @ p.H @ G, seen * A @ e + said * G @ p.H @ o)
        for e, o, seen, said in zip(p.E, p.O, p.seen, p.said, strict=True)
    ]
    torch.testing.assert_close(fit_rows(*p, gain_D=g), torch.stack(rows), rtol=1e-6, atol=1e-7)


def test_no_rows_nearby_lose_less() -> None:
    p, g = problem(0), gain_of(0)
    M, A = fit_rows(*p, gain_D=g), damping(p)

    def of(W: Tensor) -> float:
        return lost(W, p.E, p.seen, A) + lost(W * g, p.O, p.said, p.H)

    assert all(of(M) < of(M + 1e-3 * noise(V, D, seed=seed)) for seed in range(20))
    assert of(M) < min(of(p.E), of(p.O), of(p.O / g))


def test_rows_that_only_one_of_the_two_needs_are_that_ones() -> None:
    p, g = problem(1), gain_of(1)
    lookup = fit_rows(*p._replace(said=torch.full_like(p.said, 1e-12)), gain_D=g)
    torch.testing.assert_close(lookup, p.E, rtol=1e-6, atol=1e-8)
    output = fit_rows(*p._replace(seen=torch.full_like(p.seen, 1e-12)), gain_D=g)
    torch.testing.assert_close(output * g, p.O, rtol=1e-5, atol=1e-7)


def test_what_nothing_feels_and_nothing_reads_stays_as_the_embedding_has_it() -> None:
    p = problem(2)
    p.F[3], p.F[:, 3], p.H[3], p.H[:, 3] = 0, 0, 0, 0
    M = fit_rows(*p, gain_D=torch.ones(D, dtype=torch.float64))
    torch.testing.assert_close(M[:, 3], p.E[:, 3], rtol=1e-6, atol=1e-8)
    assert float((M - p.E)[:, :3].abs().max()) > 0.1


# fit_gain


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999))
def test_the_gain_is_the_least_squares_one(seed: int) -> None:
    """Every row and direction of the metric a sample of its own, and the pull towards 1 one for each
    channel."""
    p = problem(seed)
    R_DD = torch.linalg.cholesky(p.H)
    samples = [said.sqrt() * R_DD.T * m for m, said in zip(p.E, p.said, strict=True)]
    wanted = [said.sqrt() * R_DD.T @ o for o, said in zip(p.O, p.said, strict=True)]
    sizes = torch.stack([(p.said * p.E[:, d].square()).sum() * p.H[d, d] for d in range(D)])
    pull = (GAIN_DAMP * sizes.mean()).sqrt() * torch.eye(D, dtype=torch.float64)
    found = torch.linalg.lstsq(
        torch.cat([*samples, pull]), torch.cat([*wanted, pull.sum(1)])[:, None]
    ).solution[:, 0]
    torch.testing.assert_close(fit_gain(p.E, p.O, p.said, p.H), found, rtol=1e-6, atol=1e-8)


def test_a_gain_that_makes_the_one_the_other_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    p, g = problem(0), gain_of(0)
    pulled = fit_gain(p.E, p.E * g, p.said, p.H)
    monkeypatch.setattr(tied_embeddings, "GAIN_DAMP", 0.0)
    torch.testing.assert_close(fit_gain(p.E, p.E * g, p.said, p.H), g)
    # of a channel that is hardly there the pull towards 1 decides
    large = p.H.diagonal() > 0.1 * p.H.diagonal().mean()
    torch.testing.assert_close(pulled[large], g[large], rtol=0, atol=0.02)


def test_a_channel_that_is_not_there_keeps_its_gain() -> None:
    p = problem(0)
    p.E[:, 2] = 0
    g = fit_gain(p.E, p.O, p.said, p.H)
    assert bool(torch.isfinite(g).all()) and float(g[2]) == pytest.approx(1)


# tie


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("balance", [0.01, 0.25, 1.0, 10.0])
def test_no_round_is_worse_than_the_one_before(
    seed: int, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(seed)
    plain = [objective(p, *tie(*p, balance, rounds=rounds), balance) for rounds in range(12)]
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(plain))
    # or what is minimised has a pull towards 1 beside this objective
    monkeypatch.setattr(tied_embeddings, "GAIN_DAMP", 0.0)
    monkeypatch.setattr(tied_embeddings, "DAMP", 1e-13)
    exact = [objective(p, *tie(*p, balance, rounds=rounds), balance) for rounds in range(12)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(exact))
    assert exact[-1] < exact[0]
    assert plain[-1] == pytest.approx(exact[-1], rel=0.05), "the damping is small"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("balance", [0.01, 0.25, 1.0, 10.0])
@pytest.mark.parametrize("gain", [True, False])
def test_the_fit_loses_less_than_either_matrix_and_than_their_mean(
    seed: int, balance: float, gain: bool
) -> None:
    p, one = problem(seed), torch.ones(D, dtype=torch.float64)
    M, g = tie(*p, balance, gain=gain)
    found = objective(p, M, g, balance)
    assert found < min(objective(p, W, one, balance) for W in (p.E, p.O, (p.E + p.O) / 2))
    assert gain != torch.equal(g, one)
    assert not gain or found < objective(p, *tie(*p, balance, gain=False), balance), "a gain is free"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_two_equal_matrices_it_is_that_matrix(dtype: torch.dtype) -> None:
    p = problem(0)
    M, g = tie(*Problem(*(part.to(dtype) for part in p._replace(O=p.E))), 0.25)
    assert M.dtype == g.dtype == dtype
    torch.testing.assert_close(M, p.E.to(dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g, torch.ones(D, dtype=dtype), rtol=0, atol=1e-6)


def test_the_balance_leads_from_the_heads_outputs_to_the_embedding() -> None:
    p = problem(0)
    M, g = tie(*p, 1e-9)
    torch.testing.assert_close(M * g, p.O, rtol=1e-4, atol=1e-4)
    M, _ = tie(*p, 1e9)
    torch.testing.assert_close(M, p.E, rtol=1e-4, atol=1e-4)
    both = [tie(*p, balance) for balance in (0.01, 0.1, 1.0, 10.0)]
    of_embedding = [lost(M, p.E, p.seen, p.F) for M, _ in both]
    of_head = [lost(M * g, p.O, p.said, p.H) for M, g in both]
    assert of_embedding == sorted(of_embedding, reverse=True) and of_head == sorted(of_head)


def test_the_sizes_of_metrics_and_weights_do_not_matter() -> None:
    p = problem(0)
    expected = tie(*p, 0.25)
    found = tie(*p._replace(seen=7 * p.seen, said=p.said / 9, F=1e-6 * p.F, H=1e5 * p.H), 0.25)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 3])
def test_metrics_of_few_tokens_give_finite_matrices(tokens: int) -> None:
    p = problem(0, tokens=tokens)
    M, g = tie(*Problem(*(part.float() for part in p)), 0.25)
    assert bool(torch.isfinite(M).all()) and bool(torch.isfinite(g).all())
    assert objective(p, M.double(), g.double(), 0.25) < objective(
        p, p.E, torch.ones(D, dtype=torch.float64), 0.25
    )


def test_what_is_given_is_not_changed() -> None:
    p = problem(0)
    before = [part.clone() for part in p]
    tie(*p, 0.25)
    fit_rows(*p, gain_D=gain_of(0))
    fit_gain(p.E, p.O, p.said, p.H)
    assert all(torch.equal(a, b) for a, b in zip(p, before, strict=True))
