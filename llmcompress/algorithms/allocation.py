"""Choose the widths of all layers under one budget of parameters, with the least sum of losses.

This is a knapsack that takes one option from every layer. It is solved exactly, by dynamic programming over
the frontier of the layers so far: the pairs (parameters, loss) that no other pair beats on both. Each layer
is added to every pair and the beaten pairs are dropped. The losses of a layer need not be convex or even
fall. The frontier has at most as many pairs as the budget has multiples of the common step of all layers'
parameters (a unit's weights times `multiple`): thousands for a large model. The cost is layers x pairs x
options. 80 layers of 112 widths take eight seconds on one core. The sum assumes that the losses of layers are
independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.algorithms.overflow import Overflow


@dataclass(frozen=True)
class Option:
    """What a layer may become: a number of units, with its loss and number of parameters."""

    width: int
    loss: float
    parameters: int


def allocate(layers: Sequence[Sequence[Option]], budget: int, *, multiple: int = 1) -> list[Option]:
    """Return one option per layer with the least sum of losses within `budget` parameters.

    Widths are multiples of `multiple`. Of equal sums, the one with the fewest parameters is returned. Raises
    ValueError if a layer has no such width, a loss is not finite, or the smallest options exceed the budget.

    Source: Nemhauser and Ullmann 1969, Discrete dynamic programming and capital allocation, on a
    multiple-choice knapsack.
    """
    fitting = [_fitting(options, multiple, layer) for layer, options in enumerate(layers)]
    least_left = sum(min(option.parameters for option in options) for options in fitting)
    if least_left > budget:
        raise ValueError(
            f"the smallest layers there are have {least_left} parameters; the budget is {budget}"
        )
    spent, _, taken = _added_up(fitting, budget)
    return _origin(fitting, taken, len(spent) - 1)  # the last pair has the least loss


def combinations(parts: Sequence[Sequence[Option]]) -> list[tuple[list[Option], int, float]]:
    """Return the ways to take one option from every part that no other way beats on both sums, by rising
    parameters: the options, the sum of their parameters, and the sum of their losses."""
    most = sum(max(option.parameters for option in options) for options in parts)
    spent, loss, taken = _added_up(parts, most)
    return [
        (_origin(parts, taken, pair), size, lost)
        for pair, (size, lost) in enumerate(zip(spent.tolist(), loss.tolist(), strict=True))
    ]


def _added_up(layers: Sequence[Sequence[Option]], budget: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the frontier of all layers within a budget, and for each pair of each layer's frontier: its pair
    in the layer before, times the number of options, plus its option."""
    spent, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    least_left = sum(min(option.parameters for option in options) for options in layers)
    taken: list[Tensor] = []
    for options in layers:
        least_left -= min(option.parameters for option in options)
        parameters = torch.tensor([option.parameters for option in options])
        losses = torch.tensor([option.loss for option in options], dtype=torch.float64)
        spent, loss = (spent[:, None] + parameters).flatten(), (loss[:, None] + losses).flatten()
        taken.append(_frontier(spent, loss, budget - least_left))
        spent, loss = spent[taken[-1]], loss[taken[-1]]
    return spent, loss, taken


def _origin(layers: Sequence[Sequence[Option]], taken: Sequence[Tensor], pair: int) -> list[Option]:
    """The options that a pair of the last frontier is the sum of."""
    chosen = []
    for options, origin in zip(reversed(layers), reversed(taken), strict=True):
        pair, option = divmod(int(origin[pair]), len(options))
        chosen.append(options[option])
    return chosen[::-1]


def _fitting(options: Sequence[Option], multiple: int, layer: int) -> list[Option]:
    fitting = [option for option in options if option.width % multiple == 0]
    if not fitting:
        raise ValueError(f"layer {layer} has no width that is a multiple of {multiple}")
    if not all(math.isfinite(option.loss) for option in fitting):
        raise Overflow(f"layer {layer} has a loss that is not finite")
    return fitting


def _frontier(spent: Tensor, loss: Tensor, most: int) -> Tensor:
    """Return the indices of the unbeaten pairs within `most`, by rising parameters and falling loss."""
    order = torch.nonzero(spent <= most).flatten()
    order = order[torch.argsort(loss[order], stable=True)]
    # by parameters, then by loss, then in the given order
    order = order[torch.argsort(spent[order], stable=True)]
    least = loss[order].cummin(0).values
    better = torch.ones_like(order, dtype=torch.bool)
    better[1:] = loss[order][1:] < least[:-1]
    return order[better]
