"""Set single weights to zero: a share of them, or two of every four in a row, and store the rest without the zeros' bytes.

Each block is done with the inputs that the blocks before it give, and within it the linears that read one input after
another, as in `quantize`. `magnitude` takes the smallest weights away and is the classical baseline, nothing more: no inputs
are looked at. `wanda` asks how large the inputs are that a weight meets; what stays is as it was. `sparsegpt` also has what
stays make up for what went, against the full model's outputs. The last two put the mean output right through the bias,
where there is one. A block that the journal holds is not done again.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from llmcompress.block import Block
from llmcompress.checkpoint import Journal
from llmcompress.errors import ModelError
from llmcompress.methods.hessian import Moments, retarget
from llmcompress.methods.repair import bias_shift
from llmcompress.methods.scores import wanda_weights
from llmcompress.methods.solve import output_error, weight_error
from llmcompress.methods.sparse import keep_mask, sparsegpt
from llmcompress.residency import Resident
from llmcompress.sparse_linear import DTYPES, Sparse, SparseWeight
from llmcompress.stages.choice import inner, install, mean_bits, require_known
from llmcompress.stages.context import Context, Facts
from llmcompress.walk import walk

STAGE = "sparsify"
BASE_60 = {124: "2:4", 248: "4:8"}  # what YAML takes 2:4 and 4:8 for, where they are not quoted


class Sparsify(BaseModel):
    """`prune: {pattern, keep, score, skip}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str] = STAGE

    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        description="which weights may become zero: any, or all but 2 of every 4 (4 of every 8) neighbours in a row"
    )
    keep: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="unstructured: share that stays")
    score: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        default="sparsegpt", description="what a weight is worth; sparsegpt also adjusts those that stay"
    )
    skip: tuple[str, ...] = Field(default=(), strict=False, description="linears to keep, by name; * matches anything")

    @model_validator(mode="before")
    @classmethod
    def _no_axis(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and "axis" in entry:
            raise ValueError("axis cuts whole units and pattern single weights; give one of them, or two prune stages")
        return entry

    @field_validator("pattern", mode="before")
    @classmethod
    def _not_base_60(cls, given: Any) -> Any:
        return BASE_60.get(given, given) if type(given) is int else given

    @model_validator(mode="after")
    def _fits_together(self) -> Sparsify:
        if self.pattern == "unstructured" and self.keep is None:
            raise ValueError("pattern: unstructured needs keep, the share of the weights that stays, as 0.5")
        if self.pattern != "unstructured" and self.keep is not None:
            raise ValueError(f"keep is for pattern: unstructured; {self.pattern} says how many stay")
        return self

    def choose(self, model: Resident) -> tuple[dict[str, Sparse], dict[str, str]]:
        """How each linear that loses weights is written, by full name, and those to keep with the reason.

        Raises ModelError where none is left.
        """
        ours = inner(model, model.anatomy.linears)
        require_known("skip", self.skip, ours)
        dtype = str(model.weight_dtype).removeprefix("torch.")
        layout = Sparse(self.pattern, dtype if dtype in DTYPES else "float32", self.keep)
        chosen: dict[str, Sparse] = {}
        kept: dict[str, str] = {}
        for name, shape in model.linear_maps():
            if why := self._why_not(name, model, ours) or layout.refusal(shape):
                kept[name] = why
            else:
                chosen[name] = layout
        kept |= dict.fromkeys(inner(model, model.anatomy.experts), "3-D experts, which are stored whole")
        if not chosen:
            raise ModelError(
                f"no linear of this model can lose weights ({next(iter(kept.values()))}); try another keep or skip"
            )
        return chosen, kept

    def settled(self, model: Resident, journal: Journal) -> tuple[dict[str, Sparse], dict[str, str]]:
        """As `choose`: there is nothing that only `apply` finds out."""
        return self.choose(model)

    def _why_not(self, name: str, model: Resident, ours: Collection[str]) -> str | None:
        if name == model.anatomy.head:
            return "the head stays"
        if name not in ours:
            return "outside the blocks"
        return "skip" if any(fnmatchcase(name, pattern) for pattern in self.skip) else None

    def apply(self, model: Resident, context: Context) -> Facts:
        """Do every block that the journal does not hold yet; leave its tensors and facts there."""
        (chosen, kept), journal, layers = self.choose(model), context.journal, len(model.layers)
        if not all(journal.has(STAGE, index) for index in range(layers)):
            blocks = walk(model, context.data.calibration, reference=self.score != "magnitude")
            for block in context.track(blocks, f"prune ({self.pattern}, {self.score})", layers):
                layouts = block.own(chosen)
                if journal.has(STAGE, block.index):
                    install(block, layouts, journal.load(STAGE, block.index)[0])
                else:
                    journal.save(STAGE, block.index, *self._block(block, layouts, model.weight_dtype))
        facts = Facts(STAGE, kept=[{"name": name, "why": why} for name, why in kept.items()])
        shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
        bits = {name: chosen[name].bits(shape[1]) for name, shape in shapes.items()}
        facts.details = self.model_dump(exclude={"skip"}, exclude_none=True) | {"bits": mean_bits(bits, shapes)}
        facts.add(journal.load(STAGE, index)[1] for index in range(layers))
        return facts

    def _block(self, block: Block, layouts: dict[str, Sparse], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the block that change, by their full names, and what that cost; they are put in place."""
        tensors: dict[str, Tensor] = {}
        facts = []
        for readers in [group for group in block.anatomy.readers if layouts.keys() & set(group)]:
            moments = block.moments(readers)
            for linear in [linear for linear in readers if linear in layouts]:
                W_RC, layout, name = block.weight(linear), layouts[linear], f"{block.name}.{linear}"
                packed = self._solve(W_RC, moments[linear], layout)
                S_RC = packed.dequantize().to(W_RC.device)
                block.set_weight(linear, S_RC)
                tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors().items()}
                if self.score != "magnitude" and (bias := f"{linear}.bias") in block.anatomy.block:
                    shift_R = bias_shift(W_RC, moments[linear].full_C, S_RC, moments[linear].mean_C)
                    block.shift_bias(linear, shift_R, dtype)
                    tensors[f"{name}.bias"] = block.module.get_parameter(bias).data.to(dtype).cpu()
                lost = output_error(W_RC, S_RC, moments[linear].H_CC)  # of the outputs on the calibration text
                errors = {"relative_error": lost, "weight_error": weight_error(W_RC, S_RC)}
                facts.append({"name": name, "format": layout.name, "bits": layout.bits(W_RC.shape[1]), **errors})
        return tensors, {"name": block.name, "linears": facts}

    def _solve(self, W_RC: Tensor, moments: Moments, layout: Sparse) -> SparseWeight:
        """What stays of a linear."""
        keep = layout.choice(W_RC.shape[1])
        if self.score == "sparsegpt":
            W_RC = sparsegpt(retarget(W_RC, moments), moments.H_CC, keep)
            return SparseWeight.of(W_RC, stays(W_RC, layout), layout)
        score_RC = wanda_weights(W_RC, moments.H_CC.diagonal().sqrt()) if self.score == "wanda" else W_RC.abs()
        return SparseWeight.of(W_RC, keep_mask(score_RC, keep), layout)


def stays(W_RC: Tensor, layout: Sparse) -> Tensor:
    """The mask of a weight that has its zeros already; where it has more, as the base may, the first of them stay too."""
    if layout.allows(mask_RC := W_RC != 0):
        return mask_RC
    keep = layout.choice(W_RC.shape[1])
    return keep_mask(W_RC.abs() if layout.keep is None else W_RC.abs().reshape(1, -1), keep).view_as(W_RC)
