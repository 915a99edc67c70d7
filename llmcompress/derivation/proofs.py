"""Proofs on a tiny model: each returns what speaks against a fact, and nothing if it holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.derivation.subject import Subject, described, logits
from llmcompress.errors import ModelError
from llmcompress.integrations.layer_calls import arguments_of, entering, leaving, sharing, states_of
from llmcompress.integrations.linear_modules import weight_of


def proved_walk(subject: Subject) -> bool:
    """Whether the layers run one by one only with arguments of each batch, because these depend on the
    tokens; else those of one text are the arguments for all.

    Errors: ModelError if the layers don't run one by one either way, with the reason.
    """
    why = prove_walk(subject)
    if why is None:
        return False
    if prove_walk_by_batch(subject) is None:
        return True
    if _handed_on(subject):
        why = "its layers hand on more than their states, such as keys and values, to later ones"
    raise ModelError(why)


def prove_walk(subject: Subject) -> str | None:
    """Whether the layers one by one give the logits of the whole model, as a walk through a model on disk
    runs them.

    Each layer runs for one batch after another before the next one does, the last batch first. The arguments
    of its calls come from a text of other tokens, and the last states become logits a piece of the positions
    at a time.
    """
    recorded: list[Mapping[str, Any]] = []

    def run(index: int, states: Tensor, tokens: Tensor) -> Tensor:
        if not recorded:
            recorded.extend(_entered(subject, torch.zeros_like(tokens))[1])
        return states_of(subject.layers[index](states, **recorded[index]))

    return _prove_walk(subject, run)


def prove_walk_by_batch(subject: Subject) -> str | None:
    """Whether they do with arguments that are recorded for each batch.

    The arguments of a call are recorded when it comes, and what is the same for another text is taken from
    there. A batch goes through a layer twice: as a whole, and then sequence by sequence, which counts.
    """

    def run(index: int, states: Tensor, tokens: Tensor) -> Tensor:
        layer = subject.layers[index]

        def part(here: slice) -> Tensor:
            _, other = _entered(subject, torch.zeros_like(tokens[here]))
            _, own = _entered(subject, tokens[here])
            return states_of(layer(states[here], **sharing(own[index], other[index])))

        part(slice(0, len(states)))
        return torch.cat([part(slice(place, place + 1)) for place in range(len(states))])

    return _prove_walk(subject, run)


def _entered(subject: Subject, tokens: Tensor) -> tuple[Tensor, list[Mapping[str, Any]]]:
    return entering(subject.model, subject.layers, tokens, subject.returned_items)


@torch.no_grad()
def _prove_walk(subject: Subject, run: Callable[[int, Tensor, Tensor], Tensor]) -> str | None:
    """Whether the layers give the logits of the whole model if `run` runs them: number of a layer, the states
    that enter it, their tokens -> the states that leave it."""
    model, layers, items = subject.model, subject.layers, subject.returned_items
    try:
        states = [_entered(subject, tokens)[0] for tokens in subject.tokens]
        if states[0].dim() != 3:
            return f"its states have {states[0].dim()} dimensions, not [batch, length, width]"
        for index in range(len(layers)):
            pairs = [*zip(states, subject.tokens, strict=True)]
            states = [run(index, *pair) for pair in pairs[::-1]][::-1]
        half = states[0].shape[1] // 2
        found = [
            torch.cat(
                [
                    leaving(model, layers, part, torch.zeros(part.shape[:2], dtype=torch.int64), items)
                    for part in (each[:, :half], each[:, half:])
                ],
                dim=1,
            )
            for each in states
        ]
    except Exception as error:  # every family fails in its own way
        return f"its layers don't run one by one ({described(error)})"
    off = max(subject.distance(logits.double(), batch) for batch, logits in enumerate(found))
    if off < subject.exact:
        return None
    return f"its layers one by one give other logits than the whole (off by {off:.1g})"


def _handed_on(subject: Subject) -> bool:
    """Whether the layers run one by one with the arguments that they are called with in a pass through the
    whole model: those depend on layers before them."""
    called = [_called(subject, tokens) for tokens in subject.tokens]

    def run(index: int, states: Tensor, tokens: Tensor) -> Tensor:
        batch = next(i for i, each in enumerate(subject.tokens) if each is tokens)
        return states_of(subject.layers[index](states, **called[batch][index]))

    return _prove_walk(subject, run) is None


def _called(subject: Subject, tokens: Tensor) -> list[Mapping[str, Any]]:
    """The arguments of the calls of all layers in a pass through the whole model."""
    found: list[Mapping[str, Any]] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(arguments_of(layer, args, kwargs))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in subject.layers]
    try:
        logits(subject.model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def prove_causal(subject: Subject) -> str | None:
    """Whether the logits of a position depend on no token after it."""
    tokens = subject.tokens[0].clone()
    tokens[:, -1] = subject.tokens[1][:, -1]
    found = logits(subject.model, tokens)
    found[:, -1] = subject.expected[0][:, -1]
    return None if subject.distance(found) < subject.exact else "each of its tokens sees those after it"


def prove_poison(subject: Subject, linears: Collection[str]) -> dict[str, str]:
    """Whether the weights of linears, by full name, are used by calls of their modules alone.

    A linear runs on a copy of its weight and bias while the parameters are NaN. Returns those whose NaN are
    seen elsewhere, with the reason.
    """
    why = "is read by another module too"
    if not _seen(subject, linears):
        return {}
    return {name: why for name in linears if _seen(subject, [name])}


def _seen(subject: Subject, linears: Collection[str]) -> bool:
    """Whether the logits change when the parameters of linears are NaN outside of calls."""
    with _poisoned(subject, linears):
        try:
            return subject.distance(logits(subject.model, subject.tokens[0])) >= subject.exact
        except Exception:  # a check for NaN, or an index made of them
            return True


@contextmanager
def _poisoned(subject: Subject, linears: Collection[str]) -> Iterator[None]:
    modules = [subject.model.get_submodule(name) for name in linears]
    saved = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    for module in modules:
        bias = module.bias.data.clone() if isinstance(module.bias, Tensor) else None
        module.forward = partial(F.linear, weight=weight_of(module).clone(), bias=bias)
    for parameter, data in saved:
        parameter.data = torch.full_like(data, float("nan"))
    try:
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data
        for module in modules:
            del module.forward
