"""Cut units of an axis out of every block: feed-forward neurons, key-value heads with their query heads, query heads.

Each block is cut with the inputs that the cut blocks before it give. What a unit is worth is read off the linear that reads
the axis (`score`): with `obs`, the default, units go one after another, each the one whose loss the others make up for best.
That linear is then solved for anew (`repair`), so that its outputs on the inputs as they have become come closest to those of
the model as it was. All blocks keep the same number of units, so the result is a plain checkpoint that transformers loads by
itself. A block that the journal holds is not cut again.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmcompress.axes import Spelling, Term, take, units_along
from llmcompress.block import Block
from llmcompress.errors import ModelError
from llmcompress.family import Anatomy
from llmcompress.methods import scores
from llmcompress.methods.hessian import Moments, retarget
from llmcompress.methods.removal import remove
from llmcompress.methods.repair import bias_shift, repair
from llmcompress.methods.solve import output_error
from llmcompress.residency import Outline, Resident
from llmcompress.resize import changed, resized
from llmcompress.stages.context import Context, Facts
from llmcompress.walk import walk

STAGE = "prune"
KERNEL = 64  # what the width of ffn is a multiple of, unless the recipe says otherwise: 4-bit blocks after it need that


class Prune(BaseModel):
    """`prune: {axis, keep, score, repair, multiple}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    axis: Literal["ffn", "kv", "q"] = Field(
        description="what is cut: ffn neurons, kv heads with their query heads, or q: as many query heads of every kv head"
    )
    keep: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)] = Field(
        description="units that stay in each block: a share, or how many"
    )
    score: Literal["obs", "wanda", "activation", "magnitude"] = Field(default="obs", description="what a unit is worth")
    repair: bool = Field(default=True, description="solve the linear that reads the axis anew for what is left")
    multiple: Annotated[int, Field(ge=1)] | None = Field(default=None, description="of which the count is one; ffn: 64")

    def count(self, model: Resident) -> int:
        """How many units stay in each block. Errors: ModelError where the axis can't be cut, or nothing would be."""
        sizes, family = model.sizes, model.anatomy.family
        if self.axis not in sizes or reader_of(model.anatomy, self.axis) is None:
            raise ModelError(f'axis "{self.axis}" of this {family} model can\'t be cut; use one of ffn, kv, q that it has')
        size = sizes[self.axis]
        multiple = self.multiple or (KERNEL if self.axis == "ffn" and size > KERNEL else 1)
        share = isinstance(self.keep, float)
        count = max(multiple, round(self.keep * size / multiple) * multiple) if share else int(self.keep)
        if not share and self.multiple and count % self.multiple:
            raise ModelError(f'keep {count} of axis "{self.axis}" is no multiple of {self.multiple}')
        if count >= size:
            raise ModelError(
                f'keep {self.keep:g} of axis "{self.axis}" leaves {count} of {size} units (multiples of {multiple}): nothing '
                "would be cut; use a smaller keep or multiple"
            )
        return count

    def changes(self, model: Resident) -> dict[str, Any]:
        """What changes in the config. Errors: ModelError where transformers has no such model."""
        return resized(model.config, model.anatomy, {self.axis: self.count(model)})

    def apply(self, model: Resident, context: Context) -> Facts:
        """Cut every block that the journal does not hold yet; leave its tensors and facts there."""
        journal, layers = context.journal, len(model.layers)
        count = self.count(model)
        outline = Outline(changed(model.config, self.changes(model)), model.device, model.dtype)
        if not all(journal.has(STAGE, index) for index in range(layers)):
            blocks = walk(model, context.data.calibration, reference=True)
            for block in context.track(blocks, f"prune ({self.axis}, {self.score})", layers):
                if not journal.has(STAGE, block.index):
                    journal.save(STAGE, block.index, *self._block(block, count, model.weight_dtype))
                tensors = journal.load(STAGE, block.index)[0]
                inner = {name.removeprefix(f"{block.name}."): tensor for name, tensor in tensors.items()}
                block.become(copy.deepcopy(outline.layers[block.index]), inner)
        facts = Facts(STAGE, blocks=[journal.load(STAGE, index)[1] for index in range(layers)])
        facts.notes = [f"{count} of {model.sizes[self.axis]} units of {self.axis} stay in each block"]
        facts.details = self.model_dump(exclude_none=True) | {"units": model.sizes[self.axis], "kept_units": count}
        return facts

    def _block(self, block: Block, count: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the block that change, by their full names, and what that cost."""
        anatomy, reader = block.anatomy, reader_of(block.anatomy, self.axis)
        assert reader is not None
        moments = block.moments(next(group for group in anatomy.readers if reader in group))[reader]
        W_RC = block.weight(reader)
        term = input_of(anatomy, reader)
        unit_C = units_along(term, block.sizes, self.axis).to(block.device)
        aim_RC = retarget(W_RC, moments) if self.repair else W_RC
        kept = self._kept(block, aim_RC, moments, unit_C, count)
        place = torch.arange(len(unit_C), device=block.device)
        columns = take(place, Spelling((term,)), block.sizes, self.axis, kept)
        left_RP = repair(aim_RC, moments.H_CC, columns) if self.repair else W_RC[:, columns]
        tensors = {
            name: take(block.module.get_parameter(name).data, row, block.sizes, self.axis, kept)
            for name, row in anatomy.block.items()
            if self.axis in Spelling.parse(row).axes
        }
        tensors[f"{reader}.weight"] = block.oriented(reader, left_RP)
        if self.repair and (bias := f"{reader}.bias") in anatomy.block:
            shift_R = bias_shift(W_RC, moments.full_C, left_RP, moments.mean_C[columns])
            tensors[bias] = block.module.get_parameter(bias).data + shift_R
        lost = output_error(W_RC, torch.zeros_like(W_RC).index_copy(1, columns, left_RP), moments.H_CC)
        facts = {"name": block.name, "kept_units": count, "relative_error": lost}
        return {f"{block.name}.{name}": tensor.to(dtype).cpu() for name, tensor in tensors.items()}, facts

    def _kept(self, block: Block, W_RC: Tensor, moments: Moments, unit_C: Tensor, count: int) -> Tensor:
        """The units that stay, int64 in rising order."""
        units = block.sizes[self.axis]
        if self.score == "obs":
            return remove(W_RC, moments.H_CC, unit_C, units, least=count).kept(count)
        if self.score == "wanda":
            worth_U = scores.wanda(W_RC, moments.H_CC.diagonal().sqrt(), unit_C, units)
        elif self.score == "activation":
            worth_U = scores.activation(moments.H_CC.diagonal().sqrt(), unit_C, units)
        else:
            worth_U = scores.magnitude(W_RC, unit_C, units)
            for name, row in block.anatomy.block.items():  # what writes the axis is part of the unit
                dims = Spelling.parse(row).dims
                if len(dims) == 2 and (linear := name.removesuffix(".weight")) != reader_of(block.anatomy, self.axis):
                    unit_R = units_along(dims[-1 if linear in block.anatomy.conv1d else 0], block.sizes, self.axis)
                    if bool((unit_R >= 0).any()):
                        worth_U = worth_U + scores.magnitude(block.weight(linear).T, unit_R.to(block.device), units)
        return worth_U.argsort(descending=True, stable=True)[:count].sort().values


def input_of(anatomy: Anatomy, linear: str) -> Term:
    """What the columns of a linear run along."""
    return Spelling.parse(anatomy.block[f"{linear}.weight"]).dims[0 if linear in anatomy.conv1d else -1]


def reader_of(anatomy: Anatomy, axis: str) -> str | None:
    """The linear whose columns run along an axis inside the block; None where there is no such one, as for experts."""
    inside = [linear for linear in anatomy.linears if axis in Spelling((input_of(anatomy, linear),)).axes]
    return inside[0] if len(inside) == 1 else None
