"""What each width of a layer costs, in nats and bytes, measured in one walk through the model.

A layer alone is cut along an axis, as `prune` with `obs` cuts it: units go one after another, each time the
one with the least loss, and the linear that reads the axis is solved again for what is left. The states run
on through the full model, and the KL of its predictions is the cost. An attention or a feed-forward part that
can be taken out has a width of zero too. A linear that keeps a share of its units is expected to keep the
square root of that share of each format's nats, as those that stay are the ones that matter, until the
narrower model is priced itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from llmcompress.algorithms.least_squares import bias_shift
from llmcompress.architectures.resize import resized
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.errors import ModelError
from llmcompress.formats import registry
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.schemes import QuantScheme
from llmcompress.frontier.costs import SAMPLE, TOKENS, Cost, Priced, header_bytes
from llmcompress.frontier.ways import KEEP, Way
from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import divergences, walk
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context
from llmcompress.stages.fisher import find_fisher, metric
from llmcompress.stages.prune.stage import cuttable, layers_along, of_experts
from llmcompress.stages.prune.structured import Reading, solved_without
from llmcompress.stages.prune.sublayer_dropping import candidates

CUTS = "cuts"  # entry of the journal
AXES = ("kv", "ffn")  # in the order in which a recipe cuts them
STEPS = 8  # widths of an axis that are tried, with the whole one, at most
KERNEL = 64  # number of which wide axes keep a multiple, which groups of 4-bit formats need


class Width(JournalFacts):
    """Units that stay, what it costs in nats/token that the others go, and what each way then costs each unit
    of linears."""

    count: int
    nats: float
    units: tuple[Priced, ...]


class Part(JournalFacts):
    """Units of linears of one layer that get narrower together, with all their widths by rising number; those
    along no axis have one width."""

    axis: str | None
    layer: int
    widths: tuple[Width, ...]

    @property
    def whole(self) -> Width:
        """The width that it has."""
        return self.widths[-1]

    @property
    def staying(self) -> Part:
        """The same without the width of zero, with which nothing of it stays."""
        stay = tuple(width for width in self.widths if width.count or width is self.whole)
        return self.model_copy(update={"widths": stay})


def axes_of(model: LayerwiseModel) -> tuple[str, ...]:
    """The axes along which the layers of a model may be cut. There are none if layers hand on more than their
    states, as the loss of that is not measured, and the neurons of experts stay."""
    if model.anatomy.form.handed_on:
        return ()
    return tuple(
        axis for axis in AXES if axis in cuttable(model.anatomy) and not (axis == "ffn" and of_experts(model))
    )


def counts(units: int) -> list[int]:
    """The numbers of units to try, less than all of them: about eighths, multiples of a power of two up to
    64."""
    multiple = 1
    while multiple < KERNEL and 2 * multiple * STEPS <= units:
        multiple *= 2
    found = [max(multiple, round(units * step / STEPS / multiple) * multiple) for step in range(1, STEPS)]
    return [count for count in dict.fromkeys(found) if count < units]


def measured(
    model: LayerwiseModel, context: Context, units: Sequence[Priced], ways: Sequence[Way]
) -> list[Part]:
    """What each width of each layer costs, and the units of linears that get no narrower. `units` are priced
    in the same model. A layer that the journal holds is not cut again."""
    along = {axis: layers_along(model, axis) for axis in axes_of(model)}
    lost = _lost(model, context, along) if along else {}
    tried = {(axis, count) for (_, axis), losses in lost.items() for count in losses}
    built = {(axis, count) for axis, count in tried if _can_be_built(model, axis, count)}
    parts = []
    for axis, layers in along.items():
        for index in layers:
            losses = lost.get((index, axis), {})
            losses = {count: nats for count, nats in losses.items() if (axis, count) in built}
            parts.append(_part(model, axis, index, losses, units, ways))
    narrowed = {unit.linears for part in parts for unit in part.whole.units}
    for unit in units:
        if unit.linears not in narrowed:
            parts.append(Part(axis=None, layer=0, widths=(Width(count=0, nats=0.0, units=(unit,)),)))
    return parts


def _can_be_built(model: LayerwiseModel, axis: str, count: int) -> bool:
    """Whether transformers builds the model with so many units of an axis in each layer; with none in those
    that can do without them."""
    removable = _removable(model)
    kept = [
        size if count == 0 and (index, axis) not in removable else min(count, size)
        for index, size in enumerate(model.widths_of(axis))
    ]
    try:
        resized(model.config, model.anatomy, {axis: kept})
    except ModelError:
        return False
    return True


def _removable(model: LayerwiseModel) -> Sequence[tuple[int, str]]:
    """The parts that can be taken out, as a layer and an axis."""
    try:
        return candidates(model)
    except ModelError:
        return ()


def _lost(
    model: LayerwiseModel, context: Context, along: Mapping[str, Sequence[int]]
) -> dict[tuple[int, str], dict[int, float]]:
    """KL in nats/token of each number of units, by layer and axis; `along` are the layers that have an
    axis."""
    find_fisher(model, context)
    journal, layers, removable = context.journal, len(model.layers), _removable(model)
    sequences = first_sequences(context.data.calibration, max(TOKENS, 8 * model.hidden_size))
    streams: dict[tuple[int, str, int], list[Tensor]] = {}
    for layer in context.track(
        walk(model, sequences, through=True, half=True), "what each width costs", layers + 1
    ):
        last = layer
        if layer.index == layers:
            continue
        streams = {key: layer.outputs(states) for key, states in streams.items()}
        if not journal.has(CUTS, layer.index):
            M_DD = metric(model, context, layer.index)
            ours = [axis for axis, of in along.items() if layer.index in of]
            tensors = {f"{axis} {count}": out for axis in ours for count, out in _cut(layer, axis, M_DD)}
            tensors |= {
                f"{axis} 0": _without(layer, axis) for axis in ours if (layer.index, axis) in removable
            }
            journal.save(CUTS, layer.index, tensors)
        for name, states in journal.load(CUTS, layer.index).items():
            axis, _, stays = name.partition(" ")
            streams[layer.index, axis, int(stays)] = [states]
    full = last.limit.units(last.inputs)[:SAMPLE]
    found: dict[tuple[int, str], dict[int, float]] = {}
    for (index, axis, count), nats in divergences(model, full, streams, context.data.unscored).items():
        found.setdefault((index, axis), {})[count] = max(0.0, nats)
    return found


@torch.no_grad()
def _cut(layer: DecoderLayer, axis: str, M_DD: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield each number of units with the states that leave the layer if so many stay. The layer is left
    unchanged."""
    if not (tried := counts(layer.sizes[axis])):
        return
    read = Reading.of(layer, axis)
    removal = read.removal(read.W_RC, M_DD, tried[0])
    sample, reader = layer.limit.units(layer.inputs)[:SAMPLE], read.linear
    for count in tried:
        columns, left_RP, padded_RC = solved_without(
            layer, axis, read, removal.kept(count), read.W_RC, mend=True
        )
        given = {f"{reader}.weight": layer.oriented(reader, padded_RC)}
        if (bias := f"{reader}.bias") in layer.anatomy.layer:
            mean_C = read.moments.mean_C
            given[bias] = layer.module.get_parameter(bias).data
            given[bias] = given[bias] + bias_shift(read.W_RC, read.moments.full_C, left_RP, mean_C[columns])
        yield count, torch.cat(layer.outputs_with(sample, given, torch.device("cpu")))


@torch.no_grad()
def _without(layer: DecoderLayer, axis: str) -> Tensor:
    """The states that leave the layer without the part that has an axis."""
    sample, weight = layer.limit.units(layer.inputs)[:SAMPLE], f"{layer.anatomy.consumer_of(axis)}.weight"
    given = {weight: torch.zeros_like(layer.module.get_parameter(weight))}
    return torch.cat(layer.outputs_with(sample, given, torch.device("cpu")))


def _part(
    model: LayerwiseModel,
    axis: str,
    index: int,
    losses: Mapping[int, float],
    units: Sequence[Priced],
    ways: Sequence[Way],
) -> Part:
    """The widths of a layer along an axis, with the linears that run along it."""
    anatomy, prefix = model.anatomy_of_layer(index), f"{model.layer_name(index)}."
    along = {
        prefix + linear
        for linear in anatomy.linears
        if axis in Spelling.parse(anatomy.layer[f"{linear}.weight"]).axes
    }
    ours = tuple(unit for unit in units if along.issuperset(unit.linears))
    whole = model.sizes_of(index)[axis]
    widths = [
        Width(
            count=count,
            nats=nats,
            units=tuple(
                _narrower(model, unit, index, {axis: count}, (count / whole) ** 0.5, ways) for unit in ours
            ),
        )
        for count, nats in sorted(losses.items())
    ]
    return Part(axis=axis, layer=index, widths=(*widths, Width(count=whole, nats=0.0, units=ours)))


def _narrower(
    model: LayerwiseModel,
    unit: Priced,
    index: int,
    width: Mapping[str, int],
    share: float,
    ways: Sequence[Way],
) -> Priced:
    """What the ways are expected to cost a unit once its linears are so narrow."""
    anatomy, prefix = model.anatomy_of_layer(index), f"{model.layer_name(index)}."
    sizes = {**model.sizes_of(index), **width}
    shapes: dict[str, tuple[int, int]] = {}
    for name in unit.linears:
        linear = name.removeprefix(prefix)
        shape = Spelling.parse(anatomy.layer[f"{linear}.weight"]).shape(sizes)
        shapes[name] = (shape[1], shape[0]) if linear in anatomy.conv1d else (shape[0], shape[1])
    plain = sum(
        shape[0] * shape[1] * model.dtype_of(f"{name}.weight").itemsize
        + header_bytes(f"{name}.weight", shape)
        for name, shape in shapes.items()
    )
    costs = {KEEP.name: Cost(nats=0.0, foretold=0.0, own_bytes=plain, native_bytes=plain)}
    there = all(all(shape) for shape in shapes.values())
    for way in ways if there else ():
        coding, whole = way.coding(model.weight_dtype), unit.costs.get(way.name)
        if coding is None or whole is None or any(coding.refusal(shape) for shape in shapes.values()):
            continue
        own, native = (
            sum(
                size + header_bytes(f"{name}.{tensor}", of)
                for name, shape in shapes.items()
                for tensor, of, size in _stored(coding, *shape, native=native)
            )
            for native in (False, True)
        )
        nats = whole.nats * share
        costs[way.name] = Cost(nats=nats, foretold=nats, own_bytes=own, native_bytes=native)
    return Priced(linears=unit.linears, costs=costs)


@cache
def _stored(
    coding: QuantScheme, rows: int, columns: int, *, native: bool
) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """The tensors of a linear [rows, columns] on disk: names, shapes and bytes. The description of a native
    linear whose scales are in 8 bits spells a number, so that its length is a few bytes off."""
    if isinstance(coding, CodebookScheme):  # its nearest levels take a k-means
        shapes = coding.layout.shapes(rows, columns)
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()
        }
    else:
        W_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        tensors = registry.tensors_of(coding.nearest(W_RC), native=native)
    return tuple((name, tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items())
