"""Choose a width for every layer and a way for every linear within a budget of bytes, with the least sum of
expected nats.

The choice is exact for the sum: for each width of a part of a layer, all combinations of its linears' ways
that no other beats, and then one knapsack over the parts. The sum assumes that what a width loses and what
formats lose add up. So the widths that are chosen are the result, and the formats are chosen again once the
narrower model is priced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from llmcompress.algorithms.allocation import Option, allocate, combinations
from llmcompress.frontier.choice import Outer, sizes_of, together
from llmcompress.frontier.ways import Palette
from llmcompress.frontier.widths import AXES, Part, Width

STEPS = 1 << 12  # of a budget, to which sizes are rounded up, so that the knapsack stays small

Counts = dict[str, tuple[int, ...]]  # axis -> units that each layer keeps


@dataclass(frozen=True)
class Narrow:
    """Units that each layer keeps of the axes that are cut, and what is expected of the model: nats/token, of
    which the cuts cost `cut_nats`, and bytes."""

    counts: Counts
    nats: float
    cut_nats: float
    size_bytes: int

    def stages(self) -> list[dict[str, Any]]:
        """The stages of a recipe that cuts the model so."""
        kept = {axis: self.counts[axis] for axis in AXES if axis in self.counts}
        return [
            {"prune": {"axis": axis, "keep": counts[0] if len({*counts}) == 1 else [*counts]}}
            for axis, counts in kept.items()
        ]


def narrow(
    parts: Sequence[Part],
    palettes: Sequence[Palette],
    outers: Sequence[Outer],
    budget: int,
    layers: int,
    *,
    uniform: bool,
) -> Narrow | None:
    """The widths of the model that is expected to lose least in at most `budget` bytes, or None if nothing is
    so small. With `uniform`, all of its layers keep the same number of an axis."""
    found: list[tuple[float, int, list[Width]]] = []
    each, offered = _possible(parts, palettes, uniform=uniform)
    for choices in each:
        for palette, outer in together(offered, outers):
            chosen = _within(choices, palette, budget - outer.size_bytes)
            if chosen is not None:
                nats, size, widths = chosen
                found.append((outer.nats + nats, outer.size_bytes + size, widths))
    if not found:
        return None
    nats, size, widths = min(found, key=lambda each: each[:2])
    return Narrow(_counts(parts, widths, layers), nats, sum(width.nats for width in widths), size)


def least(
    parts: Sequence[Part], palettes: Sequence[Palette], outers: Sequence[Outer], *, uniform: bool
) -> int:
    """The bytes of the smallest model that can be chosen."""
    each, offered = _possible(parts, palettes, uniform=uniform)
    return min(
        outer.size_bytes + sum(min(_smallest(width, palette) for width in part.widths) for part in choices)
        for choices in each
        for palette, outer in together(offered, outers)
    )


def _possible(
    parts: Sequence[Part], palettes: Sequence[Palette], *, uniform: bool
) -> tuple[list[list[Part]], Sequence[Palette]]:
    """The parts with the widths that may stand beside each other, and the palettes for them. Layers of
    different widths need the plug-in, in which no bytes are native."""
    if uniform:
        return [_alike(parts, kept) for kept in _alike_counts(parts)], palettes
    return [list(parts)], [palette for palette in palettes if not palette.native]


def _smallest(width: Width, palette: Palette) -> int:
    return sum(min(sizes_of(unit, palette).values()) for unit in width.units)


def _alike_counts(parts: Sequence[Part]) -> Iterator[Mapping[str, int]]:
    """Every number of each axis that all layers can keep, with all that there are."""
    axes: dict[str, set[int]] = {}
    for part in parts:
        if part.axis is not None:
            here = {width.count for width in part.widths}
            axes[part.axis] = axes.get(part.axis, here) & here
    for kept in product(*(sorted(each) for each in axes.values())):
        yield dict(zip(axes, kept, strict=True))


def _alike(parts: Sequence[Part], kept: Mapping[str, int]) -> list[Part]:
    """The parts with the one width that each may have."""
    return [
        part
        if part.axis is None
        else part.model_copy(
            update={"widths": tuple(width for width in part.widths if width.count == kept[part.axis])}
        )
        for part in parts
    ]


def _within(parts: Sequence[Part], palette: Palette, room: int) -> tuple[float, int, list[Width]] | None:
    """The least nats in so many bytes, with the bytes, and the width of each part."""
    if room <= 0:
        return None
    step = max(1, room // STEPS)
    options: list[list[Option]] = []
    ways: list[list[tuple[Width, float, int]]] = []
    for part in parts:
        found = [
            (width, width.nats + lost, size)
            for width in part.widths
            for size, lost in _combined(width, palette)
        ]
        ways.append(found)
        options.append([Option(place, nats, -(-size // step)) for place, (_, nats, size) in enumerate(found)])
    if sum(min(option.parameters for option in each) for each in options) > room // step:
        return None
    taken = [of[option.width] for of, option in zip(ways, allocate(options, room // step), strict=True)]
    return (
        sum(nats for _, nats, _ in taken),
        sum(size for _, _, size in taken),
        [width for width, _, _ in taken],
    )


def _combined(width: Width, palette: Palette) -> list[tuple[int, float]]:
    """Bytes and nats of the ways of all units at a width that no others beat."""
    options = [
        [Option(0, unit.costs[name].nats, size) for name, size in sizes_of(unit, palette).items()]
        for unit in width.units
    ]
    return [(size, lost) for _, size, lost in combinations(options)]


def _counts(parts: Sequence[Part], widths: Sequence[Width], layers: int) -> Counts:
    """The units that each layer keeps, of the axes along which some layer gets narrower."""
    found: dict[str, dict[int, int]] = {}
    cut = set[str]()
    for part, width in zip(parts, widths, strict=True):
        if part.axis is not None:
            found.setdefault(part.axis, {})[part.layer] = width.count
            if width.count < part.whole.count:
                cut.add(part.axis)
    # of a layer without the axis any number may be said
    return {
        axis: tuple(found[axis].get(index, max(found[axis].values())) for index in range(layers))
        for axis in AXES
        if axis in cut
    }
