"""Artefacts for these tests, made on the spot: a pico model in one of our layouts, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.formats.integer import MULTIPLIER, IntegerLayout, IntegerWeight
from tests.artefacts import write_in
from tests.bases import VOCABULARY, byte_tokenizer
from tests.models import pico


def grouped(group_size: int = 32) -> IntegerLayout:
    return IntegerLayout("w4a16", "dynamic", group_size)


def rounded(W_RC: Tensor, layout: IntegerLayout) -> IntegerWeight:
    """The weight rounded to nearest, with multipliers that differ from group to group."""
    W_RC = W_RC.float()
    R, C = W_RC.shape
    static = torch.tensor(0.02) if layout.activations == "static" else None
    if layout.group_size is None:
        scale_R = W_RC.abs().amax(1) / 127
        return IntegerWeight((W_RC / scale_R[:, None]).round().to(torch.int8), scale_R, layout, None, static)
    G = -(-C // layout.group_size)
    draw = torch.Generator().manual_seed(R + C)
    multiplier_RG = torch.randint(9, MULTIPLIER + 1, (R, G), generator=draw, dtype=torch.uint8)
    scale_R = W_RC.abs().amax(1) / (7 * 9)
    spread_RC = multiplier_RG.repeat_interleave(layout.group_size, dim=1)[:, :C] * scale_R[:, None]
    codes_RC = (W_RC / spread_RC).round().clamp(-7, 7).to(torch.int8)
    return IntegerWeight(codes_RC, scale_R, layout, multiplier_RG, static)


def written(
    folder: Path,
    layout: IntegerLayout,
    family: str = "llama",
    damage: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A pico model with every linear but the head in a layout. `damage` changes the scales of one linear."""
    model: Any = pico(family, **{"vocab_size": VOCABULARY, **config})
    model.to(dtype)
    model.config.dtype = dtype
    write_in(folder, model, layout, lambda W_RC: rounded(W_RC, layout))
    byte_tokenizer().save_pretrained(folder)
    if damage is not None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("weight_scale"))
        save_file(tensors | {name: damage(tensors[name])}, folder / "model.safetensors", {"format": "pt"})
    return folder
