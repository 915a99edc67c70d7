"""Rounding learned on the output of a whole layer, by gradient descent from GPTQ's solution.

GPTQ solves one linear at a time. Here the codes and scales of all linears of a layer are trained together, so
that they make up for each other's errors and for those of earlier layers. A weight is a *position* on its
grid: 3.25 is a quarter of the way from level 3 to level 4. The forward pass rounds it; the backward pass
gives it the gradient of its rounded value. So steps are in units of the local code spacing and mean the same
everywhere on an uneven grid. What a position means is up to what is trained: codes on a grid here, codes in
codebooks in `learned_codebook`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.quantize_weight import RoundedWeight, Snap
from llmcompress.algorithms.scales import groups_of, spread

RATE = 1.25e-3  # first step in code spacings; with eight times this, noise undoes half the gain of 200 steps
GAIN_RATE = 2e-3  # first step of a scale, relative to itself, or of a level, in units of its spacing
Loss = Callable[[Mapping[str, Tensor], int], Tensor]  # (weights [R, C] by name, step) -> scalar


def _round(position_RC: Tensor, scale_RG: Tensor, grid: Grid) -> Tensor:
    """Return the weights [R, C] that the positions round to."""
    return _Round.apply(position_RC, scale_RG, grid)  # type: ignore[no-any-return, no-untyped-call]


def snapped(values: Tensor, snap: Snap | None) -> Tensor:
    """Return the storable scales or levels, with the gradient of the values themselves (straight-through)."""
    return values if snap is None else values + (snap(values.detach()) - values.detach())


def nearest_index(position_RC: Tensor, levels: int) -> Tensor:
    """Return the index (int64) of the level that each position rounds to, of so many."""
    return position_RC.detach().round().long().clamp_(0, levels - 1)


class _Round(torch.autograd.Function):
    """Map positions [R, C] and scales [R, G] to weights; the gradient passes the rounding as if it were the
    identity."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        group_size = position.shape[1] // scale.shape[1]
        index = position.round().clamp_(0, len(grid.levels) - 1).int().flatten()
        steps = grid.spacing(torch.arange(len(grid.levels), device=index.device))
        levels, step = (
            groups_of(table.index_select(0, index).view_as(position), group_size)
            for table in (grid.levels, steps)
        )
        ctx.save_for_backward(levels, step, scale)
        return (levels * scale[..., None]).view_as(position)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        levels, step, scale = ctx.saved_tensors
        groups = grad.view_as(levels)
        return (groups * step * scale[..., None]).view_as(grad), (groups * levels).sum(-1), None


def within(own_RC: Tensor, index_RC: Tensor) -> Tensor:
    """Return the positions nearest to a weight's own that still round to the codes of a start."""
    return own_RC.clamp(index_RC - 0.499, index_RC + 0.499)


class Trainable(Protocol):
    """A linear that is trained: what it starts from, and what its positions and gains stand for."""

    def position(self, W_RC: Tensor) -> Tensor:
        """The position nearest to W's own that still rounds to the codes of the start, [R, C]."""

    def gain(self) -> Tensor:
        """What is trained beside the positions, as it begins."""

    def weight(self, position_RC: Tensor, gain: Tensor) -> Tensor:
        """The weights [R, C] that positions round to under gains, with the gradient of both."""

    def ended(self, position_RC: Tensor, gain: Tensor) -> Trainable:
        """The same linear at the end of a training."""


@dataclass(frozen=True)
class OnGrid:
    """Codes and scales on a grid from which a training starts. With `snap`, codes are trained under the
    storable scales nearest to the trained ones. A gain [R, G] moves a scale, relative to itself."""

    rounded: RoundedWeight
    grid: Grid
    snap: Snap | None = None

    def position(self, W_RC: Tensor) -> Tensor:
        """The position nearest to W's own that still rounds to the codes of the start, [R, C]."""
        scale_RG = self.rounded.scale_RG
        own_RC = self.grid.position(W_RC / spread(scale_RG, W_RC.shape[1] // scale_RG.shape[1]))
        return within(own_RC, self.rounded.index_RC)

    def gain(self) -> Tensor:
        """What the scales begin at: zeros [R, G]."""
        return torch.zeros_like(self.rounded.scale_RG)

    def weight(self, position_RC: Tensor, gain: Tensor) -> Tensor:
        """The weights [R, C] that positions and scales round to; gradients pass the rounding of both."""
        return _round(position_RC, snapped(self.rounded.scale_RG * (1 + gain), self.snap), self.grid)

    def ended(self, position_RC: Tensor, gain: Tensor) -> OnGrid:
        """The codes, and the scales before snapping, at the end of a training."""
        index_RC = nearest_index(position_RC, len(self.grid.levels))
        return OnGrid(RoundedWeight(index_RC, self.rounded.scale_RG * (1 + gain)), self.grid, self.snap)


def learn(
    weights: Mapping[str, Tensor],
    starts: Mapping[str, Trainable],
    loss: Loss,
    *,
    steps: int,
    rate: float = RATE,
    gain_rate: float = GAIN_RATE,
    add: Callable[..., None] = lambda *gradients: None,
) -> dict[str, Trainable]:
    """Return all `weights` as they are after `steps` of Adam on `loss`, under a cosine schedule.

    `rate` is the size of the first step in code spacings, `gain_rate` that of a gain: of a scale relative to
    itself, of a level in units of its spacing. If `loss` is one process's part of a sum, `add` replaces
    gradients by their sums over all processes.

    Source: the idea of SignRound, Cheng et al. 2023, arXiv:2309.05516. Differs: on bitsandbytes' uneven
    grids and in codebooks, in units of the local spacing, started from GPTQ, with Adam, and under whatever
    metric `loss` has.
    """
    positions = {name: start.position(weights[name]).requires_grad_() for name, start in starts.items()}
    gains = {name: start.gain().requires_grad_() for name, start in starts.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": list(positions.values()), "lr": rate},
            {"params": list(gains.values()), "lr": gain_rate},
        ],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    for step in range(steps):
        rounded = {name: start.weight(positions[name], gains[name]) for name, start in starts.items()}
        optimizer.zero_grad()
        loss(rounded, step).backward()
        add(*(parameter.grad for parameter in (*positions.values(), *gains.values())))
        optimizer.step()
        schedule.step()
    return {
        name: start.ended(positions[name].detach(), gains[name].detach()) for name, start in starts.items()
    }
