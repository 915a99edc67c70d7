"""Quantise the linears, each layer with the inputs that the layers before it give.

`nearest` is stock bitsandbytes: absmax scales and nearest codes, the baseline. `gptq` solves each linear for
its codes and scales under the second moments of its inputs, one linear after another, so that each corrects
what those before it lost against the full model. `learned` starts from there and trains the codes and scales
of a whole layer at once. It brings the layer's output closest to the full model's where the full model's
predictions depend on it most. All three store the same number of bytes. A layer that the journal holds is not
quantised again: its codes are read, and the walk goes on through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from llmcompress.architectures.rotation import Rotation
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.architectures.spec import AXES, LINEARS, R2, SCALES
from llmcompress.data.sources import Effort
from llmcompress.errors import ModelError
from llmcompress.formats.integer import FORMATS
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.schemes import QuantScheme
from llmcompress.integrations.distributed import By
from llmcompress.integrations.linear_modules import replaced_modules
from llmcompress.io.journal import Journal
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.io.units import asked_percent
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.fisher import MANY, TOKENS, find_fisher
from llmcompress.stages.linear_rewriting import mean_bits, require_known
from llmcompress.stages.quantize import estimate
from llmcompress.stages.quantize.config import FormatConfig, Override, together
from llmcompress.stages.quantize.embedding import apart, embedding_codings, settle_outer
from llmcompress.stages.quantize.sensitivity import spared
from llmcompress.stages.quantize.smoothing import Smooth
from llmcompress.stages.quantize.solver import (
    PROTECTED,
    STAGE,
    LayerQuantizer,
    ProtectedLinears,
    QuantizedLayer,
)
from llmcompress.stages.routed_experts import KEEP, ExpertStage, replaced_parameters, starved_experts

NATIVE = {"nf4": "4 bits", "fp4": "4 bits", "int8": "8 bits"}  # layouts that plain transformers loads
# by effort, where a recipe does not say it; more steps than 200 did not help
ROUNDINGS: Mapping[Effort, Literal["gptq", "learned"]] = {
    "fast": "gptq",
    "balanced": "gptq",
    "best": "learned",
}
STEPS: Mapping[Effort, int] = {"fast": 50, "balanced": 200, "best": 200}
# settings that weights shared by layers allow only if they are off, `gptq` or `nearest`
ALONE = ("smooth", "rotate", "protect", "rounding", "two_sided")


class Quantize(FormatConfig, ExpertStage):
    """Stores the weights of linears in 8 to 2 bits; some formats round activations too."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "coded weights"
    quantizes: ClassVar[bool] = True
    newer: ClassVar[frozenset[str]] = FormatConfig.newer | ExpertStage.newer | {"two_sided"}
    overrides: dict[str, Override] = Field(
        default={},
        description="other settings for some linears, by name (`*` matches anything) or by an axis they run "
        "along (`ffn`, `kv`, `q`, `hidden`); the last match holds",
    )
    rounding: Literal["nearest", "gptq", "learned"] = Field(
        default="gptq", description="how codes are chosen; `nearest` is stock bitsandbytes"
    )
    two_sided: bool = Field(
        default=False,
        description="`gptq`, `learned`: choose the codes of all rows of a linear together, by the Fisher "
        "matrix of its outputs; not for experts",
    )
    steps: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        default=200, description="training steps for each layer, with `rounding: learned`"
    )
    smooth: Smooth | None = Field(
        default=None,
        description="smoothing before the rounding; `{}` takes the defaults",
    )
    rotate: bool | Literal["heads"] = Field(
        default=False,
        description="rotate hidden state and head values before the rounding; `heads`: the values alone",
    )
    protect: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="share of the weights, experts aside, to spare where rounding costs most; in `w8a8`, "
        "`w4a8` and `w4a4` their inputs alone are spared",
    )
    skip: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="names of linears to keep; `*` matches anything",
    )
    head: Literal["keep", "quantize"] = Field(
        default="keep",
        description="whether the output head is quantised too",
    )
    experts: Literal["quantize", "keep"] = Field(
        default="quantize",
        description="whether the experts of a mixture are quantised too; the result then loads once "
        "llmcompress is imported. Routers are kept",
    )
    embedding: Literal["keep", "int8"] = Field(
        default="keep",
        description="`int8`: store the input embedding, and a head tied to it, as one int8 matrix",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Quantize:
        if "steps" in self.model_fields_set and self.rounding != "learned":
            raise ValueError(f"steps is for rounding: learned, not {self.rounding}")
        if self.two_sided:
            if self.rounding == "nearest":
                raise ValueError("two_sided is for rounding: gptq and learned, not nearest")
            if self.smooth is not None:
                raise ValueError(
                    "two_sided weighs outputs as they are before scales cross; leave two_sided or smooth"
                )
        for name, override in self.overrides.items():
            try:
                override.over(self)
            except ValidationError as error:
                raise ValueError(
                    f"overrides.{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
                ) from None
        return self

    def with_effort(self, effort: Effort, before: Sequence[Stage]) -> Stage:
        """With the rounding and its steps, if it has some. Weights that layers share can't be learned."""
        shared = any(stage.shares for stage in before)
        rounded = self.model_copy(update=self.unsaid(rounding="gptq" if shared else ROUNDINGS[effort]))
        if rounded.rounding != "learned":
            return rounded
        return rounded.model_copy(update=self.unsaid(steps=STEPS[effort]))

    def rotation(self, model: LayerwiseModel, seed: int) -> Rotation | None:
        """The rotation to apply first, or None. Raises ModelError if the model can't be rotated."""
        if not self.rotate:
            return None
        r1 = self.rotate != "heads"
        return Rotation(model.anatomy, model.config, seed, r1=r1, r2=not (r1 and self._heads_stay(model)))

    def _heads_stay(self, model: LayerwiseModel) -> bool:
        """Whether the head values of a model can't be rotated, and its hidden state may be all the same."""
        turns = model.anatomy.turns
        return turns is not None and R2 not in turns

    def choose(self, model: LayerwiseModel) -> tuple[dict[str, QuantScheme], dict[str, str]]:
        """Return the scheme of each linear to quantise, by full name, and those to keep with the reason,
        without `protect`.

        Raises ModelError if no linear is left, or if an override can't stand beside the rest.
        """
        chosen: dict[str, QuantScheme] = {}
        kept: dict[str, str] = {}
        rows, ours = model.anatomy.rows(model.config), model.layer_linears
        require_known("skip", self.skip, ours)
        require_known("overrides", self.overrides, [*ours, model.anatomy.head], model.sizes)
        if model.shared_linears and (
            alone := [
                name for name in ALONE if getattr(self, name) not in (None, False, 0.0, "gptq", "nearest")
            ]
        ):
            raise ModelError(
                f"{alone[0]} is for layers by themselves, and some of this model share weights; leave "
                f"{alone[0]}"
            )
        for name, shape in model.linear_maps():
            coding = self._settings(name, rows.get(f"{name}.weight", "")).coding(model.weight_dtype)
            if why := self._why_not(name, model) or coding.refusal(shape):
                kept[name] = why
            else:
                chosen[name] = coding
        kept |= model.kept_weights | dict.fromkeys(model.expert_weights, KEEP)
        if not chosen:
            raise ModelError(
                f"no linear of this model can be quantised ({next(iter(kept.values()))}); try another "
                "group_size or skip"
            )
        if self.embedding == "int8":
            chosen |= embedding_codings(
                model, self._settings(model.anatomy.head, rows[f"{model.anatomy.head}.weight"])
            )
            kept = {name: why for name, why in kept.items() if name not in chosen}  # a tied head
        for name, source in model.shared_linears.items():  # one weight, one code
            chosen.pop(name, None)
            kept.pop(name, None)
            if source in chosen:
                chosen[name] = chosen[source]
            else:
                kept[name] = kept[source]
        return together(chosen, native=model.plain), kept

    @property
    def formats(self) -> list[FormatConfig]:
        """The settings of all linears, and of those that overrides name."""
        return [self, *(override.over(self) for override in self.overrides.values())]

    @property
    def weight_bits(self) -> tuple[float, float]:
        """The least and the most bits per weight, scales included, levels of codebooks excluded."""
        found = [each.coding(torch.float32).bits for each in self.formats]
        return min(found), max(found)

    @property
    def learns(self) -> bool:
        """Whether the rounding is learned."""
        return self.rounding == "learned"

    @property
    def kernel(self) -> str | None:
        """The format, if all linears have the same and the embedding has its dtype."""
        mixed = self.embedding != "keep" or len({each.format for each in self.formats}) > 1
        return None if mixed else self.format

    @property
    def spares(self) -> bool:
        """Whether some linears are kept by their names or by their loss."""
        return bool(self.protect or self.skip)

    @property
    def needs(self) -> int:
        """The axes to rotate along, where scales cross to smooth, otherwise what each linear reads."""
        return AXES if self.rotate else SCALES if self.smooth is not None else LINEARS

    @property
    def divides(self) -> By:
        """The batches of the text; if rounding is learned each batch, which a step of the training reads.

        LLM.int8 finds its outlier columns over all tokens of a batch, so that its batches stay whole.
        """
        whole = self.rounding != "learned" or any(each.threshold for each in self.formats)
        return "batch" if whole else "sequence"

    @property
    def leaves(self) -> str:
        """The bits per weight, and what else is spared or coded."""
        least, most = (f"{bits:.3f}".rstrip("0").rstrip(".") for bits in self.weight_bits)
        words = f"{least} bits per weight" if least == most else f"{least} to {most} bits per weight"
        if self.protect and self.format not in FORMATS:
            words += f", {asked_percent(self.protect)} of the weights kept in their dtype"
        return words + (", embedding in 8 bits" if self.embedding == "int8" else "")

    @property
    def takes_experts(self) -> bool:
        """Whether experts are quantised."""
        return self.experts == "quantize"

    @property
    def needs_plugin(self) -> bool:
        """Whether formats are mixed or the plug-in's own, or the embedding is coded too."""
        kinds = {NATIVE.get(each.format) for each in self.formats}
        return self.embedding != "keep" or len(kinds) > 1 or None in kinds

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse a second code for the same linears. Errors: ValueError."""
        if any(stage.takes_all for stage in before) and (self.head, self.embedding) == ("keep", "keep"):
            raise ValueError(
                "codebook and quantize are two codes for the same linears, and codebook takes all; give it "
                "skip, or leave one"
            )
        super().require_place(before, after)

    def require_possible(self, model: LayerwiseModel, before: Sequence[StageResult], seed: int) -> None:
        """Refuse a model that can't be rotated, and one that transformers would load codes of in other
        modules."""
        self.rotation(model, seed)
        native = model.plain and not self.needs_plugin
        if native and (replaced := replaced_modules(model.model)):
            raise ModelError(
                f"transformers replaces {replaced[0]} of a {model.anatomy.family} model when it loads "
                "bitsandbytes' codes, and its weights would not fit; leave out experts: keep, or use a "
                "format of the plug-in: w8a16"
            )

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How linears and embedding are written. The parameters of experts that become linears go."""
        chosen, kept = self.choose(model) if journal is None else self.settled(model, journal)
        return StageResult(chosen, kept, removed=replaced_parameters(model))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of moments and solvers, and the bytes of the codes."""
        return estimate.of(self, model, work)

    def settled(
        self, model: LayerwiseModel, journal: Journal
    ) -> tuple[dict[str, QuantScheme], dict[str, str]]:
        """The result of `choose` once `apply` has found which linears to protect."""
        chosen, kept = self.choose(model)
        for name in journal.facts(PROTECTED, 0, ProtectedLinears).linears if self.protect else ():
            coding = chosen.pop(name)
            if wide := spared(coding):
                chosen[name] = wide
            else:
                kept[name] = "protect"
        return chosen, kept

    def _settings(self, name: str, spelling: str) -> FormatConfig:
        """The settings of one linear: the last override that matches, else the stage's own."""
        found: FormatConfig = self
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern) or (spelling and pattern in Spelling.parse(spelling).axes):
                found = override.over(self)
        return found

    def _why_not(self, name: str, model: LayerwiseModel) -> str | None:
        if name == model.anatomy.head:
            if self.head == "keep":
                return "head: keep"
            if model.config.tie_word_embeddings:
                raise ModelError(
                    "head: quantize needs an untied lm_head, and this one is tied to the embedding; use "
                    "head: keep and embedding: int8, which is both"
                )
        elif name not in model.layer_linears:
            return model.kept_weights.get(name, "outside the layers")
        elif (layout := model.layouts.get(name)) is not None and layout != FactoredLayout("shared"):
            return f"is stored as {layout.format} already"
        elif any(fnmatchcase(name, pattern) for pattern in self.skip):
            return "skip"
        elif not self.takes_experts and name in model.expert_linears:  # an earlier stage divided them
            return KEEP
        return None

    @property
    def fisher_tokens(self) -> int:
        """Tokens, at least, from which the Fisher matrices are computed: more for a training than for a
        ranking."""
        return MANY if self.rounding == "learned" or self.two_sided else TOKENS

    def _weighed(self, model: LayerwiseModel, solved: Mapping[str, QuantScheme]) -> dict[int, list[str]]:
        """The linears of each layer whose outputs have Fisher matrices of their own, by their names in it."""
        if not self.two_sided:
            return {}
        ours = solved.keys() - model.expert_linears.keys()
        found = {}
        for index in range(len(model.layers)):
            start = f"{model.layer_name(index)}."
            linears = model.anatomy_of_layer(index).linears
            found[index] = [linear for linear in linears if start + linear in ours]
        return found

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Quantise every layer that the journal does not hold yet, and leave its tensors and facts there."""
        if rotation := self.rotation(model, context.seed):
            model.turn(rotation)
        chosen, _ = self.choose(model)
        solved = {name: coding for name, coding in chosen.items() if name not in apart(model)}
        # the head is the step after the last layer
        steps = len(model.layers) + (model.anatomy.head in solved)
        journal = context.journal
        if (solved and (self.rounding == "learned" or self.two_sided)) or self.protect:
            # of the full model, so before its embedding is rounded
            find_fisher(model, context, self.fisher_tokens, self._weighed(model, solved))
        full, outer = settle_outer(model, context, chosen)
        if self.protect and not journal.has(PROTECTED, 0):
            LayerQuantizer(self).find_hurt(model, context, solved)
        chosen, kept = self.settled(model, journal)
        if not all(journal.has(STAGE, index) for index in range(steps)):
            LayerQuantizer(self).walk(model, context, chosen, steps, full)
        facts = Facts(STAGE, kept=kept)
        shapes = {name: shape for name, shape in model.matrices().items() if name in chosen}
        bits = {name: chosen[name].bits_of(shape) for name, shape in shapes.items()}
        unsaid = {
            "overrides",
            "threshold",
            "activations",
            "range",
            "smooth",
            "rotate",
            "protect",
            "embedding",
        }
        unsaid -= self.model_fields_set
        unsaid |= set() if self.format in ("nf4", "fp4") else {"double_quant"}
        unsaid |= set() if self.has_group_size else {"group_size"}
        facts.details = self.model_dump(exclude={"skip", "steps"} | unsaid) | {
            "bits": mean_bits(bits, shapes)
        }
        facts.linears += outer.linears if outer else ()
        layers = [journal.facts(STAGE, index, QuantizedLayer) for index in range(steps)]
        facts.add(layers)
        facts.notes += starved_experts(layers, model.hidden_size)
        if self.rotate is True and self._heads_stay(model):
            facts.notes.append("the hidden state is rotated, and the head values of this model can't be")
        return facts
