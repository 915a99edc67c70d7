"""Codebooks as a learned rounding trains them: the level of each weight, and the levels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.codebook import Palette, Snap, look_up
from llmcompress.algorithms.codebook_loops import gathered, places
from llmcompress.algorithms.learned_rounding import nearest_index, snapped, within


@dataclass(frozen=True)
class InCodebooks:
    """Codebooks from which a training starts; `snap` makes levels storable.

    A position is between the levels of the codebook of its row, and a gain [G, L] moves a level, in units of
    the mean distance to its neighbours.
    """

    palette: Palette
    snap: Snap

    @cached_property
    def spacing_GL(self) -> Tensor:
        """The mean distance of each level to its neighbours at the start, [G, L]."""
        apart = self.palette.levels_GL.diff(dim=1)
        return torch.cat([apart[:, :1], (apart[:, 1:] + apart[:, :-1]) / 2, apart[:, -1:]], 1)

    def position(self, W_RC: Tensor) -> Tensor:
        """The position nearest to W's own that still rounds to the codes of the start, [R, C]."""
        levels_RL = self.palette.levels_GL.repeat_interleave(self.palette.rows, 0)[: len(W_RC)]
        W_RC = W_RC.clamp(levels_RL[:, :1], levels_RL[:, -1:]).contiguous()
        upper = torch.searchsorted(levels_RL, W_RC).clamp(1, levels_RL.shape[1] - 1)
        below, above = levels_RL.gather(1, upper - 1), levels_RL.gather(1, upper)
        share = torch.where(above > below, (W_RC - below) / (above - below), 0)
        return within(upper - 1 + share, self.palette.index_RC)

    def gain(self) -> Tensor:
        """What the levels begin at: zeros [G, L]."""
        return torch.zeros_like(self.palette.levels_GL)

    def weight(self, position_RC: Tensor, gain: Tensor) -> Tensor:
        """The weights [R, C] that positions and levels round to; gradients pass the rounding of both."""
        levels_GL = snapped(self._levels(gain), self.snap)
        return _Round.apply(position_RC, levels_GL, self.spacing_GL, self.palette.rows)  # type: ignore[no-any-return, no-untyped-call]

    def ended(self, position_RC: Tensor, gain: Tensor) -> InCodebooks:
        """The codebooks at the end of a training: storable levels in ascending order, and the codes."""
        index_RC, rows = nearest_index(position_RC, gain.shape[1]), self.palette.rows
        levels_GL, order = self.snap(self._levels(gain)).sort(dim=1, stable=True)
        return InCodebooks(Palette(look_up(index_RC, order.argsort(dim=1), rows), levels_GL, rows), self.snap)

    def _levels(self, gain: Tensor) -> Tensor:
        """The levels [G, L] under gains, not snapped yet."""
        return self.palette.levels_GL + gain * self.spacing_GL


class _Round(torch.autograd.Function):
    """Map positions [R, C] and levels [G, L] to weights; the gradient passes the rounding as if it were the
    identity."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, levels_GL: Tensor, spacing_GL: Tensor, rows: int) -> Tensor:
        place_RC = places(nearest_index(position, levels_GL.shape[1]), rows, levels_GL.shape[1])
        ctx.save_for_backward(place_RC, spacing_GL)
        return levels_GL.flatten()[place_RC]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        place_RC, spacing_GL = ctx.saved_tensors
        by_level = gathered(grads[0], place_RC, spacing_GL.shape)
        return grads[0] * spacing_GL.flatten()[place_RC], by_level, None, None
