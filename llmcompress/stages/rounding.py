"""From weights to packed codes: the three roundings of `quantize`, with what they need of one linear or of one block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress import native
from llmcompress.methods.grids import Format, Grid, grid
from llmcompress.methods.hessian import Moments, metric_factor
from llmcompress.methods.learned import learn
from llmcompress.methods.solve import Rounded, output_error, solve
from llmcompress.walk import Block

METRIC_DAMP = 0.05  # of the output Fisher matrix: how much every error counts, felt by the model or not


def half_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are worth it there: on GPUs that have them, and on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ours: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and ours


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

    def gptq(self, W_RC: Tensor, H_CC: Tensor) -> native.Packed:
        """Codes and scales solved for under the second moments H."""
        return self._pack(*self._solve(W_RC, H_CC))

    def learned(
        self,
        block: Block,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Moments],
        F_DD: Tensor,
        *,
        steps: int,
        seed: int,
    ) -> tuple[dict[str, native.Packed], dict[str, Any]]:
        """All linears of a block, trained together from the solution of `gptq`; with the block's loss before and after.

        The loss is the error of the block's output against the full model's, weighed by the output Fisher matrix. Where
        training ends no better than it began, the start is kept.
        """
        solved = {name: self._solve(W, moments[name].H_CC) for name, W in weights.items()}
        starts = {name: start for name, (start, _) in solved.items()}
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
            snap=self._snap if self.double_quant else None,
        )
        ends = {name: (result, self._nested(result.scale_RG)) for name, result in trained.items()}
        stored = {name: Rounded(result.index_RC, self._snap(result.scale_RG)) for name, result in trained.items()}
        before, after = whole(starts), whole(stored)
        best = ends if after < before else solved
        return {name: self._pack(*result) for name, result in best.items()}, {"loss_gptq": before, "loss_learned": after}

    @property
    def _grid(self) -> Grid:
        return grid(self.format).to(self.device)

    def _solve(self, W_RC: Tensor, H_CC: Tensor) -> tuple[Rounded, native.DoubleQuantized | None]:
        """The solution under storable scales, and how its scales are stored if not as they are.

        Scales of both signs use the uneven grid better, but span a wider range, which 8 bits resolve less finely: with double
        quantisation both are solved and the smaller error is kept.
        """
        W_RC = W_RC.float()
        found = [self._solve_signed(W_RC, H_CC, signed) for signed in ((True, False) if self.double_quant else (True,))]
        return min(found, key=lambda solution: output_error(W_RC, solution[0].weight(self._grid), H_CC))

    def _solve_signed(self, W_RC: Tensor, H_CC: Tensor, signed: bool) -> tuple[Rounded, native.DoubleQuantized | None]:
        stored: list[native.DoubleQuantized | None] = []

        def snap(scale_RG: Tensor) -> Tensor:
            stored.append(nested := self._nested(scale_RG))
            return nested.decode().to(scale_RG.device) if nested else scale_RG

        return solve(W_RC, H_CC, self._grid, self.block, snap=snap, signed=signed), stored[-1]

    def _snap(self, scale_RG: Tensor) -> Tensor:
        """The scales as they will be read back."""
        nested = self._nested(scale_RG)
        return nested.decode().to(scale_RG.device) if nested else scale_RG

    def _nested(self, scale_RG: Tensor) -> native.DoubleQuantized | None:
        return native.double_quantize(scale_RG) if self.double_quant else None

    def _pack(self, result: Rounded, nested: native.DoubleQuantized | None) -> native.Packed:
        scale_RG = nested.decode() if nested else result.scale_RG.cpu()
        codes_RC = self._grid.codes[result.index_RC].cpu()
        return native.Packed(codes_RC, scale_RG, self.format, self.block, self.dtype, nested)
