"""What each way costs each linear, in nats and bytes, measured in one walk through the model.

A layer's linears are solved in every way under the second moments of the full model's inputs. Each linear
alone then replaces the layer's own: if e is the change in the output of the layer and F the output Fisher
matrix there, e F e^T / 2 is to second order the KL in nats that it costs. Large errors are no longer small
to second order, so a way is also measured in whole layers: all linears of the layer take it, the states run
on through the full model, and the KL of its predictions divides among the linears as the foretold nats do.
What a layer hands on beside its states, such as keys and values that later layers read, goes past its output,
where no loss is seen; so such a layer is offered fine formats alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import Factors, Moments
from llmcompress.formats import registry
from llmcompress.formats.registry import StoredWeight
from llmcompress.formats.schemes import QuantScheme
from llmcompress.frontier.ways import KEEP, Way
from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.finished_parts import FinishedParts
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import divergences, walk
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context, naming_layer
from llmcompress.stages.fisher import find_fisher, fisher
from llmcompress.stages.linear_rewriting import refused
from llmcompress.stages.quantize.fake_quant import outputs_with
from llmcompress.stages.quantize.rounding import Rounding
from llmcompress.stages.quantize.sensitivity import nats
from llmcompress.stages.routed_experts import completed, expert_turns

COSTS = "costs"  # entry of the journal
TOKENS = 16384  # under whose second moments the linears are solved, at least eight a column
SAMPLE = 1  # units of tokens on which losses are measured
FINE = 6.0  # bits from which a way is not measured in whole layers, as its error is small to second order
Unit = tuple[str, ...]  # linears of one layer that take the same way: one, or all experts


class Cost(JournalFacts):
    """What a way costs a unit: nats per token, those foretold to second order, and bytes in the plug-in's
    layout and in the native one."""

    nats: float
    foretold: float
    own_bytes: int
    native_bytes: int


class LayerCosts(JournalFacts):
    """The units of a layer by the names of their linears in it, and the cost of each way by unit."""

    units: tuple[Unit, ...]
    costs: tuple[dict[str, Cost], ...]


class Priced(JournalFacts):
    """Linears that take the same way, by full name, and what each way costs them."""

    linears: Unit
    costs: dict[str, Cost]


def measured(
    model: LayerwiseModel, context: Context, ways: Sequence[Way], known: Sequence[Priced] = ()
) -> list[Priced]:
    """What each way costs the linears of all layers, without those whose costs are `known`. A layer that the
    journal holds is not solved again."""
    find_fisher(model, context)
    journal, layers = context.journal, len(model.layers)
    tokens = max(TOKENS, 8 * model.hidden_size)
    streams: dict[tuple[int, str], list[Tensor]] = {}
    done = {unit.linears for unit in known}
    visited = walk(model, first_sequences(context.data.calibration, tokens), through=True, half=True)
    for layer in context.track(visited, "what each format costs", layers + 1):
        last = layer
        if layer.index == layers:
            continue
        streams = {key: layer.outputs(states) for key, states in streams.items()}
        if not journal.has(COSTS, layer.index):
            units = [unit for unit in _units(model, layer) if _full(layer.name, unit) not in done]
            journal.save(
                COSTS, layer.index, *_priced(model, layer, units, ways, fisher(context, layer.index))
            )
        for name, states in journal.load(COSTS, layer.index).items():
            streams[layer.index, name] = [states]
    full = last.limit.units(last.inputs)[:SAMPLE]
    found = divergences(model, full, streams, context.data.unscored)
    priced = list(known)
    for index in range(layers):
        facts = journal.facts(COSTS, index, LayerCosts)
        whole = {way: loss for (of, way), loss in found.items() if of == index}
        for unit, costs in zip(facts.units, _corrected(facts.costs, whole), strict=True):
            priced.append(Priced(linears=_full(model.layer_name(index), unit), costs=costs))
    return priced


def _full(layer: str, unit: Unit) -> Unit:
    """The full names of the linears of a layer."""
    return tuple(f"{layer}.{linear}" for linear in unit)


def _corrected(costs: Sequence[Mapping[str, Cost]], measured: Mapping[str, float]) -> list[dict[str, Cost]]:
    """Scale the foretold nats of each way so that their sum over the layer is what was `measured`."""
    factors = {}
    for way, loss in measured.items():
        foretold = sum(each[way].nats for each in costs if way in each)
        factors[way] = loss / foretold if foretold > 0 and loss > 0 else 1.0
    return [
        {
            way: cost.model_copy(update={"nats": cost.nats * factors.get(way, 1.0)})
            for way, cost in each.items()
        }
        for each in costs
    ]


@torch.no_grad()
def _priced(
    model: LayerwiseModel, layer: DecoderLayer, units: Sequence[Unit], ways: Sequence[Way], F_DD: Tensor
) -> tuple[dict[str, Tensor], LayerCosts]:
    """Price all ways for some units of a layer. Returns also the states that leave the layer if all of these
    take a way, by way."""
    weights = {linear: layer.weight(linear) for unit in units for linear in unit}
    shapes = {linear: (len(W_RC), W_RC.shape[1]) for linear, W_RC in weights.items()}
    moments = dict(_moments(layer, weights))
    factors = {id(each): Factors(each) for each in moments.values()}
    sample = layer.limit.units(layer.inputs)[:SAMPLE]
    aims, F_DD = layer.outputs_with(sample, {}, layer.device), F_DD.to(layer.device)
    kept: dict[tuple[str, ...], FinishedParts] = {}  # of the submodules that end before a unit
    costs: list[dict[str, Cost]] = [{KEEP.name: _as_it_is(model, layer, unit)} for unit in units]
    leaving: dict[str, Tensor] = {}
    for way in ways:
        coding = way.coding(model.weight_dtype)
        if coding is None or (layer.anatomy.writes and coding.bits < FINE):
            continue
        codings = {
            linear: coding
            for unit in units
            if all(coding.refusal(shapes[linear]) is None for linear in unit)
            for linear in unit
        }
        stored = _solved(layer, codings, weights, moments, factors)
        dense = {linear: registry.dequantize(one, device=layer.device) for linear, one in stored.items()}
        for unit, found in zip(units, costs, strict=True):
            if unit[0] not in codings:
                continue
            final = tuple(layer.ending_before(layer.anatomy.group_of(unit[0])))
            parts = kept.setdefault(final, FinishedParts({}))
            outs = _outputs(layer, {linear: dense[linear] for linear in unit}, coding, sample, parts, final)
            lost = max(0.0, nats(layer, outs, aims, F_DD))
            own, native = (_bytes(layer, unit, stored, native=native) for native in (False, True))
            found[way.name] = Cost(nats=lost, foretold=lost, own_bytes=own, native_bytes=native)
        if coding.bits < FINE and codings:
            leaving[way.name] = torch.cat(_outputs(layer, dense, coding, sample)).cpu()
    return leaving, LayerCosts(units=tuple(units), costs=tuple(costs))


def _units(model: LayerwiseModel, layer: DecoderLayer) -> list[Unit]:
    """The linears of a layer that can be quantised, each by itself, but all experts together."""
    prefix = f"{layer.name}."
    ours = [
        linear
        for linear in layer.anatomy.linears
        if f"{prefix}{linear}" in model.layer_linears
        and refused(f"{prefix}{linear}", model, (), experts=True) is None
    ]
    experts = tuple(linear for linear in ours if f"{prefix}{linear}" in model.expert_linears)
    return [(linear,) for linear in ours if linear not in experts] + ([experts] if experts else [])


def _moments(layer: DecoderLayer, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Moments]]:
    """The second moments of the inputs of each linear; of experts `completed`."""
    groups = [group for group in layer.anatomy.consumers if set(group) & weights.keys()]
    if groups:
        yield from layer.moments(*groups).items()
    for experts in expert_turns(layer, weights):
        yield from completed(layer, layer.moments(*experts)).items()


def _solved(
    layer: DecoderLayer,
    codings: Mapping[str, QuantScheme],
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    factors: Mapping[int, Factors],
) -> dict[str, StoredWeight]:
    """The codes of linears, as `quantize` with gptq finds them on the full model's inputs."""
    rounding, found = Rounding(codings, layer.device), dict[str, StoredWeight]()
    for linear in codings:
        read = moments[linear]
        with naming_layer(f"{layer.name}.{linear}"):
            found[linear] = rounding.gptq(linear, weights[linear], read, factors=factors[id(read)]).stored
    return found


def _outputs(
    layer: DecoderLayer,
    dense: Mapping[str, Tensor],
    coding: QuantScheme,
    sample: Sequence[Tensor],
    parts: FinishedParts | None = None,
    final: Sequence[str] = (),
) -> list[Tensor]:
    """The layer's outputs with some weights in place of its own, and their inputs rounded as the kernel
    does."""
    rounded = coding.inputs()
    inputs = {} if rounded is None else dict.fromkeys(dense, rounded)
    return outputs_with(layer, dense, inputs, sample, parts, final)


def _as_it_is(model: LayerwiseModel, layer: DecoderLayer, unit: Unit) -> Cost:
    """The cost of plain linears."""
    size = 0
    for linear in unit:
        name, shape = f"{layer.name}.{linear}.weight", layer.weight(linear).shape
        size += shape.numel() * model.dtype_of(name).itemsize + header_bytes(name, shape)
    return Cost(nats=0.0, foretold=0.0, own_bytes=size, native_bytes=size)


def _bytes(layer: DecoderLayer, unit: Unit, stored: Mapping[str, StoredWeight], *, native: bool) -> int:
    """The bytes of a unit's tensors in a file, with their part of its header."""
    return sum(
        tensor.nbytes + header_bytes(f"{layer.name}.{linear}.{name}", tensor.shape)
        for linear in unit
        for name, tensor in registry.tensors_of(stored[linear], native=native).items()
    )


def header_bytes(name: str, shape: Sequence[int]) -> int:
    """The most bytes that a tensor takes in the header of a safetensors file, of up to 10^12 bytes."""
    entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**11, 10**11]}
    return len(json.dumps({name: entry}, separators=(",", ":")))
