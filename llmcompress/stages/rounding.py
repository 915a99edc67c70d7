"""From weights to codes: the roundings of `quantize`, with what they need of one linear or of one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.block import Block
from llmcompress.methods.activations import Magnitudes, static_scale
from llmcompress.methods.grids import Grid
from llmcompress.methods.hessian import Moments, metric_factor, retarget
from llmcompress.methods.learned import learn
from llmcompress.methods.solve import Rounded, output_error, solve
from llmcompress.stages.coding import Coding, Integer
from llmcompress.stored import Stored

METRIC_DAMP = 0.05  # of the output Fisher matrix: how much every error counts, felt by the model or not


def half_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are worth it there: on GPUs that have them, and on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ours: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and ours


@dataclass(frozen=True)
class Solution:
    """Codes with scales as they are read back, and the same as it is stored."""

    rounded: Rounded
    stored: Stored


@dataclass(frozen=True)
class Rounding:
    """A format, and the device of the weights that go into it."""

    coding: Coding
    device: torch.device
    range: str = "mse"  # what a static scale of inputs is chosen by

    def gptq(self, W_RC: Tensor, moments: Moments, input_scale: float | None = None) -> Solution:
        """Codes and scales solved for under the second moments of the inputs, against the full model's outputs if they know it.

        Where scales may have one sign or both, both are solved for and the smaller error is kept.
        """
        W_RC = retarget(W_RC.float(), moments)
        found = [self._solve(W_RC, moments.H_CC, signed, input_scale) for signed in self.coding.signs]
        return min(found, key=lambda solution: output_error(W_RC, self.weight(solution), moments.H_CC))

    def weight(self, solution: Solution) -> Tensor:
        """The weight [R, C] that a solution stands for."""
        return solution.rounded.weight(self._grid)

    def in_turn(
        self, block: Block, weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Solution], dict[str, Moments], dict[str, float]]:
        """Solve for the linears that read one input, put them in place, and go on to what the next ones read then.

        Returns the solutions for `weights`, the moments of all linears of the block, and the static scales of inputs.
        """
        solved: dict[str, Solution] = {}
        moments: dict[str, Moments] = {}
        scales: dict[str, float] = {}
        for readers in block.anatomy.readers:
            scales |= self.round_inputs(block, (readers,), weights)
            moments |= block.moments(readers)
            for linear in [linear for linear in readers if linear in weights]:
                solved[linear] = self.gptq(weights[linear], moments[linear], scales.get(linear))
                block.set_weight(linear, self.weight(solved[linear]))
        return {linear: solved[linear] for linear in weights}, moments, scales

    def round_inputs(self, block: Block, groups: Sequence[tuple[str, ...]], weights: Mapping[str, Tensor]) -> dict[str, float]:
        """From here on the linears of `groups` among `weights` read what their kernels will; their static scales, if any."""
        scales: dict[str, float] = {}
        if isinstance(self.coding, Integer) and self.coding.scheme.activations == "static":
            seen = {readers[0]: Magnitudes(block.device) for readers in groups}
            for read, _ in block.reads(*groups):
                for name, magnitudes in seen.items():
                    magnitudes.add(read[name])
            for readers in groups:
                scale = static_scale(seen[readers[0]], self.coding.scheme.activation_bits, self.range)
                scales |= {linear: scale for linear in readers if linear in weights}
        for linear in [linear for readers in groups for linear in readers if linear in weights]:
            if inputs := self.coding.inputs(scales.get(linear)):
                block.rounds[linear] = inputs
        return scales

    def learned(
        self,
        block: Block,
        weights: Mapping[str, Tensor],
        solved: Mapping[str, Solution],
        F_DD: Tensor,
        *,
        input_scales: Mapping[str, float],
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
            snap=self.coding.snap,
        )
        ends = {name: self._stored(result, input_scales.get(name)) for name, result in trained.items()}
        before, after = whole(starts), whole({name: solution.rounded for name, solution in ends.items()})
        return dict(ends if after < before else solved), {"loss_gptq": before, "loss_learned": after}

    def _solve(self, W_RC: Tensor, H_CC: Tensor, signed: bool, input_scale: float | None) -> Solution:
        columns = self.coding.columns(tuple(W_RC.shape))
        return self._stored(solve(W_RC, H_CC, self._grid, columns, snap=self.coding.snap, signed=signed), input_scale)

    def _stored(self, result: Rounded, input_scale: float | None) -> Solution:
        rounded = Rounded(result.index_RC, self.coding.snap(result.scale_RG))
        return Solution(rounded, self.coding.store(result, input_scale))

    @property
    def _grid(self) -> Grid:
        return self.coding.grid.to(self.device)
