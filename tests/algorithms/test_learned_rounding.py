"""Learned rounding: where it starts, what gradient it follows, and what it gains on losses that can be
written down.

It is for a loss that is not the one GPTQ solved for: errors of other linears, inputs that drifted. There it
gains much, and that is shown. On GPTQ's own objective the straight-through gradient has a floor: steps large
enough to change codes end above GPTQ (which is why the stage compares and keeps the better), and only the
scales are left to gain by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms.gptq import gptq
from llmcompress.algorithms.grids import GridFormat, grid
from llmcompress.algorithms.learned_rounding import Loss, OnGrid, _round, learn
from llmcompress.algorithms.quantize_weight import RoundedWeight, solve
from llmcompress.algorithms.scales import groups_of, search_scales, spread
from tests.algorithms.test_gptq import nearest, problem

FORMATS: tuple[GridFormat, ...] = ("nf4", "fp4", "q4_0", "iq4_nl")
BLOCK = 16


def linear(seed: int, format: GridFormat) -> tuple[Tensor, Tensor, RoundedWeight]:
    """Weights, moments and the solution of GPTQ, float32."""
    W_RC, H_CC = (x.float() for x in problem(seed))
    S_RG = search_scales(W_RC, H_CC.diagonal(), grid(format), BLOCK)
    return W_RC, H_CC, RoundedWeight(gptq(W_RC, H_CC, S_RG, grid(format)), S_RG)


def wrong(W_RC: Tensor, Q_RC: Tensor, H_CC: Tensor) -> Tensor:
    """tr(E H E^T), with gradient."""
    E = W_RC - Q_RC
    return ((E @ H_CC) * E).sum()


def learned(
    weights: Mapping[str, Tensor], starts: Mapping[str, OnGrid], loss: Loss, **settings: Any
) -> dict[str, RoundedWeight]:
    """The codes and scales that a training of linears on grids ends in."""
    ends = dict[str, RoundedWeight]()
    for name, end in learn(weights, starts, loss, **settings).items():
        assert isinstance(end, OnGrid)
        ends[name] = end.rounded
    return ends


def one_linear(
    W_RC: Tensor, H_CC: Tensor, start: RoundedWeight, format: GridFormat, steps: int, rate: float = 0.01
) -> RoundedWeight:
    def loss(rounded: Mapping[str, Tensor], step: int) -> Tensor:
        return wrong(W_RC, rounded["linear"], H_CC)

    starts = {"linear": OnGrid(start, grid(format))}
    return learned({"linear": W_RC}, starts, loss, steps=steps, rate=rate, gain_rate=1e-3)["linear"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_training_starts_at_exactly_the_codes_of_the_start(format: GridFormat, seed: int) -> None:
    W_RC, _, start = linear(seed, format)
    position = OnGrid(start, grid(format)).position(W_RC)
    assert torch.equal(position.round().long(), start.index_RC)
    assert torch.equal(_round(position, start.scale_RG, grid(format)), start.weight(grid(format)))


@pytest.mark.parametrize("format", FORMATS)
def test_training_starts_at_the_codes_of_any_start_however_far_from_the_weights(format: GridFormat) -> None:
    W_RC, _, start = linear(0, format)
    generator = torch.Generator().manual_seed(0)
    anywhere = RoundedWeight(
        torch.randint(len(grid(format).levels), W_RC.shape, generator=generator), start.scale_RG
    )
    assert torch.equal(OnGrid(anywhere, grid(format)).position(W_RC).round().long(), anywhere.index_RC)


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_whose_code_is_the_nearest_starts_at_its_own_position(format: GridFormat) -> None:
    W_RC, _, start = linear(1, format)
    position = OnGrid(start, grid(format)).position(W_RC)
    own = grid(format).position(W_RC / spread(start.scale_RG, BLOCK))
    kept = (own - start.index_RC).abs() < 0.499
    assert torch.equal(position[kept], own[kept])
    assert bool((position[~kept] - start.index_RC[~kept]).abs().isclose(torch.tensor(0.499), atol=1e-5).all())
    assert bool(kept[start.index_RC == nearest(W_RC, start.scale_RG, grid(format))].float().mean() > 0.95)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_the_gradient_is_the_straight_through_one(format: GridFormat, layout: str) -> None:
    levels, generator = grid(format), torch.Generator().manual_seed(2)
    top = len(levels.levels) - 1
    position = (torch.rand(6, 32, generator=generator) * (top + 1) - 0.5).requires_grad_()
    scale = torch.randn(6, 2, generator=generator).requires_grad_()
    weigh = (
        torch.randn(32, 6, generator=generator).T
        if layout == "columns"
        else torch.randn(6, 32, generator=generator)
    )
    if layout == "expanded":
        weigh = torch.ones(()).expand(6, 32)
    _round(position, scale, levels).backward(weigh)

    index = position.detach().round().long()
    S = spread(scale.detach(), BLOCK)
    above, below = levels.levels[(index + 1).clamp(max=top)], levels.levels[(index - 1).clamp(min=0)]
    step = (above - below) / torch.where((index == 0) | (index == top), 1, 2)
    assert position.grad is not None and scale.grad is not None
    torch.testing.assert_close(position.grad, weigh * step * S)
    torch.testing.assert_close(scale.grad, groups_of(weigh * levels.levels[index], BLOCK).sum(-1))


@pytest.mark.parametrize("format", FORMATS)
def test_a_position_off_the_grid_rounds_to_its_end(format: GridFormat) -> None:
    position = torch.tensor([[-3.0, -0.6, 15.7, 40.0]])
    first, last = 2 * grid(format).levels[[0, -1]]
    assert torch.equal(
        _round(position, torch.tensor([[2.0]]), grid(format)), torch.stack([first, first, last, last])[None]
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_of_one_goes_one_code_towards_the_loss(sign: float) -> None:
    levels, index = grid("nf4"), torch.tensor([[*range(1, 15), 4, 9]])
    way = torch.tensor([[1, -1] * 8])
    scale = torch.tensor([[0.3 * sign]])
    start, target = RoundedWeight(index, scale), RoundedWeight(index + way, scale).weight(levels)
    result = learned(
        {"a": start.weight(levels)},
        {"a": OnGrid(start, levels)},
        lambda rounded, step: (rounded["a"] - target).square().sum(),
        steps=1,
        rate=1.0,
        gain_rate=0.0,
    )["a"]
    assert torch.equal(result.index_RC, index + way)
    assert torch.equal(result.scale_RG, scale)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_steps_too_small_to_change_a_code_learn_the_scales_and_lose_nothing_on_gptqs_own_objective(
    format: GridFormat, seed: int
) -> None:
    W_RC, H_CC, start = linear(seed, format)
    result = one_linear(W_RC, H_CC, start, format, steps=100, rate=1e-5)
    assert torch.equal(result.index_RC, start.index_RC)
    before, after = (wrong(W_RC, x.weight(grid(format)), H_CC) for x in (start, result))
    assert after < 0.95 * before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_learning_from_nearest_rounding_finds_better_codes(format: GridFormat, seed: int) -> None:
    W_RC, H_CC, start = linear(seed, format)
    start = RoundedWeight(nearest(W_RC, start.scale_RG, grid(format)), start.scale_RG)
    result = one_linear(W_RC, H_CC, start, format, steps=100, rate=0.003)
    assert not torch.equal(result.index_RC, start.index_RC)
    before, after = (wrong(W_RC, x.weight(grid(format)), H_CC) for x in (start, result))
    assert after < 0.85 * before


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_result_is_on_the_grid_and_its_scales_have_moved(steps: int) -> None:
    W_RC, H_CC, start = linear(3, "fp4")
    result = one_linear(W_RC, H_CC, start, "fp4", steps)
    assert result.index_RC.dtype == torch.int64
    assert int(result.index_RC.min()) >= 0 and int(result.index_RC.max()) <= 14
    moved = (result.scale_RG / start.scale_RG - 1).abs()
    assert 0 < float(moved.max()) < 0.1
    assert not result.scale_RG.requires_grad


def test_the_arguments_are_left_as_they_were_and_the_result_is_the_same_again() -> None:
    W_RC, H_CC, start = linear(4, "nf4")
    given = (W_RC, H_CC, start.index_RC, start.scale_RG)
    before = [tensor.clone() for tensor in given]
    results = [one_linear(W_RC, H_CC, start, "nf4", 5) for _ in range(2)]
    assert all(map(torch.equal, given, before))
    assert not any(tensor.requires_grad for tensor in given)
    assert torch.equal(results[0].index_RC, results[1].index_RC) and torch.equal(
        results[0].scale_RG, results[1].scale_RG
    )


def test_the_loss_sees_every_step_once_and_the_codes_of_the_start_first() -> None:
    W_RC, H_CC, start = linear(5, "nf4")
    seen: list[int] = []

    def loss(rounded: Mapping[str, Tensor], step: int) -> Tensor:
        if not seen:
            assert torch.equal(rounded["linear"], start.weight(grid("nf4")))
        seen.append(step)
        return wrong(W_RC, rounded["linear"], H_CC)

    learned({"linear": W_RC}, {"linear": OnGrid(start, grid("nf4"))}, loss, steps=7)
    assert seen == list(range(7))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_linear_learns_to_make_up_for_another_that_is_added_to_it(format: GridFormat, seed: int) -> None:
    X_TC = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
    A_RC, B_RC = (problem(seed + offset)[0].float() for offset in (0, 10))
    rough = torch.where(A_RC > 0, 1, -1) * A_RC.abs().mean(1, keepdim=True)  # one bit a weight
    start = solve(B_RC, X_TC.T @ X_TC / 256, grid(format), BLOCK, snap=lambda S_RG: S_RG)

    def loss(rounded: Mapping[str, Tensor], step: int = 0) -> Tensor:
        return (X_TC @ (rounded["b"] + rough - A_RC - B_RC).T).square().sum(1).mean()

    starts = {"b": OnGrid(start, grid(format))}
    result = learned({"b": B_RC}, starts, loss, steps=100, rate=0.01, gain_rate=1e-3)["b"]
    before, after = (loss({"b": x.weight(grid(format))}) for x in (start, result))
    assert after < 0.8 * before


@pytest.mark.parametrize("format", FORMATS)
def test_linears_one_after_the_other_learn_together_on_drifted_inputs(format: GridFormat) -> None:
    """A small layer with a nonlinearity, whose inputs lost something in the layers before:
    down(relu(up(x)))."""
    generator = torch.Generator().manual_seed(0)
    X_TC = torch.randn(512, 64, generator=generator)
    drifted = (
        X_TC
        + 0.3 * torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator) / 8**0.5
    )
    weights = {
        "up": torch.randn(96, 64, generator=generator) / 8,
        "down": torch.randn(32, 96, generator=generator) / 10,
    }
    hidden = (drifted @ weights["up"].T).relu()
    moments = {"up": drifted.T @ drifted / 512, "down": hidden.T @ hidden / 512}
    starts = {
        name: solve(W_RC, moments[name], grid(format), BLOCK, snap=lambda S_RG: S_RG)
        for name, W_RC in weights.items()
    }
    target = (X_TC @ weights["up"].T).relu() @ weights["down"].T

    def loss(rounded: Mapping[str, Tensor], step: int = 0) -> Tensor:
        return ((drifted @ rounded["up"].T).relu() @ rounded["down"].T - target).square().sum(1).mean()

    on_grids = {name: OnGrid(start, grid(format)) for name, start in starts.items()}
    results = learned(weights, on_grids, loss, steps=100, rate=0.01, gain_rate=1e-3)
    before, after = (
        loss({name: x.weight(grid(format)) for name, x in found.items()}) for found in (starts, results)
    )
    assert set(results) == set(weights)
    assert after < 0.85 * before
