"""Cut one decoder layer after another, each with the inputs that the cut layers before it give.

The linear that consumes the axis is then solved again (`repair`), so that its outputs on the changed inputs
come closest to those of the original model. A layer that the journal holds is not cut again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.backward import following, gradients
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import walk
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context, LayerRecord
from llmcompress.stages.fisher import MANY, find_fisher, metric
from llmcompress.stages.prune import expert_widths, experts, structured, sublayer_dropping

if TYPE_CHECKING:
    from llmcompress.stages.prune.allocation import Widths
    from llmcompress.stages.prune.stage import Prune

STAGE, TAYLOR = "prune", "taylor"  # entries of the journal


class CutLayer(LayerRecord):
    """What is left of one axis in a layer, and the relative error of what reads it."""

    axis: str
    kept_units: int
    relative_error: float


class LayerCuts(JournalFacts):
    """The cuts in one layer, one for each axis."""

    cuts: tuple[CutLayer, ...]


class LayerCutter:
    """Cuts the layers of one model with the settings of a stage."""

    def __init__(self, stage: Prune, model: LayerwiseModel, context: Context) -> None:
        self.stage, self.model, self.context = stage, model, context

    def find_scores(self) -> None:
        """Compute what the score needs of the whole model, as it is now, and write it to the journal."""
        journal, model, context = self.context.journal, self.model, self.context
        layers = len(model.layers)
        if self.stage.ranking == "obs":
            find_fisher(model, context)
        if self.stage.ranking != "taylor" or all(journal.has(TAYLOR, index) for index in range(layers)):
            return
        sequences = first_sequences(context.data.calibration, MANY)
        consumers = [
            {axis: f"{reader}.weight" for axis in self.stage.axes if (reader := anatomy.consumer_of(axis))}
            for anatomy in (model.anatomy.of_layer(index) for index in range(layers))
        ]
        found = gradients(
            model,
            sequences,
            context.scratch,
            following,
            tuple(dict.fromkeys(name for of in consumers for name in of.values())),
            unscored=context.data.unscored,
            processes=context.processes,
        )
        for index, _, by_name in context.track(found, "gradients of the loss", layers):
            saliency = {
                axis: structured.taylor(model, index, axis, by_name[name]).cpu()
                for axis, name in consumers[index].items()
            }
            journal.save(TAYLOR, index, saliency)

    def cut(self, outline: MetaModel, widths: Widths) -> None:
        """Cut every layer that the journal does not hold yet to its widths in `outline`."""
        journal, layers, stage = self.context.journal, len(self.model.layers), self.stage
        if all(journal.has(STAGE, index) for index in range(layers)):
            return
        visited = walk(
            self.model,
            self.context.data.calibration,
            reference=True,
            half=True,
            processes=self.context.processes,
        )
        for layer in self.context.track(visited, f"prune ({', '.join(stage.axes)}, {stage.ranking})", layers):
            if not journal.has(STAGE, layer.index):
                counts = {axis: counts[layer.index] for axis, counts in widths.items()}
                journal.save(STAGE, layer.index, *self._cut_layer(layer, counts))
            tensors = journal.load(STAGE, layer.index)
            inner = {name.removeprefix(f"{layer.name}."): tensor for name, tensor in tensors.items()}
            layer.become(copy.deepcopy(outline.layers[layer.index]), inner)

    def _cut_layer(
        self, layer: DecoderLayer, counts: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], LayerCuts]:
        """Cut a layer along each axis in turn. Returns the changed tensors by full name, and the facts."""
        named = self.model.as_stored(sublayer_dropping.cut(layer, counts), f"{layer.name}.")
        cuts = list[CutLayer]()
        for axis in (axis for axis in self.stage.axes if counts.get(axis)):  # of some nothing is left
            if axis == "expert":
                tensors, lost = experts.cut(layer, counts[axis])
            else:
                score = self._score(layer.index, axis)
                of_experts = expert_widths.along(layer.anatomy, axis) is not None
                cut = expert_widths.cut if of_experts else structured.cut
                tensors, lost = cut(layer, axis, counts[axis], score, self.stage.repair)
            named |= self.model.as_stored(tensors, f"{layer.name}.")
            cuts.append(CutLayer(name=layer.name, axis=axis, kept_units=counts[axis], relative_error=lost))
        return named, LayerCuts(cuts=tuple(cuts))

    def _score(self, index: int, axis: str) -> structured.Score:
        """The score, with what was computed for a layer."""
        ranking, journal = self.stage.ranking, self.context.journal
        M_DD = metric(self.model, self.context, index) if ranking == "obs" else None
        taylor = journal.load(TAYLOR, index)[axis] if ranking == "taylor" else None
        return structured.Score(ranking, M_DD, taylor)
