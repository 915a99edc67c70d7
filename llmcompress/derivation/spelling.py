"""The rows of an anatomy for a layer of any size, from axes and crossings that were proved on a tiny one.

A dimension that runs along a proved axis is spelled by its layout. Where a scale crosses, the outputs and the
columns that read them have an axis in common. If both are spelled, the crossing must be what the spelling
says. Else a name is made for it: `hidden` for what a norm of the hidden states gives, `c0` and so on for
others, if it has one of three patterns that are the same at any size: all outputs in order, the last outputs
of a fused linear, and the channels of each head once for every query head that shares it. Crossings with
another pattern are left out. All other dimensions are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcompress.architectures.shape_grammar import Spelling, Term, units_along
from llmcompress.derivation.axis_proofs import HIDDEN
from llmcompress.derivation.drafts import HEAD_CHANNELS, Draft
from llmcompress.derivation.scales import Crossing
from llmcompress.integrations.linear_modules import shape_of
from llmcompress.integrations.transformers_compat import Conv1D

PART = "|"  # of `units_along`: the number of the alternative
UNIT = re.compile(r"\((\w[\w ]*) (\d+)\)")  # a unit of several channels


@dataclass
class Spelled:
    """Rows of the parameters of a layer and of buffers that run along an axis, the sizes of the axes, scale
    pairs, and the offset of norms."""

    rows: dict[str, str]
    buffers: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    offset: float = 0.0


def spelled(layer: Draft, tiny: Draft, crossings: Sequence[Crossing], hidden: int) -> Spelled:
    """The rows of a layer whose hidden states have `hidden` channels, like the tiny layer whose crossings
    these are."""
    if HIDDEN not in layer.sizes:  # then vectors of its size may be gains of the states
        for name, parameter in layer.module.named_parameters():
            if [*parameter.shape] == [hidden] and name.endswith(".weight"):
                layer.terms[name], layer.sizes[HIDDEN] = [HIDDEN], hidden
    offsets = [crossing.offset for crossing in crossings if crossing.offset is not None]
    found = Spelled({}, {}, layer.sizes, {}, offsets[0] if offsets else 0.0)
    for number, crossing in enumerate(crossings):
        if crossing.offset in (None, found.offset):
            key = _named(layer, tiny, crossing) or _added(layer, tiny, crossing, f"c{number}", hidden)
            if key is not None:
                found.pairs[key] = tuple(name.removesuffix(".weight") for name in crossing.readers)
    rows = {name: " ".join(of) for name, of in layer.terms.items()}
    found.rows = {name: rows.pop(name) for name, _ in layer.module.named_parameters()}
    found.buffers = {name: row for name, row in rows.items() if Spelling.parse(row).axes}
    return found


def _named(layer: Draft, tiny: Draft, crossing: Crossing) -> str | None:
    """The key of `scale_pairs` for a crossing that is what the spelling of its dimensions says, or None.

    Outputs that are spelled as channels of units may become two parts.
    """
    outputs, columns = _outputs(tiny, crossing.producer), _columns(tiny, crossing)
    if outputs is None or columns is None:
        return None
    for part in (None, 0, 1, 2):
        if _agrees(outputs, columns, part, tiny.sizes, crossing.unit_C):
            return crossing.producer + (f"[{part}]" if part is not None else "")
    return _in_halves(layer, tiny, crossing, columns)


def _in_halves(layer: Draft, tiny: Draft, crossing: Crossing, columns: str) -> str | None:
    """The same for a crossing of the first or last channels of each unit, as many as a head has, or one."""
    small, whole = (UNIT.fullmatch(_outputs(draft, crossing.producer) or "") for draft in (tiny, layer))
    if small is None or whole is None or small[1] != whole[1]:
        return None
    for inner in (HEAD_CHANNELS, "1"):
        here, there = (draft.sizes.get(inner, 1) for draft in (tiny, layer))
        rest, other = int(small[2]) - here, int(whole[2]) - there
        if rest < 1 or other < 1 or (inner == HEAD_CHANNELS and inner not in tiny.sizes):
            continue
        for part, halves in enumerate(("({0} ({1} | {2}))", "({0} ({2} | {1}))")):
            term = halves.format(small[1], inner, rest)
            if _agrees(term, columns, part, tiny.sizes, crossing.unit_C):
                _set_outputs(tiny, crossing.producer, term)
                _set_outputs(layer, crossing.producer, halves.format(small[1], inner, other))
                return f"{crossing.producer}[{part}]"
    return None


def _agrees(outputs: str, columns: str, part: int | None, sizes: Mapping[str, int], unit_C: Tensor) -> bool:
    """Whether each column reads the output, in one part of the outputs or in all, that has its units."""
    (produced,), (read,) = Spelling.parse(outputs).dims, Spelling.parse(columns).dims
    here = Spelling((produced,)) if part is None else _part(Spelling((produced,)), part)
    if here is None or not here.axes or not {*here.axes} <= {*Spelling((read,)).axes}:
        return False
    rows, place_C = _places(produced, here.axes, sizes), _places(read, here.axes, sizes)
    if part is not None:
        rows = torch.where(units_along(produced, sizes, PART) == part, rows, -1)
    position = {int(place): row for row, place in enumerate(rows.tolist()) if place >= 0}
    if len(position) != int((rows >= 0).sum()) or len(place_C) != len(unit_C):
        return False
    return [position.get(place, -1) for place in place_C.tolist()] == unit_C.tolist()


def _part(spelling: Spelling, number: int) -> Spelling | None:
    """One part of a fused dimension; None if it has none of that number."""
    try:
        found = spelling.part(number)
    except IndexError:
        return None
    return None if str(found) == str(spelling) else found


def _places(term: Term, axes: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
    """One number for the units of several axes at each position of a term; -1 where one has none."""
    place = torch.zeros(1, dtype=torch.int64)
    for axis in axes:
        unit = units_along(term, sizes, axis)
        place = torch.where((unit < 0) | (place < 0), -1, place * sizes[axis] + unit)
    return place


def _outputs(draft: Draft, producer: str) -> str | None:
    """The term of a producer's outputs, if it is spelled."""
    terms = draft.terms.get(f"{producer}.weight", [])
    term = terms[_output_dim(draft, producer)] if terms else ""
    return term if Spelling.parse(term or "1").axes else None


def _output_dim(draft: Draft, producer: str) -> int:
    return 1 if isinstance(draft.module.get_submodule(producer), Conv1D) else 0


def _set_outputs(draft: Draft, producer: str, term: str) -> None:
    """Spell a producer's outputs, and its bias."""
    draft.terms[f"{producer}.weight"][_output_dim(draft, producer)] = term
    if f"{producer}.bias" in draft.terms:
        draft.terms[f"{producer}.bias"] = [term]


def _columns(draft: Draft, crossing: Crossing) -> str | None:
    """The term of the columns that read, if it is spelled and one for all readers."""
    found = {draft.terms[_parameter(draft, name)][dim] for name, dim in crossing.readers.items()}
    term = found.pop() if len(found) == 1 else "1"
    return term if Spelling.parse(term).axes else None


def _parameter(draft: Draft, reader: str) -> str:
    return reader if reader in draft.terms else f"{reader}.weight"


@dataclass(frozen=True)
class Pattern:
    """How a crossing is spelled: terms of the producer's outputs and of the columns, and sizes of axes."""

    outputs: str
    columns: str
    sizes: dict[str, int]
    part: str = ""  # of the producer, as a key of `scale_pairs` names it


def _added(layer: Draft, tiny: Draft, crossing: Crossing, axis: str, hidden: int) -> str | None:
    """Spell a crossing by an axis of its own, and return its key of `scale_pairs`; None if its pattern
    depends on the size, or is at odds with what is spelled."""
    module, terms = layer.module, layer.terms
    read = {_parameter(layer, name): dim for name, dim in crossing.readers.items()}
    columns = {module.get_parameter(name).shape[dim] for name, dim in read.items()}
    pattern = _pattern(module, tiny.module, crossing, max(columns), axis, hidden)
    if len(columns) > 1 or pattern is None:
        return None
    if any(terms[name][dim] not in (str(*columns), pattern.columns) for name, dim in read.items()):
        return None
    if _outputs(layer, crossing.producer) not in (None, pattern.outputs):
        return None
    for name, dim in read.items():
        terms[name][dim] = pattern.columns
    _set_outputs(layer, crossing.producer, pattern.outputs)
    layer.sizes |= pattern.sizes
    return crossing.producer + pattern.part


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
