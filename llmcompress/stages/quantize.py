"""Quantise the linears to 4 bits in bitsandbytes' native layout, each block with the inputs that the blocks before it give.

`nearest` is stock bitsandbytes: absmax scales and nearest codes, the baseline. `gptq` solves each linear for its codes and
scales under the second moments of its inputs, one after another, so that each makes good what those before it lost against
the full model. `learned` goes on from there and trains the codes and scales of a whole block
at once, so that its output comes closest to the full model's where the full model's predictions feel it. All three write the
same bytes. A block that the journal holds is not done again: its codes are read, and the walk goes on through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from llmcompress import native
from llmcompress.block import Block
from llmcompress.errors import ModelError
from llmcompress.methods.hessian import Moments
from llmcompress.methods.solve import output_error, weight_error
from llmcompress.residency import Resident
from llmcompress.stages.context import Context, Facts
from llmcompress.stages.rounding import Rounding, Solution
from llmcompress.walk import head_input, output_fisher, walk

Entry = tuple[dict[str, Tensor], dict[str, Any]]  # of the journal: tensors by their names in the checkpoint, facts

STAGE, FISHER = "quantize", "fisher"  # what the journal calls the blocks of this stage, and what is found out before it
FISHER_TOKENS = 32768  # for the output Fisher matrices: more tokens than this change the result by less than its noise


class Quantize(BaseModel):
    """`quantize: {format, block, double_quant, rounding, steps, skip, head}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["nf4", "fp4"] = Field(default="nf4", description="the 4-bit grid of bitsandbytes")
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(default=64, description="weights that share one scale")
    double_quant: bool = Field(default=False, description="store the scales in 8 bits: 4.13 bits a weight at block 64, not 4.5")
    rounding: Literal["nearest", "gptq", "learned"] = Field(default="gptq", description="nearest is stock bitsandbytes")
    steps: Annotated[int, Field(ge=1)] = Field(default=200, description="steps of learned rounding on each block")
    skip: tuple[str, ...] = Field(default=(), strict=False, description="linears to keep, by name; * matches anything")
    head: Literal["keep", "quantize"] = Field(default="keep", description="what becomes of the output head")

    @model_validator(mode="after")
    def _steps_only_where_learned(self) -> Quantize:
        if "steps" in self.model_fields_set and self.rounding != "learned":
            raise ValueError(f"steps is for rounding: learned, not {self.rounding}")
        return self

    @property
    def bits(self) -> float:
        """Bits a weight on disk, scales included."""
        return 4 + (8 + 32 / native.NESTED_BLOCK if self.double_quant else 32) / self.block

    def choose(self, model: Resident) -> tuple[list[str], dict[str, str]]:
        """The linears to quantise, by full name, and those to keep with the reason; raises ModelError where none is left."""
        chosen: list[str] = []
        kept: dict[str, str] = {}
        ours = {f"{model.block_name(i)}.{linear}" for i in range(len(model.layers)) for linear in model.anatomy.linears}
        for name, shape in model.linear_maps():
            if why := self._why_not(name, shape, model, ours):
                kept[name] = why
            else:
                chosen.append(name)
        for i in range(len(model.layers)):
            for experts in model.anatomy.experts:
                kept[f"{model.block_name(i)}.{experts}"] = "3-D experts, which bitsandbytes' 4-bit layout can't hold"
        if unknown := [pattern for pattern in self.skip if not any(fnmatchcase(name, pattern) for name in ours)]:
            raise ModelError(f'skip "{unknown[0]}" matches no linear of this model; they have names like {min(ours)}')
        if not chosen:
            raise ModelError(
                f"no linear of this model can be quantised ({next(iter(kept.values()))}); try another block or skip"
            )
        return chosen, kept

    def _why_not(self, name: str, shape: tuple[int, int], model: Resident, ours: set[str]) -> str | None:
        if name == model.anatomy.head:
            if self.head == "keep":
                return "head: keep"
            if model.config.tie_word_embeddings:
                raise ModelError("head: quantize needs a head of its own, this one is tied to the embedding; use head: keep")
        elif name not in ours:
            return "outside the blocks"
        elif any(fnmatchcase(name, pattern) for pattern in self.skip):
            return "skip"
        return native.refusal(shape, self.format, self.block)

    def apply(self, model: Resident, context: Context) -> Facts:
        """Quantise every block that the journal does not hold yet; leave its tensors and facts there."""
        chosen, kept = self.choose(model)
        steps = len(model.layers) + (model.anatomy.head in chosen)  # the head is the step after the last block
        journal = context.journal
        if not all(journal.has(STAGE, index) for index in range(steps)):
            self._walk(model, context, set(chosen), steps)
        facts = Facts(STAGE, kept=[{"name": name, "why": why} for name, why in kept.items()])
        facts.details = self.model_dump(exclude={"skip", "steps"}) | {"bits": self.bits}
        for index in range(steps):
            block = journal.load(STAGE, index)[1]
            facts.linears += block.pop("linears")
            facts.blocks.append(block)
        facts.notes += starved_experts(facts.blocks, model.config.hidden_size)
        return facts

    def _walk(self, model: Resident, context: Context, chosen: set[str], steps: int) -> None:
        journal = context.journal
        if self.rounding == "learned":
            self._find_fisher(model, context)
        rounding = Rounding(self.format, self.block, self.double_quant, model.weight_dtype, model.device)
        calibrated, through = self.rounding != "nearest", steps > len(model.layers)
        blocks = walk(model, context.data.calibration, reference=calibrated, through=through)
        for block in context.track(blocks, f"quantize ({self.format}, {self.rounding})", steps):
            head = block.index == len(model.layers)
            linears = [linear for linear in model.anatomy.linears if f"{block.name}.{linear}" in chosen]
            if not journal.has(STAGE, block.index):
                entry = self._head(model, block, rounding) if head else self._block(block, linears, rounding, context)
                journal.save(STAGE, block.index, *entry)
            stored = journal.load(STAGE, block.index)[0]
            for linear in [] if head else linears:
                packed = native.unpack(native.parts_of(f"{block.name}.{linear}", stored))
                block.set_weight(linear, native.dequantize(packed, torch.float32))

    def _find_fisher(self, model: Resident, context: Context) -> None:
        journal, layers = context.journal, len(model.layers)
        if all(journal.has(FISHER, index) for index in range(layers)):
            return
        windows = context.data.calibration
        windows = windows[: -(-max(FISHER_TOKENS, 8 * model.config.hidden_size) // windows.shape[1])]
        found = output_fisher(model, windows, context.scratch, context.seed)
        for index, F_DD in context.track(found, "find the errors that matter", layers):
            journal.save(FISHER, index, {"F_DD": F_DD}, {})

    def _block(self, block: Block, linears: list[str], rounding: Rounding, context: Context) -> Entry:
        weights = {linear: block.weight(linear) for linear in linears}
        notes: dict[str, Any] = {}
        if self.rounding == "nearest":
            moments = block.moments()
            packed = {linear: rounding.nearest(W_RC) for linear, W_RC in weights.items()}
        else:
            solved, moments = solve_in_turn(block, weights, rounding)
            if self.rounding == "learned":
                F_DD = context.journal.load(FISHER, block.index)[0]["F_DD"]
                solved, notes = rounding.learned(block, weights, solved, F_DD, steps=self.steps, seed=context.seed)
            packed = {linear: rounding.pack(solution) for linear, solution in solved.items()}
        tensors: dict[str, Tensor] = {}
        facts = []
        for linear, W_RC in weights.items():
            name = f"{block.name}.{linear}"
            tensors |= _stored(name, packed[linear])
            facts.append(self._facts(name, W_RC, packed[linear], moments[linear]))
        if block.expert_tokens:
            notes["expert_tokens"] = list(block.expert_tokens.values())
        return tensors, {"name": block.name, "linears": facts, **notes}

    def _head(self, model: Resident, block: Block, rounding: Rounding) -> Entry:
        name = model.anatomy.head
        W_RC, moments = head_input(model, block)
        nearest = self.rounding == "nearest"
        packed = rounding.nearest(W_RC) if nearest else rounding.pack(rounding.gptq(W_RC, moments))
        return _stored(name, packed), {"name": name, "linears": [self._facts(name, W_RC, packed, moments)]}

    def _facts(self, name: str, W_RC: Tensor, packed: native.Packed, moments: Moments) -> dict[str, Any]:
        Q_RC = native.dequantize(packed, torch.float32).to(W_RC.device)
        return {
            "name": name,
            "format": self.format,
            "bits": self.bits,
            "relative_error": output_error(W_RC, Q_RC, moments.H_CC),  # of the outputs on the calibration text
            "weight_error": weight_error(W_RC, Q_RC),
        }


def solve_in_turn(
    block: Block, weights: Mapping[str, Tensor], rounding: Rounding
) -> tuple[dict[str, Solution], dict[str, Moments]]:
    """Solve for the linears that read one input, put them in place, and go on to what the next ones read then.

    Returns the solutions for `weights`, and the moments of all linears of the block.
    """
    solved: dict[str, Solution] = {}
    moments: dict[str, Moments] = {}
    for readers in block.anatomy.readers:
        moments |= block.moments(readers)
        for linear in [linear for linear in readers if linear in weights]:
            solved[linear] = rounding.gptq(weights[linear], moments[linear])
            block.set_weight(linear, rounding.weight(solved[linear]))
    return {linear: solved[linear] for linear in weights}, moments


def starved_experts(blocks: list[dict[str, Any]], few: int) -> list[str]:
    """A line for each block some of whose experts saw fewer calibration tokens than `few`, with those experts.

    No calibrated format can be better than its data: such an expert's second moments are singular. Experts are kept in their
    dtype by the formats that there are, so this is said and nothing more is done.
    """
    lines = []
    for block in blocks:
        starved = [f"{expert} ({tokens})" for expert, tokens in enumerate(block.get("expert_tokens", ())) if tokens < few]
        if starved:
            lines.append(f"{block['name']}: experts that saw fewer than {few} calibration tokens: {', '.join(starved)}")
    return lines


def _stored(name: str, packed: native.Packed) -> dict[str, Tensor]:
    """The tensors of a linear under the names they have in a checkpoint."""
    return {f"{name}.{part}": tensor.cpu() for part, tensor in native.tensors(packed).items()}
