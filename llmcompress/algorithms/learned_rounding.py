"""Rounding learned on the output of a whole layer, by gradient descent from GPTQ's solution.

GPTQ solves one linear at a time. Here the codes and scales of all linears of a layer are trained together, so
that they make up for each other's errors and for those of earlier layers. A weight is a *position* on its
grid: 3.25 is a quarter of the way from level 3 to level 4. The forward pass rounds it; the backward pass
gives it the gradient of its rounded value. So steps are in units of the local code spacing and mean the same
everywhere on an uneven grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.quantize_weight import RoundedWeight, Snap
from llmcompress.algorithms.scales import groups_of, spread

RATE = 1.25e-3  # first step in code spacings; with eight times this, noise undoes half the gain of 200 steps
SCALE_RATE = 2e-3  # first step of a scale, relative to itself
Loss = Callable[[Mapping[str, Tensor], int], Tensor]  # (weights [R, C] by name, step) -> scalar


def _round(position_RC: Tensor, scale_RG: Tensor, grid: Grid) -> Tensor:
    """Return the weights [R, C] that the positions round to."""
    return _Round.apply(position_RC, scale_RG, grid)  # type: ignore[no-any-return, no-untyped-call]


def _snapped(scale_RG: Tensor, snap: Snap | None) -> Tensor:
    """Return the storable scales, with the gradient of the scales themselves (straight-through)."""
    return scale_RG if snap is None else scale_RG + (snap(scale_RG.detach()) - scale_RG.detach())


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


def start_position(W_RC: Tensor, start: RoundedWeight, grid: Grid) -> Tensor:
    """Return the position nearest to W's own that still rounds to the codes of `start`."""
    own = grid.position(W_RC / spread(start.scale_RG, W_RC.shape[1] // start.scale_RG.shape[1]))
    return own.clamp(start.index_RC - 0.499, start.index_RC + 0.499)


def learn(
    weights: Mapping[str, Tensor],
    starts: Mapping[str, RoundedWeight],
    grids: Mapping[str, Grid],
    loss: Loss,
    *,
    steps: int,
    snaps: Mapping[str, Snap] | None = None,
    rate: float = RATE,
    scale_rate: float = SCALE_RATE,
    add: Callable[..., None] = lambda *gradients: None,
) -> dict[str, RoundedWeight]:
    """Return the codes and scales of all `weights` after `steps` of Adam on `loss`, under a cosine schedule.

    Each weight has its own grid. With `snaps`, codes are trained under the storable scales nearest to the
    trained ones; the scales are returned before snapping. `rate` is the size of the first step in code
    spacings, `scale_rate` that of a scale relative to itself. If `loss` is one process's part of a sum, `add`
    replaces gradients by their sums over all processes.

    Source: the idea of SignRound, Cheng et al. 2023, arXiv:2309.05516. Differs: on bitsandbytes' uneven
    grids, in units of the local spacing, started from GPTQ, with Adam, and under whatever metric `loss` has.
    """
    positions = {
        name: start_position(weights[name], start, grids[name]).requires_grad_()
        for name, start in starts.items()
    }
    gains = {name: torch.zeros_like(start.scale_RG).requires_grad_() for name, start in starts.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": list(positions.values()), "lr": rate},
            {"params": list(gains.values()), "lr": scale_rate},
        ],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    snap = (snaps or {}).get
    for step in range(steps):
        scales = {name: _snapped(starts[name].scale_RG * (1 + gains[name]), snap(name)) for name in starts}
        rounded = {name: _round(positions[name], scales[name], grids[name]) for name in starts}
        optimizer.zero_grad()
        loss(rounded, step).backward()
        add(*(parameter.grad for parameter in (*positions.values(), *gains.values())))
        optimizer.step()
        schedule.step()
    found = {}
    for name, start in starts.items():
        index_RC = positions[name].detach().round().long().clamp_(0, len(grids[name].levels) - 1)
        found[name] = RoundedWeight(index_RC, start.scale_RG * (1 + gains[name].detach()))
    return found
