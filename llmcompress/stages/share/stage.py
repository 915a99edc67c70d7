"""Let layers that do the same work share the weights of their feed-forward part, their attention, or both.

`layer_groups` finds the groups, and `group_fitting` fits what each shares. Norms and biases, which cost next
to nothing, stay each layer's own, and so does the low-rank difference that each may have (residual_rank). A
shared weight is one tensor on disk and in memory. It is multiplied once for each layer, so sharing saves no
time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from llmcompress.algorithms.layer_similarity import adjacent
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.data.sources import Effort
from llmcompress.errors import ModelError
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.io.journal import Journal
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.share import estimate, layer_groups
from llmcompress.stages.share.group_fitting import STAGE, GroupFitter, SharedLayer
from llmcompress.stages.share.layer_groups import FoundGroups

GROUPS = "groups"  # entry of the journal
AXES = {"attention": "kv", "ffn": "ffn"}  # axis of the linears of a part
SPOKEN = {"attention": "attention", "ffn": "feed-forward"}
# by effort, where a recipe does not say it
STEPS: Mapping[Effort, int] = {"fast": 75, "balanced": 300, "best": 600}
Part = Literal["attention", "ffn"]
Group = Annotated[tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...], Field(min_length=2, strict=False)]


class Share(Stage):
    """Lets layers share the weights of their feed-forward part, their attention, or both."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["layers", "groups"]}, {"required": ["pairs"]}]},
    )
    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "shared or factorised weights"
    rewrites: ClassVar[bool] = True
    combines: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    layers: Literal["auto", "kl", "cka", "cosine", "adjacent"] | None = Field(
        default=None,
        description="how groups are found: `kl`, also called `auto`, by measured loss, the others by a score",
    )
    groups: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="number of different sets of weights that are left; goes with `layers`"
    )
    pairs: Annotated[tuple[Group, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="the groups themselves, in place of `layers`: `[[2, 3], [4, 5]]`; layer 0 is the first",
    )
    parts: Annotated[tuple[Part, ...], Field(min_length=1, strict=False)] = Field(
        default=("ffn",), description="parts of a layer that are shared"
    )
    residual_rank: Annotated[int, Field(ge=0, le=MOST_COUNTED)] = Field(
        default=0, description="rank of the difference that each layer keeps"
    )
    steps: Annotated[int, Field(ge=0, le=MOST_COUNTED)] = Field(
        default=300,
        description="training steps for each group",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Share:
        if (self.layers is None) == (self.pairs is None):
            raise ValueError("give layers (auto, with groups) or pairs, one of them")
        if (self.groups is None) != (self.layers is None):
            raise ValueError(
                "groups goes with layers: how many different ones are left; pairs say it themselves"
            )
        named = [layer for group in self.pairs or () for layer in group]
        if len(set(named)) < len(named):
            raise ValueError("pairs name a layer twice; a layer is in one group")
        return self

    def linears(self, model: LayerwiseModel) -> list[str]:
        """The linears of a layer that are shared, in order of computation, without experts. Errors:
        ModelError if a part has none."""
        anatomy, found = model.anatomy, list[str]()
        if anatomy.form.handed_on:
            raise ModelError(
                f"layers of this {anatomy.family} model hand on more than their states to later ones, such "
                "as keys and values, so they can't share weights; use low_rank or codebook"
            )
        others = [other.layer for other in anatomy.each_layer]  # layers may be of several kinds
        for part in self.parts:
            of = [
                name
                for name in (linear for consumers in anatomy.consumers for linear in consumers)
                if AXES[part] in Spelling.parse(row := anatomy.layer[f"{name}.weight"]).axes
                and all(rows.get(f"{name}.weight") == row for rows in others)
            ]
            if not of:
                raise ModelError(
                    f"the {part} of a {anatomy.family} model has no linears that can be shared; share other "
                    "parts"
                )
            found += of
        return [name for name in anatomy.linears if name in found]

    def groups_of(self, model: LayerwiseModel, journal: Journal | None = None) -> list[list[int]]:
        """The groups of layers that share; the first layer of each stores the weights. Without a journal of
        what was found, they are a guess.

        Raises ModelError if there are no such layers, or if layers of a group differ in width.
        """
        layers = len(model.layers)
        if self.pairs is not None:
            found = [list(group) for group in self.pairs]
        elif self.groups is not None and not self.groups < layers:
            raise ModelError(f"groups: {self.groups} leaves the {layers} layers as they are; use fewer")
        else:
            known = journal.facts(GROUPS, 0, FoundGroups).groups if journal else None
            found = [list(group) for group in known or adjacent(layers, self.groups or 1)]
        found = sorted(sorted(group) for group in found if len(group) > 1)
        for group in found:
            if max(group) >= layers:
                raise ModelError(f"pairs name layer {max(group)}; this model has layers 0 to {layers - 1}")
            self._alike(model, group)
        return found

    def _alike(self, model: LayerwiseModel, group: Sequence[int]) -> None:
        first = model.sizes_of(group[0])
        for linear in self.linears(model):
            for axis in Spelling.parse(model.anatomy.layer[f"{linear}.weight"]).axes:
                for other in group[1:]:
                    if (size := model.sizes_of(other)[axis]) != first[axis]:
                        raise ModelError(
                            f'layers {group[0]} and {other} have {first[axis]} and {size} of axis "{axis}"; '
                            "weights of different shapes can't be one, group layers of the same widths"
                        )

    def choose(
        self, model: LayerwiseModel, journal: Journal | None = None
    ) -> tuple[dict[str, FactoredLayout], dict[str, str]]:
        """Return the layout of each shared linear, by full name, and those to keep with the reason."""
        linears, layout = self.linears(model), FactoredLayout("shared", self.residual_rank)
        chosen = {
            f"{model.layer_name(index)}.{linear}": layout
            for group in self.groups_of(model, journal)
            for index in group
            for linear in linears
        }
        shapes = dict(model.linear_maps())
        for name in chosen:
            if name in model.layouts:
                raise ModelError(
                    f"{name} is {model.layouts[name].format} already; share other layers or parts"
                )
            if why := layout.refusal(shapes[name]):
                raise ModelError(f"residual_rank {self.residual_rank}: {why}; use a smaller one")
        others = dict.fromkeys(model.in_layers(lambda _: linears), "shares with no other layer")
        return chosen, {name: why for name, why in others.items() if name not in chosen}

    def with_effort(self, effort: Effort, before: Sequence[Stage]) -> Stage:
        """With the number of steps."""
        return self.model_copy(update=self.unsaid(steps=STEPS[effort]))

    @property
    def learns(self) -> bool:
        """Whether the shared weights are trained."""
        return self.steps > 0

    @property
    def leaves(self) -> str:
        """How many different weights are left."""
        parts = " and ".join(SPOKEN[part] for part in self.parts)
        if self.pairs is not None:
            count = len(self.pairs)
            return f"one set of {parts} weights in {count} group{'s' if count > 1 else ''} of layers"
        return f"{self.groups} sets of {parts} weights"

    @property
    def needs_plugin(self) -> bool:
        """True: shared linears are in a layout of the plug-in."""
        return True

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How shared linears are written, and which tensors are one."""
        chosen, kept = self.choose(model, journal)
        return StageResult(chosen, kept, self.ties(model, journal))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of finding the groups and of fitting what each shares."""
        return estimate.of(self, model, left, work)

    def ties(self, model: LayerwiseModel, journal: Journal | None = None) -> dict[str, str]:
        """The stored tensors that are other tensors, by name."""
        return {
            f"{model.layer_name(index)}.{linear}.weight": f"{model.layer_name(group[0])}.{linear}.weight"
            for group in self.groups_of(model, journal)
            for index in group[1:]
            for linear in self.linears(model)
        }

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Find the groups, fit what each shares, and journal what becomes of every layer."""
        journal, linears = context.journal, self.linears(model)
        if not journal.has(GROUPS, 0):
            journal.save(GROUPS, 0, {}, self._found(model, context, linears))
        chosen, kept = self.choose(model, journal)
        groups = self.groups_of(model, journal)
        if not all(journal.has(STAGE, index) for index in range(len(model.layers))):
            GroupFitter(self, model, context, linears).fit(groups)
        facts = Facts(STAGE, kept=kept)
        facts.add(journal.facts(STAGE, index, SharedLayer) for index in range(len(model.layers)))
        facts.notes = [
            f"{len(chosen)} linears share {len(groups) * len(linears)} weights; operations per token are "
            "unchanged: a shared weight is multiplied once for each layer"
        ]
        asked = self.model_dump(include={"parts", "residual_rank", "steps"}, exclude_none=True, mode="json")
        facts.details = {
            "layers": self.layers or "given",
            **asked,
            "groups": [list(group) for group in groups],
        }
        if (kl_nats := journal.facts(GROUPS, 0, FoundGroups).kl_nats) is not None:
            facts.details = {**facts.details, "kl_nats": list(kl_nats)}
        return facts

    def _found(self, model: LayerwiseModel, context: Context, linears: Sequence[str]) -> FoundGroups:
        """The groups that the recipe gives, or that a search finds."""
        if self.layers is None or self.groups is None:
            return FoundGroups(groups=tuple(tuple(group) for group in self.groups_of(model)))
        self.choose(model)  # refuses layers that can't share before they are compared
        by: layer_groups.Likeness = "kl" if self.layers == "auto" else self.layers
        return layer_groups.find(model, context, linears, self.groups, by)
