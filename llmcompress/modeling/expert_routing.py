"""Which tokens go to which expert: taken down in one pass of a module of experts, and kept to in another.

Two streams of states choose experts by themselves. An input of an expert in one stream has its counterpart in
the other only if both send it the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Routing:
    """The arguments of each call of a module of experts in a pass. The first one is the states, the others
    say where they go."""

    calls: list[Call] = field(default_factory=list)

    def covers(self, tokens: int) -> bool:
        """Whether the states of each of so many tokens were given in one call, together with where they
        go."""
        if len(self.calls) != 1:
            return False
        args, named = self.calls[0]
        states = args[0] if args else None
        if not isinstance(states, Tensor) or states.numel() != tokens * states.shape[-1]:
            return False
        return len(args) + len(named) > 1


def experts_of(linear: str) -> str:
    """The module of experts that calls a linear, by its name in the layer."""
    return linear.rsplit(".", 2)[0]


@contextmanager
def taken_down(experts: nn.Module) -> Iterator[Routing]:
    """Yield what will hold the arguments of the calls within the context."""
    routing = Routing()

    def keep(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        routing.calls.append((args, named))

    hook = experts.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield routing
    finally:
        hook.remove()


@contextmanager
def kept_to(experts: nn.Module, routing: Routing) -> Iterator[None]:
    """Give a module of experts its own states, and all other arguments as they were taken down."""
    (taken, named), *_ = routing.calls

    def turn(module: nn.Module, args: tuple[Any, ...], own: dict[str, Any]) -> Call:
        return (args[0], *taken[1:]), named

    hook = experts.register_forward_pre_hook(turn, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
