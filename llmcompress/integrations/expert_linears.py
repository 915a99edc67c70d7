"""The experts of a mixture as linears: one module for each expert, where transformers has one parameter for
all.

transformers keeps a projection of all experts in one parameter [E, R, C], and most families' code multiplies
by one expert's slice of it at a time. `divide` puts linears in the parameter's place, and leaves under its
name an object whose slices are them. The family's own code runs them, whatever it does before, between and
after: gates, limits, biases. So an expert can have hooks, codes and a format like any other linear.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUFFIX = "_linears"  # of the list of linears, after the name of the parameter; no converter of names knows it
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class ExpertWeight:
    """What family code gets as the weight of one expert; a product with it is a call of the linear.

    `transposed` says that it stands for a matrix [C, R], as its linear's weight is [R, C].
    """

    def __init__(self, linear: nn.Module, transposed: bool) -> None:
        self.linear, self.transposed = linear, transposed

    def t(self) -> ExpertWeight:
        """The transpose."""
        return ExpertWeight(self.linear, not self.transposed)

    @property
    def T(self) -> ExpertWeight:
        """The transpose."""
        return self.t()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        x, weight, bias = (*args, None, None)[:3]
        if func is F.linear and isinstance(weight, ExpertWeight) and not weight.transposed:
            out: Tensor = weight.linear(x)
            bias = (kwargs or {}).get("bias", bias)
            return out if bias is None else out + bias
        if func in _PRODUCTS and isinstance(weight, ExpertWeight) and weight.transposed:
            return weight.linear(x)  # type: ignore[no-any-return]
        raise TypeError(f"the weight of an expert is no tensor, and can't be given to {func.__name__}")


class ExpertWeights:
    """What family code gets in place of the parameter of all experts: its slices are their weights."""

    def __init__(self, linears: nn.ModuleList, transposed: bool) -> None:
        self.linears, self.transposed = linears, transposed

    def __len__(self) -> int:
        return len(self.linears)

    def transpose(self, one: int, other: int) -> ExpertWeights:
        """The transposes of all weights."""
        if {one % 3, other % 3} != {1, 2}:
            raise TypeError("the weights of experts are no tensor; each of them can be transposed")
        return ExpertWeights(self.linears, not self.transposed)

    def __getitem__(self, expert: int | Tensor) -> ExpertWeight:
        return ExpertWeight(self.linears[int(expert)], self.transposed)

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        first: Any = self.linears[0]
        sizes = (first.out_features, first.in_features)
        return torch.Size((len(self), *(sizes[::-1] if self.transposed else sizes)))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        x, weights = (*args, None)[:2]
        if func in (torch.bmm, Tensor.bmm) and isinstance(weights, ExpertWeights) and weights.transposed:
            return torch.stack([weights.linears[expert](each) for expert, each in enumerate(x)])
        raise TypeError(f"the weights of experts are no tensor, and can't be given to {func.__name__}")


def divide(module: nn.Module, parameter: str, *, transposed: bool) -> list[str]:
    """Put a linear for each expert in the place of a parameter [E, R, C], or [E, C, R] if it is `transposed`.

    The linears have views of its memory. The module runs its own loop over experts from here on, whatever
    implementation its config asks for. Returns the names of the linears in `module`.
    """
    place, _, leaf = parameter.rpartition(".")
    owner = module.get_submodule(place)
    stacked = owner.get_parameter(leaf).data
    del owner._parameters[leaf]
    linears = nn.ModuleList(_linear(W.T if transposed else W) for W in stacked)
    owner.add_module(leaf + SUFFIX, linears)
    weights: Any = ExpertWeights(linears, transposed)
    weights._is_hf_initialized = True  # so that transformers draws no random numbers into it
    owner.__dict__[leaf] = weights
    _run_own_loop(owner)
    return [f"{parameter}{SUFFIX}.{expert}" for expert in range(len(linears))]


def unite(module: nn.Module, parameter: str) -> None:
    """Undo `divide`: put the parameter of all experts in the place of its linears, which must be plain."""
    place, _, leaf = parameter.rpartition(".")
    owner = module.get_submodule(place)
    weights: ExpertWeights = owner.__dict__.pop(leaf)
    slices = [each.get_parameter("weight").data for each in weights.linears]
    stacked = torch.stack([W_RC.T if weights.transposed else W_RC for W_RC in slices])
    del owner._modules[leaf + SUFFIX]
    owner.register_parameter(leaf, nn.Parameter(stacked, requires_grad=False))


def divided_in(module: nn.Module) -> dict[str, ExpertWeights]:
    """The parameters of a module that are divided, by name."""
    return {
        f"{place}.{leaf}".removeprefix("."): value
        for place, owner in module.named_modules()
        for leaf, value in vars(owner).items()
        if isinstance(value, ExpertWeights)
    }


def _linear(W_RC: Tensor) -> nn.Linear:
    """A linear without a bias whose weight is this tensor, not a copy."""
    R, C = W_RC.shape
    with torch.device("meta"):
        linear = nn.Linear(C, R, bias=False)
    linear.weight = nn.Parameter(W_RC, requires_grad=False)
    return linear


def _run_own_loop(experts: nn.Module) -> None:
    """Let a module of experts run its own code: other implementations multiply by whole parameters."""
    config = getattr(experts, "config", None)
    if hasattr(config, "_experts_implementation"):
        own: Any = copy.copy(config)
        own._experts_implementation_internal = "eager"
        experts.config = own
