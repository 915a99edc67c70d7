"""Which axes the weights of a model run along, found by changing its config.

A field of the config counts the units of an axis: in a model with half as many, every dimension that runs
along the axis is shorter. So the dimensions of all weights follow from the shapes of models without memory.
How the units lie in a dimension is chosen among a few layouts by a proof (`axis_proofs`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from llmcompress.derivation.axis_proofs import (
    DROPPED,
    EXPERT,
    FFN,
    HIDDEN,
    KV,
    Axes,
    Q,
    holds,
    leaves_out,
    narrows,
    permutes,
)
from llmcompress.derivation.config_fields import (
    FIELDS_OF_HEADS,
    FIELDS_OF_KV_HEADS,
    HEAD_DIM,
    HIDDEN_SIZE,
    Place,
    Setting,
)
from llmcompress.derivation.layouts import HEADS, PLAIN, fitting
from llmcompress.derivation.scales import OFFSETS

CHOICES = 24  # of layouts of several fused weights that are tried together


def proved_axes(setting: Setting) -> list[Axes]:
    """The axes of a tiny model that are proved."""
    return [*_feed_forward(setting), *_heads(setting), *_hidden(setting), *_experts(setting)]


def _feed_forward(setting: Setting) -> Iterator[Axes]:
    """The neurons of feed-forward parts, by each field that counts some.

    Where two fields count the same neurons, as a number of parts and their width, it is the one that counts
    more. Where a layer has several parts, such as experts and a shared one, it is the largest.
    """
    found = [axes for name, size in setting.counts() if (axes := _neurons(setting, name, size)) is not None]
    best: dict[str, Axes] = {}  # by layer

    def weight(axes: Axes, layer: str) -> tuple[int, int]:
        places = [(f"{layer}.{name}", dim) for name, dim in axes.of(layer)]
        read = [name for name, dim in places if (name, dim) in setting.reads]
        return sum(prod(setting.shapes[name]) for name in read), axes.sizes[FFN]

    layers = [f"{setting.subject.path}.{index}" for index in range(len(setting.subject.layers))]
    for layer in layers:
        if here := [axes for axes in found if axes.of(layer)]:
            best[layer] = max(here, key=lambda axes: weight(axes, layer))
    for axes in found:
        if all(best[layer] is axes for layer in layers if axes.of(layer)):
            yield axes


def _neurons(setting: Setting, name: str, size: int) -> Axes | None:
    """The neurons that a field counts, if they are that."""
    if size < 2:
        return None
    other = setting.said({name: size // 2})
    places = setting.changed(setting.narrow(other))
    readers = setting.reads & places.keys()
    if not readers or not setting.inside(places) or not all(map(setting.writes_states, readers)):
        return None
    options = {}
    for (tensor, dim), length in places.items():
        cases = [({FFN: size}, setting.shapes[tensor][dim]), ({FFN: size // 2}, length)]
        options[tensor, dim] = fitting([layout.format(FFN) for layout in PLAIN], cases)
    axes = Axes({FFN: size}, {FFN: name})
    wide = sum(prod(setting.shapes[tensor]) for tensor, _ in readers) // setting.text.hidden_size
    # a narrow part beside the feed-forward part is none
    if wide < setting.text.hidden_size * len({setting.layer_of(tensor) for tensor, _ in readers}):
        return None
    return _proved(setting, axes, options, {FFN: other})


def _heads(setting: Setting) -> Iterator[Axes]:
    """Key-value heads, and the query heads of each."""
    heads_field, kv_field = setting.field(*FIELDS_OF_HEADS), setting.field(*FIELDS_OF_KV_HEADS)
    if heads_field is None:
        return
    heads = setting.fields[heads_field]
    kv = setting.fields[kv_field] if kv_field else heads
    if heads % kv:
        return
    sizes = {KV: kv, Q: heads // kv}
    fields = {KV: kv_field, Q: heads_field} if kv_field else {KV: heads_field}
    others: dict[str, dict[str, int]] = {}
    if kv > 1:
        others[KV] = {heads_field: kv // 2 * sizes[Q]} | ({kv_field: kv // 2} if kv_field else {})
    if sizes[Q] > 1:
        others[Q] = {heads_field: kv * (sizes[Q] // 2)}
    for head_dim in (True, False):  # with the width of a head in the config, if it can say it
        said = {HEAD_DIM: setting.head_dim} if head_dim else {}
        axes = Axes(sizes, fields, head_dim=head_dim)
        if (
            found := _of_heads(setting, axes, {axis: said | other for axis, other in others.items()})
        ) is not None:
            yield found
            return


def _of_heads(setting: Setting, axes: Axes, others: Mapping[str, Mapping[str, int]]) -> Axes | None:
    """The heads of models with other fields, by the axis that is half as long there."""
    lengths = {axis: setting.changed(setting.narrow(other)) for axis, other in others.items()}
    places = dict.fromkeys(place for found in lengths.values() for place in found)
    if not setting.inside(places):
        return None
    layouts = HEADS if axes.sizes[Q] > 1 else [layout for layout in HEADS if " q " not in f" {layout} "]
    options = {}
    for tensor, dim in places:
        base = setting.shapes[tensor][dim]
        cases = [(axes.sizes, base)]
        for axis, found in lengths.items():
            if found:
                cases.append(({**axes.sizes, axis: axes.sizes[axis] // 2}, found.get((tensor, dim), base)))
        options[tensor, dim] = fitting(layouts, cases)
    return _proved(setting, axes, options, {axis: other for axis, other in others.items() if lengths[axis]})


def _hidden(setting: Setting) -> Iterator[Axes]:
    """The channels of the states between layers. They can be cut if gains make up for the mean over
    fewer."""
    if (name := setting.field(HIDDEN_SIZE)) is None:
        return
    size = setting.fields[name]
    for head_dim in (True, False):
        said = {HEAD_DIM: setting.head_dim} if head_dim else {}
        other = {**said, name: size * 3 // 4}
        places = setting.changed(setting.narrow(other))
        options = {}
        for (tensor, dim), length in places.items():
            cases = [({HIDDEN: size}, setting.shapes[tensor][dim]), ({HIDDEN: size * 3 // 4}, length)]
            options[tensor, dim] = fitting([HIDDEN], cases)
        if not places or not all(options.values()) or not places.keys() <= setting.parameters:
            continue
        axes = Axes({HIDDEN: size}, {HIDDEN: name}, dict.fromkeys(places, HIDDEN), (), head_dim)
        if permutes(setting, axes, HIDDEN):
            offsets = [offset for offset in OFFSETS if narrows(setting, axes, other, offset)]
            yield replace(axes, cuts=(HIDDEN,), offset=offsets[0]) if offsets else axes
            return


def _experts(setting: Setting) -> Iterator[Axes]:
    """Experts, if any of them can be left out: not where each token takes some of every group of them."""
    stacks = {name for name, dim in setting.reads if len(setting.shapes[name]) == 3}
    for name, size in setting.counts():
        places = setting.changed(setting.narrow({name: size - DROPPED})) if size > DROPPED + 1 else {}
        if not stacks or not {(stack, 0) for stack in stacks} <= places.keys():
            continue
        cases = {
            (tensor, dim): [({EXPERT: size}, setting.shapes[tensor][dim]), ({EXPERT: size - DROPPED}, length)]
            for (tensor, dim), length in places.items()
        }
        if all(fitting([EXPERT], each) for each in cases.values()):
            axes = Axes({EXPERT: size}, {EXPERT: name}, dict.fromkeys(places, EXPERT))
            if leaves_out(setting, axes):
                yield replace(axes, cuts=(EXPERT,))
            return


def _proved(
    setting: Setting,
    axes: Axes,
    options: Mapping[Place, Sequence[str]],
    others: Mapping[str, Mapping[str, Any]],
) -> Axes | None:
    """The axes with the first choice of layouts with which every cut holds, or None.

    Weights and biases of a module, and modules of one name in several layers, lie alike.
    """

    def key(place: Place) -> tuple[str, int]:
        name = place[0].removeprefix(f"{setting.subject.path}.").partition(".")[2]
        return name.removesuffix(".weight").removesuffix(".bias"), setting.shapes[place[0]][place[1]]

    common: dict[tuple[str, int], list[str]] = {}
    for place, found in options.items():
        common[key(place)] = [layout for layout in common.get(key(place), found) if layout in found]
    if not options or not others:
        return None
    for chosen in itertools.islice(itertools.product(*common.values()), CHOICES):
        by_key = dict(zip(common, chosen, strict=True))
        tried = replace(axes, layouts={place: by_key[key(place)] for place in options})
        if all(holds(setting, tried, axis, other) for axis, other in others.items()):
            return replace(tried, cuts=tuple(others))
    return None
