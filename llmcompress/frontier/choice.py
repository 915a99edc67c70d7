"""Choose a way for every linear within a budget, with the least sum of expected nats.

A budget is of any quantity that adds up over linears: bytes on disk, bytes in memory, nanoseconds per token.
The choice is exact for the sum: `algorithms.allocation` solves the knapsack. The sum assumes that losses add
up, so it orders models better than it foretells their loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmcompress.algorithms.allocation import Option, allocate
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.frontier.costs import Priced
from llmcompress.frontier.ways import KEEP, Palette, Way

STEPS = 1 << 14  # of what a budget leaves beside the least, rounded up to, so that the knapsack stays small


@dataclass(frozen=True)
class Outer:
    """What becomes of the weights outside the layers: settings and overrides of `quantize`, their loss and
    their bytes."""

    name: str
    settings: Mapping[str, str]
    overrides: Mapping[str, Mapping[str, str]]
    nats: float
    size_bytes: int
    native: bool


@dataclass(frozen=True)
class Quantity:
    """What a budget is of, in whole numbers that add up: what a unit takes in a way, by its name, in a model
    that is `native` or not, and what everything outside the units takes."""

    of: Callable[[Priced, str, bool], int]
    outside: Callable[[Outer], int]


def _stored(unit: Priced, way: str, native: bool) -> int:
    cost = unit.costs[way]
    return cost.native_bytes if native else cost.own_bytes


BYTES = Quantity(_stored, lambda outer: outer.size_bytes)  # of the files


@dataclass(frozen=True)
class Choice:
    """A way for each unit of linears, and what is expected of the model."""

    palette: Palette
    outer: Outer
    ways: tuple[Way, ...]  # by unit
    nats: float
    size_bytes: int


def best(
    units: Sequence[Priced],
    palettes: Sequence[Palette],
    outers: Sequence[Outer],
    budget: int,
    quantity: Quantity = BYTES,
) -> Choice | None:
    """The choice with the least expected loss within a budget of a quantity, or None if nothing is so
    small."""
    plain = any(palette.native for palette in palettes)
    found = [
        choice
        for palette, outer in together(palettes, outers)
        if (choice := _within(units, palette, outer, budget, quantity, plain=plain)) is not None
    ]
    return min(found, key=lambda choice: (choice.nats, choice.size_bytes), default=None)


def least(
    units: Sequence[Priced],
    palettes: Sequence[Palette],
    outers: Sequence[Outer],
    quantity: Quantity = BYTES,
) -> int:
    """The least of a quantity that a model can take."""
    return min(
        quantity.outside(outer) + sum(min(_amounts(unit, palette, quantity).values()) for unit in units)
        for palette, outer in together(palettes, outers)
    )


def taken(units: Sequence[Priced], choice: Choice, quantity: Quantity) -> int:
    """How much of a quantity a choice takes."""
    native, ways = choice.palette.native, zip(units, choice.ways, strict=True)
    return quantity.outside(choice.outer) + sum(quantity.of(unit, way.name, native) for unit, way in ways)


def together(palettes: Sequence[Palette], outers: Sequence[Outer]) -> list[tuple[Palette, Outer]]:
    """The palettes with what may stand beside each outside the layers."""
    return [
        (palette, outer) for palette in palettes for outer in outers if outer.native or not palette.native
    ]


@dataclass(frozen=True)
class Uniform:
    """A model in which every linear that can takes the same way, with its bytes, expected nats/token, and
    how much it takes of what is counted."""

    way: str
    outside: str
    size_bytes: int
    nats: float
    taken: int


def uniform(
    units: Sequence[Priced],
    palettes: Sequence[Palette],
    outers: Sequence[Outer],
    quantity: Quantity = BYTES,
) -> list[Uniform]:
    """The models of one way, without ways that most linears can't take."""
    found: dict[tuple[str, str], Uniform] = {}
    for palette, outer in together(palettes, outers):
        for way in palette.ways:
            if 2 * sum(way.name in unit.costs for unit in units) < len(units):
                continue
            ways = tuple(way if way.name in unit.costs else KEEP for unit in units)
            model = _chosen(units, palette, outer, ways)
            amount = taken(units, model, quantity)
            one = Uniform(way.name, outer.name, model.size_bytes, model.nats, amount)
            found.setdefault((way.name, outer.name), one)
    return list(found.values())


def sizes_of(unit: Priced, palette: Palette) -> dict[str, int]:
    """The bytes of each way of a palette that a unit can take."""
    return _amounts(unit, palette, BYTES)


def _amounts(unit: Priced, palette: Palette, quantity: Quantity) -> dict[str, int]:
    """How much each way of a palette takes that a unit can take."""
    names = [way.name for way in palette.ways if way.name in unit.costs]
    return {name: quantity.of(unit, name, palette.native) for name in names}


def _chosen(units: Sequence[Priced], palette: Palette, outer: Outer, ways: tuple[Way, ...]) -> Choice:
    nats = sum(unit.costs[way.name].nats for unit, way in zip(units, ways, strict=True))
    size = sum(_stored(unit, way.name, palette.native) for unit, way in zip(units, ways, strict=True))
    return Choice(palette, outer, ways, outer.nats + nats, outer.size_bytes + size)


def _within(
    units: Sequence[Priced],
    palette: Palette,
    outer: Outer,
    budget: int,
    quantity: Quantity,
    *,
    plain: bool,
) -> Choice | None:
    """The choice within a budget, or None; `plain` says whether the model loads with transformers if its
    linears do."""
    amounts = [_amounts(unit, palette, quantity) for unit in units]
    leasts = [min(of.values()) for of in amounts]
    room = budget - quantity.outside(outer) - sum(leasts)
    if room < 0:
        return None
    step, names = max(1, room // STEPS), [way.name for way in palette.ways]
    options = [
        [
            Option(names.index(name), unit.costs[name].nats, -(-(amount - smallest) // step))
            for name, amount in of.items()
        ]
        for unit, of, smallest in zip(units, amounts, leasts, strict=True)
    ]
    found = tuple(palette.ways[option.width] for option in allocate(options, room // step))
    if plain and not palette.native and outer.native and _loads_plain(found):
        return None  # the native palette says what such a model takes
    if outer.name != KEEP.name and all(way is KEEP for way in found):
        return _with_one(units, palette, outer, budget, quantity)
    return _chosen(units, palette, outer, found)


def _with_one(
    units: Sequence[Priced], palette: Palette, outer: Outer, budget: int, quantity: Quantity
) -> Choice | None:
    """The choice in which one unit is not kept, as `quantize` codes nothing outside the layers by itself;
    None if there is none within the budget."""
    kept = [KEEP] * len(units)
    choices = [
        _chosen(units, palette, outer, (*kept[:place], way, *kept[place + 1 :]))
        for place, unit in enumerate(units)
        for way in palette.ways
        if way is not KEEP and way.name in unit.costs
    ]
    within = [choice for choice in choices if taken(units, choice, quantity) <= budget]
    return min(within, key=lambda choice: (choice.nats, choice.size_bytes), default=None)


def _loads_plain(ways: Sequence[Way]) -> bool:
    """Whether all of these ways are written in bitsandbytes' layouts if nothing else is beside them."""
    codings = [way.coding(torch.float32) for way in ways]
    return all(coding is None or isinstance(coding, FourBitScheme) for coding in codings)


def counted(units: Sequence[Priced], choice: Choice) -> list[tuple[str, int, int, float]]:
    """The ways of a choice: name, number of linears, bytes and expected nats, by falling size of the
    palette."""
    linears, sizes = Counter[str](), Counter[str]()
    nats = dict.fromkeys([way.name for way in choice.palette.ways], 0.0)
    for unit, way in zip(units, choice.ways, strict=True):
        linears[way.name] += len(unit.linears)
        sizes[way.name] += _stored(unit, way.name, choice.palette.native)
        nats[way.name] += unit.costs[way.name].nats
    return [(name, linears[name], sizes[name], nats[name]) for name in nats if linears[name]]
