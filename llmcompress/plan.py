"""What a run would give and cost, from the model's config alone: no weight is read and nothing is run.

Sizes follow from shapes and formats and are exact, headers apart. Memory is the sum of what is held at once. Time is work
over speed: the multiplications that a stage does, at the rate at which this machine multiplies matrices now (timed for a
moment), so it is right to a factor of about two.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from llmcompress.prepare import config_of, find_base, pick_device
from llmcompress.recipe import Recipe
from llmcompress.residency import Outline
from llmcompress.stages.protect import spared
from llmcompress.stages.quantize import FISHER_TOKENS, Quantize
from llmcompress.walk import TOKENS_AT_ONCE

Row = dict[str, Any]  # stage, parameters, size_bytes, peak_memory_bytes, seconds


def plan(recipe: Recipe, *, base: str | None = None, device: str | None = None) -> tuple[list[Row], list[str]]:
    """Rows for the base and for each stage, and notes in words; raises CompressError as `compress` would for the same input."""
    found = find_base(base or recipe.base, recipe.revision if base is None else None, weights=False)
    config = config_of(found.folder, base=True)
    model = Outline(config, pick_device(device), torch.float32)
    model.model.tie_weights()  # so that a tied head counts once
    stage = recipe.stages[0].stage
    chosen, kept = stage.choose(model)
    shapes = dict(model.linear_maps())
    width = model.weight_dtype.itemsize
    parameters = sum(p.numel() for p in model.model.parameters())
    left = {name: stage.protect if spared(coding) is None else 0.0 for name, coding in chosen.items()}
    bits = {
        n: math.prod(shapes[n]) * (1 - left[n]) * (coding.bits - 8 * width) for n, coding in chosen.items()
    }  # over the base's
    formats = ", ".join(dict.fromkeys(coding.format for coding in chosen.values()))
    length = recipe.data.length or min(2048, getattr(model.config, "max_position_embeddings", 2048))
    tokens = recipe.data.samples * length
    rows = [
        {"stage": "base", "parameters": parameters, "size_bytes": parameters * width},
        {
            "stage": f"quantize ({formats}, {stage.rounding})",
            "parameters": parameters,
            "size_bytes": int(parameters * width + sum(bits.values()) / 8),
            "peak_memory_bytes": _memory(model, stage, tokens),
            "seconds": _work(model, stage, shapes, list(chosen), tokens) / _rate(model.device),
        },
    ]
    reasons = sorted(set(kept.values()))
    notes = [f"{len(chosen)} linears are quantised, {len(kept)} kept ({'; '.join(reasons)})"] if kept else []
    return rows, [*notes, f"calibration: {recipe.data.samples} windows of {length} tokens, on {model.device}"]


def _memory(model: Outline, stage: Quantize, tokens: int) -> int:
    """Bytes held at once: the largest block with its solver's matrices, what lies outside the blocks, and the hidden states."""
    inner = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    every = sum(p.numel() for p in model.model.parameters())
    outer = every - sum(p.numel() for layer in model.layers for p in layer.parameters())
    D = model.config.hidden_size
    streams = tokens * D * (2 if stage.rounding == "nearest" else 4)  # inputs and outputs, here and in the full model
    widest = max(columns for _, (_, columns) in model.linear_maps())
    # a block in float32, as it was and as it becomes, its codes as int64; gradients, positions and moments of Adam if trained
    copies = {"nearest": 4, "gptq": 6, "learned": 11}[stage.rounding]
    floats = inner * copies + outer + streams + 4 * widest * widest
    return int(4 * floats + TOKENS_AT_ONCE * model.config.vocab_size * 8)


def _work(model: Outline, stage: Quantize, shapes: dict[str, tuple[int, int]], chosen: list[str], tokens: int) -> float:
    """Multiplications and additions of a stage."""
    inner = sum(p.numel() for layer in model.layers for p in layer.parameters())
    forward = 2.0 * inner * tokens
    total = 2 * forward  # one pass for the moments, one to go on
    if stage.rounding != "nearest":
        total += 3 * forward  # the moments of one group of linears after another, in two streams; most passes end early
        total += sum(2.0 * rows * columns**2 * 13 + columns**3 for rows, columns in (shapes[name] for name in chosen))
    if stage.rounding == "learned" or stage.protect:
        total += 5 * 2.0 * inner * max(FISHER_TOKENS, 8 * model.config.hidden_size)
    if stage.rounding == "learned":
        total += 3 * 2.0 * inner * stage.steps * TOKENS_AT_ONCE + 2 * forward
    return total


def _rate(device: torch.device) -> float:
    """Operations per second of a float32 matrix product here, timed for a moment."""
    X = torch.rand(1024, 1024, device=device)
    (X @ X).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (X @ X).sum().item()
        count += 1
    return 0.6 * count * 2 * 1024**3 / (time.perf_counter() - start)  # blocks run at about 0.6 of a bare product
