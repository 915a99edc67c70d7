"""Build models on the meta device without filling their parameters, which takes most of the time there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# where the functions that fill a tensor in place come from; transformers puts its own in place of torch's
FILLING = ("torch.nn.init", "transformers.initialization")


class Unfilled(TorchFunctionMode):
    """Leaves tensors on the meta device as they are where they would be filled with initial values. torch
    works out the steps of a random fill there one by one, for nothing. Others, such as real buffers, are
    filled."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in FILLING:
            filled = kwargs.get("tensor", args[0] if args else None)
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)
