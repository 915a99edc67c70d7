"""PEFT adapters on our modules: they become plain before merging, because codes can't take the merged
weights.

PEFT merges by adding to `weight.data`, and takes any subclass of nn.Linear for a float linear. It would end
in an error of torch, or add to codes, or to tensors that layers share. It has no registry for modules of
other packages, so its check before merging is extended (`integrations.registration`).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from llmcompress.errors import ModelError
from llmcompress.formats.base import StoredLinear, StoredModule
from llmcompress.integrations.plain_modules import WRAPPED, make_plain


def ready_to_merge(model: Any) -> None:
    """Make our modules under an adapter plain, in the type of the model. Errors: ModelError."""
    under = {
        name: m
        for name, m in model.named_modules()
        if isinstance(getattr(m, "base_layer", None), StoredModule)
    }
    if not under:
        return
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{next(iter(under))} is quantised and no part of a PreTrainedModel; use its dequantize() "
            "before merging"
        )
    for name, adapter in under.items():
        if isinstance(adapter.base_layer, StoredLinear) and adapter.base_layer.transposed:
            if not hasattr(adapter, "fan_in_fan_out"):
                raise ModelError(
                    f"{name} is a Conv1D, which {type(adapter).__name__} can't merge into; use "
                    "model.dequantize() first"
                )
            adapter.fan_in_fan_out = True  # as for the Conv1D that replaces it
    make_plain(model, [f"{name}{WRAPPED}" for name in under], model.dtype)
