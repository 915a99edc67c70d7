"""GPTQ and the descent against their plain forms, against all codes there are, and for what they promise.

Identities are shown in float64, where no sum decides differently for having been taken in another order; what
float32 adds is shown apart. Guaranteed is only that the descent never raises the objective: GPTQ itself is
greedy, and beats nearest rounding on correlated inputs as a rule, not by a theorem.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.gptq import descend, gptq
from llmcompress.algorithms.grids import Grid, GridFormat, grid
from llmcompress.algorithms.hessian import damped
from llmcompress.algorithms.scales import search_scales, spread

FORMATS: tuple[GridFormat, ...] = ("nf4", "fp4", "q4_0", "iq4_nl")
DAMP = 0.01


def precise(format: GridFormat) -> Grid:
    """The grid in float64."""
    single = grid(format)
    return Grid(single.levels.double(), single.middles.double(), single.codes)


def problem(seed: int, R: int = 32, C: int = 64, tokens: int = 256) -> tuple[Tensor, Tensor]:
    """Weights [R, C] and moments [C, C] of correlated inputs with some strong channels, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = (
        torch.randn(C, C, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -1.5, C, dtype=torch.float64)[:, None]
    )
    strength = torch.exp(torch.randn(C, generator=generator, dtype=torch.float64))
    X_TC = torch.randn(tokens, C, generator=generator, dtype=torch.float64) @ mix * strength
    return torch.randn(R, C, generator=generator, dtype=torch.float64) * 0.05, X_TC.T @ X_TC / tokens


def lost(W_RC: Tensor, index_RC: Tensor, S_RG: Tensor, H_CC: Tensor, levels: Grid) -> float:
    """tr(E H E^T) in float64."""
    Q_RC = levels.levels.double()[index_RC] * spread(S_RG, W_RC.shape[1] // S_RG.shape[1]).double()
    E_RC = W_RC.double() - Q_RC
    return float(((E_RC @ H_CC.double()) * E_RC).sum())


def nearest(W_RC: Tensor, S_RG: Tensor, levels: Grid) -> Tensor:
    return levels.nearest(W_RC / spread(S_RG, W_RC.shape[1] // S_RG.shape[1]))


def plain_gptq(W_RC: Tensor, H_CC: Tensor, S_RG: Tensor, levels: Grid) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323 as it reads, a column at a time, in activation order."""
    order = torch.argsort(H_CC.diagonal(), descending=True, stable=True)
    W, S = W_RC[:, order], spread(S_RG, W_RC.shape[1] // S_RG.shape[1])[:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(damped(H_CC, DAMP)[order][:, order]), upper=True)
    index = torch.empty(W.shape, dtype=torch.int64)
    for c in range(W.shape[1]):
        index[:, c] = levels.nearest(W[:, c] / S[:, c])
        error = (W[:, c] - levels.levels[index[:, c]] * S[:, c]) / U[c, c]
        W[:, c:] -= torch.outer(error, U[c, c:])
    return index[:, torch.argsort(order)]


def by_least_squares(W_RC: Tensor, H_CC: Tensor, S_RG: Tensor, levels: Grid) -> Tensor:
    """What Algorithm 1 stands for: after each column, those that are left make up for all rounded ones as
    well as they can."""
    order = torch.argsort(H_CC.diagonal(), descending=True, stable=True)
    W, S = W_RC[:, order], spread(S_RG, W_RC.shape[1] // S_RG.shape[1])[:, order]
    H, left = damped(H_CC, DAMP)[order][:, order], W.clone()
    index = torch.empty(W.shape, dtype=torch.int64)
    for c in range(W.shape[1]):
        index[:, c] = levels.nearest(left[:, c] / S[:, c])
        done, rest = slice(c + 1), slice(c + 1, None)
        error = W[:, done] - levels.levels[index[:, done]] * S[:, done]
        left[:, rest] = W[:, rest] + torch.linalg.solve(H[rest, rest], H[rest, done] @ error.T).T
    return index[:, torch.argsort(order)]


def plain_descent(W_RC: Tensor, H_CC: Tensor, index_RC: Tensor, S_RG: Tensor, levels: Grid) -> Tensor:
    """Each column in turn takes the best of all its levels, found by trying them, the whole objective
    computed anew."""
    index, S = index_RC.clone(), spread(S_RG, W_RC.shape[1] // S_RG.shape[1])
    for c in range(W_RC.shape[1]):
        every = index.repeat(len(levels.levels), 1, 1)  # [L, R, C]
        every[:, :, c] = torch.arange(len(levels.levels))[:, None]
        E = W_RC - levels.levels[every] * S
        index[:, c] = ((E @ H_CC) * E).sum(-1).argmin(0)
    return index


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [1, 8, 16, 64])
def test_gptq_gives_the_codes_of_the_plain_form(format: GridFormat, group_size: int) -> None:
    W_RC, H_CC = problem(group_size)
    levels = precise(format)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, group_size)
    assert torch.equal(gptq(W_RC, H_CC, S_RG, levels, width=16), plain_gptq(W_RC, H_CC, S_RG, levels))


@pytest.mark.parametrize("format", FORMATS)
def test_gptq_lets_the_columns_left_make_up_for_the_rounded_ones_in_the_best_way(format: GridFormat) -> None:
    W_RC, H_CC = problem(1, C=48)
    levels = precise(format)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 16)
    assert torch.equal(gptq(W_RC, H_CC, S_RG, levels), by_least_squares(W_RC, H_CC, S_RG, levels))


@pytest.mark.parametrize("seed", range(3))
def test_in_float32_few_codes_differ_and_the_objective_does_not(seed: int) -> None:
    W_RC, H_CC = problem(seed, R=64, C=128)
    levels = grid("nf4")
    S_RG = search_scales(W_RC.float(), H_CC.float().diagonal(), levels, 32)
    single = gptq(W_RC.float(), H_CC.float(), S_RG, levels)
    double = plain_gptq(W_RC, H_CC, S_RG.double(), precise("nf4"))
    assert float((single != double).float().mean()) <= 0.002
    assert lost(W_RC, single, S_RG, H_CC, levels) == pytest.approx(
        lost(W_RC, double, S_RG, H_CC, levels), rel=0.005
    )


@pytest.mark.parametrize("width", [1, 7, 16, 64, 1000])
def test_the_width_of_a_panel_changes_no_code(width: int) -> None:
    W_RC, H_CC = problem(2)
    levels = precise("nf4")
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 16)
    index = gptq(W_RC, H_CC, S_RG, levels)
    assert torch.equal(gptq(W_RC, H_CC, S_RG, levels, width=width), index)
    assert torch.equal(
        descend(W_RC, H_CC, index, S_RG, levels, width=width), descend(W_RC, H_CC, index, S_RG, levels)
    )


@pytest.mark.parametrize("format", FORMATS)
def test_without_correlation_gptq_is_nearest_rounding(format: GridFormat) -> None:
    W_RC, _ = problem(3)
    levels = grid(format)
    for H_CC in (torch.eye(64), torch.diag(torch.linspace(5, 0.1, 64)), torch.zeros(64, 64)):
        S_RG = search_scales(W_RC.float(), torch.ones(64), levels, 16)
        index = gptq(W_RC.float(), H_CC, S_RG, levels)
        assert torch.equal(index, nearest(W_RC.float(), S_RG, levels))
        assert torch.equal(descend(W_RC.float(), H_CC, index, S_RG, levels), index)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_on_the_grid_keep_their_codes(format: GridFormat) -> None:
    _, H_CC = problem(4)
    levels, generator = precise(format), torch.Generator().manual_seed(4)
    index = torch.randint(len(levels.levels), (32, 64), generator=generator)
    S_RG = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    W_RC = levels.levels[index] * spread(S_RG, 16)
    assert torch.equal(gptq(W_RC, H_CC, S_RG, levels), index)
    assert torch.equal(descend(W_RC, H_CC, index, S_RG, levels), index)


def test_dead_channels_are_rounded_to_nearest_and_touch_no_other() -> None:
    W_RC, H_CC = problem(5)
    levels, dead = precise("nf4"), torch.zeros(64, dtype=torch.bool)
    dead[[0, 17, 40, 63]] = True
    H_CC[dead], H_CC[:, dead] = 0, 0
    # a scale per weight, so that columns can be taken out
    S_RG = search_scales(W_RC, torch.ones(64), levels, 1)
    # the mean diagonal counts the dead channels too
    index = gptq(W_RC, H_CC, S_RG, levels, damp=DAMP * 64 / 60)
    assert torch.equal(index[:, dead], nearest(W_RC, S_RG, levels)[:, dead])
    assert torch.equal(
        index[:, ~dead], gptq(W_RC[:, ~dead], H_CC[~dead][:, ~dead], S_RG[:, ~dead], levels, damp=DAMP)
    )
    start = torch.zeros_like(index)
    assert torch.equal(descend(W_RC, H_CC, start, S_RG, levels)[:, dead], start[:, dead])


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_columns_are_enough(tokens: int) -> None:
    W_RC, H_CC = (x.float() for x in problem(6, tokens=tokens))
    levels = grid("nf4")
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 16)
    index = gptq(W_RC, H_CC, S_RG, levels)
    assert lost(W_RC, index, S_RG, H_CC, levels) < 0.2 * lost(
        W_RC, nearest(W_RC, S_RG, levels), S_RG, H_CC, levels
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 32])
def test_the_arguments_are_left_as_they_were(format: GridFormat, rows: int) -> None:
    W_RC, H_CC = problem(7, R=rows)
    levels = precise(format)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 16)
    index = nearest(W_RC, S_RG, levels)
    given = (W_RC, H_CC, S_RG, index)
    before = [tensor.clone() for tensor in given]
    gptq(W_RC, H_CC, S_RG, levels)
    moved = descend(W_RC, H_CC, index, S_RG, levels)
    assert not torch.equal(moved, index)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_descent_gives_the_codes_of_the_plain_form(format: GridFormat, seed: int) -> None:
    W_RC, H_CC = problem(seed, R=16, C=48)
    levels = precise(format)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 16)
    start = nearest(W_RC, S_RG, levels)
    assert torch.equal(
        descend(W_RC, H_CC, start, S_RG, levels, width=16), plain_descent(W_RC, H_CC, start, S_RG, levels)
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    R=st.integers(1, 5),
    G=st.integers(1, 4),
    group_size=st.integers(1, 6),
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    format=st.sampled_from(FORMATS),
)
def test_descent_from_any_codes_never_raises_the_objective(
    seed: int, R: int, G: int, group_size: int, tokens: int, width: int, format: GridFormat
) -> None:
    W_RC, H_CC = problem(seed, R, G * group_size, tokens)
    levels, generator = precise(format), torch.Generator().manual_seed(seed)
    S_RG = torch.randn(R, G, generator=generator, dtype=torch.float64) * 0.1
    index = torch.randint(len(levels.levels), W_RC.shape, generator=generator)
    for _ in range(3):
        moved = descend(W_RC, H_CC, index, S_RG, levels, width=width)
        before, after = (lost(W_RC, codes, S_RG, H_CC, levels) for codes in (index, moved))
        assert after <= before * (1 + 1e-9) + 1e-15
        index = moved


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), tokens=st.integers(1, 200))
def test_in_float32_descent_from_gptq_raises_the_objective_by_rounding_at_most(
    seed: int, tokens: int
) -> None:
    W_RC, H_CC = (x.float() for x in problem(seed, 8, 64, tokens))
    levels = grid("nf4")
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 16)
    index = gptq(W_RC, H_CC, S_RG, levels)
    whole = float(((W_RC @ H_CC) * W_RC).sum())
    moved = descend(W_RC, H_CC, index, S_RG, levels)
    assert lost(W_RC, moved, S_RG, H_CC, levels) <= lost(W_RC, index, S_RG, H_CC, levels) + 1e-6 * whole


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_where_descent_stops_no_single_code_can_be_changed_for_the_better(
    format: GridFormat, seed: int
) -> None:
    """Against all 16^4 codes of a row of four columns: not the best of all, which is not promised, but
    close."""
    W_RC, H_CC = problem(seed, R=1, C=4, tokens=20)
    levels = precise(format)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 4)
    count = len(levels.levels)
    every = torch.tensor(list(itertools.product(range(count), repeat=4)))
    E = W_RC - levels.levels[every] * S_RG
    objective = ((E @ H_CC) * E).sum(1)
    index = gptq(W_RC, H_CC, S_RG, levels)
    for _ in range(10):
        before, index = index, descend(W_RC, H_CC, index, S_RG, levels)
        if torch.equal(index, before):
            break
    else:
        pytest.fail("descent did not come to rest")
    found = lost(W_RC, index, S_RG, H_CC, levels)
    one_code_away = objective[(every != index).sum(1) == 1]
    assert len(one_code_away) == 4 * (count - 1)
    assert found <= float(one_code_away.min()) * (1 + 1e-9)
    typical = float(objective[((every - nearest(W_RC, S_RG, levels)).abs() <= 1).all(1)].mean())
    assert float(objective.min()) * (1 - 1e-9) <= found <= 0.5 * typical


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_on_correlated_inputs_gptq_beats_nearest_and_descent_beats_gptq(
    format: GridFormat, group_size: int, seed: int
) -> None:
    W_RC, H_CC = (x.float() for x in problem(seed))
    levels = grid(format)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, group_size)
    start = gptq(W_RC, H_CC, S_RG, levels)
    rounded = [nearest(W_RC, S_RG, levels), start, descend(W_RC, H_CC, start, S_RG, levels)]
    plain, greedy, descended = (lost(W_RC, index, S_RG, H_CC, levels) for index in rounded)
    assert descended < greedy < 0.7 * plain
