"""A linear that was solved for: its stored form and, on a grid, its codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Grid
from llmcompress.algorithms.quantize_weight import RoundedWeight
from llmcompress.formats import registry


@dataclass(frozen=True)
class Solution:
    """A linear that was solved for, in its stored form."""

    stored: registry.StoredWeight

    def weight(self, device: torch.device) -> Tensor:
        """The weight [R, C] that it stands for."""
        return registry.dequantize(self.stored, device=device)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that another process makes it of, with `received` of its scheme."""
        return registry.tensors_of(self.stored)


@dataclass(frozen=True)
class GridSolution(Solution):
    """Codes with scales as they are read back, on a grid on their device, and their stored form."""

    rounded: RoundedWeight
    grid: Grid
    found_RG: Tensor  # the scales before they were snapped; snapped twice they would move

    def weight(self, device: torch.device) -> Tensor:
        """The weight [R, C] that it stands for."""
        return self.rounded.weight(self.grid).to(device)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that another process makes it of, with `received` of its scheme."""
        return {"index": self.rounded.index_RC, "scale": self.found_RG}
