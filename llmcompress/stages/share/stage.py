"""Let layers that do the same work share the weights of their feed-forward part, their attention, or both.

`grouping` finds the groups. What a group shares is fitted: it starts as the weights of the layer that serves
all best and is trained on what each of them makes of its own inputs, weighed by what the model feels of it.
Norms and biases, which cost next to nothing, stay each layer's own and are trained with it; so is the
difference of low rank that each may have (residual_rank). What is shared is one tensor on disk and in memory.
It is multiplied once for each layer, so there is no speed in it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.layer_similarity import adjacent, descend
from llmcompress.algorithms.low_rank import shared_basis
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.errors import ModelError
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.io.journal import Journal
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.io.safetensors_writer import writing
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import SAMPLE, TOKENS_AT_ONCE, together, walk
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.fisher import find_fisher, fisher, nats_factor
from llmcompress.stages.linear_rewriting import inner
from llmcompress.stages.share import layer_groups

STAGE, GROUPS, FIT = "share", "groups", "fit"  # in the journal
TOKENS = 32768  # that are fitted on
AXES = {"attention": "kv", "ffn": "ffn"}  # what the linears of a part run along
SPOKEN = {"attention": "attention", "ffn": "feed-forward"}
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
        """The linears of a layer that are shared, in order of computation. Errors: ModelError where a part
        has none."""
        anatomy, found = model.anatomy, list[str]()
        for part in self.parts:
            of = [
                name
                for name in anatomy.linears
                if AXES[part] in Spelling.parse(anatomy.layer[f"{name}.weight"]).axes
            ]
            if not of:
                raise ModelError(
                    f"the {part} of a {anatomy.family} model is no linears that can be shared; share other "
                    "parts"
                )
            found += of
        return [name for name in anatomy.linears if name in found]

    def groups_of(self, model: LayerwiseModel, journal: Journal | None = None) -> list[list[int]]:
        """The layers that share, the first of each group the one that stores; without a journal of what was
        found, a guess.

        Raises ModelError where there are no such layers, or layers of a group differ in width.
        """
        layers = len(model.layers)
        if self.pairs is not None:
            found = [list(group) for group in self.pairs]
        elif self.groups is not None and not self.groups < layers:
            raise ModelError(f"groups: {self.groups} leaves the {layers} layers as they are; use fewer")
        else:
            found = journal.load(GROUPS, 0)[1]["groups"] if journal else adjacent(layers, self.groups or 1)
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
        """How each linear that is shared is written, by full name, and those to keep with the reason."""
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
        others = dict.fromkeys(inner(model, linears), "shares with no other layer")
        return chosen, {name: why for name, why in others.items() if name not in chosen}

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
        """Linears that are one tensor are in a layout of ours."""
        return True

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How shared linears are written, and which tensors are one."""
        chosen, kept = self.choose(model, journal)
        return StageResult(chosen, kept, self.ties(model, journal))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """The cost of finding the groups and of fitting what each shares."""
        groups, layers, inner = self.groups_of(model), len(model.layers), model.inner_parameters()
        searched = self.layers in ("auto", "kl")
        swaps = (
            (layers - (self.groups or layers)) * layers * min(layers - 1, 2 * layer_groups.NEAR)
            if searched
            else 0
        )
        operations = 2.0 * inner * (2 * work.tokens + 5 * TOKENS) + inner * SAMPLE * swaps
        operations += 6.0 * inner / layers * TOKENS_AT_ONCE * self.steps * sum(map(len, groups))
        floats = (max(map(len, groups)) + 5) * inner // layers + 2 * work.tokens * model.config.hidden_size
        note = "the run finds the layers that share with least loss; what stands here is for neighbours"
        return Estimate(
            stage=(
                f"share ({' and '.join(self.parts)} of {sum(map(len, groups))} layers, {len(groups)} stored)"
            ),
            parameters=left.parameters(),
            size_bytes=work.size_bytes - model.stored_bytes() + left.stored_bytes(),
            peak_memory_bytes=4 * floats,
            seconds=operations / work.rate,
            notes=(note,) if searched else (),
        )

    def ties(self, model: LayerwiseModel, journal: Journal | None = None) -> dict[str, str]:
        """Which stored tensors are others, by name."""
        return {
            f"{model.layer_name(index)}.{linear}.weight": f"{model.layer_name(group[0])}.{linear}.weight"
            for group in self.groups_of(model, journal)
            for index in group[1:]
            for linear in self.linears(model)
        }

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Find the groups, fit what each shares, and leave in the journal what becomes of every layer."""
        journal, linears = context.journal, self.linears(model)
        if not journal.has(GROUPS, 0):
            found: dict[str, Any] = {"groups": self.groups_of(model)} if self.pairs else {}
            if self.layers is not None and self.groups is not None:
                by: layer_groups.Likeness = "kl" if self.layers == "auto" else self.layers
                self.choose(model)
                found = layer_groups.find(model, context, linears, self.groups, by)
            journal.save(GROUPS, 0, {}, found)
        chosen, kept = self.choose(model, journal)
        if not all(journal.has(STAGE, index) for index in range(len(model.layers))):
            self._fit_all(model, context, linears)
        facts = Facts(STAGE, kept=[{"name": name, "why": why} for name, why in kept.items()])
        facts.add(journal.load(STAGE, index)[1] for index in range(len(model.layers)))
        groups = self.groups_of(model, journal)
        facts.notes = [
            f"{len(chosen)} linears share {len(groups) * len(linears)} weights; operations per token are "
            "unchanged: a shared weight is multiplied once for each layer"
        ]
        asked = self.model_dump(include={"parts", "residual_rank", "steps"}, exclude_none=True, mode="json")
        told = {"layers": self.layers or "given", **asked, "groups": groups}
        facts.details = told | {k: v for k, v in journal.load(GROUPS, 0)[1].items() if k != "groups"}
        return facts

    def _fit_all(self, model: LayerwiseModel, context: Context, linears: Sequence[str]) -> None:
        journal, groups = context.journal, self.groups_of(model, context.journal)
        sequences = context.data.calibration
        sequences = sequences[: -(-TOKENS // sequences.shape[1])]
        if not all(journal.has(FIT, number) for number in range(len(groups))):
            find_fisher(model, context)
            needed = {index for group in groups for index in group}
            for layer in walk(model, sequences):
                if layer.index in needed:
                    with writing(context.scratch):
                        states = {str(i): hidden for i, hidden in enumerate(layer.inputs)}
                        save_file(states, context.scratch / f"entering-{layer.index}.safetensors")
        for number, group in context.track(
            enumerate(groups), f"tie (fit {', '.join(self.parts)})", len(groups)
        ):
            if not journal.has(FIT, number):
                journal.save(FIT, number, *self._fit(model, context, group, linears, sequences))
        done: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        for number, group in enumerate(groups):
            tensors, facts = journal.load(FIT, number)
            for index in group:
                own = {
                    name.removeprefix(f"{index}:"): t
                    for name, t in tensors.items()
                    if name.startswith(f"{index}:")
                }
                dtypes = {
                    name: model.dtype_of(f"{model.layer_name(group[0])}.{name}.weight") for name in linears
                }
                done[index] = (
                    self._stored(model, index, dtypes, tensors, own),
                    {"nats": facts["nats"][str(index)]},
                )
        for index in range(len(model.layers)):
            tensors, facts = done.get(index, ({}, {}))
            journal.save(STAGE, index, tensors, {"name": model.layer_name(index), "linears": [], **facts})

    def _fit(
        self,
        model: LayerwiseModel,
        context: Context,
        group: Sequence[int],
        linears: Sequence[str],
        sequences: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a group shares, by linear, and what each layer has of its own, as `3:name`; the loss before
        and after."""
        entering = {}
        for index in group:
            states = load_file(context.scratch / f"entering-{index}.safetensors")
            entering[index] = [states[str(i)] for i in range(len(states))]
        with together(model, sequences, entering) as layers:
            members = [_Member(layer, linears, fisher(context, layer.index)) for layer in layers]
            start = min(
                (self._start(members, source) for source in members), key=lambda own: _total(members, own)
            )
            before = {str(member.index): member.loss_of_all(start) for member in members}
            count = len(members[0].layer.inputs)

            def loss(tensors: Mapping[str, Tensor], step: int) -> Tensor:
                return torch.stack([member.loss(tensors, step % count) for member in members]).sum()

            fitted = descend(start, loss, steps=self.steps) if self.steps else start
            after = {str(member.index): member.loss_of_all(fitted) for member in members}
            if sum(after.values()) > sum(before.values()):
                fitted, after = start, before
        return {name: tensor.cpu() for name, tensor in fitted.items()}, {"nats": after, "nats_before": before}

    def _start(self, members: Sequence[_Member], source: _Member) -> dict[str, Tensor]:
        """The weights of one layer for all, the other layers' differences from it as far as their rank
        allows."""
        tensors = {linear: W_RC.clone() for linear, W_RC in source.weights.items()}
        for member in members:
            tensors |= {f"{member.index}:{name}": tensor.clone() for name, tensor in member.own.items()}
            for linear, W_RC in member.weights.items() if self.residual_rank else ():
                H_CC = member.moments[linear].H_CC
                (left,), right = shared_basis([W_RC - source.weights[linear]], [H_CC], self.residual_rank)
                tensors |= {f"{member.index}:{linear}.left": left, f"{member.index}:{linear}.right": right}
        return tensors

    def _stored(
        self,
        model: LayerwiseModel,
        index: int,
        dtypes: Mapping[str, torch.dtype],
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What a layer is written as, by full names; `dtypes`: of the linears, what they share and what is
        their own."""
        name, layout, found = (
            model.layer_name(index),
            FactoredLayout("shared", self.residual_rank),
            dict[str, Tensor](),
        )
        for linear, dtype in dtypes.items():
            parts = (own.get(f"{linear}.left"), own.get(f"{linear}.right"))
            weight = FactoredWeight(layout, shared[linear], *parts).to(dtype)
            found |= {f"{name}.{linear}.{part}": tensor for part, tensor in weight.tensors().items()}
        plain = {key: tensor for key, tensor in own.items() if key in model.anatomy.layer}
        return found | model.as_stored(plain, f"{name}.")


class _Member:
    """A layer of a group: its layer in memory, what it is to put out, and how much each error of that is
    felt."""

    def __init__(self, layer: DecoderLayer, linears: Sequence[str], F_DD: Tensor) -> None:
        self.layer, self.index = layer, layer.index
        self.metric_DD = nats_factor(F_DD.to(layer.device))
        self.weights = {linear: layer.weight(linear) for linear in linears}
        vectors = [name for name, row in layer.anatomy.layer.items() if len(Spelling.parse(row).dims) == 1]
        self.own = {name: layer.module.get_parameter(name).data for name in vectors}
        self.targets = layer.outputs(layer.inputs)

    @functools.cached_property
    def moments(self) -> dict[str, Moments]:
        """Of what its linears read."""
        return self.layer.moments()

    def loss(self, tensors: Mapping[str, Tensor], batch: int) -> Tensor:
        """Nats a token of one batch, to second order, with the shared weights and its own of `tensors`."""
        parameters = {name: tensors[f"{self.index}:{name}"] for name in self.own}
        for linear in self.weights:
            W_RC = tensors[linear]
            if (left := tensors.get(f"{self.index}:{linear}.left")) is not None:
                W_RC = W_RC + left @ tensors[f"{self.index}:{linear}.right"]
            parameters[f"{linear}.weight"] = self.layer.oriented(linear, W_RC)
        lost = self.layer.run(self.layer.inputs[batch], parameters) - self.targets[batch].to(
            self.layer.device
        )
        return (lost @ self.metric_DD).square().sum(-1).mean()

    @torch.no_grad()
    def loss_of_all(self, tensors: Mapping[str, Tensor]) -> float:
        """The same of all batches, in the mean."""
        sizes = [len(hidden) for hidden in self.layer.inputs]
        lost = [float(self.loss(tensors, batch)) * size for batch, size in enumerate(sizes)]
        return sum(lost) / sum(sizes)


def _total(members: Sequence[_Member], tensors: Mapping[str, Tensor]) -> float:
    return sum(member.loss_of_all(tensors) for member in members)
