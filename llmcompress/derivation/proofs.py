"""Proofs on a tiny model: each returns what speaks against a fact, and nothing if it holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from llmcompress.derivation.handing_on import seen_handed_on
from llmcompress.derivation.subject import Subject, described, logits
from llmcompress.errors import ModelError
from llmcompress.integrations.layer_calls import (
    Handed,
    arguments_of,
    by_sequence,
    called,
    entering,
    leaving,
    of_batch,
    sharing,
)
from llmcompress.integrations.linear_modules import weight_of

CODES = (torch.int8, torch.uint8)  # dtypes of codes
DTYPE_READ = "gives its dtype to what it reads, which codes would round to bytes"


def proved_walk(subject: Subject) -> tuple[bool, Mapping[str, int]]:
    """Whether the layers run one by one only with arguments of each batch, because these depend on the
    tokens; else those of one text are the arguments for all. And what they hand on, as `CallForm` says.

    Errors: ModelError if the layers don't run one by one in any way, with the reason.
    """
    why = prove_walk(subject)
    if why is None:
        return _called_by_text(subject), {}
    if prove_walk_by_batch(subject) is None:
        return True, {}
    handed_on = seen_handed_on(subject)
    if handed_on and prove_walk_by_batch(subject, handed_on) is None:
        return True, handed_on
    if _handed_on(subject):
        why = "its layers hand on more than their states to later ones, in a way that is not known"
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
        return called(subject.layers[index], states, recorded[index], subject.form)[0]

    return _prove_walk(subject, run)


def prove_walk_by_batch(subject: Subject, handed_on: Mapping[str, int] | None = None) -> str | None:
    """Whether they do with arguments that are recorded for each batch, and with what layers hand on.

    The arguments of a call are recorded when it comes, and what is the same for another text is taken from
    there. A batch goes through a layer twice: as a whole, whose states are handed on, and then sequence by
    sequence, whose states count.
    """
    form = replace(subject.form, handed_on=handed_on or {})
    kept: dict[int, Sequence[Handed]] = {}  # by batch, that of each sequence

    def run(index: int, states: Tensor, tokens: Tensor) -> Tensor:
        layer, batch = subject.layers[index], _number(subject, tokens)
        entering = kept.get(batch, [{}] * len(states))

        def part(here: slice) -> tuple[Tensor, Handed]:
            _, other = _entered(subject, torch.zeros_like(tokens[here]))
            _, own = _entered(subject, tokens[here])
            arguments = sharing(own[index], other[index])
            return called(layer, states[here], arguments, form, of_batch(entering[here]))

        _, handed = part(slice(0, len(states)))
        found = torch.cat([part(slice(place, place + 1))[0] for place in range(len(states))])
        kept[batch] = by_sequence(handed, len(states))
        return found

    return _prove_walk(subject, run)


def _called_by_text(subject: Subject) -> bool:
    """Whether layers are called with other arguments for another text, such as its tokens. A table of a tiny
    model may have the same in all places, where that of a model does not."""
    one, other = (_entered(subject, tokens)[1] for tokens in subject.tokens)
    shared = [sharing(*pair) for pair in zip(one, other, strict=True)]
    return any(
        own is not first and isinstance(own, Tensor)
        for pair in zip(shared, other, strict=True)
        for own, first in zip(*map(tree_leaves, pair), strict=True)
    )


def _number(subject: Subject, tokens: Tensor) -> int:
    """The number of the batch that has these tokens."""
    return next(i for i, each in enumerate(subject.tokens) if each is tokens)


def _entered(subject: Subject, tokens: Tensor) -> tuple[Tensor, list[Mapping[str, Any]]]:
    return entering(subject.model, subject.layers, tokens, subject.form)


@torch.no_grad()
def _prove_walk(subject: Subject, run: Callable[[int, Tensor, Tensor], Tensor]) -> str | None:
    """Whether the layers give the logits of the whole model if `run` runs them: number of a layer, the states
    that enter it, their tokens -> the states that leave it."""
    model, layers = subject.model, subject.layers
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
                    leaving(model, layers, part, torch.zeros(part.shape[:2], dtype=torch.int64), subject.form)
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
    seen = [_called(subject, tokens) for tokens in subject.tokens]

    def run(index: int, states: Tensor, tokens: Tensor) -> Tensor:
        arguments = seen[_number(subject, tokens)][index]
        return called(subject.layers[index], states, arguments, subject.form)[0]

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

    A linear runs on a copy of its weight and bias while the parameters are NaN, and then while the weight is
    of bytes, as codes are. Returns those where that is seen elsewhere, with the reason.
    """
    found: dict[str, str] = {}
    for dtype, why in ((None, "is read by another module too"), *((dtype, DTYPE_READ) for dtype in CODES)):
        if _seen(subject, linears, dtype):
            found |= {name: why for name in linears if name not in found and _seen(subject, [name], dtype)}
    return found


def _seen(subject: Subject, linears: Collection[str], dtype: torch.dtype | None) -> bool:
    """Whether the logits change when the parameters of linears are NaN outside of calls, or their weights of
    a dtype."""
    with _poisoned(subject, linears, dtype):
        try:
            return subject.distance(logits(subject.model, subject.tokens[0])) >= subject.exact
        except Exception:  # a check for NaN, or an index made of them
            return True


@contextmanager
def _poisoned(subject: Subject, linears: Collection[str], dtype: torch.dtype | None) -> Iterator[None]:
    modules = [subject.model.get_submodule(name) for name in linears]
    saved = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    for module in modules:
        bias = module.bias.data.clone() if isinstance(module.bias, Tensor) else None
        module.forward = partial(F.linear, weight=weight_of(module).clone(), bias=bias)
    weights = [(module, module.get_parameter("weight")) for module in modules if dtype is not None]
    for module, weight in weights:
        codes = torch.zeros(weight.shape, dtype=dtype)
        module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
    for parameter, data in saved if dtype is None else ():
        parameter.data = torch.full_like(data, float("nan"))
    try:
        yield
    finally:
        for module, weight in weights:
            module._parameters["weight"] = weight
        for parameter, data in saved:
            parameter.data = data
        for module in modules:
            del module.forward
