"""Which axes the weights of a model run along, found by changing its config and proved by cutting.

A field of the config counts the units of an axis: in a model with half as many, every dimension that runs
along the axis is shorter. So the dimensions of all weights follow from the shapes of models without memory.
How the units lie in a dimension is chosen among a few layouts by a proof: the narrow model, with the weights
of the units that stay, computes what the whole one does if nothing reads the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PretrainedConfig

from llmcompress.architectures.shape_grammar import Spelling, take, units_along
from llmcompress.derivation.config_fields import (
    FIELDS_OF_HEADS,
    FIELDS_OF_KV_HEADS,
    HEAD_DIM,
    HIDDEN_SIZE,
    Place,
    Setting,
)
from llmcompress.derivation.layouts import CHANNELS, HEADS, PLAIN, channels, fitting
from llmcompress.derivation.shrink import resized, tiny_model

FFN, KV, Q, HIDDEN, EXPERT = "ffn", "kv", "q", "hidden", "expert"
OFFSETS = (0.0, 1.0)  # a norm multiplies by its weight, or by one more
CHOICES = 24  # of layouts of several fused weights that are tried together
LARGE = 128.0  # by what states are larger, so that the epsilon of a norm does not count


@dataclass(frozen=True)
class Axes:
    """Axes that are counted together: their sizes in the tiny model, the fields that count them, and the
    layout of each dimension that runs along one of them.

    `cuts` are those that can be cut. `head_dim` says that the config has to say the width of a head then.
    """

    sizes: Mapping[str, int]
    fields: Mapping[str, str]
    layouts: Mapping[Place, str] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    head_dim: bool = False

    def in_model(self, text: PretrainedConfig, index: int) -> dict[str, int]:
        """The sizes in layer `index` of a model with this config; those that its fields leave open are left
        out."""
        found, said = dict[str, Any](), text.to_dict()
        for axis, name in self.fields.items():
            value = said.get(name)
            found[axis] = value[index] if isinstance(value, list) else value
        if KV in found:  # the field of q counts all query heads
            found[Q] = found.get(Q, found[KV]) // found[KV]
        return {axis: size for axis, size in found.items() if size is not None}

    def of(self, layer: str) -> dict[Place, str]:
        """The layouts in a layer, by the names of tensors there."""
        prefix = f"{layer}."
        return {
            (name.removeprefix(prefix), dim): layout
            for (name, dim), layout in self.layouts.items()
            if name.startswith(prefix)
        }


def proved_axes(setting: Setting) -> list[Axes]:
    """The axes of a tiny model that are proved."""
    return [*_feed_forward(setting), *_heads(setting), *_hidden(setting)]


def _feed_forward(setting: Setting) -> Iterator[Axes]:
    """The neurons of feed-forward parts, by each field that counts some.

    Where two fields count the same neurons, as a number of parts and their width, it is the one that counts
    more. Where a layer has several parts, such as experts and a shared one, it is the largest.
    """
    found = [axes for name, size in setting.counts() if (axes := _neurons(setting, name, size)) is not None]
    best: dict[str, Axes] = {}  # by layer

    def weight(axes: Axes, layer: str) -> tuple[int, int]:
        read = [name for name, dim in axes.layouts if (name, dim) in setting.reads and name.startswith(layer)]
        return sum(prod(setting.shapes[name]) for name in read), axes.sizes[FFN]

    layers = [f"{setting.subject.path}.{index}." for index in range(len(setting.subject.layers))]
    for layer in layers:
        if here := [axes for axes in found if any(name.startswith(layer) for name, _ in axes.layouts)]:
            best[layer] = max(here, key=lambda axes: weight(axes, layer))
    for axes in found:
        of = [layer for layer in layers if any(name.startswith(layer) for name, _ in axes.layouts)]
        if all(best[layer] is axes for layer in of):
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
            cut = any(narrows(setting, axes, other, offset) for offset in OFFSETS)
            yield replace(axes, cuts=(HIDDEN,) if cut else ())
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


@torch.no_grad()
def holds(setting: Setting, axes: Axes, axis: str, fields: Mapping[str, Any]) -> bool:
    """Whether the narrow model computes what the whole one does if nothing reads the units that are cut."""
    kept = _some(axes.sizes[axis], axes.sizes[axis] // 2)
    state, silent, cut = setting.state, dict[str, Tensor](), dict[str, Tensor]()
    for name, dim in axes.layouts:
        unit = _units(setting, axes, (name, dim), axis)
        cut[name] = _taken(setting, axes, (name, dim), axis, kept, cut.get(name, state[name]))
        if (name, dim) in setting.reads:
            heard = (unit < 0) | torch.isin(unit, kept)
            silent[name] = _times(silent.get(name, state[name]), heard, dim)
    return _equal(setting, silent, cut, fields)


@torch.no_grad()
def permutes(setting: Setting, axes: Axes, axis: str) -> bool:
    """Whether the model computes the same with the units of an axis in another order."""
    order = torch.randperm(axes.sizes[axis], generator=torch.Generator().manual_seed(4))
    moved = dict[str, Tensor]()
    for name, dim in axes.layouts:
        before = moved.get(name, setting.state[name])
        moved[name] = _taken(setting, axes, (name, dim), axis, order, before)
    return _equal(setting, {}, moved, {})


@torch.no_grad()
def narrows(setting: Setting, axes: Axes, fields: Mapping[str, int], offset: float) -> bool:
    """Whether the narrow model, its gains made larger, computes what the whole one does if the channels that
    are cut are zero in every state."""
    size, count = axes.sizes[HIDDEN], fields[axes.fields[HIDDEN]]
    kept = _some(size, count)
    state, silent, cut = setting.state, dict[str, Tensor](), dict[str, Tensor]()
    for name, dim in axes.layouts:
        unit = _units(setting, axes, (name, dim), HIDDEN)
        gain = state[name].dim() == 1 and name.endswith(".weight")
        whole = silent.get(name, state[name])
        silent[name] = whole if gain else _times(whole, torch.isin(unit, kept), dim)
        cut[name] = _taken(setting, axes, (name, dim), HIDDEN, kept, cut.get(name, state[name]))
        if gain:
            cut[name] = (cut[name] + offset) * (size / count) ** 0.5 - offset
    for name in setting.embeddings:
        silent[name], cut[name] = silent[name] * LARGE, cut[name] * LARGE
    return _equal(setting, silent, cut, fields)


def _some(size: int, count: int) -> Tensor:
    """`count` of `size` units, in order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(3))[:count].sort().values


def _units(setting: Setting, axes: Axes, place: Place, axis: str) -> Tensor:
    """The unit of an axis at each position of a dimension; -1 for none."""
    return units_along(Spelling.parse(axes.layouts[place]).dims[0], _sizes(setting, axes, place), axis)


def _taken(setting: Setting, axes: Axes, place: Place, axis: str, units: Tensor, tensor: Tensor) -> Tensor:
    """A tensor with some units of an axis along one dimension."""
    dims = [str(length) for length in tensor.shape]
    dims[place[1]] = axes.layouts[place]
    return take(tensor, " ".join(dims), _sizes(setting, axes, place), axis, units)


def _sizes(setting: Setting, axes: Axes, place: Place) -> dict[str, int]:
    """The sizes of the axes in a layout."""
    length = setting.shapes[place[0]][place[1]]
    return {**axes.sizes, CHANNELS: channels(axes.layouts[place], axes.sizes, length) or 1}


def _times(tensor: Tensor, mask: Tensor, dim: int) -> Tensor:
    """A tensor with zeros where the mask of one dimension is false."""
    return tensor * mask.to(tensor).reshape([-1 if each == dim else 1 for each in range(tensor.dim())])


def _equal(
    setting: Setting, silent: Mapping[str, Tensor], cut: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> bool:
    """Whether the tiny model with some tensors replaced, and one with other fields and other tensors, give
    the same logits."""
    subject, model = setting.subject, setting.subject.model
    asked = {"input_ids": subject.tokens[0], "use_cache": False}
    try:
        replaced = {name: tensor for name, tensor in silent.items() if name in setting.parameters_once}
        expected = functional_call(model, replaced, kwargs=asked).logits.double()
        dtype = next(model.parameters()).dtype
        narrow = tiny_model(resized(model.config, fields), type(model), dtype=dtype)
        narrow.load_state_dict({**setting.state, **cut})
        found = narrow(**asked).logits.double()
    except Exception:  # each family fails in its own way
        return False
    return replace(subject, expected=[expected]).distance(found) < subject.exact
