"""Choose a way for every linear within a budget of bytes, with the least sum of expected nats.

The choice is exact for the sum: `algorithms.allocation` solves the knapsack. The sum assumes that losses add
up, so it orders models better than it foretells their loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmcompress.algorithms.allocation import Option, allocate
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.frontier.costs import Priced
from llmcompress.frontier.ways import KEEP, Palette, Way

STEPS = 1 << 14  # of a budget, to which sizes are rounded up, so that the knapsack stays small


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
class Choice:
    """A way for each unit of linears, and what is expected of the model."""

    palette: Palette
    outer: Outer
    ways: tuple[Way, ...]  # by unit
    nats: float
    size_bytes: int


def best(
    units: Sequence[Priced], palettes: Sequence[Palette], outers: Sequence[Outer], budget: int
) -> Choice | None:
    """The choice with the least expected loss in at most `budget` bytes, or None if nothing is so small."""
    plain = any(palette.native for palette in palettes)
    found = [
        choice
        for palette, outer in together(palettes, outers)
        if (choice := _within(units, palette, outer, budget, plain=plain)) is not None
    ]
    return min(found, key=lambda choice: (choice.nats, choice.size_bytes), default=None)


def least(units: Sequence[Priced], palettes: Sequence[Palette], outers: Sequence[Outer]) -> int:
    """The bytes of the smallest model that can be chosen."""
    return min(
        outer.size_bytes + sum(min(sizes_of(unit, palette).values()) for unit in units)
        for palette, outer in together(palettes, outers)
    )


def together(palettes: Sequence[Palette], outers: Sequence[Outer]) -> list[tuple[Palette, Outer]]:
    """The palettes with what may stand beside each outside the layers."""
    return [
        (palette, outer) for palette in palettes for outer in outers if outer.native or not palette.native
    ]


@dataclass(frozen=True)
class Uniform:
    """A model in which every linear that can takes the same way, with its bytes and expected nats/token."""

    way: str
    outside: str
    size_bytes: int
    nats: float


def uniform(units: Sequence[Priced], palettes: Sequence[Palette], outers: Sequence[Outer]) -> list[Uniform]:
    """The models of one way, without ways that most linears can't take."""
    found: dict[tuple[str, str], Uniform] = {}
    for palette, outer in together(palettes, outers):
        for way in palette.ways:
            if 2 * sum(way.name in unit.costs for unit in units) < len(units):
                continue
            size, nats = outer.size_bytes, outer.nats
            for unit in units:
                taken = way.name if way.name in unit.costs else KEEP.name
                size += sizes_of(unit, palette)[taken]
                nats += unit.costs[taken].nats
            found.setdefault((way.name, outer.name), Uniform(way.name, outer.name, size, nats))
    return list(found.values())


def sizes_of(unit: Priced, palette: Palette) -> dict[str, int]:
    """The bytes of each way of a palette that a unit can take."""
    costs = {way.name: unit.costs[way.name] for way in palette.ways if way.name in unit.costs}
    return {name: cost.native_bytes if palette.native else cost.own_bytes for name, cost in costs.items()}


def _within(
    units: Sequence[Priced], palette: Palette, outer: Outer, budget: int, *, plain: bool
) -> Choice | None:
    """The choice within a budget, or None; `plain` says whether the model loads with transformers if its
    linears do."""
    room = budget - outer.size_bytes
    if room <= 0:
        return None
    step = max(1, room // STEPS)
    options, ways = [], [way.name for way in palette.ways]
    for unit in units:
        sizes = sizes_of(unit, palette)
        options.append(
            [
                Option(ways.index(name), unit.costs[name].nats, -(-size // step))
                for name, size in sizes.items()
            ]
        )
    if sum(min(option.parameters for option in each) for each in options) > room // step:
        return None
    taken = [palette.ways[option.width] for option in allocate(options, room // step)]
    if plain and not palette.native and outer.native and _loads_plain(taken):
        return None  # the native palette says what such a model takes
    nats = sum(unit.costs[way.name].nats for unit, way in zip(units, taken, strict=True))
    size = sum(sizes_of(unit, palette)[way.name] for unit, way in zip(units, taken, strict=True))
    return Choice(palette, outer, tuple(taken), outer.nats + nats, outer.size_bytes + size)


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
        sizes[way.name] += sizes_of(unit, choice.palette)[way.name]
        nats[way.name] += unit.costs[way.name].nats
    return [(name, linears[name], sizes[name], nats[name]) for name in nats if linears[name]]
