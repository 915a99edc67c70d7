"""Which parameters of a decoder layer hold one matrix for each expert: with linears in their place the logits
stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from llmcompress.derivation.subject import Subject, logits
from llmcompress.integrations.expert_linears import divide, unite


def stacked(layer: nn.Module) -> dict[str, int]:
    """The parameters with three axes, which may hold a matrix for each expert, with the size of the first."""
    return {
        name: len(parameter)
        for name, parameter in layer.named_parameters()
        if parameter.dim() == 3 and not isinstance(layer.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    }


def proved_experts(subject: Subject, index: int) -> dict[str, bool]:
    """The parameters of layer `index` whose slices are the matrices of experts, in order of computation.

    The value says whether a slice is stored [in, out]. A parameter counts if linears in its place are called,
    and the logits stay.
    """
    layer = subject.layers[index]
    found = {}
    for name in stacked(layer):
        for transposed in (False, True):
            if _called(subject, layer, {name: transposed}):
                found[name] = transposed
                break
    return {name: found[name] for name in _called(subject, layer, found)} if found else {}


def _called(subject: Subject, layer: nn.Module, experts: dict[str, bool]) -> list[str]:
    """The parameters whose linears are called in a pass, in the order of the first calls; none if the logits
    move."""
    called: dict[str, None] = {}
    with _divided(layer, experts, called):
        try:
            distance = subject.distance(logits(subject.model, subject.tokens[0]))
        except Exception:  # each family fails in its own way
            return []
    return [*called] if distance < subject.exact else []


@contextmanager
def _divided(layer: nn.Module, experts: dict[str, bool], called: dict[str, None]) -> Iterator[None]:
    """Put linears in the place of experts within the context; the names of those called are left in
    `called`."""

    def note(name: str, module: nn.Module, args: object) -> None:
        called.setdefault(name)

    for name, transposed in experts.items():
        for linear in divide(layer, name, transposed=transposed):
            layer.get_submodule(linear).register_forward_pre_hook(partial(note, name))
    try:
        yield
    finally:
        for name in experts:
            unite(layer, name)
