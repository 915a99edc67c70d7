"""Which modules are linears: those that transformers and bitsandbytes replace by quantised ones."""

from __future__ import annotations

from torch import Tensor, nn

from llmcompress.integrations.transformers_compat import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a loader puts codes in a module's place: it takes nn.Linear and Conv1D, and leaves every
    subclass of nn.Linear as it is."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """The shape of a linear as (outputs, inputs)."""
    R, C = weight_of(module).shape
    return R, C


def weight_of(module: nn.Module) -> Tensor:
    """The weight [R, C] of a linear; Conv1D stores it as [C, R]."""
    weight: Tensor = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight
