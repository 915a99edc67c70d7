"""Whether Triton compiles our kernels for a GPU, and how they are launched there."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class TritonKernels:
    """The kernels of a module of this package by its `name`. `attempt` compiles them on a device; `without`
    says what happens where that fails."""

    def __init__(self, name: str, attempt: Callable[[torch.device], None], without: str) -> None:
        self.name, self.attempt, self.without = name, attempt, without
        self._compiled: dict[torch.device, bool] = {}

    @functools.cached_property
    def module(self) -> Any:
        """The module. Errors: ImportError where Triton is not installed: it comes with torch for GPUs and
        does not exist for every platform."""
        return importlib.import_module(f"llmcompress.kernels.{self.name}")

    @property
    def installed(self) -> bool:
        """Whether there is a Triton to compile them with."""
        try:
            return self.module is not None
        except ImportError:
            return False

    def compiles(self, device: torch.device) -> bool:
        """Whether Triton compiles the kernels for a GPU. If it does not, a warning says why, once."""
        if device not in self._compiled:
            self._compiled[device] = self._attempted(device)
        return self._compiled[device]

    def _attempted(self, device: torch.device) -> bool:
        if not self.installed:
            logger.warning("%s on %s: Triton is not installed", self.without, device)
            return False
        try:
            self.attempt(device)
        except Exception as error:  # a compiler may raise anything
            logger.warning("%s on %s: Triton cannot compile for it: %s", self.without, device, error)
            return False
        return True

    def forget(self) -> None:
        """Try again the next time."""
        self.__dict__.pop("module", None)
        self._compiled.clear()


def power(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **settings: Any) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current device."""
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](first, *arguments, **settings)
    else:
        kernel[grid](first, *arguments, **settings)
