"""Codebooks in a learned rounding: where they start, what gradient they follow, and what they gain."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms.codebook import Palette, look_up, nearest, solve_codebook
from llmcompress.algorithms.learned_codebook import InCodebooks
from llmcompress.algorithms.learned_rounding import learn
from tests.algorithms.test_codebook import half, levels_of
from tests.algorithms.test_gptq import problem

R, C, L = 7, 24, 8


def start(rows: int, seed: int = 0) -> tuple[Tensor, InCodebooks]:
    """Weights, and any codes in random codebooks."""
    levels_GL = half(levels_of(seed, -(-R // rows), L))
    index = torch.randint(L, (R, C), generator=torch.Generator().manual_seed(seed))
    return problem(seed, R, C)[0], InCodebooks(Palette(index, levels_GL, rows), half)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_training_starts_at_exactly_the_codes_and_levels_of_the_start(rows: int) -> None:
    W_RC, books = start(rows)
    position, gain = books.position(W_RC), books.gain()
    assert torch.equal(position.round().long(), books.palette.index_RC)
    assert torch.equal(books.weight(position, gain), books.palette.weight())
    end = books.ended(position, gain)
    assert torch.equal(end.palette.index_RC, books.palette.index_RC)
    assert torch.equal(end.palette.levels_GL, books.palette.levels_GL)


def test_a_weight_whose_code_is_the_nearest_starts_at_its_own_position() -> None:
    W_RC, books = start(3)
    levels_GL = books.palette.levels_GL
    W_RC = W_RC.clamp(levels_GL.min(1).values.max(), levels_GL.max(1).values.min())
    books = InCodebooks(Palette(nearest(W_RC, levels_GL, 3), levels_GL, 3), half)
    position = books.position(W_RC)
    low = look_up(position.floor().long(), levels_GL, 3)
    high = look_up(position.ceil().long(), levels_GL, 3)
    torch.testing.assert_close(low + (position - position.floor()) * (high - low), W_RC, rtol=1e-2, atol=1e-4)


def test_levels_that_are_equal_leave_finite_positions() -> None:
    W_RC, books = start(1)
    books.palette.levels_GL[:, 3:] = books.palette.levels_GL[:, 3:4]
    position = books.position(W_RC)
    assert bool(position.isfinite().all())
    assert torch.equal(position.round().long(), books.palette.index_RC)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_gradient_is_the_straight_through_one(rows: int) -> None:
    W_RC, books = start(rows)
    position, gain = books.position(W_RC).requires_grad_(), books.gain().requires_grad_()
    weigh = torch.randn(C, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64).T
    books.weight(position, gain).backward(weigh)
    levels_GL, index = books.palette.levels_GL, books.palette.index_RC
    above = levels_GL.gather(1, (torch.arange(L) + 1).clamp(max=L - 1).expand_as(levels_GL))
    below = levels_GL.gather(1, (torch.arange(L) - 1).clamp(min=0).expand_as(levels_GL))
    spacing_GL = (above - below) / torch.tensor([1.0, *[2.0] * (L - 2), 1.0])
    by_level = torch.zeros_like(levels_GL)
    for r in range(R):
        by_level[r // rows].index_add_(0, index[r], weigh[r])
    assert position.grad is not None and gain.grad is not None
    torch.testing.assert_close(position.grad, weigh * look_up(index, spacing_GL, rows))
    torch.testing.assert_close(gain.grad, by_level * spacing_GL)


def test_levels_that_cross_are_sorted_with_their_codes() -> None:
    W_RC, books = start(3)
    position, gain = books.position(W_RC), books.gain()
    gain[:, 2] = 3.0
    end = books.ended(position, gain)
    assert torch.equal(end.palette.levels_GL.sort(dim=1).values, end.palette.levels_GL)
    assert not torch.equal(end.palette.index_RC, books.palette.index_RC)
    assert torch.equal(end.palette.weight(), books.weight(position, gain))


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_learns_to_make_up_for_another_that_is_added_to_it(seed: int) -> None:
    X_TC = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
    A_RC, B_RC = (problem(seed + offset)[0].float() for offset in (0, 10))
    rough = torch.where(A_RC > 0, 1, -1) * A_RC.abs().mean(1, keepdim=True)  # one bit per weight
    palette = solve_codebook(B_RC, X_TC.T @ X_TC / 256, L, 1, snap=half)

    def loss(rounded: Mapping[str, Tensor], step: int = 0) -> Tensor:
        return (X_TC @ (rounded["b"] + rough - A_RC - B_RC).T).square().sum(1).mean()

    end = learn({"b": B_RC}, {"b": InCodebooks(palette, half)}, loss, steps=100, rate=0.01)["b"]
    assert isinstance(end, InCodebooks)
    assert torch.equal(half(end.palette.levels_GL), end.palette.levels_GL)
    before, after = (loss({"b": found.weight()}) for found in (palette, end.palette))
    assert after < 0.8 * before
