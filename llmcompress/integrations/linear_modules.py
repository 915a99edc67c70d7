"""Which modules are linears: those that transformers and bitsandbytes replace by quantised ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llmcompress.integrations.transformers_compat import MODULES_TO_PATCH_FOR_QUANTIZATION, Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a loader puts codes in a module's place: it takes nn.Linear and Conv1D, and leaves every
    subclass of nn.Linear as it is."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def replaced_modules(model: nn.Module) -> list[str]:
    """The names of modules that transformers replaces by others when it loads bitsandbytes' codes: weights of
    a plain checkpoint no longer fit there."""
    known: Mapping[str, Mapping[str, Any]] = MODULES_TO_PATCH_FOR_QUANTIZATION
    replaced = {name for name, how in known.items() if "bitsandbytes" in how["quantization_methods"]}
    return [name for name, module in model.named_modules() if type(module).__name__ in replaced]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """The shape of a linear as (outputs, inputs)."""
    R, C = weight_of(module).shape
    return R, C


def weight_of(module: nn.Module) -> Tensor:
    """The weight [R, C] of a linear; Conv1D stores it as [C, R]."""
    weight: Tensor = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight
