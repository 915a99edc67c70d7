"""How a model of transformers calls its decoder layers: with what, and what it takes from them.

A layer returns its states alone, or first in a tuple. A model takes one or the other, so a stub in place of a
layer must return the same. The first argument of a layer's forward, by place or by name, is the states that
enter it; all others (masks, rotary tables) are its arguments. In some families they depend on the tokens: an
input of its own for each layer, or the embedding once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

# layer, the states that enter it, its other arguments -> the states that leave it
Stub = Callable[[int, Tensor, Mapping[str, Any]], Tensor]


def states_of(returned: Any) -> Tensor:
    """The states in what a layer returned."""
    states: Tensor = returned[0] if isinstance(returned, tuple | list) else returned
    return states


@contextmanager
def stubbed(layers: Iterable[nn.Module], stub: Stub, items: int = 0) -> Iterator[None]:
    """Replace every layer by `stub` within the context. Its states stand first in a tuple of `items`, or
    alone if that is 0."""

    def call(index: int, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        states = stub(index, *_divided(signature, args, kwargs))
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
    model: PreTrainedModel, layers: Iterable[nn.Module], tokens: Tensor, items: int = 0
) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """Return the states [B, L, D] of tokens [B, L] that enter the first layer, and the arguments that each
    layer is called with."""
    arguments: list[Mapping[str, Any]] = []
    seen: list[Tensor] = []

    def record(index: int, states: Tensor, others: Mapping[str, Any]) -> Tensor:
        arguments.append(others)
        seen.append(states)
        return states

    with stubbed(layers, record, items), torch.autocast(tokens.device.type, enabled=False):
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
    model: PreTrainedModel, layers: Iterable[nn.Module], states: Tensor, tokens: Tensor, items: int = 0
) -> Tensor:
    """Return the logits [B, L, V] of states [B, L, D] that left the last layer. The values of the tokens
    [B, L] do not matter."""
    with stubbed(layers, lambda index, entered, others: states, items):
        return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
