"""Cut units of an axis: feed-forward neurons, key-value heads with their query heads, query heads, and
others.

`layer_cutter` cuts the layers, and `structured` decides which units go. If all layers keep the same number of
units, the result is a plain checkpoint that transformers loads by itself. If `allocation` gives each layer a
width of its own, the result loads once llmcompress is imported. `experts`, `hidden_size`, `layer_dropping`
and `sublayer_dropping` handle experts, the hidden state, layers and their parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmcompress.architectures.resize import changed, resized, shortened
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import ModelError
from llmcompress.integrations.distributed import By
from llmcompress.io.journal import Journal
from llmcompress.io.units import amount, asked_percent
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.prune import (
    allocation,
    estimate,
    expert_widths,
    experts,
    hidden_size,
    layer_dropping,
    sublayer_dropping,
)
from llmcompress.stages.prune.allocation import FoundWidths, Widths
from llmcompress.stages.prune.budget import PruningBudget
from llmcompress.stages.prune.layer_cutter import STAGE, LayerCuts, LayerCutter
from llmcompress.stages.prune.layer_dropping import DroppedLayers
from llmcompress.stages.prune.sublayer_dropping import DroppedSublayers

WIDTHS = "widths"  # entry of the journal
# default multiple of the widths of ffn and hidden, which 4-bit groups in a later stage need
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
SCORES = {  # scores of an axis, the default first
    **dict.fromkeys(INNER, ("obs", "taylor", "wanda", "activation", "magnitude")),
    "expert": ("activation",),
    "hidden": ("pca", "activation"),
    "layer": ("kl", "influence"),
    "sublayer": ("kl",),
}


@dataclass(frozen=True)
class Cut:
    """What is left of a model: the units of each axis in each layer, or which layers are gone."""

    widths: Widths = field(default_factory=dict)
    gone: tuple[int, ...] = ()


class Prune(PruningBudget, Stage):
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
        if isinstance(self.keep, tuple):
            if len(self.axes) > 1 or self.axes[0] not in INNER:
                raise ValueError(f"a list of keep is for one of {', '.join(sorted(INNER))}, not for {spoken}")
            if self.allocation or self.multiple:
                raise ValueError(
                    "a list of keep says the width of every layer; leave allocation and multiple"
                )
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
        """Whether whole layers are removed."""
        return self.axes == ("layer",)

    @property
    def of_parts(self) -> bool:
        """Whether the attention or ffn of layers is removed."""
        return self.axes == ("sublayer",)

    @property
    def ranking(self) -> str:
        """The score, or its default if none was given."""
        return self.score or SCORES[self.axes[0]][0]

    @property
    def sensitive(self) -> bool:
        """Whether each layer gets a width of its own."""
        return set(INNER).issuperset(self.axes) and (
            (self.allocation or ("uniform" if self.keep else "sensitivity")) == "sensitivity"
        )

    def by_layer(self, model: LayerwiseModel) -> bool:
        """Whether each layer of a model gets a width of its own: not where only one field of its config says
        the widths of all, or where they are those of experts."""
        one = model.anatomy.cuts is not None or ("ffn" in self.axes and of_experts(model))
        return self.sensitive and not one

    def sizes(self, model: LayerwiseModel) -> Widths:
        """The number of units in each layer. Errors: ModelError if an axis can't be cut."""
        if self.of_parts:
            return sublayer_dropping.sizes(model)
        along = {axis: layers_along(model, axis) for axis in self.axes}
        for axis, layers in along.items():
            if axis not in cuttable(model.anatomy):
                others = [*cuttable(model.anatomy), *([] if model.anatomy.form.handed_on else ["layer"])]
                left = " or ".join(other for other in others if other != axis) or "no prune"
                raise ModelError(
                    f'axis "{axis}" of this {model.anatomy.family} model can\'t be cut; use {left}'
                )
            if axis == "expert":
                experts.require_called(model, layers[0])
            if axis == "hidden" and (why := hidden_size.why_not(model, self.ranking)):
                raise ModelError(
                    f"hidden can't be cut by {self.ranking}: {why}; use score: activation, or another axis"
                )
        if "ffn" in self.axes and self.ranking == "taylor" and of_experts(model):
            raise ModelError("score: taylor is not for the neurons of experts; use score: obs")
        if self.allocation == "sensitivity" and not self.by_layer(model):
            raise ModelError(
                f"layers of a {model.anatomy.family} model can't have widths of their own; use "
                "allocation: uniform"
            )
        found = {axis: model.widths_of(axis) for axis in self.axes}
        if gone := [(axis, index) for axis in found for index in along[axis] if not found[axis][index]]:
            raise ModelError(
                f"layer {gone[0][1]} has no {gone[0][0]} left; cut {gone[0][0]} before sublayers"
            )
        return found

    def cut(self, model: LayerwiseModel, journal: Journal | None = None) -> Cut:
        """What the stage leaves. Without the journal of what it has found, layers count as alike and the last
        layers as removed.

        Raises ModelError if the axis can't be cut, or not so far.
        """
        if self.of_layers:
            if model.anatomy.form.handed_on:
                raise ModelError(
                    f"layers of this {model.anatomy.family} model hand on more than their states to later "
                    "ones, such as keys and values, so none can be taken out; use another axis"
                )
            total = len(model.layers)
            if journal is None:
                return Cut(gone=tuple(range(self.layers(model), total)))
            return Cut(gone=journal.facts(STAGE, 0, DroppedLayers).gone)
        if self.of_parts:
            if journal is None:
                return Cut(sublayer_dropping.widths(model, sublayer_dropping.guess(model, self)))
            return Cut(sublayer_dropping.widths(model, journal.facts(WIDTHS, 0, DroppedSublayers).gone))
        if journal and self.by_layer(model):
            return Cut(journal.facts(WIDTHS, 0, FoundWidths).widths)
        return Cut(self.uniform_widths(model))

    def changes(self, model: LayerwiseModel, cut: Cut | None = None) -> dict[str, Any]:
        """The fields of the config that change. Errors: ModelError if transformers has no such model."""
        cut = cut or self.cut(model)
        if self.of_layers:
            return shortened(
                model.config, [index for index in range(len(model.layers)) if index not in cut.gone]
            )
        return resized(model.config, model.anatomy, cut.widths)

    @property
    def leaves(self) -> str:
        """The units or the parameters that are left."""
        if self.parameters is not None:
            share = self.parameters <= 1
            return (
                f"{asked_percent(self.parameters)} of the parameters"
                if share
                else f"{self.parameters} parameters"
            )
        if self.size is not None:
            return f"{amount(self.size, 'B')} before quantisation"
        units = " and ".join(UNITS[axis] for axis in self.axes)
        if isinstance(self.keep, tuple):
            return f"{min(self.keep)} to {max(self.keep)} {units}"
        kept = self.keep or 1
        return f"{asked_percent(kept)} of the {units}" if kept < 1 else f"{kept} {units}"

    @property
    def needs_plugin(self) -> bool:
        """Whether layers have widths of their own, or lack an attention or feed-forward part."""
        listed = isinstance(self.keep, tuple) and len(set(self.keep)) > 1
        return self.sensitive or self.of_parts or listed

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse to prune weights that are no longer plain matrices. Errors: ValueError."""
        if other := next((stage.name for stage in before if stage.rewrites), None):
            raise ValueError(
                f"prune comes before {other}: weights that are shared, products or codes can't be cut any "
                "more"
            )
        super().require_place(before, after)

    @property
    def divides(self) -> By | None:
        """The batches of the text, if the widths are known before and the units are not hidden channels,
        layers or their parts."""
        return "batch" if {*INNER, "expert"}.issuperset(self.axes) and not self.sensitive else None

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """The config of the narrower model, or the layers that are removed."""
        cut = self.cut(model, journal)
        return StageResult(config=self.changes(model, cut), removed_layers=cut.gone)

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of finding what goes and of solving for what stays."""
        return estimate.of(self, model, left, work)

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Cut every layer that the journal does not hold yet, and leave its tensors and facts there."""
        if self.of_layers:
            return self._shorten(model, context)
        journal, sizes = context.journal, self.sizes(model)
        if (self.by_layer(model) or self.of_parts) and not journal.has(WIDTHS, 0):
            find = sublayer_dropping.find if self.of_parts else allocation.find
            journal.save(WIDTHS, 0, {}, find(model, context, self))
        cut = self.cut(model, journal)
        by_layer = self.by_layer(model)
        facts = Facts(STAGE, details=self._said(sizes, cut, by_layer=by_layer))
        facts.notes = [_spoken(axis, cut.widths[axis], sizes[axis]) for axis in self.axes if axis in sizes]
        if self.sensitive and not by_layer:
            facts.notes.append("layers of this model can't have widths of their own, so all keep one share")
        if self.of_parts:
            dropped = journal.facts(WIDTHS, 0, DroppedSublayers)
            facts.notes = [sublayer_dropping.spoken(dropped.gone, model)]
            facts.details = {**facts.details, **dropped.model_dump(mode="json")}
        if cut.widths == sizes:  # the model is left as it is, to the bit
            return facts
        cutter = LayerCutter(self, model, context)
        cutter.find_scores()
        outline = MetaModel(changed(model.config, self.changes(model, cut)), model.device, model.dtype)
        if self.axis == "hidden":
            hidden_size.find_directions(model, context, self.ranking)
            hidden_size.cut(model, context, outline, self.ranking, self.repair)
        else:
            cutter.cut(outline, cut.widths)
        for index in range(len(model.layers)):
            facts.add(journal.facts(STAGE, index, LayerCuts).cuts)
        return facts

    def _shorten(self, model: LayerwiseModel, context: Context) -> Facts:
        journal, total = context.journal, len(model.layers)
        if not journal.has(STAGE, 0):
            journal.save(STAGE, 0, {}, layer_dropping.find(model, context, self.layers(model), self.ranking))
        found = journal.facts(STAGE, 0, DroppedLayers)
        count = total - len(found.gone)
        details = {
            **self._asked(),
            "axis": "layer",
            "score": self.ranking,
            "units": total,
            "kept_units": count,
            **found.model_dump(mode="json", exclude_none=True),
        }
        return Facts(STAGE, notes=[f"{count} of {total} layers stay"], details=details)

    def _asked(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include={"keep", "parameters", "size"}, exclude_none=True)

    def _said(self, sizes: Widths, cut: Cut, *, by_layer: bool) -> dict[str, Any]:
        """The settings of the stage and what it left, for the report."""
        details: dict[str, Any] = self._asked() | {"axis": " and ".join(self.axes), "score": self.ranking}
        if len(self.axes) == 1 and not by_layer and not self.of_parts:
            there = [index for index, size in enumerate(sizes[self.axes[0]]) if size]
            units, kept = ({each[self.axes[0]][index] for index in there} for each in (sizes, cut.widths))
            if len(units) == len(kept) == 1:
                return details | {"units": units.pop(), "kept_units": kept.pop()}
        return details | {
            "units": {axis: list(n) for axis, n in sizes.items()},
            "widths": {axis: list(n) for axis, n in cut.widths.items()},
        }

    def multiple_of(self, model: LayerwiseModel, axis: str) -> int:
        """The number of which the units of an axis are to be a multiple."""
        return self.multiple or (
            KERNEL if axis in ("ffn", "hidden") and min(filter(None, self.sizes(model)[axis])) > KERNEL else 1
        )

    def uniform_widths(self, model: LayerwiseModel) -> Widths:
        """Widths if all layers lose alike. Errors: ModelError."""
        sizes = self.sizes(model)
        if self.keep is None and len(self.axes) > 1:
            return self._alike(model, sizes)
        found = {
            axis: self.uniform(model, axis, sizes[axis], self.multiple_of(model, axis)) for axis in self.axes
        }
        gone = [
            (index, axis)
            for axis, counts in found.items()
            for index, count in enumerate(counts)
            if sizes[axis][index] and not count
        ]
        if gone:
            sublayer_dropping.require_removable(model, gone)
        if "expert" in found:
            experts.require_enough(model, min(filter(None, found["expert"])))
        return found

    def _alike(self, model: LayerwiseModel, sizes: Widths) -> Widths:
        """Widths that are the same share of every axis and within the budget, for a plan."""
        allowed = self.allowed(model)
        shares = [share / 64 for share in range(64, 0, -1)]
        for share in shares:
            found = {
                axis: tuple(max(1, int(share * size)) if size else 0 for size in sizes[axis])
                for axis in self.axes
            }
            if (reached := self.spent(model, found)) <= allowed:
                return found
        raise self.refuse(model, reached)


def layers_along(model: LayerwiseModel, axis: str) -> list[int]:
    """The layers whose weights run along an axis that may be cut."""
    return [index for index in range(len(model.layers)) if model.anatomy.of_layer(index).cut_along(axis)]


def is_read(anatomy: Anatomy, axis: str) -> bool:
    """Whether one linear of a layer reads an axis, or one of each expert."""
    return anatomy.consumer_of(axis) is not None or expert_widths.along(anatomy, axis) is not None


def of_experts(model: LayerwiseModel) -> bool:
    """Whether the neurons of some layer are those of experts."""
    each = (model.anatomy.of_layer(index) for index in range(len(model.layers)))
    return any(expert_widths.along(anatomy, "ffn") is not None for anatomy in each)


def cuttable(anatomy: Anatomy) -> tuple[str, ...]:
    """The axes of a model that may be cut, in every layer that has them; of a family of the table, as far as
    the config that the cut leaves can say it."""

    def is_cut(axis: str) -> bool:
        along = [of for of in anatomy.each_layer or (anatomy,) if of.cut_along(axis)]
        return bool(along) and (axis not in INNER or all(is_read(of, axis) for of in along))

    return tuple(axis for axis in UNITS if is_cut(axis))


def _spoken(axis: str, counts: Sequence[int], sizes: Sequence[int]) -> str:
    there = [index for index, size in enumerate(sizes) if size]
    counts, sizes = [counts[index] for index in there], [sizes[index] for index in there]
    if len(set(counts)) == len(set(sizes)) == 1:
        return f"{counts[0]} of {sizes[0]} units of {axis} stay in each layer"
    return f"{sum(counts)} of {sum(sizes)} units of {axis} stay, {min(counts)} to {max(counts)} in a layer"
