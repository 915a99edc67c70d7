"""Which linears of a decoder layer read the same input, and which can't be rewritten, seen in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmcompress.derivation.experts import proved_experts, stacked
from llmcompress.derivation.subject import Subject, logits, same
from llmcompress.integrations.linear_modules import is_linear, shape_of

# why a parameter with three axes stays as it is
UNDIVIDED = "has three axes, and its code takes it as a whole"


@dataclass
class Readers:
    """Linears of a layer by the input that they read, in order of computation; matrices that stay as they
    are, with the reason; and parameters of experts."""

    groups: list[tuple[str, ...]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    experts: dict[str, bool] = field(default_factory=dict)  # as `proved_experts` returns them


def readers_of(subject: Subject, index: int) -> Readers:
    """Look at one pass through layer `index`: a linear is read once, with a row for each token."""
    layer, tokens = subject.layers[index], subject.tokens[0]
    with _listening(layer) as inputs:
        logits(subject.model, tokens)
    found = Readers(kept=_not_replaced(layer) | _routers(layer))
    groups: list[tuple[Tensor, list[str]]] = []
    for name, read in inputs.items():
        if why := found.kept.get(name) or _unfit(read, tokens.numel()):
            found.kept[name] = why
            continue
        group = next((names for x_TC, names in groups if same(x_TC, read[0])), None)
        if group is None:
            groups.append((read[0], [name]))
        else:
            group.append(name)
    never = [name for name, module in layer.named_modules() if is_linear(module) and name not in inputs]
    found.kept |= dict.fromkeys(never, "reads no token of a text")
    found.experts = proved_experts(subject, index)
    undivided = [name for name in stacked(layer) if name not in found.experts]
    found.kept |= dict.fromkeys(undivided, UNDIVIDED)
    found.groups = [(*names,) for _, names in groups]
    return found


@contextmanager
def _listening(layer: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Yield what will hold the inputs [T, C] of each linear of a layer, in the order of the first calls."""
    inputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, []).append(args[0].flatten(0, -2).clone())

    linears = {name: module for name, module in layer.named_modules() if is_linear(module)}
    hooks = [module.register_forward_pre_hook(partial(keep, name)) for name, module in linears.items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _not_replaced(layer: nn.Module) -> dict[str, str]:
    """The matrices that no loader replaces: those of modules that are no linears."""
    found: dict[str, str] = {}
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(name, recurse=False))
        why = f"is a matrix of a {type(module).__name__}, which no loader replaces"
        if not is_linear(module) and not isinstance(module, nn.Embedding):
            found |= {part: why for part, parameter in own.items() if parameter.dim() == 2}
    return found


def _routers(layer: nn.Module) -> dict[str, str]:
    """The linears with an output for each expert; in a tiny model no other size is that number."""
    experts = {*stacked(layer).values()}
    linears = {name: module for name, module in layer.named_modules() if is_linear(module)}
    return {name: "chooses experts" for name, module in linears.items() if shape_of(module)[0] in experts}


def _unfit(read: list[Tensor], tokens: int) -> str | None:
    if len(read) > 1:
        return f"is called {len(read)} times in a pass"
    if len(read[0]) != tokens:
        return "reads only some of the tokens"
    return None
