"""Which things are alike, and in which groups: against plain forms, planted groups, and least squares."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.layer_similarity import adjacent, agglomerate, cka, cosines, descend
from tests.models import noise


def turn(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix."""
    found: Tensor = torch.linalg.qr(noise(size, size, seed=seed)).Q
    return found


def kernels(A_TD: Tensor, B_TD: Tensor) -> float:
    """CKA as it is defined, of the two kernels over tokens [T, T], centred by a matrix, in float64."""
    tokens = len(A_TD)
    centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens
    K, L = (centre @ (Y @ Y.T) @ centre for Y in (A_TD.double(), B_TD.double()))
    return float((K * L).sum() / (K.norm() * L.norm()))


# likeness


def test_cosines_are_those_of_the_flattened_weights() -> None:
    weights = [noise(5, 9, seed=seed) * 10.0**seed for seed in range(4)]
    found = cosines(weights)
    for i, a in enumerate(weights):
        for j, b in enumerate(weights):
            expected = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)
            assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-6)


def test_cosines_do_not_see_the_size_of_a_weight_but_its_sign() -> None:
    W = noise(5, 9)
    expected = torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(cosines([W, 3 * W, -0.1 * W])[0], expected)
    assert bool(torch.isfinite(cosines([W, torch.zeros_like(W)])).all()), "a weight of zeros"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(3, 40),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
)
def test_cka_is_the_alignment_of_the_kernels_over_tokens(seed: int, tokens: int, widths: list[int]) -> None:
    outputs = [noise(tokens, width, seed=seed + width) + 2 for width in widths]
    found = cka(outputs)
    expected = torch.tensor([[kernels(a, b) for b in outputs] for a in outputs])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, found.T)
    assert float(found.min()) >= -1e-6 and float(found.max()) <= 1 + 1e-5


def test_outputs_that_are_turned_scaled_and_shifted_are_wholly_alike() -> None:
    Y = noise(200, 12) * torch.logspace(-1, 1, 12)
    others = [Y, 0.01 * Y @ turn(12, 1), -30 * Y @ turn(12, 2) + noise(12, seed=3)]
    torch.testing.assert_close(cka(others), torch.ones(3, 3), rtol=0, atol=1e-4)
    bent = cka([Y, Y * torch.logspace(2, -2, 12)])
    assert float(bent[0, 1]) < 0.9, "other than a turn and a scale"


def test_independent_outputs_are_not_alike_and_half_the_same_ones_are_half_so() -> None:
    a, b = noise(20000, 8, seed=1), noise(20000, 8, seed=2)
    assert float(cka([a, b])[0, 1]) < 0.01
    half = torch.cat([a[:, :4], b[:, 4:]], 1)
    assert float(cka([a, half])[0, 1]) == pytest.approx(0.5, abs=0.05)


def test_outputs_that_never_change_are_like_nothing() -> None:
    found = cka([noise(50, 8), torch.ones(50, 8)])
    assert bool(torch.isfinite(found).all()) and float(found[0, 1]) == pytest.approx(0, abs=1e-4)


# groups


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), own=st.lists(st.integers(0, 3), min_size=2, max_size=10))
def test_planted_groups_are_found_in_any_order(seed: int, own: list[int]) -> None:
    planted = [[i for i, group in enumerate(own) if group == number] for number in sorted(set(own))]
    of = torch.tensor(own)
    likeness = (of[:, None] == of).float() * 0.6 + 0.2 * noise(len(own), len(own), seed=seed).tanh()
    assert agglomerate((likeness + likeness.T) / 2, len(planted)) == sorted(planted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), things=st.integers(1, 12), data=st.data())
def test_there_are_as_many_groups_as_were_asked_for_and_all_are_in_one(
    seed: int, things: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, things))
    likeness = noise(things, things, seed=seed)
    groups = agglomerate(likeness + likeness.T, count)
    assert len(groups) == count and groups == sorted(sorted(group) for group in groups)
    assert sorted(thing for group in groups for thing in group) == list(range(things))


def test_groups_are_joined_by_the_mean_of_their_pairs_and_not_by_the_best_one() -> None:
    """2 is most like 1, but 0 and 1 are one by then, and 0 and 2 are not alike; so it goes to 3."""
    likeness = torch.tensor(
        [[1.0, 0.9, -0.5, 0.0], [0.9, 1.0, 0.8, 0.0], [-0.5, 0.8, 1.0, 0.2], [0.0, 0.0, 0.2, 1.0]]
    )
    assert agglomerate(likeness, 3) == [[0, 1], [2], [3]]
    assert agglomerate(likeness, 2) == [[0, 1], [2, 3]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(things=st.integers(1, 200), data=st.data())
def test_neighbours_are_grouped_in_equal_sizes(things: int, data: st.DataObject) -> None:
    groups = adjacent(things, data.draw(st.integers(1, things)))
    sizes = [len(group) for group in groups]
    assert [thing for group in groups for thing in group] == list(range(things))
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


# descent


def fit_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias by least squares."""
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    found = torch.linalg.lstsq(rows, y).solution
    return found[:-1], found[-1]


def problem() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x, y = noise(60, 4), noise(60, 3, seed=1) + 0.5
    return x, y, {"weight": 0.3 * noise(4, 3, seed=2), "bias": torch.zeros(3)}


def loss_of(tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (x @ tensors["weight"] + tensors["bias"] - y).square().mean()


def test_descent_ends_at_the_least_squares_solution_and_zeros_move() -> None:
    x, y, start = problem()
    found = descend(start, lambda tensors, step: loss_of(tensors, x, y), steps=400)
    weight, bias = fit_of(x, y)
    torch.testing.assert_close(found["weight"], weight, rtol=0, atol=2e-3)
    torch.testing.assert_close(found["bias"], bias, rtol=0, atol=2e-3)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_descent_is_the_same_each_time_and_leaves_its_start_alone() -> None:
    x, y, start = problem()
    before = {name: tensor.clone() for name, tensor in start.items()}
    first, second = (descend(start, lambda tensors, step: loss_of(tensors, x, y), steps=20) for _ in range(2))
    assert all(
        torch.equal(first[name], second[name]) and torch.equal(start[name], before[name]) for name in start
    )
    assert all(start[name].grad is None and not start[name].requires_grad for name in start)
    assert not any(torch.equal(first[name], start[name]) for name in start)


def test_each_step_is_given_its_number() -> None:
    x, y, start = problem()
    seen = list[int]()

    def loss(tensors: Mapping[str, Tensor], step: int) -> Tensor:
        seen.append(step)
        return loss_of(tensors, x, y)

    descend(start, loss, steps=7)
    assert seen == list(range(7))


def test_a_step_is_in_units_of_the_tensor() -> None:
    """Adam's first step is the rate itself: the same share of each tensor, of zeros of the mean size of
    all."""
    start = {"large": 100 * torch.ones(5), "small": 0.01 * torch.ones(5), "none": torch.zeros(5)}
    found = descend(
        start, lambda tensors, step: torch.stack([t.sum() for t in tensors.values()]).sum(), steps=1, rate=0.1
    )
    mean = (100 + 0.01) / 3
    for name, size in (("large", 100.0), ("small", 0.01), ("none", mean)):
        torch.testing.assert_close(found[name], start[name] - 0.1 * size, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_the_loss_does_not_see_stays() -> None:
    x, y, start = problem()
    found = descend(start | {"other": noise(3)}, lambda tensors, step: loss_of(tensors, x, y), steps=5)
    assert torch.equal(found["other"], noise(3))
