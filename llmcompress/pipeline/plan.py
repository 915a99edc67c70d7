"""Estimate what a run would give and cost from the model's config alone; no weight is read and nothing is
run.

Sizes follow from shapes and formats and are exact except for headers. Memory is the sum of what is held at
once. Time is the number of multiplications of a stage over the rate at which this machine multiplies matrices
now, timed for a moment, so it is right to a factor of about two.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from llmcompress.data.sources import DataSpec
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.registry import AnyLayout
from llmcompress.modeling.from_disk import meta_model
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.outcome import outline_after
from llmcompress.pipeline.resolve import config_of, find_base, resolve
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import Estimate, StageResult, Workload


@dataclass(frozen=True)
class PlanRow:
    """The model after a stage: what it stores, its cost per token, and the cost of the stage. The base's row
    has no stage cost."""

    stage: str
    parameters: int
    size_bytes: int
    flops_per_token: int
    kv_cache_bytes_per_token: int
    peak_memory_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run would give and cost: one row for the base and for each stage, and notes in words."""

    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]


def plan_recipe(
    recipe: Recipe, *, base: str | None = None, data: str | DataSpec | None = None, device: str | None = None
) -> Plan:
    """Return rows for the base and for each stage. Raises CompressError as `run_recipe` would for the same
    input.

    `base` and `data` take the place of the recipe's. No text is read.
    """
    recipe.require_own_names(base=base, data=data)
    found = find_base(base or recipe.base, recipe.revision if base is None else None, weights=False)
    config, resolved = config_of(found.folder, base=True), resolve(recipe, data, device)
    spec, model = resolved.data, meta_model(found.folder, config, resolved.device)
    length = spec.length or min(2048, getattr(model.config, "max_position_embeddings", 2048))
    rate = _rate(model.device)
    rows = [_row(model, Estimate("base", model.parameters(), model.stored_bytes(), 0, 0.0), cost=False)]
    notes: list[str] = []
    before: list[StageResult] = []
    for stage in resolved.recipe.stages:
        if student := stage.models.get("student"):
            folder = resolved.models[student].folder
            model = meta_model(folder, config_of(folder, base=True), model.device)
        stage.require_possible(model, before, recipe.data.seed)
        before.append(stage.result(model))
        work = Workload(spec.samples * length, length, rate, rows[-1].size_bytes)
        left = outline_after(stage.result(model), model)
        left.model.tie_weights()
        estimate = stage.estimate(model, left, work)
        rows.append(_row(left, estimate))
        notes += estimate.notes
        model = left
    notes.append(f"calibration: {spec.samples} sequences of {length} tokens, on {model.device}")
    return Plan(tuple(rows), tuple(notes))


def _row(model: MetaModel, estimate: Estimate, *, cost: bool = True) -> PlanRow:
    flops, cached = per_token(model)
    return PlanRow(
        stage=estimate.stage,
        parameters=estimate.parameters,
        size_bytes=estimate.size_bytes,
        flops_per_token=flops,
        kv_cache_bytes_per_token=cached,
        peak_memory_bytes=estimate.peak_memory_bytes if cost else None,
        seconds=estimate.seconds if cost else None,
    )


def per_token(model: MetaModel) -> tuple[int, int]:
    """Return the operations of the matrices per token, and the bytes per token in the key-value cache.

    The operations of attention between tokens are left out, as they grow with the text.
    """
    weights = sum(_multiplied(model.layouts.get(name), shape) for name, shape in model.linear_maps())
    for index, layer in enumerate(model.layers):
        for name in model.anatomy.experts:
            share = model.config.num_experts_per_tok / model.sizes_of(index)["expert"]
            weights += int(layer.get_parameter(name).numel() * share)
    sizes = [model.sizes_of(index) for index in range(len(model.layers))]
    cached = sum(2 * size["kv"] * size["d"] for size in sizes) * model.weight_dtype.itemsize
    return 2 * weights, cached


def _multiplied(layout: AnyLayout | None, shape: tuple[int, int]) -> int:
    """Number of weights that multiply one token. A product counts both of its matrices."""
    whole = math.prod(shape)
    if not isinstance(layout, FactoredLayout):
        return whole
    return layout.rank * sum(shape) + (whole if layout.format == "shared" else 0)


def _rate(device: torch.device) -> float:
    """Operations per second of a float32 matrix product here, timed for a moment."""
    X = torch.rand(1024, 1024, device=device)
    (X @ X).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (X @ X).sum().item()
        count += 1
    # layers run at about 0.6 of the rate of a bare product
    return 0.6 * count * 2 * 1024**3 / (time.perf_counter() - start)
