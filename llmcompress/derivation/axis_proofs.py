"""Proofs of axes: a narrow model, with the weights of the units that stay, computes what the whole one does
without the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import PretrainedConfig

from llmcompress.architectures.shape_grammar import Spelling, take, units_along
from llmcompress.derivation.config_fields import Place, Setting
from llmcompress.derivation.layouts import CHANNELS, channels
from llmcompress.derivation.shrink import resized, tiny_model

FFN, KV, Q, HIDDEN, EXPERT = "ffn", "kv", "q", "hidden", "expert"
DROPPED = 2  # experts that are left out in a proof
LOWEST = -1e30  # a score
LARGE = 128.0  # by what states are larger, so that the epsilon of a norm does not count


@dataclass(frozen=True)
class Axes:
    """Axes that are counted together: their sizes in the tiny model, the fields that count them, and the
    layout of each dimension that runs along one of them.

    `cuts` are those that can be cut. `head_dim` says that the config has to say the width of a head then, and
    `offset` is that of the gains with which hidden channels can be cut.
    """

    sizes: Mapping[str, int]
    fields: Mapping[str, str]
    layouts: Mapping[Place, str] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    head_dim: bool = False
    offset: float = 0.0

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


def leaves_out(setting: Setting, axes: Axes) -> bool:
    """Whether a model without some experts computes what the whole one does if no token is sent to them.

    The scores of an expert that gets no token are as low as they can be: those that a router's matrix gives,
    or what is added to them.
    """
    size, field = axes.sizes[EXPERT], axes.fields[EXPERT]
    kept = torch.tensor([unit for unit in range(size) if unit not in (0, DROPPED)])
    state, silent, cut = setting.state, dict[str, Tensor](), dict[str, Tensor]()
    routers = []
    for name, dim in axes.layouts:
        cut[name] = _taken(setting, axes, (name, dim), EXPERT, kept, cut.get(name, state[name]))
        if state[name].dim() == 1:
            silent[name] = torch.full_like(state[name], LOWEST).index_copy(0, kept, cut[name])
        elif state[name].dim() == 2 and (name, 1 - dim) not in axes.layouts:
            routers.append(setting.subject.model.get_parameter(name))
    with torch.no_grad(), _scores_lowered(routers, kept):
        return _equal(setting, silent, cut, {field: len(kept)})


@contextmanager
def _scores_lowered(routers: Sequence[Tensor], kept: Tensor) -> Iterator[None]:
    """Make the products with some matrices as low as they can be within the context, but for the rows that
    are kept."""
    plain = F.linear

    def lowered(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = plain(input, weight, bias)
        if any(weight is router for router in routers):
            low = torch.full_like(out, LOWEST)
            return low.index_copy(-1, kept, out.index_select(-1, kept))
        return out

    with patch.object(F, "linear", lowered):
        yield


@torch.no_grad()
def holds(setting: Setting, axes: Axes, axis: str, fields: Mapping[str, Any]) -> bool:
    """Whether the narrow model computes what the whole one does if nothing reads the units that are cut.

    Where layers hand something on, those that do lose other units than those that read it, as stages choose
    units layer by layer.
    """
    size = axes.sizes[axis]
    state, silent, cut = setting.state, dict[str, Tensor](), dict[str, Tensor]()
    for name, dim in axes.layouts:
        unit = _units(setting, axes, (name, dim), axis)
        kept = _some(size, size // 2, _turn(setting, name))
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


def _turn(setting: Setting, tensor: str) -> int:
    """Which choice of units is that of a tensor's layer: 0 or 1. A layer that hands something on has another
    one than those that read it."""
    subject, index = setting.subject, int(setting.layer_of(tensor).rpartition(".")[2])
    if subject.writers:
        return int(index in subject.writers)
    return index % 2 if subject.form.handed_on else 0  # each hands on to the next


def _some(size: int, count: int, turn: int = 0) -> Tensor:
    """`count` of `size` units, in order; one of them is another one at the next `turn`."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3)).roll(turn)
    return order[:count].sort().values


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
        replaced = {name: tensor for name, tensor in silent.items() if name in setting.once}
        expected = functional_call(model, replaced, kwargs=asked).logits.double()
        dtype = next(model.parameters()).dtype
        narrow = tiny_model(resized(model.config, fields), type(model), dtype=dtype)
        narrow.load_state_dict({**setting.state, **cut})
        found = narrow(**asked).logits.double()
    except Exception:  # each family fails in its own way
        return False
    return replace(subject, expected=[expected]).distance(found) < subject.exact
