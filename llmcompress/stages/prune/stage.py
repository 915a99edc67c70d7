"""Cut units of an axis: feed-forward neurons, key-value heads with their query heads, query heads, and what
else there is.

Each layer is cut with the inputs that the cut layers before it give; `units` says which units go. The linear
that reads the axis is then solved for anew (`repair`), so that its outputs on the inputs as they have become
come closest to those of the model as it was. Where all layers keep the same number of units, the result is a
plain checkpoint that transformers loads by itself; where `allocation` gives each layer a width of its own, it
loads once llmcompress is imported. A layer that the journal holds is not cut again. `experts`, `hidden` and
`depth` know what is special about experts, the hidden state and layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.architectures.resize import changed, resized, shortened
from llmcompress.errors import ModelError
from llmcompress.io.journal import Journal
from llmcompress.io.units import amount, share_of
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import following, gradients, walk
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.fisher import TOKENS, find_fisher, metric
from llmcompress.stages.prune import (
    allocation,
    estimate,
    experts,
    hidden_size,
    layer_dropping,
    structured,
    sublayer_dropping,
)
from llmcompress.stages.prune.allocation import Widths
from llmcompress.stages.prune.budget import NEAR, Budget

STAGE, WIDTHS, TAYLOR = "prune", "widths", "taylor"  # in the journal
# what the width of ffn is a multiple of, unless the recipe says otherwise: 4-bit groups after it need that
KERNEL = 64
INNER = ("kv", "q", "ffn")  # axes that a linear of the layer reads, in order of computation
Axis = Literal["ffn", "kv", "q", "expert", "hidden", "layer", "sublayer"]
UNITS = {
    "ffn": "feed-forward neurons",
    "kv": "key-value heads",
    "q": "query heads",
    "expert": "experts",
    "hidden": "hidden channels",
    "layer": "layers",
    "sublayer": "attentions and feed-forward parts",
}
SCORES = {  # of an axis, the default first
    **dict.fromkeys(INNER, ("obs", "taylor", "wanda", "activation", "magnitude")),
    "expert": ("activation",),
    "hidden": ("pca", "activation"),
    "layer": ("kl", "influence"),
    "sublayer": ("kl",),
}


@dataclass(frozen=True)
class Cut:
    """What is left of a model: the units of each axis in each layer, or all layers but some."""

    widths: Widths = field(default_factory=dict)
    gone: tuple[int, ...] = ()


class Prune(Budget, Stage):
    """Removes whole units: neurons, heads, experts, layers or channels of the hidden state."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "fewer parameters"
    retired: ClassVar[Mapping[str, str]] = {
        "pattern": "single weights are set to zero by a stage of its own, as sparsify: {pattern: ...}"
    }

    axis: Axis | Annotated[tuple[Axis, ...], Field(min_length=1, strict=False)] = Field(
        description="units that are removed: `ffn` neurons, `kv` (key-value heads with their query heads), "
        "`q` (query heads of each key-value head), `expert`, `hidden` (channels of the hidden state), "
        "`layer`, `sublayer` (the attention or the feed-forward part of a layer); or a list of `ffn` with "
        "`kv` or `q`",
    )
    allocation: Literal["uniform", "sensitivity"] | None = Field(
        default=None,
        description="`uniform`: the same width in every layer; `sensitivity`: a width per layer, where it "
        "costs least; default: `uniform` with `keep`, `sensitivity` with a budget",
    )
    score: Literal["obs", "taylor", "wanda", "activation", "magnitude", "pca", "kl", "influence"] | None = (
        Field(
            default=None,
            description="how units are ranked; default: `obs` for `ffn`, `kv` and `q`, `activation` for "
            "`expert`, `pca` for `hidden`, `kl` for `layer` and `sublayer`",
        )
    )
    repair: bool = Field(
        default=True,
        description="solve the linear that reads the axis again by least squares",
    )

    @model_validator(mode="after")
    def _of_the_axis(self) -> Prune:
        spoken = " and ".join(self.axes)
        if len(self.axes) > 1 and (
            len(set(self.axes)) < len(self.axes) or set(self.axes) not in ({"ffn", "kv"}, {"ffn", "q"})
        ):
            raise ValueError(
                f"axis {spoken}: ffn goes with kv or with q, everything else in a stage of its own"
            )
        if len(self.axes) > 1 and self.keep is None and self.allocation == "uniform":
            raise ValueError(f"allocation: uniform with a budget is for one axis, not {spoken}")
        fitting = SCORES[self.axes[0]]
        if self.score and self.score not in fitting:
            raise ValueError(f"score {self.score} is not for axis {spoken}; use {' or '.join(fitting)}")
        for key, fits in (("allocation", set(INNER)), ("repair", {*INNER, "hidden"})):
            if key in self.model_fields_set and not fits.issuperset(self.axes):
                raise ValueError(f"{key} is for {', '.join(sorted(fits))}, not for {spoken}")
        return self

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are cut, in order of computation."""
        given = (self.axis,) if isinstance(self.axis, str) else self.axis
        return tuple(sorted(given, key=lambda axis: INNER.index(axis) if axis in INNER else 0))

    @property
    def of_layers(self) -> bool:
        """Whether whole layers go."""
        return self.axes == ("layer",)

    @property
    def of_parts(self) -> bool:
        """Whether the attention or ffn of layers goes."""
        return self.axes == ("sublayer",)

    @property
    def worth(self) -> str:
        """The score, also where none was given."""
        return self.score or SCORES[self.axes[0]][0]

    @property
    def sensitive(self) -> bool:
        """Whether each layer gets a width of its own."""
        return set(INNER).issuperset(self.axes) and (
            (self.allocation or ("uniform" if self.keep else "sensitivity")) == "sensitivity"
        )

    def sizes(self, model: LayerwiseModel) -> Widths:
        """How many units there are in each layer. Errors: ModelError where an axis can't be cut."""
        if self.of_parts:
            return sublayer_dropping.sizes(model)
        for axis in self.axes:
            if axis not in model.sizes or (axis in INNER and model.anatomy.consumer_of(axis) is None):
                raise ModelError(
                    f'axis "{axis}" of this {model.anatomy.family} model can\'t be cut; use ffn, kv, q or '
                    "layer"
                )
            if axis == "hidden" and (why := hidden_size.why_not(model, self.worth)):
                raise ModelError(
                    f"hidden can't be cut by {self.worth}: {why}; use score: activation, or another axis"
                )
        found = {axis: model.widths_of(axis) for axis in self.axes}
        if gone := [(axis, counts.index(0)) for axis, counts in found.items() if 0 in counts]:
            raise ModelError(
                f"layer {gone[0][1]} has no {gone[0][0]} left; cut {gone[0][0]} before sublayers"
            )
        return found

    def cut(self, model: LayerwiseModel, journal: Journal | None = None) -> Cut:
        """What the stage leaves; without the journal of what it has found, as if layers were alike and the
        last layers went.

        Raises ModelError where the axis can't be cut, or not so far.
        """
        if self.of_layers:
            total = len(model.layers)
            return Cut(
                gone=tuple(journal.load(STAGE, 0)[1]["gone"] if journal else range(self.layers(model), total))
            )
        if self.of_parts:
            gone = journal.load(WIDTHS, 0)[1]["gone"] if journal else sublayer_dropping.guess(model, self)
            return Cut(sublayer_dropping.widths(model, [(index, axis) for index, axis in gone]))
        if journal and self.sensitive:
            return Cut({axis: tuple(found) for axis, found in journal.load(WIDTHS, 0)[1]["widths"].items()})
        return Cut(self._plain(model))

    def changes(self, model: LayerwiseModel, cut: Cut | None = None) -> dict[str, Any]:
        """What changes in the config. Errors: ModelError where transformers has no such model."""
        cut = cut or self.cut(model)
        if self.of_layers:
            return shortened(
                model.config, [index for index in range(len(model.layers)) if index not in cut.gone]
            )
        return resized(model.config, model.anatomy, cut.widths)

    @property
    def leaves(self) -> str:
        """What is left of the units, or of the parameters."""
        if self.parameters is not None:
            share = self.parameters <= 1
            return (
                f"{share_of(self.parameters)} of the parameters" if share else f"{self.parameters} parameters"
            )
        if self.size is not None:
            return f"{amount(self.size, 'B')} before quantisation"
        units = " and ".join(UNITS[axis] for axis in self.axes)
        kept = self.keep or 1
        return f"{share_of(kept)} of the {units}" if kept < 1 else f"{kept} {units}"

    @property
    def needs_plugin(self) -> bool:
        """Whether layers have widths of their own, or lack an attention or feed-forward part."""
        return self.sensitive or self.of_parts

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse to prune what is no plain matrix any more. Errors: ValueError."""
        if other := next((stage.name for stage in before if stage.rewrites), None):
            raise ValueError(
                f"prune comes before {other}: weights that are shared, products or codes can't be cut any "
                "more"
            )
        super().require_place(before, after)

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """The config of the narrower model, or the layers that are removed."""
        cut = self.cut(model, journal)
        return StageResult(config=self.changes(model, cut), removed_layers=cut.gone)

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """The cost of finding what goes and of solving for what stays."""
        return estimate.of(self, model, left, work)

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Cut every layer that the journal does not hold yet; leave its tensors and facts there."""
        if self.of_layers:
            return self._shorten(model, context)
        journal, sizes = context.journal, self.sizes(model)
        if (self.sensitive or self.of_parts) and not journal.has(WIDTHS, 0):
            found = (
                sublayer_dropping.find(model, context, self)
                if self.of_parts
                else self._allocate(model, context)
            )
            journal.save(WIDTHS, 0, {}, found)
        cut = self.cut(model, journal)
        notes = [_spoken(axis, cut.widths[axis], sizes[axis]) for axis in self.axes if axis in sizes]
        details = self._said(sizes, cut)
        if self.of_parts:
            found = journal.load(WIDTHS, 0)[1]
            notes, details = [sublayer_dropping.spoken(found["gone"], model)], details | found
        if cut.widths == sizes:  # the model is left as it is, to the bit
            return Facts(STAGE, notes=notes, details=details)
        self._find_out(model, context)
        outline = MetaModel(changed(model.config, self.changes(model, cut)), model.device, model.dtype)
        if self.axis == "hidden":
            hidden_size.find_directions(model, context, self.worth)
            facts = hidden_size.cut(model, context, outline, self.worth, self.repair)
        else:
            facts = self._layers(model, context, outline, cut)
        return Facts(STAGE, per_layer=facts, notes=notes, details=details)

    def _layers(
        self, model: LayerwiseModel, context: Context, outline: MetaModel, cut: Cut
    ) -> list[dict[str, Any]]:
        """Cut layer after layer; what that cost."""
        journal, layers = context.journal, len(model.layers)
        if not all(journal.has(STAGE, index) for index in range(layers)):
            visited = walk(model, context.data.calibration, reference=True)
            for layer in context.track(visited, f"prune ({', '.join(self.axes)}, {self.worth})", layers):
                if not journal.has(STAGE, layer.index):
                    self._layer(
                        layer,
                        model,
                        context,
                        {axis: counts[layer.index] for axis, counts in cut.widths.items()},
                    )
                tensors = journal.load(STAGE, layer.index)[0]
                inner = {name.removeprefix(f"{layer.name}."): tensor for name, tensor in tensors.items()}
                layer.become(copy.deepcopy(outline.layers[layer.index]), inner)
        return [entry for index in range(layers) for entry in journal.load(STAGE, index)[1]["cuts"]]

    def _layer(
        self, layer: DecoderLayer, model: LayerwiseModel, context: Context, counts: Mapping[str, int]
    ) -> None:
        """Cut a layer along each axis in turn, and journal what changes in it."""
        named: dict[str, Tensor] = {}
        cuts: list[dict[str, Any]] = []
        if self.of_parts:
            tensors = sublayer_dropping.cut(layer, dict(counts))
            named = model.as_stored(tensors, f"{layer.name}.")
        for axis in () if self.of_parts else self.axes:
            if axis == "expert":
                tensors, lost = experts.cut(layer, counts[axis])
            else:
                score = self._score(model, context, layer.index, axis)
                tensors, lost = structured.cut(layer, axis, counts[axis], score, self.repair)
            named |= model.as_stored(tensors, f"{layer.name}.")
            cuts.append(
                {"name": layer.name, "axis": axis, "kept_units": counts[axis], "relative_error": lost}
            )
        context.journal.save(STAGE, layer.index, named, {"cuts": cuts})

    def _shorten(self, model: LayerwiseModel, context: Context) -> Facts:
        journal, total = context.journal, len(model.layers)
        if not journal.has(STAGE, 0):
            journal.save(STAGE, 0, {}, layer_dropping.find(model, context, self.layers(model), self.worth))
        found = journal.load(STAGE, 0)[1]
        count = total - len(found["gone"])
        details = {"axis": "layer", "score": self.worth, "units": total, "kept_units": count}
        return Facts(
            STAGE, notes=[f"{count} of {total} layers stay"], details=self._asked() | details | found
        )

    def _asked(self) -> dict[str, Any]:
        return self.model_dump(include={"keep", "parameters", "size"}, exclude_none=True)

    def _said(self, sizes: Widths, cut: Cut) -> dict[str, Any]:
        """How the stage was set and what it left, for the report."""
        details: dict[str, Any] = self._asked() | {"axis": " and ".join(self.axes), "score": self.worth}
        if len(self.axes) == 1 and not self.sensitive and not self.of_parts:
            return details | {"units": sizes[self.axes[0]][0], "kept_units": cut.widths[self.axes[0]][0]}
        return details | {
            "units": {axis: list(n) for axis, n in sizes.items()},
            "widths": {axis: list(n) for axis, n in cut.widths.items()},
        }

    def _multiple(self, model: LayerwiseModel, axis: str) -> int:
        return self.multiple or (
            KERNEL if axis in ("ffn", "hidden") and min(self.sizes(model)[axis]) > KERNEL else 1
        )

    def _plain(self, model: LayerwiseModel) -> Widths:
        """Widths as if all layers were to lose alike."""
        sizes = self.sizes(model)
        if self.keep is None and len(self.axes) > 1:
            return self._alike(model, sizes)
        found = {
            axis: self.uniform(model, axis, sizes[axis], self._multiple(model, axis)) for axis in self.axes
        }
        if "expert" in found:
            experts.require_enough(model, min(found["expert"]))
        return found

    def _alike(self, model: LayerwiseModel, sizes: Widths) -> Widths:
        """Widths that are the same share of every axis and within the budget, for a plan."""
        allowed = self.allowed(model)
        shares = [share / 64 for share in range(64, 0, -1)]
        for share in shares:
            found = {axis: tuple(max(1, int(share * size)) for size in sizes[axis]) for axis in self.axes}
            if (reached := self.spent(model, found)) <= allowed:
                return found
        raise self.refuse(model, reached)

    def _allocate(self, model: LayerwiseModel, context: Context) -> dict[str, Any]:
        """The widths of all layers, and what they are expected to lose."""
        unit = {axis: allocation.of_a_unit(model, axis, partial(self.spent, model)) for axis in self.axes}
        none = self.spent(model, {axis: [0] * len(model.layers) for axis in self.axes})
        whole = self.spent(model)
        within = (
            self.spent(model, self._plain(model))
            if self.keep is not None
            else min(self.allowed(model), whole)
        )
        multiples = {axis: self._multiple(model, axis) for axis in self.axes}
        for axis in self.axes:
            while (
                not self.multiple
                and multiples[axis] > 1
                and multiples[axis] * max(unit[axis]) > NEAR * within
            ):
                multiples[axis] //= 2
        least = none + sum(multiples[axis] * sum(unit[axis]) for axis in self.axes)
        if within < least:
            raise self.refuse(model, least)
        curves = allocation.curves(model, context, self.axes)
        found = allocation.widths(curves, unit, within - none, multiples)
        nats = {
            axis: [losses[n] for losses, n in zip(curves[axis], found[axis], strict=True)]
            for axis in self.axes
        }
        return {"widths": found, "expected_nats": nats}

    def _find_out(self, model: LayerwiseModel, context: Context) -> None:
        """Have the journal hold what the score asks of the whole model, as it is now."""
        journal, layers = context.journal, len(model.layers)
        if self.worth == "obs":
            find_fisher(model, context)
        if self.worth != "taylor" or all(journal.has(TAYLOR, index) for index in range(layers)):
            return
        sequences = context.data.calibration
        sequences = sequences[: -(-TOKENS // sequences.shape[1])]
        consumers = {axis: f"{model.anatomy.consumer_of(axis)}.weight" for axis in self.axes}
        unscored = context.data.unscored
        found = gradients(
            model, sequences, context.scratch, following, tuple(consumers.values()), unscored=unscored
        )
        for index, _, by_name in context.track(found, "gradients of the loss", layers):
            worth = {
                axis: structured.taylor(model, index, axis, by_name[name]).cpu()
                for axis, name in consumers.items()
            }
            journal.save(TAYLOR, index, worth, {})

    def _score(self, model: LayerwiseModel, context: Context, index: int, axis: str) -> structured.Score:
        """The score, with what was found out about a layer."""
        M_DD = metric(model, context, index) if self.worth == "obs" else None
        found = context.journal.get(TAYLOR, index) if self.worth == "taylor" else None
        return structured.Score(self.worth, M_DD, found[0][axis] if found else None)


def _spoken(axis: str, counts: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    if len(set(counts)) == len(set(sizes)) == 1:
        return f"{counts[0]} of {sizes[0]} units of {axis} stay in each layer"
    return f"{sum(counts)} of {sum(sizes)} units of {axis} stay, {min(counts)} to {max(counts)} in a layer"
