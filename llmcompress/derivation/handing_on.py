"""What the layers of a tiny model hand on to later ones beside their states, seen in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from llmcompress.derivation.subject import Subject, logits
from llmcompress.integrations.layer_calls import arguments_of


def seen_handed_on(subject: Subject) -> dict[str, int]:
    """The arguments by which layers get what others hand on, as `CallForm` says it: a mapping that a layer
    writes to, or an item that one returns and the next is called with."""
    with _watching(subject) as (seen, written):
        logits(subject.model, subject.tokens[0])
    found = dict.fromkeys((name for names in written for name in names), 0)
    names = set.intersection(*({*arguments} for arguments, _ in seen))
    for name in sorted(names - found.keys()):
        for item in range(1, subject.form.returned_items):
            pairs = [(arguments[name], returned[item]) for (_, returned), (arguments, _) in pairwise(seen)]
            if all(got is gave for got, gave in pairs) and any(isinstance(got, Tensor) for got, _ in pairs):
                found[name] = item
    return found


def layers_that_write(subject: Subject) -> frozenset[int]:
    """The layers that write to a mapping that is handed on."""
    if 0 not in subject.form.handed_on.values():
        return frozenset()
    with _watching(subject) as (_, written):
        logits(subject.model, subject.tokens[0])
    handed_on = subject.form.handed_on.keys()
    return frozenset(index for index, names in enumerate(written) if names & handed_on)


@contextmanager
def _watching(subject: Subject) -> Iterator[tuple[list[tuple[Mapping[str, Any], Any]], list[set[str]]]]:
    """Yield what will hold of each layer its arguments with what it returned, and the names of the mappings
    that it wrote to."""
    seen: list[tuple[Mapping[str, Any], Any]] = []
    written: list[set[str]] = []
    before: dict[str, dict[Any, Any]] = {}

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before.clear()
        for name, value in arguments_of(layer, args, kwargs).items():
            if isinstance(value, MutableMapping):
                before[name] = dict(value)

    def leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        arguments = arguments_of(layer, args, kwargs)
        seen.append((arguments, out))
        written.append({name for name, was in before.items() if _differ(was, arguments[name])})

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in subject.layers]
    hooks += [layer.register_forward_hook(leave, with_kwargs=True) for layer in subject.layers]
    try:
        yield seen, written
    finally:
        for hook in hooks:
            hook.remove()


def _differ(was: Mapping[Any, Any], now: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds other objects than before."""
    return was.keys() != now.keys() or any(was[key] is not value for key, value in now.items())
