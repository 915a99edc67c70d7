"""Adapters of PEFT on modules of ours: merging one changes weights, which codes can't follow, so they become plain first.

PEFT merges by adding to `weight.data`, and takes any subclass of nn.Linear for a float one: it would end in an error of torch,
or add to codes, or to what layers share. It has no registry for modules of others, so its check before merging is extended, as
soon as it is imported: importing it here would take seconds from everyone who has no adapters.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from llmcompress.errors import ModelError
from llmcompress.formats.base import StoredLinear, StoredModule
from llmcompress.integrations.plain_modules import WRAPPED, make_plain

TUNERS = "peft.tuners.tuners_utils"


def ready_to_merge(model: Any) -> None:
    """Turn the modules of ours that are under an adapter plain, in the type of the model. Errors: ModelError."""
    under = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), StoredModule)}
    if not under:
        return
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{next(iter(under))} is quantised and no part of a PreTrainedModel; use its dequantize() before merging"
        )
    for name, adapter in under.items():
        if isinstance(adapter.base_layer, StoredLinear) and adapter.base_layer.transposed:
            if not hasattr(adapter, "fan_in_fan_out"):
                raise ModelError(
                    f"{name} is a Conv1D, which {type(adapter).__name__} can't merge into; use model.dequantize() first"
                )
            adapter.fan_in_fan_out = True  # as for the Conv1D that it becomes
    make_plain(model, [f"{name}{WRAPPED}" for name in under], model.dtype)


def _extend(tuners: ModuleType) -> None:
    """Have the check that PEFT makes before merging prepare the modules for it."""
    kind: Any = vars(tuners)["BaseTuner"]
    check = kind._check_merge_allowed
    if getattr(check, "prepares", False):  # by a former import of this module
        return

    @functools.wraps(check)
    def prepared(self: Any) -> None:
        check(self)
        ready_to_merge(self.model)

    prepared.prepares = True  # type: ignore[attr-defined]
    kind._check_merge_allowed = prepared


class _WhenImported(importlib.abc.MetaPathFinder):
    """Extends PEFT once, when it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TUNERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if TUNERS in sys.modules:
    _extend(sys.modules[TUNERS])
else:
    sys.meta_path.insert(0, _WhenImported())
