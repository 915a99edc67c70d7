"""Greedy removal against its plain form, which tries every unit at every step and fits all columns that are
left anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import damped
from llmcompress.algorithms.least_squares import repair
from llmcompress.algorithms.obs import Removal, remove
from llmcompress.algorithms.saliency import obs
from tests.algorithms.test_gptq import problem
from tests.algorithms.test_hessian import HARD, inputs, moments
from tests.algorithms.test_saliency import fitted_loss

DAMP = 0.01
UNITS = {
    "single columns": torch.arange(10),
    "equal layers": torch.arange(12) // 3,
    "scattered, of different sizes": torch.tensor([1, 0, -1, 2, 1, 1, 0, -1, 3, 2, 3, 0, 4]),
}


def linear(unit_C: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
    """Weights [7, C] and second moments, float64, and how many units there are."""
    return *problem(seed, R=7, C=len(unit_C)), int(unit_C.max()) + 1


def plain_removal(W_RC: Tensor, H_CC: Tensor, unit_C: Tensor, units: int) -> Removal:
    """At each step the unit without which the fit of all columns left loses least, found by trying all."""
    order: list[int] = []
    losses: list[float] = []
    for _ in range(units):
        rest = [unit for unit in range(units) if unit not in order]
        tried = [fitted_loss(W_RC, H_CC, torch.isin(unit_C, torch.tensor([*order, unit]))) for unit in rest]
        losses.append(min(tried))
        order.append(rest[tried.index(min(tried))])
    return Removal(torch.tensor(order), torch.tensor(losses, dtype=torch.float64), units)


@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", UNITS)
def test_units_go_in_the_order_and_at_the_loss_of_the_plain_form(case: str, seed: int, width: int) -> None:
    unit_C = UNITS[case]
    W_RC, H_CC, units = linear(unit_C, seed)
    found, expected = remove(W_RC, H_CC, unit_C, units, width=width), plain_removal(W_RC, H_CC, unit_C, units)
    assert found.order.tolist() == expected.order.tolist()
    torch.testing.assert_close(found.losses, expected.losses)


@pytest.mark.parametrize("case", UNITS)
def test_the_first_to_go_is_the_cheapest_by_obs(case: str) -> None:
    W_RC, H_CC, units = linear(UNITS[case], 5)
    cost, found = obs(W_RC, H_CC, UNITS[case], units), remove(W_RC, H_CC, UNITS[case], units)
    assert int(found.order[0]) == int(cost.argmin())
    torch.testing.assert_close(found.losses[0], cost.min())


@pytest.mark.parametrize("case", UNITS)
def test_the_loss_at_a_count_is_what_repair_leaves(case: str) -> None:
    unit_C = UNITS[case]
    W_RC, H_CC, units = linear(unit_C, 6)
    found, H = remove(W_RC, H_CC, unit_C, units, damp=DAMP), damped(H_CC, DAMP)
    for count in range(units + 1):
        kept = torch.nonzero(torch.isin(unit_C, torch.tensor([-1, *found.kept(count).tolist()]))).flatten()
        E_RC = W_RC.clone()
        E_RC[:, kept] -= repair(W_RC, H_CC, kept, DAMP)
        assert found.loss(count) == pytest.approx(float(((E_RC @ H) * E_RC).sum()), rel=1e-8, abs=1e-12)


def test_when_all_is_gone_the_whole_output_is_lost() -> None:
    W_RC, H_CC, units = linear(UNITS["equal layers"], 0)
    found, H = remove(W_RC, H_CC, UNITS["equal layers"], units, damp=DAMP), damped(H_CC, DAMP)
    torch.testing.assert_close(found.losses[-1], ((W_RC @ H) * W_RC).sum())


@pytest.mark.parametrize("seed", range(4))
def test_of_twins_one_stays_where_sorting_once_loses_both(seed: int) -> None:
    said = torch.randn(400, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    difference = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3]) * inputs(400, 4, seed).sign()
    W_RC, H_CC, unit_C = (
        torch.ones(3, 8, dtype=torch.float64),
        moments(torch.cat([said, said + difference], 1)),
        torch.arange(8),
    )
    found = remove(W_RC, H_CC, unit_C, 8, damp=1e-9)
    assert sorted(unit % 4 for unit in found.kept(4).tolist()) == [0, 1, 2, 3]
    once = obs(W_RC, H_CC, unit_C, 8, 1e-9).argsort()[:4]
    assert sorted(unit % 4 for unit in once.tolist()) == [0, 0, 1, 1]
    assert found.loss(4) < 1e-4 * fitted_loss(W_RC, H_CC, torch.isin(unit_C, once), 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), zero=st.sets(st.integers(0, 4)), case=st.sampled_from(sorted(UNITS)))
def test_units_of_zeros_go_first_and_cost_nothing(seed: int, zero: set[int], case: str) -> None:
    unit_C = UNITS[case]
    W_RC, H_CC, units = linear(unit_C, seed)
    zero &= set(range(units))
    W_RC[:, torch.isin(unit_C, torch.tensor(sorted(zero)))] = 0
    found = remove(W_RC, H_CC, unit_C, units)
    assert set(found.order[: len(zero)].tolist()) == zero
    assert found.losses[: len(zero)].count_nonzero() == 0 and bool((found.losses[len(zero) :] > 0).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)), width=st.integers(1, 16))
def test_renaming_the_units_renames_their_order(seed: int, order: list[int], width: int) -> None:
    unit_C, names = UNITS["equal layers"], torch.tensor(order)
    W_RC, H_CC, units = linear(unit_C, seed)
    found, renamed = remove(W_RC, H_CC, unit_C, units), remove(W_RC, H_CC, names[unit_C], units, width=width)
    assert renamed.order.tolist() == names[found.order].tolist()
    torch.testing.assert_close(renamed.losses, found.losses)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), case=st.sampled_from(sorted(UNITS)))
def test_more_kept_is_never_worse(seed: int, case: str) -> None:
    W_RC, H_CC, units = linear(UNITS[case], seed)
    found = remove(W_RC, H_CC, UNITS[case], units)
    losses = [found.loss(count) for count in range(units + 1)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0


def test_columns_of_no_unit_stay_and_make_up_for_others() -> None:
    unit_C = UNITS["scattered, of different sizes"]
    W_RC, H_CC, units = linear(unit_C, 0)
    own = unit_C >= 0
    with_others, alone = (
        remove(W_RC, H_CC, unit_C, units),
        remove(W_RC[:, own], H_CC[own][:, own], unit_C[own], units),
    )
    assert bool((with_others.losses < alone.losses).all())


def test_a_removal_stops_where_it_is_told_and_goes_the_same_way_until_then() -> None:
    W_RC, H_CC, units = linear(UNITS["single columns"], 0)
    whole, part = (remove(W_RC, H_CC, UNITS["single columns"], units, least=least) for least in (0, 7))
    assert torch.equal(part.order, whole.order[:3]) and torch.equal(part.losses, whole.losses[:3])
    assert part.kept(8).tolist() == sorted(set(range(10)) - set(whole.order[:2].tolist()))
    assert part.kept(10).tolist() == list(range(10)) and part.loss(10) == 0
    for count in (6, 11):
        with pytest.raises(ValueError, match=f"{count} units can't be kept: between 7 and 10 are known"):
            part.kept(count)
        with pytest.raises(ValueError, match="are known"):
            part.loss(count)


def test_a_removal_of_nothing_keeps_all() -> None:
    W_RC, H_CC, units = linear(UNITS["equal layers"], 0)
    found = remove(W_RC, H_CC, UNITS["equal layers"], units, least=units)
    assert len(found.order) == len(found.losses) == 0
    assert found.kept(units).tolist() == list(range(units)) and found.loss(units) == 0


@pytest.mark.parametrize("unit_C", [torch.tensor([0, 2, 3, 2]), torch.tensor([0, 2, 3, -1])])
def test_a_unit_without_columns_goes_first_and_costs_nothing(unit_C: Tensor) -> None:
    W_RC, H_CC, units = linear(unit_C, 0)
    found = remove(W_RC, H_CC, unit_C, units)
    assert int(found.order[0]) == 1 and found.losses[0] == 0 and bool((found.losses[1:] > 0).all())


@pytest.mark.parametrize("damp", [1e-6, 0.01])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("case", HARD)
def test_hard_moments_give_a_whole_order_and_finite_rising_losses(case: str, size: int, damp: float) -> None:
    columns = len(HARD[case])
    units = -(-columns // size)
    found = remove(inputs(7, columns, 3), HARD[case], torch.arange(columns) // size, units, damp=damp)
    assert sorted(found.order.tolist()) == list(range(units))
    assert bool(torch.isfinite(found.losses).all()) and bool((found.losses.diff() >= 0).all())


def test_units_whose_inputs_never_fire_go_first_and_cost_nothing() -> None:
    found = remove(inputs(7, 24, 3), HARD["dead channels"], torch.arange(24), 24)
    assert set(found.order[:2].tolist()) == {3, 20} and found.losses[1] == 0 < found.losses[2]


def test_weights_and_moments_are_left_as_they_are() -> None:
    W_RC, H_CC, units = linear(UNITS["equal layers"], 0)
    before = W_RC.clone(), H_CC.clone()
    remove(W_RC, H_CC, UNITS["equal layers"], units, width=1)
    assert torch.equal(W_RC, before[0]) and torch.equal(H_CC, before[1])
