"""Cut units of an axis: feed-forward neurons, key-value heads with their query heads, query heads, or whole layers.

Each block is cut with the inputs that the cut blocks before it give. What a unit is worth is read off the linear that reads
the axis (`score`): with `obs`, the default, units go one after another, each the one whose loss the others make up for best.
That linear is then solved for anew (`repair`), so that its outputs on the inputs as they have become come closest to those of
the model as it was. All blocks keep the same number of units, so the result is a plain checkpoint that transformers loads by
itself. A block that the journal holds is not cut again. Layers are another matter: `depth` finds those that can go.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from llmcompress.axes import Spelling, take, units_along
from llmcompress.block import Block
from llmcompress.checkpoint import Journal
from llmcompress.errors import ModelError
from llmcompress.family import Anatomy
from llmcompress.methods import scores
from llmcompress.methods.hessian import Moments, retarget
from llmcompress.methods.removal import remove
from llmcompress.methods.repair import bias_shift, repair
from llmcompress.methods.solve import output_error
from llmcompress.residency import Outline, Resident
from llmcompress.resize import changed, resized, shortened
from llmcompress.stages import depth
from llmcompress.stages.context import Context, Facts
from llmcompress.walk import walk

STAGE = "prune"
KERNEL = 64  # what the width of ffn is a multiple of, unless the recipe says otherwise: 4-bit blocks after it need that


class Prune(BaseModel):
    """`prune: {axis, keep, score, repair, multiple}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str] = STAGE

    axis: Literal["ffn", "kv", "q", "layer"] = Field(
        description="what is cut: ffn neurons, kv heads with their query heads, q: query heads of every kv head, whole layers"
    )
    keep: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)] = Field(
        description="units that stay (in each block), or layers: a share, or how many"
    )
    score: Literal["obs", "wanda", "activation", "magnitude", "kl", "influence"] | None = Field(
        default=None, description="what a unit is worth; default obs, of layers (which have kl and influence) kl"
    )
    repair: bool = Field(default=True, description="solve the linear that reads the axis anew for what is left")
    multiple: Annotated[int, Field(ge=1)] | None = Field(default=None, description="of which the count is one; ffn: 64")

    @model_validator(mode="after")
    def _of_the_axis(self) -> Prune:
        if self.score and (self.score in ("kl", "influence")) != (self.axis == "layer"):
            fitting = "kl or influence" if self.axis == "layer" else "obs, wanda, activation or magnitude"
            raise ValueError(f"score {self.score} is not for axis {self.axis}; use {fitting}")
        if self.axis == "layer" and "repair" in self.model_fields_set:
            raise ValueError("repair is for ffn, kv and q: no linear reads a layer")
        return self

    @property
    def worth(self) -> str:
        """The score, also where none was given."""
        return self.score or ("kl" if self.axis == "layer" else "obs")

    def size(self, model: Resident) -> int:
        """How many units there are. Errors: ModelError where the axis can't be cut."""
        if self.axis == "layer":
            return len(model.layers)
        if self.axis not in model.sizes or reader_of(model.anatomy, self.axis) is None:
            raise ModelError(f'axis "{self.axis}" of this {model.anatomy.family} model can\'t be cut; use ffn, kv, q or layer')
        return model.sizes[self.axis]

    def count(self, model: Resident) -> int:
        """How many units stay in each block, or layers. Errors: ModelError where the axis can't be cut, or nothing would be."""
        size = self.size(model)
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

    def changes(self, model: Resident, gone: Collection[int] | None = None) -> dict[str, Any]:
        """What changes in the config; before it is known which layers go (None), as if it were the last ones.

        Errors: ModelError where transformers has no such model.
        """
        if self.axis != "layer":
            return resized(model.config, model.anatomy, {self.axis: self.count(model)})
        total = len(model.layers)
        gone = range(self.count(model), total) if gone is None else gone
        return shortened(model.config, [index for index in range(total) if index not in gone])

    def gone(self, journal: Journal) -> list[int]:
        """The layers that were taken out."""
        found: list[int] = journal.load(STAGE, 0)[1]["gone"] if self.axis == "layer" else []
        return found

    def apply(self, model: Resident, context: Context) -> Facts:
        """Cut every block that the journal does not hold yet; leave its tensors and facts there."""
        journal, layers, count = context.journal, len(model.layers), self.count(model)
        if self.axis == "layer":
            if not journal.has(STAGE, 0):
                journal.save(STAGE, 0, {}, depth.find(model, context, count, self.worth))
            return self._facts(model, count, [], journal.load(STAGE, 0)[1])
        outline = Outline(changed(model.config, self.changes(model)), model.device, model.dtype)
        if not all(journal.has(STAGE, index) for index in range(layers)):
            blocks = walk(model, context.data.calibration, reference=True)
            for block in context.track(blocks, f"prune ({self.axis}, {self.worth})", layers):
                if not journal.has(STAGE, block.index):
                    journal.save(STAGE, block.index, *self._block(block, count, model.weight_dtype))
                tensors = journal.load(STAGE, block.index)[0]
                inner = {name.removeprefix(f"{block.name}."): tensor for name, tensor in tensors.items()}
                block.become(copy.deepcopy(outline.layers[block.index]), inner)
        return self._facts(model, count, [journal.load(STAGE, index)[1] for index in range(layers)], {})

    def _facts(self, model: Resident, count: int, blocks: list[dict[str, Any]], found: Mapping[str, Any]) -> Facts:
        total = self.size(model)
        what = "layers stay" if self.axis == "layer" else f"units of {self.axis} stay in each block"
        details = {"axis": self.axis, "keep": self.keep, "score": self.worth, "units": total, "kept_units": count, **found}
        return Facts(STAGE, blocks=blocks, notes=[f"{count} of {total} {what}"], details=details)

    def _block(self, block: Block, count: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the block that change, by their full names, and what that cost."""
        anatomy, reader = block.anatomy, reader_of(block.anatomy, self.axis)
        assert reader is not None
        moments = block.moments(next(group for group in anatomy.readers if reader in group))[reader]
        W_RC = block.weight(reader)
        term = anatomy.input_of(reader)
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
        if self.worth == "obs":
            return remove(W_RC, moments.H_CC, unit_C, units, least=count).kept(count)
        if self.worth == "wanda":
            worth_U = scores.wanda(W_RC, moments.H_CC.diagonal().sqrt(), unit_C, units)
        elif self.worth == "activation":
            worth_U = scores.activation(moments.H_CC.diagonal().sqrt(), unit_C, units)
        else:
            worth_U = scores.magnitude(W_RC, unit_C, units)
            for linear in block.anatomy.linears:  # what writes the axis is part of the unit
                unit_R = units_along(block.anatomy.output_of(linear), block.sizes, self.axis)
                if bool((unit_R >= 0).any()):
                    worth_U = worth_U + scores.magnitude(block.weight(linear).T, unit_R.to(block.device), units)
        return worth_U.argsort(descending=True, stable=True)[:count].sort().values


def reader_of(anatomy: Anatomy, axis: str) -> str | None:
    """The linear whose columns run along an axis inside the block; None where there is no such one, as for experts."""
    inside = [linear for linear in anatomy.linears if axis in Spelling((anatomy.input_of(linear),)).axes]
    return inside[0] if len(inside) == 1 else None
