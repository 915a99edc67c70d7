"""Fit what a group of layers shares.

It starts as the weights of the layer that serve all best. It is trained on the output that each layer gives
for its own inputs; errors of that output are weighted by the layer's output Fisher matrix. Norms, biases and
low-rank differences stay each layer's own and are trained with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.layer_similarity import descend
from llmcompress.algorithms.low_rank import shared_basis
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.io.journal import JournalFacts
from llmcompress.io.safetensors_writer import writing
from llmcompress.modeling.decoder_layer import DecoderLayer, firsts
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import together, walk
from llmcompress.modeling.token_limit import first_sequences, loss_in_parts
from llmcompress.stages.base import Context, LayerRecord
from llmcompress.stages.fisher import find_fisher, fisher, nats_factor

if TYPE_CHECKING:
    from llmcompress.stages.share.stage import Share

STAGE, FIT = "share", "fit"  # entries of the journal
TOKENS = 32768  # tokens to fit on


class SharedLayer(LayerRecord):
    """What became of a layer: the nats/token that it loses by sharing, to second order; None if it shares
    with no other."""

    nats: float | None = None


class FittedGroup(JournalFacts):
    """Nats/token that each layer of a group loses, by its index: with the shared weights as fitted, and as
    they began."""

    nats: dict[int, float]
    nats_before: dict[int, float]


class GroupFitter:
    """Fits groups of layers of one model, one group at a time. What is done is in the journal."""

    def __init__(self, stage: Share, model: LayerwiseModel, context: Context, linears: Sequence[str]) -> None:
        self.stage, self.model, self.context, self.linears = stage, model, context, linears
        sequences = context.data.calibration
        self.sequences = first_sequences(sequences, TOKENS)
        self.layout = FactoredLayout("shared", stage.residual_rank)

    def fit(self, groups: Sequence[Sequence[int]]) -> None:
        """Fit all groups, and journal what every layer becomes, also those that share with no other."""
        journal, model = self.context.journal, self.model
        if not all(journal.has(FIT, number) for number in range(len(groups))):
            find_fisher(model, self.context)
            self._keep_inputs({index for group in groups for index in group})
        what = f"share (fit {', '.join(self.stage.parts)})"
        for number, group in self.context.track(enumerate(groups), what, len(groups)):
            if not journal.has(FIT, number):
                journal.save(FIT, number, *self._fitted(group))
        alone = set(range(len(model.layers)))
        for number, group in enumerate(groups):
            fitted, facts = journal.load(FIT, number), journal.facts(FIT, number, FittedGroup)
            for index in group:
                record = SharedLayer(name=model.layer_name(index), nats=facts.nats[index])
                journal.save(STAGE, index, self._stored(index, group[0], fitted), record)
            alone -= set(group)
        for index in alone:
            journal.save(STAGE, index, {}, SharedLayer(name=model.layer_name(index)))

    def _keep_inputs(self, layers: Iterable[int]) -> None:
        """Write the hidden states that enter these layers to the scratch folder."""
        needed = set(layers)
        for layer in walk(self.model, self.sequences):
            if layer.index in needed:
                with writing(self.context.scratch):
                    states = {str(i): hidden for i, hidden in enumerate(layer.limit.units(layer.inputs))}
                    save_file(states, self.context.scratch / f"entering-{layer.index}.safetensors")

    def _inputs(self, index: int) -> list[Tensor]:
        """Read the states that `_keep_inputs` wrote, batch by batch."""
        states = load_file(self.context.scratch / f"entering-{index}.safetensors")
        return [states[str(i)] for i in range(len(states))]

    def _fitted(self, group: Sequence[int]) -> tuple[dict[str, Tensor], FittedGroup]:
        """Fit one group. Returns what it shares, by linear, and what each layer has of its own, as
        `3:name`."""
        entering = {index: self._inputs(index) for index in group}
        with together(self.model, self.sequences, entering) as layers:
            members = [_Member(layer, self.linears, fisher(self.context, layer.index)) for layer in layers]
            starts = (self._start(members, source) for source in members)
            start = min(starts, key=lambda tensors: _total(members, tensors))
            before = {member.index: member.loss_of_all(start) for member in members}
            count = len(members[0].layer.inputs)

            def loss(tensors: Mapping[str, Tensor], step: int) -> Tensor:
                return torch.stack([member.loss(tensors, step % count) for member in members]).sum()

            steps = self.stage.steps
            fitted = descend(start, loss, steps=steps) if steps else start
            after = {member.index: member.loss_of_all(fitted) for member in members}
            if sum(after.values()) > sum(before.values()):
                fitted, after = start, before
        tensors = {name: tensor.cpu() for name, tensor in fitted.items()}
        return tensors, FittedGroup(nats=after, nats_before=before)

    def _start(self, members: Sequence[_Member], source: _Member) -> dict[str, Tensor]:
        """Return the start: the weights of one layer for all, and the other layers' differences from it as
        far as their rank allows."""
        rank = self.stage.residual_rank
        tensors = {linear: W_RC.clone() for linear, W_RC in source.weights.items()}
        for member in members:
            tensors |= {f"{member.index}:{name}": tensor.clone() for name, tensor in member.own.items()}
            for linear, W_RC in member.weights.items() if rank else ():
                H_CC = member.moments[linear].H_CC
                (left,), right = shared_basis([W_RC - source.weights[linear]], [H_CC], rank)
                tensors |= {f"{member.index}:{linear}.left": left, f"{member.index}:{linear}.right": right}
        return tensors

    def _stored(self, index: int, first: int, fitted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer as they are written, by full name. `first` is the layer of its group that
        stores the weights, in its dtypes."""
        model, name = self.model, self.model.layer_name(index)
        mine = f"{index}:"
        own = {key.removeprefix(mine): tensor for key, tensor in fitted.items() if key.startswith(mine)}
        found = dict[str, Tensor]()
        for linear in self.linears:
            dtype = model.dtype_of(f"{model.layer_name(first)}.{linear}.weight")
            parts = (own.get(f"{linear}.left"), own.get(f"{linear}.right"))
            weight = FactoredWeight(self.layout, fitted[linear], *parts).to(dtype)
            found |= {f"{name}.{linear}.{part}": tensor for part, tensor in weight.tensors().items()}
        plain = {key: tensor for key, tensor in own.items() if key in model.anatomy.of_layer(index).layer}
        return found | model.as_stored(plain, f"{name}.")


class _Member:
    """A layer of a group: the layer in memory, its target outputs, and the metric of their errors."""

    def __init__(self, layer: DecoderLayer, linears: Sequence[str], F_DD: Tensor) -> None:
        self.layer, self.index = layer, layer.index
        self.metric_DD = nats_factor(F_DD.to(layer.device))
        self.weights = {linear: layer.weight(linear) for linear in linears}
        vectors = [name for name, row in layer.anatomy.layer.items() if len(Spelling.parse(row).dims) == 1]
        self.own = {name: layer.module.get_parameter(name).data for name in vectors}
        self.targets = layer.outputs(layer.inputs)

    @functools.cached_property
    def moments(self) -> dict[str, Moments]:
        """The second moments of its linears' inputs."""
        return self.layer.moments()

    def loss(self, tensors: Mapping[str, Tensor], batch: int) -> Tensor:
        """Nats/token lost on one batch, to second order, with the shared weights and its own of `tensors`."""
        mine = {name: tensor for name, tensor in tensors.items() if self._reads(name)}
        shape = self.layer.inputs[batch].shape[:2]
        return loss_in_parts(partial(self._loss, batch), mine, self.layer.limit, *shape)

    def _reads(self, name: str) -> bool:
        """Whether a tensor is shared, or this layer's own."""
        return ":" not in name or name.startswith(f"{self.index}:")

    def _loss(self, batch: int, tensors: Mapping[str, Tensor], here: slice) -> Tensor:
        parameters = {name: tensors[f"{self.index}:{name}"] for name in self.own}
        for linear in self.weights:
            W_RC = tensors[linear]
            if (left := tensors.get(f"{self.index}:{linear}.left")) is not None:
                W_RC = W_RC + left @ tensors[f"{self.index}:{linear}.right"]
            parameters[f"{linear}.weight"] = self.layer.oriented(linear, W_RC)
        inputs = self.layer.inputs
        out = self.layer.run(inputs[batch][here], parameters, first=firsts(inputs)[batch] + here.start)
        lost = out - self.targets[batch][here].to(self.layer.device)
        return (lost @ self.metric_DD).square().sum(-1).mean()

    @torch.no_grad()
    def loss_of_all(self, tensors: Mapping[str, Tensor]) -> float:
        """The mean loss over all batches."""
        sizes = [len(hidden) for hidden in self.layer.inputs]
        lost = [float(self.loss(tensors, batch)) * size for batch, size in enumerate(sizes)]
        return sum(lost) / sum(sizes)


def _total(members: Sequence[_Member], tensors: Mapping[str, Tensor]) -> float:
    return sum(member.loss_of_all(tensors) for member in members)
