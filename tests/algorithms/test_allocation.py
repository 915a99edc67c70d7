"""The allocation against all choices there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.algorithms.allocation import Option, _frontier, allocate

OPTIONS = st.lists(
    st.builds(Option, st.integers(0, 8), st.integers(-3, 20).map(float), st.integers(0, 30)),
    min_size=1,
    max_size=5,
)
LAYERS = st.lists(OPTIONS, min_size=1, max_size=4)


def total(chosen: list[Option]) -> tuple[float, int]:
    return sum(option.loss for option in chosen), sum(option.parameters for option in chosen)


def convex(layers: int, widths: int, step: int = 64) -> list[list[Option]]:
    """Layers of different importance, whose loss falls ever more slowly."""
    return [
        [
            Option(step * w, (1 + layer % 5) * math.exp(-w * (1 + layer % 3) / widths), 3 * 48 * step * w)
            for w in range(1, widths + 1)
        ]
        for layer in range(layers)
    ]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layers=LAYERS, budget=st.integers(0, 120), multiple=st.sampled_from([1, 2, 3]))
def test_no_choice_there_is_loses_less_or_as_much_with_fewer_parameters(
    layers: list[list[Option]], budget: int, multiple: int
) -> None:
    every = [
        total(list(chosen))
        for chosen in itertools.product(*layers)
        if all(option.width % multiple == 0 for option in chosen) and total(list(chosen))[1] <= budget
    ]
    if not every:
        with pytest.raises(ValueError, match=r"no width that is a multiple|the smallest layers there are"):
            allocate(layers, budget, multiple=multiple)
        return
    found = allocate(layers, budget, multiple=multiple)
    assert all(
        option in options and option.width % multiple == 0
        for option, options in zip(found, layers, strict=True)
    )
    assert total(found) == min(every)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 9)), min_size=1, max_size=30),
    most=st.integers(9, 20),
)
def test_the_frontier_is_every_pair_once_that_no_other_beats(pairs: list[tuple[int, int]], most: int) -> None:
    spent, loss = torch.tensor(pairs).T
    found = _frontier(spent, loss.double(), most).tolist()
    unbeaten = {
        own for own in pairs if not any(p != own and p[0] <= own[0] and p[1] <= own[1] for p in pairs)
    }
    assert [pairs[place] for place in found] == sorted(unbeaten)
    assert all(pairs.index(pairs[place]) == place for place in found), "of equals the first"


def test_a_larger_budget_never_loses_more() -> None:
    layers = convex(6, 20)
    least, most = (sum(options[place].parameters for options in layers) for place in (0, -1))
    losses = [total(allocate(layers, budget))[0] for budget in range(least, most + 1, 9216)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]
    assert allocate(layers, most) == [options[-1] for options in layers]


def test_where_losses_are_convex_it_is_what_taking_the_best_step_each_time_gives() -> None:
    layers = convex(7, 12)
    width = [0] * 7
    for _ in range(30):
        gains = [o[w].loss - o[w + 1].loss if w + 1 < 12 else 0.0 for o, w in zip(layers, width, strict=True)]
        width[gains.index(max(gains))] += 1
    greedy = [options[w] for options, w in zip(layers, width, strict=True)]
    assert total(allocate(layers, total(greedy)[1]))[0] == pytest.approx(total(greedy)[0], rel=1e-12)


def test_layers_that_matter_more_stay_wider() -> None:
    layers = [[Option(w, gain * 0.5**w, w) for w in range(1, 9)] for gain in (1, 10, 100)]
    widths = [option.width for option in allocate(layers, 12)]
    assert widths == sorted(widths) and sum(widths) == 12 and widths[0] < widths[2]


def test_twice_the_same_is_twice_the_same_choice_also_among_equals() -> None:
    # every spread of a budget loses the same
    layers = [[Option(w, 8.0 - w, w) for w in range(1, 9)] for _ in range(6)]
    first = allocate(layers, 30)
    assert all(allocate(layers, 30) == first for _ in range(3)) and total(first) == (18, 30)


def test_many_layers_of_many_widths_are_exact_to_the_last_parameter() -> None:
    layers = convex(24, 60)
    budget = sum(options[-1].parameters for options in layers) // 2
    loss, parameters = total(allocate(layers, budget, multiple=128))
    assert budget - 3 * 48 * 128 < parameters <= budget
    assert all(option.width % 128 == 0 for option in allocate(layers, budget, multiple=128))
    assert total(allocate(layers, budget))[0] < loss, "finer widths could not be used"


def test_what_cannot_be_met_is_an_error_that_says_why() -> None:
    layers = [[Option(64, 1.0, 100), Option(96, 0.5, 150)], [Option(96, 2.0, 300)]]
    with pytest.raises(
        ValueError, match="the smallest layers there are have 400 parameters; the budget is 399"
    ):
        allocate(layers, 399)
    with pytest.raises(ValueError, match="layer 1 has no width that is a multiple of 64"):
        allocate(layers, 1000, multiple=64)
    with pytest.raises(ValueError, match="layer 1 has a loss that is not finite"):
        allocate([layers[0], [Option(64, math.nan, 1), Option(32, 1.0, 1)]], 1000)


def test_no_layers_need_no_parameters() -> None:
    assert allocate([], 0) == []
