"""Quantise one decoder layer after another as `Quantize` has decided, and write the result to the journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.quantize_weight import weight_error
from llmcompress.formats import registry
from llmcompress.formats.schemes import QuantScheme
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Entered, head_input, walk
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context, LinearRecord, naming_layer
from llmcompress.stages.fisher import fisher, outputs_fisher
from llmcompress.stages.linear_rewriting import install
from llmcompress.stages.quantize.rounding import Rounding
from llmcompress.stages.quantize.sensitivity import TOKENS, costs, most_hurt
from llmcompress.stages.quantize.smoothing import norm_of
from llmcompress.stages.routed_experts import ExpertsRecord, expert_tokens, kept_experts

if TYPE_CHECKING:
    from llmcompress.stages.quantize.stage import Quantize

STAGE, SMOOTH, PROTECTED = "quantize", "smooth", "protected"  # entries of the journal


class QuantizedLayer(ExpertsRecord):
    """What became of a layer, or of the head.

    `loss_gptq` and `loss_learned` are the losses of the layer's output before and after training, in
    nats/token to second order.
    """

    loss_gptq: float | None = None
    loss_learned: float | None = None


class ProtectedLinears(JournalFacts):
    """The linears that `protect` spares, and what rounding each linear would cost in nats/token."""

    linears: tuple[str, ...]
    nats: dict[str, float]


Entry = tuple[dict[str, Tensor], QuantizedLayer]  # a journal entry: tensors by name in the checkpoint


class LayerQuantizer:
    """Quantises the layers and the head with the settings of a stage."""

    def __init__(self, stage: Quantize) -> None:
        self.stage = stage

    def walk(
        self,
        model: LayerwiseModel,
        context: Context,
        chosen: dict[str, QuantScheme],
        steps: int,
        full: Entered | None,
    ) -> None:
        """Quantise every layer that the journal does not hold yet.

        `full` is what the full model's embedding gives, if the embedding in use is another one.
        """
        journal = context.journal
        calibrated, through = self.stage.rounding != "nearest", steps > len(model.layers)
        pooled = self._pooled(model, context, chosen) if calibrated and model.shared_linears else {}
        layers = walk(
            model,
            context.data.calibration,
            reference=calibrated,
            through=through,
            half=calibrated,
            processes=context.processes,
            full=full,
        )
        for layer in context.track(layers, f"quantize ({self.stage.format}, {self.stage.rounding})", steps):
            head = layer.index == len(model.layers)
            codings = {model.anatomy.head: chosen[model.anatomy.head]} if head else layer.own(chosen)
            known = {} if head else layer.own(self._known(model, layer, chosen, journal))
            dtype_of = _in_block(model, layer)
            outputs = {} if head or not self.stage.two_sided else outputs_fisher(context, layer.index)
            rounding = Rounding(codings, model.device, dtype_of, layer.own(pooled), known, outputs)
            changed = [] if head else self._smoothed(layer, codings, context, dtype_of)
            if not journal.has(STAGE, layer.index):
                entry = self._head(model, layer, rounding) if head else self._layer(layer, rounding, context)
                changed += [] if head else kept_experts(model, layer, codings)
                dense = {name: layer.module.get_parameter(name).data for name in changed}
                entry[0].update(model.as_stored(dense, f"{layer.name}."))
                journal.save(STAGE, layer.index, *entry)
            if not head:
                install(layer, codings, journal.load(STAGE, layer.index))

    def _pooled(self, model: LayerwiseModel, context: Context, chosen: Collection[str]) -> dict[str, Moments]:
        """For weights that layers share, the second moments of the inputs of all of them, by the full name of
        the first."""
        shared_linears, found = model.shared_linears, dict[str, Moments]()
        wanted = {name for pair in shared_linears.items() for name in pair if pair[0] in chosen}
        for layer in context.track(
            walk(model, context.data.calibration, processes=context.processes),
            "read what shared weights read",
            len(model.layers),
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
        """The codes of a layer's linears that have those of earlier layers, by full name."""
        here = {
            name: source
            for name, source in model.shared_linears.items()
            if name in chosen and name.startswith(f"{layer.name}.")
        }
        tensors: dict[str, Tensor] = {}
        for index in {
            int(source.removeprefix(f"{model.anatomy.layers}.").partition(".")[0]) for source in here.values()
        }:
            tensors |= journal.load(STAGE, index)
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
        """Let the scales cross that the journal holds or a search finds. Returns the changed parameters that
        stay dense."""
        if self.stage.smooth is None:
            return self._turned(layer, codings)
        journal = context.journal
        if not journal.has(SMOOTH, layer.index):
            before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
            found = self.stage.smooth.search(layer, codings, dtype_of)
            for name, data in before.items():
                layer.module.get_parameter(name).data = data
            journal.save(SMOOTH, layer.index, {key: factor.cpu() for key, factor in found.items()})
        factors, changed = journal.load(SMOOTH, layer.index), set()
        for key in layer.anatomy.scale_pairs:
            if key in factors:
                changed |= set(layer.cross(key, factors[key].to(layer.device), dtype_of(norm_of(layer, key))))
        return sorted(
            (changed | set(self._turned(layer, codings))) - {f"{linear}.weight" for linear in codings}
        )

    def _turned(self, layer: DecoderLayer, linears: Iterable[str]) -> list[str]:
        """All parameters that stay dense if a rotation changed them, otherwise none."""
        inside = {f"{linear}.weight" for linear in linears}
        return [name for name in layer.anatomy.layer if name not in inside] if self.stage.rotate else []

    def find_hurt(self, model: LayerwiseModel, context: Context, chosen: Mapping[str, QuantScheme]) -> None:
        """Journal the linears that `protect` spares. Scales cross first, and are journalled too."""
        journal, found = context.journal, dict[str, float]()
        sequences = first_sequences(context.data.calibration, TOKENS)
        # a round of trials for each expert would take too long
        chosen = {name: how for name, how in chosen.items() if name not in model.expert_linears}
        sizes = {name: math.prod(shape) for name, shape in model.linear_maps() if name in chosen}
        for layer in context.track(
            walk(model, sequences, half=True, processes=context.processes),
            "find the linears that suffer",
            len(model.layers),
        ):
            codings = layer.own(chosen)
            self._smoothed(layer, codings, context, _in_block(model, layer))
            nats = costs(layer, codings, fisher(context, layer.index))
            found |= {f"{layer.name}.{linear}": cost for linear, cost in nats.items()}
        hurt = most_hurt(found, sizes, self.stage.protect)
        journal.save(PROTECTED, 0, {}, ProtectedLinears(linears=tuple(hurt), nats=found))

    def _layer(self, layer: DecoderLayer, rounding: Rounding, context: Context) -> Entry:
        codings = rounding.codings
        weights = {linear: layer.weight(linear) for linear in codings}
        losses: tuple[float, float] | None = None
        if self.stage.rounding == "nearest":
            found = rounding.nearest(layer, weights)
        else:
            found = rounding.in_turn(layer, weights)
        if self.stage.rounding == "learned" and found.solutions:
            losses = rounding.learned(
                layer,
                weights,
                found,
                fisher(context, layer.index),
                steps=self.stage.steps,
                seed=context.seed,
            )
        tensors: dict[str, Tensor] = {}
        records = list[LinearRecord]()
        for linear, W_RC in weights.items():
            name, bias, packed = f"{layer.name}.{linear}", f"{linear}.bias", found.stored[linear]
            tensors |= _named(name, packed)
            if self.stage.rounding != "nearest" and bias in layer.anatomy.layer:
                tensors[f"{layer.name}.{bias}"] = (
                    layer.module.get_parameter(bias).data.to(rounding.dtype_of(bias)).cpu()
                )
            error = found.errors.get(linear)
            if error is None:
                error = rounding.error(W_RC, packed, found.moments[linear])
            records.append(_record(name, codings[linear], W_RC, packed, error))
        before, after = losses or (None, None)
        return tensors, QuantizedLayer(
            name=layer.name,
            linears=tuple(records),
            loss_gptq=before,
            loss_learned=after,
            expert_tokens=expert_tokens(layer, found.tokens),
        )

    def _head(self, model: LayerwiseModel, layer: DecoderLayer, rounding: Rounding) -> Entry:
        name = model.anatomy.head
        coding, (W_RC, moments) = rounding.codings[name], head_input(model, layer)
        scale = coding.static_scale(float(moments.top_C.max()))
        nearest = self.stage.rounding == "nearest"
        with naming_layer(name):
            packed = (
                coding.nearest(W_RC, scale) if nearest else rounding.gptq(name, W_RC, moments, scale).stored
            )
        record = _record(name, coding, W_RC, packed, rounding.error(W_RC, packed, moments))
        return _named(name, packed), QuantizedLayer(name=name, linears=(record,))


def _in_block(model: LayerwiseModel, layer: DecoderLayer) -> Callable[[str], torch.dtype]:
    """Return a function from a parameter's name in the layer to its stored dtype."""
    return lambda name: model.dtype_of(f"{layer.name}.{name}")


def _named(name: str, packed: registry.StoredWeight) -> dict[str, Tensor]:
    """The tensors of a linear under their names in a checkpoint."""
    return {f"{name}.{part}": tensor.cpu() for part, tensor in registry.tensors_of(packed).items()}


def _record(
    name: str, coding: QuantScheme, W_RC: Tensor, packed: registry.StoredWeight, error: float
) -> LinearRecord:
    Q_RC = registry.dequantize(packed, device=W_RC.device)
    return LinearRecord(
        name=name,
        format=coding.format,
        bits=coding.bits_of((W_RC.shape[0], W_RC.shape[1])),
        relative_error=error,
        weight_error=weight_error(W_RC, Q_RC),
    )
