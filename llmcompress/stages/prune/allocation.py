"""How many units each layer keeps, so that the loss within one budget of parameters is least.

The loss of every layer at every width is computed in the full model. It is the squared error of the linear
that consumes the axis as its units are removed one after another, with the others solved for. It is weighted
by the output Fisher matrix of the layer, which turns it into nats. That is right for small losses, so at one
width the loss is measured, with that layer alone cut. The widths are then a knapsack. The cost is one
backward pass for the Fisher matrices, one forward pass, the removal of all units, and half a pass per layer
on a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.algorithms.allocation import Option, allocate
from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import divergences, walk
from llmcompress.modeling.token_limit import batches_of
from llmcompress.stages.base import Context
from llmcompress.stages.fisher import find_fisher, metric
from llmcompress.stages.prune.budget import NEAR
from llmcompress.stages.prune.structured import Reading, Score, cut

if TYPE_CHECKING:
    from llmcompress.stages.prune.stage import Prune

SAMPLE = 4096  # tokens on which losses are measured

# axis -> for each layer, the loss if it keeps 0, 1, 2 ... units
Curves = Mapping[str, Sequence[Sequence[float]]]
Widths = dict[str, tuple[int, ...]]  # axis -> units that each layer keeps


class FoundWidths(JournalFacts):
    """The units that each layer keeps, by axis, and its expected loss in nats/token."""

    widths: dict[str, tuple[int, ...]]
    expected_nats: dict[str, tuple[float, ...]]


def find(model: LayerwiseModel, context: Context, stage: Prune) -> FoundWidths:
    """Find the widths of all layers within the budget of a stage. Errors: ModelError if it can't be
    reached."""
    spent, axes = partial(stage.spent, model), stage.axes
    unit = {axis: of_a_unit(model, axis, spent) for axis in axes}
    none = spent({axis: [0] * len(model.layers) for axis in axes})
    within = (
        spent(stage.uniform_widths(model)) if stage.keep is not None else min(stage.allowed(model), spent())
    )
    multiples = {axis: stage.multiple_of(model, axis) for axis in axes}
    for axis in axes if not stage.multiple else ():
        while multiples[axis] > 1 and multiples[axis] * max(unit[axis]) > NEAR * within:
            multiples[axis] //= 2
    least = none + sum(multiples[axis] * sum(unit[axis]) for axis in axes)
    if within < least:
        raise stage.refuse(model, least)
    losses = curves(model, context, axes)
    found = widths(losses, unit, within - none, multiples)
    nats = {
        axis: tuple(curve[count] for curve, count in zip(losses[axis], found[axis], strict=True))
        for axis in axes
    }
    return FoundWidths(widths=found, expected_nats=nats)


def curves(model: LayerwiseModel, context: Context, axes: Sequence[str]) -> dict[str, list[list[float]]]:
    """The loss of each layer in nats/token by the units that it keeps of each axis, as far as losses add up.

    Each layer alone is cut to three quarters, and the loss of the model is measured; the layer's curve is
    scaled to go through that point. If there is no metric, because a norm follows the sublayer, the curve is
    one of relative errors before it is scaled.
    """
    layers, sample = len(model.layers), context.data.calibration[:1].shape[1]
    few = max(1, -(-SAMPLE // (sample * len(batches_of(context.data.calibration)[0]))))  # batches
    found: dict[str, list[list[float]]] = {axis: [] for axis in axes}
    streams: dict[tuple[str, int], list[Tensor]] = {}
    find_fisher(model, context)
    visited = walk(model, context.data.calibration, through=True, half=True)
    for layer in context.track(visited, f"what each width of {' and '.join(axes)} costs", layers + 1):
        last = layer
        if layer.index == layers:
            continue
        streams = {key: layer.outputs(states) for key, states in streams.items()}
        M_DD = metric(model, context, layer.index)
        for axis in axes:
            read = Reading.of(layer, axis)
            losses = read.removal(read.W_RC, M_DD, 0).losses
            if M_DD is None:
                losses = losses / max(float(((read.W_RC @ read.moments.H_CC) * read.W_RC).sum()), 1e-30)
            found[axis].append([*reversed(losses.tolist()), 0.0])
            if (width := _measured_at(read.units)) < read.units:
                streams[axis, layer.index] = without(layer, axis, width, M_DD, few)
    measured = divergences(model, model.limit.units(last.inputs)[:few], streams, context.data.unscored)
    for (axis, index), nats in measured.items():
        losses_here = found[axis][index]
        foretold = losses_here[_measured_at(len(losses_here) - 1)]
        found[axis][index] = (
            [loss * nats / foretold for loss in losses_here] if foretold > 0 and nats > 0 else losses_here
        )
    return found


def _measured_at(units: int) -> int:
    return max(1, min(units - 1, round(0.75 * units)))


def without(
    layer: DecoderLayer, axis: str, count: int, metric_RR: Tensor | None, batches: int
) -> list[Tensor]:
    """The outputs of a layer for its first `batches` of TOKENS_AT_ONCE tokens if `count` units of an axis
    stay. The layer is left unchanged."""
    before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
    cut(layer, axis, count, Score("obs", metric_RR), mend=True)
    out = layer.outputs(layer.limit.units(layer.inputs)[:batches])
    for name, data in before.items():
        layer.module.get_parameter(name).data = data
    return out


def of_a_unit(model: LayerwiseModel, axis: str, spent: Callable[[Widths], int]) -> list[int]:
    """The size of one unit of an axis in each layer, in the parameters or bytes that `spent` gives for
    widths."""
    layers = len(model.layers)
    none = spent({axis: (0,) * layers})
    return [
        spent({axis: tuple(int(index == only) for index in range(layers))}) - none for only in range(layers)
    ]


def widths(
    curves: Curves, unit: Mapping[str, Sequence[int]], budget: int, multiples: Mapping[str, int]
) -> Widths:
    """Units that each layer keeps: multiples, or all that it has, with the least total loss in at most
    `budget` parameters or bytes.

    `unit` is the size of one unit, by axis and layer. Raises ValueError if one multiple everywhere is too
    much.
    """
    options = []
    for axis, layers in curves.items():
        for losses, parameters in zip(layers, unit[axis], strict=True):
            units = len(losses) - 1
            counts = dict.fromkeys([*range(multiples[axis], units, multiples[axis]), units])
            options.append([Option(count, losses[count], count * parameters) for count in counts])
    found = iter(allocate(options, budget))
    return {axis: tuple(next(found).width for _ in layers) for axis, layers in curves.items()}
