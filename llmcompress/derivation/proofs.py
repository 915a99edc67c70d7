"""Proofs on a tiny model: each returns what speaks against a fact, and nothing if it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.derivation.subject import Subject, described, logits
from llmcompress.integrations.layer_calls import entering, leaving, states_of
from llmcompress.integrations.linear_modules import weight_of


@torch.no_grad()
def prove_walk(subject: Subject) -> str | None:
    """Whether the layers one by one give the logits of the whole model, as a walk through a model on disk
    runs them.

    Each layer runs for one batch after another before the next one does, the last batch first. The arguments
    of its calls come from a text of other tokens, and the last states become logits a piece of the positions
    at a time.
    """
    model, layers, items = subject.model, subject.layers, subject.returned_items
    try:
        states = [entering(model, layers, tokens, items)[0] for tokens in subject.tokens]
        if states[0].dim() != 3:
            return f"its states have {states[0].dim()} dimensions, not [batch, length, width]"
        _, arguments = entering(model, layers, torch.zeros_like(subject.tokens[0]), items)
        for layer, others in zip(layers, arguments, strict=True):
            states = [states_of(layer(each, **others)) for each in states[::-1]][::-1]
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
