"""How many units each layer keeps, so that one budget of parameters loses least.

Every layer is asked, in the full model, what it would lose at every width: the squared error of the linear
that reads the axis as its units go one after another, all others solved for, weighed by the output Fisher
matrix of the layer, which makes nats of it. That is right for small losses; so at one width it is measured,
with that layer alone cut. The widths are then a knapsack. It costs one pass back for the Fisher matrices, one
forward, the removal of all units, and half a pass a layer on a few tokens.
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
from llmcompress.modeling.sequential import batches_of, divergences, walk
from llmcompress.stages.base import Context
from llmcompress.stages.fisher import find_fisher, metric
from llmcompress.stages.prune.budget import NEAR
from llmcompress.stages.prune.structured import Reading, Score, cut

if TYPE_CHECKING:
    from llmcompress.stages.prune.stage import Prune

SAMPLE = 4096  # tokens that are measured on

# axis -> for each layer, the loss where it keeps 0, 1, 2 ... units
Curves = Mapping[str, Sequence[Sequence[float]]]
Widths = dict[str, tuple[int, ...]]  # axis -> units that each layer keeps


class FoundWidths(JournalFacts):
    """The units that each layer keeps, by axis, and the nats/token that each is expected to lose by it."""

    widths: dict[str, tuple[int, ...]]
    expected_nats: dict[str, tuple[float, ...]]


def find(model: LayerwiseModel, context: Context, stage: Prune) -> FoundWidths:
    """The widths of all layers within the budget of a stage. Errors: ModelError where it can't be reached."""
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
    """The nats a token that each layer loses by what it keeps of each axis, as far as they add up.

    A layer alone is cut to three quarters, and what the model loses by that is measured: its curve is
    multiplied so that it goes through there. Where there is no metric, because a norm follows the sublayer,
    it is one of relative errors before.
    """
    layers, sample = len(model.layers), context.data.calibration[:1].shape[1]
    few = max(1, -(-SAMPLE // (sample * len(batches_of(context.data.calibration)[0]))))  # batches
    found: dict[str, list[list[float]]] = {axis: [] for axis in axes}
    streams: dict[tuple[str, int], list[Tensor]] = {}
    find_fisher(model, context)
    visited = walk(model, context.data.calibration, through=True)
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
    measured = divergences(model, last.inputs[:few], streams, context.data.unscored)
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
    """What leaves a layer for its first inputs where `count` units of an axis stay; the layer is then as it
    was."""
    before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
    cut(layer, axis, count, Score("obs", metric_RR), mend=True)
    out = layer.outputs(layer.inputs[:batches])
    for name, data in before.items():
        layer.module.get_parameter(name).data = data
    return out


def of_a_unit(model: LayerwiseModel, axis: str, spent: Callable[[Widths], int]) -> list[int]:
    """What one unit of an axis takes in each layer, in the parameters or bytes that `spent` says of
    widths."""
    layers = len(model.layers)
    none = spent({axis: (0,) * layers})
    return [
        spent({axis: tuple(int(index == only) for index in range(layers))}) - none for only in range(layers)
    ]


def widths(
    curves: Curves, unit: Mapping[str, Sequence[int]], budget: int, multiples: Mapping[str, int]
) -> Widths:
    """Units that each layer keeps: multiples, or all it has; the least loss in all with at most `budget`
    parameters or bytes.

    `unit` is what one unit takes of these, by axis and layer. Raises ValueError where one multiple everywhere
    is too much.
    """
    options = []
    for axis, layers in curves.items():
        for losses, parameters in zip(layers, unit[axis], strict=True):
            units = len(losses) - 1
            counts = dict.fromkeys([*range(multiples[axis], units, multiples[axis]), units])
            options.append([Option(count, losses[count], count * parameters) for count in counts])
    found = iter(allocate(options, budget))
    return {axis: tuple(next(found).width for _ in layers) for axis, layers in curves.items()}
