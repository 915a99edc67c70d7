"""How a model of transformers calls its decoder layers: with what, and what it takes from them.

A layer returns its states alone, or first in a tuple. A model takes one or the other, so a stub in place of a
layer must return the same. The first argument of a layer's forward, by place or by name, is the states that
enter it; all others (masks, rotary tables) are its arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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
        named = dict(signature.bind(None, *args, **kwargs).arguments)
        itself, entering, *_ = signature.parameters
        del named[itself]
        entered = named.pop(entering)
        extra = next((name for name, of in signature.parameters.items() if of.kind is of.VAR_KEYWORD), "")
        more = named.pop(extra, {})
        states = stub(index, entered, named | more)
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


def leaving(
    model: PreTrainedModel, layers: Iterable[nn.Module], states: Tensor, tokens: Tensor, items: int = 0
) -> Tensor:
    """Return the logits [B, L, V] of states [B, L, D] that left the last layer. The values of the tokens
    [B, L] do not matter."""
    with stubbed(layers, lambda index, entered, others: states, items):
        return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
