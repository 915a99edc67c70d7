"""Quantise the linears to 4 bits in bitsandbytes' native layout, each block with the inputs that the blocks before it give.

`nearest` is stock bitsandbytes: absmax scales and nearest codes, the baseline. `gptq` solves each linear for its codes and
scales under the second moments of its inputs, one after another, so that each makes good what those before it lost against
the full model. `learned` goes on from there and trains the codes and scales of a whole block
at once, so that its output comes closest to the full model's where the full model's predictions feel it. All three write the
same bytes. A block that the journal holds is not done again: its codes are read, and the walk goes on through them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from llmcompress import stored
from llmcompress.block import Block
from llmcompress.errors import ModelError
from llmcompress.integer import FORMATS, Scheme
from llmcompress.methods.hessian import Moments
from llmcompress.methods.solve import output_error, weight_error
from llmcompress.residency import Resident
from llmcompress.rotate import Rotation
from llmcompress.stages.coding import Coding, FourBit, Int8, Integer
from llmcompress.stages.context import Context, Facts
from llmcompress.stages.rounding import Rounding
from llmcompress.stages.smooth import Smooth
from llmcompress.walk import head_input, output_fisher, walk

Entry = tuple[dict[str, Tensor], dict[str, Any]]  # of the journal: tensors by their names in the checkpoint, facts

STAGE, FISHER, SMOOTH, OUTER = "quantize", "fisher", "smooth", "outer"  # what the journal calls what is done, and found out
FISHER_TOKENS = 32768  # for the output Fisher matrices: more tokens than this change the result by less than its noise


class Quantize(BaseModel):
    """`quantize: {format, block, double_quant, threshold, activations, range, rounding, steps, smooth, rotate, skip, head}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["nf4", "fp4", "int8", "w8a8", "w4a8", "w4a4"] = Field(
        default="nf4", description="nf4, fp4, int8 load in plain transformers; the others round activations, with llmcompress"
    )
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(default=64, description="weights that share one scale")
    double_quant: bool = Field(default=False, description="store the scales in 8 bits: 4.13 bits a weight at block 64, not 4.5")
    threshold: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="int8: columns of activations that reach it are not rounded, at half the speed; 0: all are"
    )
    activations: Literal["dynamic", "static", "none"] = Field(default="dynamic", description="a scale a token, or a stored one")
    range: Literal["minmax", "percentile", "mse"] = Field(default="mse", description="what a static scale is chosen by")
    rounding: Literal["nearest", "gptq", "learned"] = Field(default="gptq", description="nearest is stock bitsandbytes")
    steps: Annotated[int, Field(ge=1)] = Field(default=200, description="steps of learned rounding on each block")
    smooth: Smooth | None = Field(default=None, description="move the difficulty between inputs and weights first")
    rotate: bool | Literal["heads"] = Field(
        default=False, description="turn the hidden state and each head's values first (heads: these alone); folded, so free"
    )
    skip: tuple[str, ...] = Field(default=(), strict=False, description="linears to keep, by name; * matches anything")
    head: Literal["keep", "quantize"] = Field(default="keep", description="what becomes of the output head")

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> Quantize:
        belongs = {
            "steps": (self.rounding == "learned", f"rounding: learned, not {self.rounding}"),
            "block": (self.format not in ("int8", "w8a8"), f"4-bit formats; {self.format} has one scale a row"),
            "double_quant": (self.format in ("nf4", "fp4"), f"nf4 and fp4, not {self.format}"),
            "threshold": (self.format == "int8", f"int8, not {self.format}"),
            "activations": (self.format in FORMATS, f"{', '.join(FORMATS)}, not {self.format}"),
            "range": (self.activations == "static", f"activations: static, not {self.activations}"),
        }
        for name, (fits, where) in belongs.items():
            if name in self.model_fields_set and not fits:
                raise ValueError(f"{name} is for {where}")
        return self

    def rotation(self, model: Resident, seed: int) -> Rotation | None:
        """The rotation that is to come first, if one is; raises ModelError where the model can't be rotated."""
        if not self.rotate:
            return None
        if model.anatomy.experts:
            raise ModelError("rotate can't write experts, which this model stores one by one; leave rotate out")
        return Rotation(model.anatomy, model.config, seed, r1=self.rotate != "heads")

    def coding(self, dtype: torch.dtype) -> Coding:
        """How a linear of a model stored in `dtype` is written."""
        if self.format == "nf4" or self.format == "fp4":
            return FourBit(self.format, self.block, self.double_quant, dtype)
        if self.format == "int8":
            return Int8(self.threshold)
        return Integer(Scheme(self.format, self.activations, None if self.format == "w8a8" else self.block))

    @property
    def bits(self) -> float:
        """Bits a weight on disk, scales of blocks included."""
        return self.coding(torch.float32).bits

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
        return self.coding(torch.float32).refusal(shape)

    def apply(self, model: Resident, context: Context) -> Facts:
        """Quantise every block that the journal does not hold yet; leave its tensors and facts there."""
        chosen, kept = self.choose(model)
        steps = len(model.layers) + (model.anatomy.head in chosen)  # the head is the step after the last block
        journal = context.journal
        if model.rotation and not journal.has(OUTER, 0):
            outer = {name: p for name, p in model.model.named_parameters() if name in model.anatomy.outer}  # a tied one once
            journal.save(OUTER, 0, {name: p.data.to(model.weight_dtype).cpu() for name, p in outer.items()}, {})
        if not all(journal.has(STAGE, index) for index in range(steps)):
            self._walk(model, context, set(chosen), steps)
        facts = Facts(STAGE, kept=[{"name": name, "why": why} for name, why in kept.items()])
        unsaid = {"threshold", "activations", "range", "smooth", "rotate"} - self.model_fields_set
        unsaid |= set() if self.format in ("nf4", "fp4") else {"double_quant"}
        unsaid |= {"block"} if self.format in ("int8", "w8a8") else set()
        facts.details = self.model_dump(exclude={"skip", "steps"} | unsaid) | {"bits": self.bits}
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
        rounding = Rounding(self.coding(model.weight_dtype), model.device, self.range)
        calibrated, through = self.rounding != "nearest", steps > len(model.layers)
        blocks = walk(model, context.data.calibration, reference=calibrated, through=through)
        for block in context.track(blocks, f"quantize ({self.format}, {self.rounding})", steps):
            head = block.index == len(model.layers)
            linears = [linear for linear in model.anatomy.linears if f"{block.name}.{linear}" in chosen]
            changed = [] if head else self._smoothed(block, linears, rounding, context, model.weight_dtype)
            if not journal.has(STAGE, block.index):
                entry = self._head(model, block, rounding) if head else self._block(block, linears, rounding, context)
                dense = {name: block.module.get_parameter(name).data.to(model.weight_dtype).cpu() for name in changed}
                entry[0].update({f"{block.name}.{name}": tensor for name, tensor in dense.items()})
                journal.save(STAGE, block.index, *entry)
            if not head:
                self._install(block, linears, rounding.coding, journal.load(STAGE, block.index)[0])

    def _smoothed(
        self, block: Block, linears: list[str], rounding: Rounding, context: Context, dtype: torch.dtype
    ) -> list[str]:
        """Let the scales cross that the journal holds or a search finds; the parameters changed by it that stay dense."""
        if self.smooth is None:
            return self._turned(block, linears)
        journal = context.journal
        if not journal.has(SMOOTH, block.index):
            before = {name: parameter.data for name, parameter in block.module.named_parameters()}
            found = self.smooth.search(block, linears, rounding.coding, dtype)
            for name, data in before.items():
                block.module.get_parameter(name).data = data
            journal.save(SMOOTH, block.index, {key: factor.cpu() for key, factor in found.items()}, {})
        factors, changed = journal.load(SMOOTH, block.index)[0], set()
        for key in block.anatomy.feeds:
            if key in factors:
                changed |= set(block.cross(key, factors[key].to(block.device), dtype))
        return sorted((changed | set(self._turned(block, linears))) - {f"{linear}.weight" for linear in linears})

    def _turned(self, block: Block, linears: list[str]) -> list[str]:
        """All parameters that stay dense, where a rotation changed them."""
        inside = {f"{linear}.weight" for linear in linears}
        return [name for name in block.anatomy.block if name not in inside] if self.rotate else []

    def _install(self, block: Block, linears: list[str], coding: Coding, tensors: dict[str, Tensor]) -> None:
        """What the journal holds in place of the block's weights, with what its kernels do to the inputs."""
        for linear in linears:
            parts = stored.parts_of(f"{block.name}.{linear}", tensors)
            packed = coding.read(parts, block.weight(linear).shape[1])
            block.set_weight(linear, stored.dequantize(packed))
            scale = parts["input_scale"].to(block.device) if "input_scale" in parts else None
            if inputs := coding.inputs(scale):
                block.rounds[linear] = inputs

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
            scales = rounding.round_inputs(block, block.anatomy.readers, weights)
            moments = block.moments()
            packed = {linear: rounding.coding.nearest(W_RC, scales.get(linear)) for linear, W_RC in weights.items()}
        else:
            solved, moments, scales = rounding.in_turn(block, weights)
            if self.rounding == "learned":
                F_DD = context.journal.load(FISHER, block.index)[0]["F_DD"]
                trained = rounding.learned(
                    block, weights, solved, F_DD, input_scales=scales, steps=self.steps, seed=context.seed
                )
                solved, notes = trained
            packed = {linear: solution.stored for linear, solution in solved.items()}
        tensors: dict[str, Tensor] = {}
        facts = []
        for linear, W_RC in weights.items():
            name = f"{block.name}.{linear}"
            tensors |= _named(name, packed[linear])
            facts.append(self._facts(name, W_RC, packed[linear], moments[linear]))
        if block.expert_tokens:
            notes["expert_tokens"] = list(block.expert_tokens.values())
        return tensors, {"name": block.name, "linears": facts, **notes}

    def _head(self, model: Resident, block: Block, rounding: Rounding) -> Entry:
        name, coding = model.anatomy.head, rounding.coding
        W_RC, moments = head_input(model, block)
        scale = coding.static_scale(float(moments.top_C.max()))
        nearest = self.rounding == "nearest"
        packed = coding.nearest(W_RC, scale) if nearest else rounding.gptq(W_RC, moments, scale).stored
        return _named(name, packed), {"name": name, "linears": [self._facts(name, W_RC, packed, moments)]}

    def _facts(self, name: str, W_RC: Tensor, packed: stored.Stored, moments: Moments) -> dict[str, Any]:
        Q_RC = stored.dequantize(packed).to(W_RC.device)
        return {
            "name": name,
            "format": self.format,
            "bits": self.bits,
            "relative_error": output_error(W_RC, Q_RC, moments.H_CC),  # of the outputs on the calibration text
            "weight_error": weight_error(W_RC, Q_RC),
        }


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


def _named(name: str, packed: stored.Stored) -> dict[str, Tensor]:
    """The tensors of a linear under the names they have in a checkpoint."""
    return {f"{name}.{part}": tensor.cpu() for part, tensor in stored.tensors_of(packed).items()}
