"""The recipe of a choice, with every way spelled out, so that it runs by itself."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmcompress.frontier.choice import Choice
from llmcompress.frontier.costs import Priced
from llmcompress.frontier.ways import KEEP, Way


def stages_of(units: Sequence[Priced], choice: Choice) -> list[dict[str, Any]]:
    """The stages of a choice as entries of a recipe: one `quantize`, or none if all linears stay.

    The settings that most bytes of the base take are those of the stage; `overrides` and `skip` name the
    others.
    """
    weights = Counter[str]()
    for unit, way in zip(units, choice.ways, strict=True):
        if way is not KEEP:
            weights[way.name] += unit.costs[KEEP.name].native_bytes
    if not weights:
        return []
    usual = next(way for way in choice.palette.ways if way.name == weights.most_common(1)[0][0])
    taken = {
        linear: way
        for unit, way in zip(units, choice.ways, strict=True)
        for linear in unit.linears
        if way is not usual
    }
    every = [linear for unit in units for linear in unit.linears]
    others: dict[str, dict[str, Any]] = {name: dict(of) for name, of in choice.outer.overrides.items()}
    skip: list[str] = []
    for pattern, way in _patterns(every, taken).items():
        if way is KEEP:
            skip.append(pattern)
        else:
            others[pattern] = dict(way.settings)
    settings: dict[str, Any] = dict(usual.settings) | dict(choice.outer.settings)
    if others:
        settings["overrides"] = others
    if skip:
        settings["skip"] = skip
    return [{"quantize": settings}]


def _patterns(every: Sequence[str], taken: Mapping[str, Way]) -> dict[str, Way]:
    """Patterns that match the linears `taken` and no others: one for a linear that takes the same way in all
    layers, otherwise the full name."""
    found: dict[str, Way] = {}
    kinds: dict[str, list[str]] = {}
    for linear in every:
        kinds.setdefault(_kind(linear), []).append(linear)
    for kind, linears in kinds.items():
        way, pattern = taken.get(linears[0]), f"*.{kind}"
        alike = len(linears) > 1 and all(taken.get(linear) is way for linear in linears)
        if way is not None and alike and fnmatch.filter(every, pattern) == linears:
            found[pattern] = way
        else:
            found |= {linear: taken[linear] for linear in linears if linear in taken}
    return found


def _kind(linear: str) -> str:
    """The name of a linear within its layer: what follows the first number."""
    parts = linear.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else linear
