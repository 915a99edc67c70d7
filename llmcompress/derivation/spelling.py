"""The rows of an anatomy for a layer of any size, from crossings that were proved on a tiny one.

Where no scale crosses, a row is numbers, the shape of the weight. Where one does, the dimensions that it runs
along have an axis in common: `hidden` for what a norm of the hidden states gives, `c0` and so on for others.
The tiny layer tells which outputs a column reads. Three patterns are the same at any size: all outputs in
order, the last outputs of a fused linear, and the channels of each head once for every query head that shares
it. Crossings with another pattern are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from llmcompress.derivation.scales import Crossing
from llmcompress.integrations.linear_modules import shape_of
from llmcompress.integrations.transformers_compat import Conv1D

HIDDEN = "hidden"


@dataclass
class Spelled:
    """Rows of a layer, the sizes of their axes, its scale pairs, and the offset of its norms."""

    rows: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    offset: float = 0.0


def spelled(layer: nn.Module, tiny: nn.Module, crossings: Sequence[Crossing], hidden: int) -> Spelled:
    """The rows of a layer whose hidden states have `hidden` channels, like the tiny layer whose crossings
    these are."""
    shapes = {name: [*parameter.shape] for name, parameter in layer.named_parameters()}
    terms = {name: [str(size) for size in shape] or ["1"] for name, shape in shapes.items()}
    found = Spelled({})
    for name, shape in shapes.items():  # gains of the stream, also those that nothing may cross
        if shape == [hidden] and name.endswith(".weight"):
            terms[name], found.sizes[HIDDEN] = [HIDDEN], hidden
    offsets = [crossing.offset for crossing in crossings if crossing.offset is not None]
    found.offset = offsets[0] if offsets else 0.0
    for number, crossing in enumerate(crossings):
        if crossing.offset in (None, found.offset):
            _add(found, terms, layer, tiny, crossing, f"c{number}", hidden)
    found.rows = {name: " ".join(of) for name, of in terms.items()}
    return found


@dataclass(frozen=True)
class Pattern:
    """How a crossing is spelled: terms of the producer's outputs and of the columns, and sizes of axes."""

    outputs: str
    columns: str
    sizes: dict[str, int]
    part: str = ""  # of the producer, as a key of `scale_pairs` names it


def _add(
    found: Spelled,
    terms: dict[str, list[str]],
    layer: nn.Module,
    tiny: nn.Module,
    crossing: Crossing,
    axis: str,
    hidden: int,
) -> None:
    """Spell one crossing, unless its pattern depends on the size, or is at odds with another one."""
    read = {name if name in terms else f"{name}.weight": dim for name, dim in crossing.readers.items()}
    columns = {layer.get_parameter(name).shape[dim] for name, dim in read.items()}
    pattern = _pattern(layer, tiny, crossing, max(columns), axis, hidden)
    if len(columns) > 1 or pattern is None:
        return
    if any(terms[name][dim] not in (str(*columns), pattern.columns) for name, dim in read.items()):
        return
    for name, dim in read.items():
        terms[name][dim] = pattern.columns
    conv1d = isinstance(layer.get_submodule(crossing.producer), Conv1D)
    terms[f"{crossing.producer}.weight"][1 if conv1d else 0] = pattern.outputs
    if f"{crossing.producer}.bias" in terms:
        terms[f"{crossing.producer}.bias"] = [pattern.outputs]
    found.sizes |= pattern.sizes
    found.pairs[crossing.producer + pattern.part] = tuple(crossing.readers)


def _pattern(
    layer: nn.Module, tiny: nn.Module, crossing: Crossing, C: int, axis: str, hidden: int
) -> Pattern | None:
    """The pattern of a crossing to C columns; None if it is none of the three."""
    producer, small = (each.get_submodule(crossing.producer) for each in (layer, tiny))
    if crossing.offset is not None:
        axis = HIDDEN if hidden == C else axis
        return Pattern(axis, axis, {axis: C})
    (R, _), (tiny_R, _) = shape_of(producer), shape_of(small)
    if torch.equal(crossing.unit_C, torch.arange(tiny_R - len(crossing.unit_C), tiny_R)):
        if C == R:
            return Pattern(axis, axis, {axis: C})
        return Pattern(f"({R - C} | {axis})", axis, {axis: C}, part="[1]") if C < R else None
    if (d := _head_dim(layer, tiny, crossing)) is None or R % d or C % R:
        return None
    kv, q, each = (f"{axis}_{part}" for part in ("kv", "q", "d"))
    return Pattern(f"({kv} {each})", f"({kv} {q} {each})", {kv: R // d, q: C // R, each: d})


def _head_dim(layer: nn.Module, tiny: nn.Module, crossing: Crossing) -> int | None:
    """The channels of a head in a layer, if columns of the tiny one read those of each head several times.

    It is the number that the module around the producer holds by a name by which the tiny one holds its own.
    """
    R, C = shape_of(tiny.get_submodule(crossing.producer))[0], len(crossing.unit_C)
    column, around = torch.arange(C), crossing.producer.rpartition(".")[0]
    held, own = vars(tiny.get_submodule(around)), vars(layer.get_submodule(around))
    found = set()
    for name, d in held.items():
        if type(d) is int and d > 0 and R % d == 0 and C % R == 0:
            reads_C = column // (C // R * d) * d + column % d
            found |= {own[name]} if torch.equal(crossing.unit_C, reads_C) else set()
    return found.pop() if len(found) == 1 else None
