"""How many units each block keeps, so that one budget of parameters loses least.

Every block is asked, in the full model, what it would lose at every width: the squared error of the linear that reads the axis
as its units go one after another, all others solved for, weighed by the output Fisher matrix of the block, which makes nats of
it. The widths are then a knapsack. It costs one pass back for the Fisher matrices, one forward, and the removal of all units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmcompress.methods.budget import Option, allocate
from llmcompress.residency import Resident
from llmcompress.stages.context import Context
from llmcompress.stages.fisher import find_fisher, metric
from llmcompress.stages.units import Reading
from llmcompress.walk import walk

Curves = Mapping[str, Sequence[Sequence[float]]]  # axis -> for each block, the loss where it keeps 0, 1, 2 ... units
Widths = dict[str, tuple[int, ...]]  # axis -> units that each block keeps


def curves(model: Resident, context: Context, axes: Sequence[str]) -> dict[str, list[list[float]]]:
    """The nats a token that each block loses by what it keeps of each axis.

    Where there is no metric, because a norm follows the sublayer, the loss is the relative error instead.
    """
    layers = len(model.layers)
    found: dict[str, list[list[float]]] = {axis: [] for axis in axes}
    find_fisher(model, context)
    for block in context.track(walk(model, context.data.calibration), f"what each width of {' and '.join(axes)} costs", layers):
        M_DD = metric(model, context, block.index)
        for axis in axes:
            read = Reading.of(block, axis)
            losses = read.removal(read.W_RC, M_DD, 0).losses
            if M_DD is None:
                losses = losses / max(float(((read.W_RC @ read.moments.H_CC) * read.W_RC).sum()), 1e-30)
            found[axis].append([*reversed(losses.tolist()), 0.0])
    return found


def unit_parameters(model: Resident, axis: str) -> list[int]:
    """Parameters that one unit of an axis has in each block."""
    layers = len(model.layers)
    none = model.parameters({axis: [0] * layers})
    return [model.parameters({axis: [int(index == only) for index in range(layers)]}) - none for only in range(layers)]


def widths(curves: Curves, unit: Mapping[str, Sequence[int]], budget: int, multiples: Mapping[str, int]) -> Widths:
    """Units that each block keeps: multiples, or all it has; the least loss in all with at most `budget` parameters.

    `unit` are the parameters of one unit, by axis and block. Raises ValueError where one multiple everywhere is too much.
    """
    options = []
    for axis, blocks in curves.items():
        for losses, parameters in zip(blocks, unit[axis], strict=True):
            units = len(losses) - 1
            counts = dict.fromkeys([*range(multiples[axis], units, multiples[axis]), units])
            options.append([Option(count, losses[count], count * parameters) for count in counts])
    found = iter(allocate(options, budget))
    return {axis: tuple(next(found).width for _ in blocks) for axis, blocks in curves.items()}
