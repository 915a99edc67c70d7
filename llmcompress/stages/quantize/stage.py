"""Quantise the linears, each layer with the inputs that the layers before it give.

`nearest` is stock bitsandbytes: absmax scales and nearest codes, the baseline. `gptq` solves each linear for
its codes and scales under the second moments of its inputs, one after another, so that each makes good what
those before it lost against the full model. `learned` goes on from there and trains the codes and scales of a
whole layer at once, so that its output comes closest to the full model's where the full model's predictions
feel it. All three write the same bytes. A layer that the journal holds is not done again: its codes are read,
and the walk goes on through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.quantize_weight import output_error, weight_error
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.errors import ModelError
from llmcompress.formats import registry
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.schemes import FourBitScheme, QuantScheme
from llmcompress.io.journal import Journal
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.io.units import share_of
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.rotation import Rotation
from llmcompress.modeling.sequential import TOKENS_AT_ONCE, head_input, walk
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload, naming_layer
from llmcompress.stages.fisher import find_fisher, fisher, tokens_for
from llmcompress.stages.linear_rewriting import inner, install, mean_bits, require_known
from llmcompress.stages.quantize.config import FormatConfig, Override, together
from llmcompress.stages.quantize.embedding import apart, embedding_codings, settle_outer
from llmcompress.stages.quantize.rounding import Rounding
from llmcompress.stages.quantize.sensitivity import costs, most_hurt, spared
from llmcompress.stages.quantize.smoothing import Smooth, norm_of

Entry = tuple[
    dict[str, Tensor], dict[str, Any]
]  # of the journal: tensors by their names in the checkpoint, facts

NATIVE = {"nf4": "4 bits", "fp4": "4 bits", "int8": "8 bits"}  # layouts that plain transformers loads
ALONE = (
    "smooth",
    "rotate",
    "protect",
    "rounding",
)  # what one weight for several layers does not go with, but for gptq
STAGE, SMOOTH, PROTECTED = "quantize", "smooth", "protected"  # what is done and found out, in the journal


class Quantize(FormatConfig, Stage):
    """Stores the weights of linears in 8 or 4 bits; some formats round activations too."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "coded weights"
    quantizes: ClassVar[bool] = True
    overrides: dict[str, Override] = Field(
        default={},
        description="other settings for some linears, by name (`*` matches anything) or by an axis they run "
        "along (`ffn`, `kv`, `q`, `hidden`); the last match holds",
    )
    rounding: Literal["nearest", "gptq", "learned"] = Field(
        default="gptq", description="how codes are chosen; `nearest` is stock bitsandbytes"
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
        description="share of the weights to spare where rounding costs most; in `w8a8`, `w4a8` and `w4a4` "
        "their inputs alone are spared",
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
    embedding: Literal["keep", "int8"] = Field(
        default="keep",
        description="`int8`: store the input embedding, and a head tied to it, as one int8 matrix",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Quantize:
        if "steps" in self.model_fields_set and self.rounding != "learned":
            raise ValueError(f"steps is for rounding: learned, not {self.rounding}")
        for name, override in self.overrides.items():
            try:
                override.over(self)
            except ValidationError as error:
                raise ValueError(
                    f"overrides.{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
                ) from None
        return self

    def rotation(self, model: LayerwiseModel, seed: int) -> Rotation | None:
        """The rotation that is to come first, if one is; raises ModelError where the model can't be
        rotated."""
        if not self.rotate:
            return None
        return Rotation(model.anatomy, model.config, seed, r1=self.rotate != "heads")

    def choose(self, model: LayerwiseModel) -> tuple[dict[str, QuantScheme], dict[str, str]]:
        """How each linear to quantise is written, by full name, and those to keep with the reason; `protect`
        left out.

        Raises ModelError where none is left, or an override can't stand beside the rest.
        """
        chosen: dict[str, QuantScheme] = {}
        kept: dict[str, str] = {}
        rows, ours = model.anatomy.rows(model.config), inner(model, model.anatomy.linears)
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
            if why := self._why_not(name, model, ours) or coding.refusal(shape):
                kept[name] = why
            else:
                chosen[name] = coding
        experts = "3-D experts, which bitsandbytes' 4-bit layout can't hold"
        kept |= dict.fromkeys(inner(model, model.anatomy.experts), experts)
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
    def bits(self) -> tuple[float, float]:
        """Bits per weight, scales included, the least and the most."""
        found = [each.coding(torch.float32).bits for each in self.formats]
        return min(found), max(found)

    @property
    def leaves(self) -> str:
        """The bits of a weight, and what is spared or coded besides."""
        least, most = (f"{bits:.3f}".rstrip("0").rstrip(".") for bits in self.bits)
        words = f"{least} bits per weight" if least == most else f"{least} to {most} bits per weight"
        if self.protect and NATIVE.get(self.format):
            words += f", {share_of(self.protect)} of the weights kept in their dtype"
        return words + (", embedding in 8 bits" if self.embedding == "int8" else "")

    @property
    def needs_plugin(self) -> bool:
        """Whether formats are mixed, or of ours, or the embedding is coded too."""
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
        """Refuse a model that can't be rotated."""
        self.rotation(model, seed)

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How linears and embedding are written."""
        return StageResult(*(self.choose(model) if journal is None else self.settled(model, journal)))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """The cost of moments and solvers, and the bytes of the codes."""
        chosen, kept = self.choose(model)
        stored = {name: scheme for name, scheme in chosen.items() if name not in model.shared_linears}
        shapes = {name: shape for name, shape in model.matrices().items() if name in stored}
        solved = [name for name in shapes if name not in apart(model)]
        saved = 0.0
        for name, shape in shapes.items():
            spares = self.protect if name in solved and spared(stored[name]) is None else 0.0
            scales = 0 if isinstance(stored[name], FourBitScheme) else 32 * shape[0]
            more = (
                math.prod(shape) * (stored[name].bits - model.bits_of(name)) + scales
            )  # bits, over those of the base
            saved -= more * (1 - spares) / 8
        formats = ", ".join(dict.fromkeys(scheme.format for scheme in stored.values()))
        reasons = "; ".join(sorted(set(kept.values())))
        return Estimate(
            stage=f"quantize ({formats}, {self.rounding})",
            parameters=model.parameters(),
            size_bytes=int(work.size_bytes - saved),
            peak_memory_bytes=self._memory(model, work.tokens),
            seconds=self._operations(model, shapes, solved, work.tokens) / work.rate,
            notes=(f"{len(shapes)} linears are quantised, {len(kept)} kept ({reasons})",) if kept else (),
        )

    def _memory(self, model: MetaModel, tokens: int) -> int:
        """Bytes held at once: the largest layer with its solver's matrices, what lies outside the layers, the
        hidden states."""
        inner = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
        outer = sum(p.numel() for p in model.model.parameters()) - model.inner_parameters()
        # inputs and outputs, here and in the full model
        states = tokens * model.config.hidden_size * (2 if self.rounding == "nearest" else 4)
        widest = max(columns for _, (_, columns) in model.linear_maps())
        # a layer in float32, before and after, its codes as int64; gradients, positions and moments of Adam
        # if trained
        copies = {"nearest": 4, "gptq": 6, "learned": 11}[self.rounding]
        floats = inner * copies + outer + states + 4 * widest * widest
        return int(4 * floats + TOKENS_AT_ONCE * model.config.vocab_size * 8)

    def _operations(
        self, model: MetaModel, shapes: Mapping[str, tuple[int, int]], solved: Sequence[str], tokens: int
    ) -> float:
        """Multiplications and additions of the stage."""
        inner = model.inner_parameters()
        forward = 2.0 * inner * tokens
        total = 2 * forward  # one pass for the moments, one to go on
        if self.rounding != "nearest":
            total += (
                3 * forward
            )  # the moments of one group of linears after another, in two streams; most passes end early
            total += sum(
                2.0 * rows * columns**2 * 13 + columns**3
                for rows, columns in (shapes[name] for name in solved)
            )
        if self.rounding == "learned" or self.protect:
            total += 5 * 2.0 * inner * tokens_for(model.config.hidden_size)
        if self.rounding == "learned":
            total += 3 * 2.0 * inner * self.steps * TOKENS_AT_ONCE + 2 * forward
        return total

    def settled(
        self, model: LayerwiseModel, journal: Journal
    ) -> tuple[dict[str, QuantScheme], dict[str, str]]:
        """As `choose`, once `apply` has found which linears to protect."""
        chosen, kept = self.choose(model)
        for name in journal.load(PROTECTED, 0)[1]["linears"] if self.protect else ():
            coding = chosen.pop(name)
            if wide := spared(coding):
                chosen[name] = wide
            else:
                kept[name] = "protect"
        return chosen, kept

    def _settings(self, name: str, spelling: str) -> FormatConfig:
        """What holds for one linear: of several overrides that match, the last."""
        found: FormatConfig = self
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern) or (spelling and pattern in Spelling.parse(spelling).axes):
                found = override.over(self)
        return found

    def _why_not(self, name: str, model: LayerwiseModel, ours: Collection[str]) -> str | None:
        if name == model.anatomy.head:
            if self.head == "keep":
                return "head: keep"
            if model.config.tie_word_embeddings:
                raise ModelError(
                    "head: quantize needs a head of its own, this one is tied to the embedding; use head: "
                    "keep and embedding: "
                    "int8, which is both"
                )
        elif name not in ours:
            return "outside the layers"
        elif (layout := model.layouts.get(name)) is not None and layout != FactoredLayout("shared"):
            return f"is stored as {layout.format} already"
        elif any(fnmatchcase(name, pattern) for pattern in self.skip):
            return "skip"
        return None

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Quantise every layer that the journal does not hold yet; leave its tensors and facts there."""
        if rotation := self.rotation(model, context.seed):
            model.turn(rotation)
        chosen, _ = self.choose(model)
        solved = {name: coding for name, coding in chosen.items() if name not in apart(model)}
        steps = len(model.layers) + (
            model.anatomy.head in solved
        )  # the head is the step after the last layer
        journal = context.journal
        if self.rounding == "learned" or self.protect:
            find_fisher(model, context)  # of the full model, so before its embedding is rounded
        full, embeddings = settle_outer(model, context, chosen)
        if self.protect and not journal.has(PROTECTED, 0):
            self._find_hurt(model, context, solved)
        chosen, kept = self.settled(model, journal)
        if not all(journal.has(STAGE, index) for index in range(steps)):
            self._walk(model, context, chosen, steps, full)
        facts = Facts(STAGE, kept=[{"name": name, "why": why} for name, why in kept.items()])
        shapes = {name: shape for name, shape in model.matrices().items() if name in chosen}
        bits = {name: chosen[name].bits for name in shapes}
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
        unsaid |= {"group_size"} if self.format in ("int8", "w8a8", "w8a16") else set()
        facts.details = self.model_dump(exclude={"skip", "steps"} | unsaid) | {
            "bits": mean_bits(bits, shapes)
        }
        facts.linears += embeddings
        facts.add(journal.load(STAGE, index)[1] for index in range(steps))
        facts.notes += starved_experts(facts.per_layer, model.config.hidden_size)
        return facts

    def _walk(
        self,
        model: LayerwiseModel,
        context: Context,
        chosen: dict[str, QuantScheme],
        steps: int,
        full: Sequence[Tensor],
    ) -> None:
        """Do the layers; `full`: the states that the full model's embedding gives, where it is not the one
        that is used."""
        journal = context.journal
        calibrated, through = self.rounding != "nearest", steps > len(model.layers)
        pooled = self._pooled(model, context, chosen) if calibrated and model.shared_linears else {}
        layers = walk(model, context.data.calibration, reference=calibrated, through=through)
        for layer in context.track(layers, f"quantize ({self.format}, {self.rounding})", steps):
            head = layer.index == len(model.layers)
            if layer.index == 0 and full and calibrated:
                layer.reference = list(full)
            codings = {model.anatomy.head: chosen[model.anatomy.head]} if head else layer.own(chosen)
            known = {} if head else layer.own(self._known(model, layer, chosen, journal))
            dtype_of = _in_block(model, layer)
            rounding = Rounding(codings, model.device, dtype_of, layer.own(pooled), known)
            changed = [] if head else self._smoothed(layer, codings, context, dtype_of)
            if not journal.has(STAGE, layer.index):
                entry = self._head(model, layer, rounding) if head else self._layer(layer, rounding, context)
                dense = {name: layer.module.get_parameter(name).data for name in changed}
                entry[0].update(model.as_stored(dense, f"{layer.name}."))
                journal.save(STAGE, layer.index, *entry)
            if not head:
                install(layer, codings, journal.load(STAGE, layer.index)[0])

    def _pooled(self, model: LayerwiseModel, context: Context, chosen: Collection[str]) -> dict[str, Moments]:
        """Of weights that layers share, the second moments of what all of them read, by the full name of the
        first."""
        shared_linears, found = model.shared_linears, dict[str, Moments]()
        wanted = {name for pair in shared_linears.items() for name in pair if pair[0] in chosen}
        for layer in context.track(
            walk(model, context.data.calibration), "read what shared weights read", len(model.layers)
        ):
            here = [name for name in layer.anatomy.linears if f"{layer.name}.{name}" in wanted]
            groups = [group for group in layer.anatomy.consumers if set(group) & set(here)]
            moments = layer.moments(*groups) if groups else {}
            for linear in here:
                source = shared_linears.get(name := f"{layer.name}.{linear}", name)
                found[source] = found[source].joined(moments[linear]) if source in found else moments[linear]
        return found

    def _known(
        self, model: LayerwiseModel, layer: DecoderLayer, chosen: Mapping[str, QuantScheme], journal: Journal
    ) -> dict[str, registry.StoredWeight]:
        """The codes of a layer's linears that are those of earlier layers, by full name."""
        here = {
            name: source
            for name, source in model.shared_linears.items()
            if name in chosen and name.startswith(f"{layer.name}.")
        }
        tensors: dict[str, Tensor] = {}
        for index in {
            int(source.removeprefix(f"{model.anatomy.layers}.").partition(".")[0]) for source in here.values()
        }:
            tensors |= journal.load(STAGE, index)[0]
        shapes = model.matrices()
        return {
            name: chosen[name].read(registry.parts_of(source, tensors), shapes[source][1])
            for name, source in here.items()
        }

    def _smoothed(
        self,
        layer: DecoderLayer,
        codings: Mapping[str, QuantScheme],
        context: Context,
        dtype_of: Callable[[str], torch.dtype],
    ) -> list[str]:
        """Let the scales cross that the journal holds or a search finds; the parameters changed by it that
        stay dense."""
        if self.smooth is None:
            return self._turned(layer, codings)
        journal = context.journal
        if not journal.has(SMOOTH, layer.index):
            before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
            found = self.smooth.search(layer, codings, dtype_of)
            for name, data in before.items():
                layer.module.get_parameter(name).data = data
            journal.save(SMOOTH, layer.index, {key: factor.cpu() for key, factor in found.items()}, {})
        factors, changed = journal.load(SMOOTH, layer.index)[0], set()
        for key in layer.anatomy.scale_pairs:
            if key in factors:
                changed |= set(layer.cross(key, factors[key].to(layer.device), dtype_of(norm_of(layer, key))))
        return sorted(
            (changed | set(self._turned(layer, codings))) - {f"{linear}.weight" for linear in codings}
        )

    def _turned(self, layer: DecoderLayer, linears: Iterable[str]) -> list[str]:
        """All parameters that stay dense, where a rotation changed them."""
        inside = {f"{linear}.weight" for linear in linears}
        return [name for name in layer.anatomy.layer if name not in inside] if self.rotate else []

    def _find_hurt(self, model: LayerwiseModel, context: Context, chosen: Mapping[str, QuantScheme]) -> None:
        """Journal the linears that `protect` spares; scales cross first, and are journalled too."""
        journal, found = context.journal, dict[str, float]()
        sizes = {name: math.prod(shape) for name, shape in model.linear_maps() if name in chosen}
        for layer in context.track(
            walk(model, context.data.calibration), "find the linears that suffer", len(model.layers)
        ):
            codings = layer.own(chosen)
            self._smoothed(layer, codings, context, _in_block(model, layer))
            nats = costs(layer, codings, fisher(context, layer.index))
            found |= {f"{layer.name}.{linear}": cost for linear, cost in nats.items()}
        journal.save(PROTECTED, 0, {}, {"linears": most_hurt(found, sizes, self.protect), "nats": found})

    def _layer(self, layer: DecoderLayer, rounding: Rounding, context: Context) -> Entry:
        codings = rounding.codings
        weights = {linear: layer.weight(linear) for linear in codings}
        notes: dict[str, Any] = {}
        if self.rounding == "nearest":
            scales = rounding.round_inputs(layer, layer.anatomy.consumers, weights)
            moments = layer.moments()
            packed = {}
            for linear, W_RC in weights.items():
                with naming_layer(f"{layer.name}.{linear}"):
                    packed[linear] = codings[linear].nearest(W_RC, scales.get(linear))
        else:
            solved, moments, scales = rounding.in_turn(layer, weights)
            if self.rounding == "learned":
                F_DD = fisher(context, layer.index)
                trained = rounding.learned(
                    layer, weights, solved, F_DD, input_scales=scales, steps=self.steps, seed=context.seed
                )
                solved, notes = trained
            packed = {linear: solution.stored for linear, solution in solved.items()} | rounding.given(scales)
        tensors: dict[str, Tensor] = {}
        facts = []
        for linear, W_RC in weights.items():
            name, bias = f"{layer.name}.{linear}", f"{linear}.bias"
            tensors |= _named(name, packed[linear])
            if self.rounding != "nearest" and bias in layer.anatomy.layer:
                tensors[f"{layer.name}.{bias}"] = (
                    layer.module.get_parameter(bias).data.to(rounding.dtype_of(bias)).cpu()
                )
            facts.append(_facts(name, codings[linear], W_RC, packed[linear], moments[linear]))
        if layer.expert_tokens:
            notes["expert_tokens"] = list(layer.expert_tokens.values())
        return tensors, {"name": layer.name, "linears": facts, **notes}

    def _head(self, model: LayerwiseModel, layer: DecoderLayer, rounding: Rounding) -> Entry:
        name = model.anatomy.head
        coding, (W_RC, moments) = rounding.codings[name], head_input(model, layer)
        scale = coding.static_scale(float(moments.top_C.max()))
        nearest = self.rounding == "nearest"
        with naming_layer(name):
            packed = (
                coding.nearest(W_RC, scale) if nearest else rounding.gptq(name, W_RC, moments, scale).stored
            )
        return _named(name, packed), {"name": name, "linears": [_facts(name, coding, W_RC, packed, moments)]}


def _in_block(model: LayerwiseModel, layer: DecoderLayer) -> Callable[[str], torch.dtype]:
    """The dtype in which a parameter of a layer is stored, by its name there."""
    return lambda name: model.dtype_of(f"{layer.name}.{name}")


def starved_experts(layers: list[dict[str, Any]], few: int) -> list[str]:
    """A line for each layer some of whose experts saw fewer calibration tokens than `few`, with those
    experts.

    No calibrated format can be better than its data: such an expert's second moments are singular. Experts
    are kept in their dtype by the formats that there are, so this is said and nothing more is done.
    """
    lines = []
    for layer in layers:
        starved = [
            f"{expert} ({tokens})"
            for expert, tokens in enumerate(layer.get("expert_tokens", ()))
            if tokens < few
        ]
        if starved:
            lines.append(
                f"{layer['name']}: experts that saw fewer than {few} calibration tokens: {', '.join(starved)}"
            )
    return lines


def _named(name: str, packed: registry.StoredWeight) -> dict[str, Tensor]:
    """The tensors of a linear under the names they have in a checkpoint."""
    return {f"{name}.{part}": tensor.cpu() for part, tensor in registry.tensors_of(packed).items()}


def _facts(
    name: str, coding: QuantScheme, W_RC: Tensor, packed: registry.StoredWeight, moments: Moments
) -> dict[str, Any]:
    Q_RC = registry.dequantize(packed).to(W_RC.device)
    return {
        "name": name,
        "format": coding.format,
        "bits": coding.bits,
        "relative_error": output_error(W_RC, Q_RC, moments.H_CC),  # of the outputs on the calibration text
        "weight_error": weight_error(W_RC, Q_RC),
    }
