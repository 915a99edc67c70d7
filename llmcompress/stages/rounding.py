"""From weights to packed codes: the three roundings of `quantize`, with what they need of one linear or of one block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress import native
from llmcompress.block import Block
from llmcompress.methods.grids import Format, Grid, grid
from llmcompress.methods.hessian import Moments, metric_factor, retarget
from llmcompress.methods.learned import learn
from llmcompress.methods.solve import Rounded, Snap, output_error, solve

METRIC_DAMP = 0.05  # of the output Fisher matrix: how much every error counts, felt by the model or not


def half_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are worth it there: on GPUs that have them, and on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ours: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and ours


@dataclass(frozen=True)
class Solution:
    """Codes, scales as they are read back, and how those are stored if in 8 bits."""

    rounded: Rounded
    nested: native.DoubleQuantized | None = None


@dataclass(frozen=True)
class Rounding:
    """A native 4-bit format, and the dtype and device of the weights that go into it."""

    format: Format
    block: int
    double_quant: bool
    dtype: torch.dtype  # in which the base stores its weights, and in which the kernels are to compute
    device: torch.device

    def nearest(self, W_RC: Tensor) -> native.Packed:
        """Stock bitsandbytes: absmax scales, nearest codes."""
        return native.quantize_nearest(W_RC.to(self.dtype), self.format, self.block, self.double_quant)

    def gptq(self, W_RC: Tensor, moments: Moments) -> Solution:
        """Codes and scales solved for under the second moments of the inputs, against the full model's outputs if they know it.

        Scales of both signs use the uneven grid better, but span a wider range, which 8 bits resolve less finely: with double
        quantisation both are solved and the smaller error is kept.
        """
        W_RC = retarget(W_RC.float(), moments)
        found = [self._solve(W_RC, moments.H_CC, signed) for signed in ((True, False) if self.double_quant else (True,))]
        return min(found, key=lambda solution: output_error(W_RC, self.weight(solution), moments.H_CC))

    def weight(self, solution: Solution) -> Tensor:
        """The weight [R, C] that a solution stands for."""
        return solution.rounded.weight(self._grid)

    def pack(self, solution: Solution) -> native.Packed:
        """A solution as it is stored."""
        codes_RC = self._grid.codes[solution.rounded.index_RC].cpu()
        nested = solution.nested
        scale_RG = nested.decode().cpu() if nested else solution.rounded.scale_RG.cpu()
        return native.Packed(codes_RC, scale_RG, self.format, self.block, self.dtype, nested)

    def learned(
        self,
        block: Block,
        weights: Mapping[str, Tensor],
        solved: Mapping[str, Solution],
        F_DD: Tensor,
        *,
        steps: int,
        seed: int,
    ) -> tuple[dict[str, Solution], dict[str, Any]]:
        """All linears of a block, trained together from the solutions of `gptq`; with the block's loss before and after.

        The loss is the error of the block's output against the full model's, weighed by the output Fisher matrix. Where
        training ends no better than it began, the start is kept.
        """
        starts = {name: solution.rounded for name, solution in solved.items()}
        R_DD = metric_factor(F_DD.to(self.device), METRIC_DAMP)

        def loss(rounded: Mapping[str, Tensor], batch: int, fast: bool = False) -> Tensor:
            stored = {f"{name}.weight": block.oriented(name, W) for name, W in rounded.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast):
                out = block.run(block.inputs[batch], stored)
            return ((out - block.targets[batch].to(self.device)).float() @ R_DD).square().sum(-1).mean()

        @torch.no_grad()
        def whole(solution: Mapping[str, Rounded]) -> float:
            rounded = {name: result.weight(self._grid) for name, result in solution.items()}
            return sum(float(loss(rounded, i)) * len(x) for i, x in enumerate(block.inputs)) / sum(map(len, block.inputs))

        generator = torch.Generator().manual_seed(seed * 1_000_003 + block.index)
        rounds = -(-steps // len(block.inputs))
        order = torch.cat([torch.randperm(len(block.inputs), generator=generator) for _ in range(rounds)]).tolist()
        trained = learn(
            weights,
            starts,
            self._grid,
            lambda rounded, step: loss(rounded, order[step], fast=half_is_fast(self.device)),
            steps=steps,
            snap=self._snap,
        )
        ends = {name: self._stored(result) for name, result in trained.items()}
        before, after = whole(starts), whole({name: solution.rounded for name, solution in ends.items()})
        return dict(ends if after < before else solved), {"loss_gptq": before, "loss_learned": after}

    def _solve(self, W_RC: Tensor, H_CC: Tensor, signed: bool) -> Solution:
        return self._stored(solve(W_RC, H_CC, self._grid, self.block, snap=self._snap, signed=signed))

    def _stored(self, result: Rounded) -> Solution:
        if not self.double_quant:
            return Solution(result)
        nested = native.double_quantize(result.scale_RG)
        return Solution(Rounded(result.index_RC, nested.decode()), nested)

    @property
    def _snap(self) -> Snap | None:
        """Scales as they will be read back."""
        return (lambda scale_RG: native.double_quantize(scale_RG).decode()) if self.double_quant else None

    @property
    def _grid(self) -> Grid:
        return grid(self.format).to(self.device)
