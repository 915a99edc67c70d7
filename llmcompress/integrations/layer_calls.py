"""How a model of transformers calls its decoder layers: with what, and what it takes from them.

A layer returns its states alone, or first in a tuple. A model takes one or the other, so a stub in place of a
layer must return the same. The first argument of a layer's forward, by place or by name, is the states that
enter it; all others (masks, rotary tables) are its arguments. In some families they depend on the tokens: an
input of its own for each layer, or the embedding once more. States are [B, L, W] everywhere else; layers that
keep their streams in a dimension of its own take and return four dimensions.

Some layers hand on more than states to later ones: keys and values in a mapping that all layers are called
with, or an item that one returns and the next is called with. That is a `Handed` here, by argument.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import PreTrainedModel

from llmcompress.architectures.spec import CallForm

# layer, the states that enter it, its other arguments -> the states that leave it
Stub = Callable[[int, Tensor, Mapping[str, Any]], Tensor]
# argument of a layer -> its value, or what is in the mapping
Handed = Mapping[str, Any]


def flat(states: Tensor, form: CallForm) -> Tensor:
    """The states [B, L, W] in those that a layer takes or returns."""
    if form.stream_dim is None:
        return states
    return states.movedim(form.stream_dim, 2).flatten(2)


def _of_layers(states: Tensor, form: CallForm) -> Tensor:
    """States [B, L, W] as a layer takes them."""
    if form.stream_dim is None:
        return states
    divided: Tensor = states.unflatten(2, (form.streams, -1))
    return divided.movedim(2, form.stream_dim)


def states_of(returned: Any) -> Tensor:
    """The states in what a layer returned, as it returned them."""
    states: Tensor = returned[0] if isinstance(returned, tuple | list) else returned
    return states


def called(
    layer: Callable[..., Any],
    states: Tensor,
    arguments: Mapping[str, Any],
    form: CallForm,
    entering: Handed | None = None,
) -> tuple[Tensor, Handed]:
    """Call a layer with states [B, L, W]. Returns those that leave it, and what it hands on; `entering` is
    what those before it have handed on."""
    named = dict(arguments)
    for name, item in form.handed_on.items():
        if item == 0:  # in a copy, as the layer writes there
            named[name] = copy.copy(named[name])
            named[name].update((entering or {}).get(name, {}))
        elif entering:
            named[name] = entering[name]
    returned = layer(_of_layers(states, form), **named)
    handed = {
        name: dict(named[name]) if item == 0 else returned[item] for name, item in form.handed_on.items()
    }
    return flat(states_of(returned), form), handed


def by_sequence(handed: Handed, count: int) -> list[Handed]:
    """What layers hand on for each of `count` sequences; the first dimension of its tensors is theirs."""

    def part(i: int, value: Any) -> Any:
        return value[i : i + 1] if isinstance(value, Tensor) else value

    return [tree_map(partial(part, i), handed) for i in range(count)]


def of_batch(parts: Sequence[Handed]) -> Handed:
    """What layers hand on for a batch, from that of each of its sequences."""

    def joined(*values: Any) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

    return parts[0] if len(parts) == 1 else tree_map(joined, *parts)


@contextmanager
def stubbed(layers: Iterable[nn.Module], stub: Stub, form: CallForm) -> Iterator[None]:
    """Replace every layer by `stub` within the context; it returns in the form of the layers."""

    def call(index: int, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        entered, others = _divided(signature, args, kwargs)
        states = _of_layers(stub(index, flat(entered, form), others), form)
        items = form.returned_items
        return (states, *[None] * (items - 1)) if items else states

    own = [(layer, vars(layer).get("forward")) for layer in layers]
    for index, (layer, _) in enumerate(own):
        layer.forward = partial(call, index, inspect.signature(type(layer).forward))
    try:
        yield
    finally:
        for layer, forward in own:
            del layer.forward
            if forward is not None:
                layer.forward = forward


def entering(
    model: PreTrainedModel, layers: Iterable[nn.Module], tokens: Tensor, form: CallForm
) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """Return the states [B, L, W] of tokens [B, L] that enter the first layer, and the arguments that each
    layer is called with."""
    arguments: list[Mapping[str, Any]] = []
    seen: list[Tensor] = []

    def record(index: int, states: Tensor, others: Mapping[str, Any]) -> Tensor:
        arguments.append(others)
        seen.append(states)
        return states

    with stubbed(layers, record, form), torch.autocast(tokens.device.type, enabled=False):
        model.base_model(input_ids=tokens, use_cache=False)
    return seen[0], arguments


def arguments_of(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call of a layer, by name, without the states that enter it."""
    return _divided(inspect.signature(type(layer).forward), args, kwargs)[1]


def _divided(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Any]]:
    """The states in what a layer is called with, and its other arguments by name."""
    named = dict(signature.bind(None, *args, **kwargs).arguments)
    itself, entering, *_ = signature.parameters
    del named[itself]
    entered = named.pop(entering)
    extra = next((name for name, of in signature.parameters.items() if of.kind is of.VAR_KEYWORD), "")
    return entered, named | named.pop(extra, {})


def sharing(own: Mapping[str, Any], first: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return arguments of one call of a layer, with all of them taken from a `first` call that are equal
    there, or that are no tensors."""
    leaves, structure = tree_flatten(dict(own))
    earlier, same_structure = tree_flatten(dict(first))
    if structure != same_structure:
        return own
    return tree_unflatten(list(map(_shared, leaves, earlier)), structure)  # type: ignore[no-any-return]


def _shared(own: Any, first: Any) -> Any:
    """The first of two values, unless they are tensors that differ."""
    if not isinstance(own, Tensor) or not isinstance(first, Tensor):
        return first
    return first if own.dtype == first.dtype and own.shape == first.shape and own.equal(first) else own


def leaving(
    model: PreTrainedModel, layers: Iterable[nn.Module], states: Tensor, tokens: Tensor, form: CallForm
) -> Tensor:
    """Return the logits [B, L, V] of states [B, L, W] that left the last layer. The values of the tokens
    [B, L] do not matter."""
    with stubbed(layers, lambda index, entered, others: states, form):
        return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
