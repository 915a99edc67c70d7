"""Runs of the package, and the numbers of their reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.models import LENGTH
from llmcompress.data.sources import DataSpec
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.resolve import config_of, find_base
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report

SAMPLES = 64  # sequences that calibrate where many rows are measured
Stage = dict[str, object]  # an entry of a recipe: {"prune": {"axis": "ffn", ...}}


def recipe_of(stages: Sequence[Stage], text: str, samples: int = SAMPLES) -> Recipe:
    """A recipe of stages, calibrated on `samples` sequences of LENGTH tokens of a text."""
    data = {"source": text, "samples": samples, "length": LENGTH}
    return Recipe.model_validate({"data": data, "stages": list(stages)})


def run(
    recipe: Recipe,
    out: Path,
    base: str | Path,
    data: str | DataSpec | None = None,
    *,
    overwrite: bool = False,
    device: str | None = None,
) -> Report:
    """Run a recipe on a base from disk to disk."""
    return run_recipe(recipe, out, base=str(base), data=data, overwrite=overwrite, device=device)


def seconds(report: Report) -> float:
    """Seconds of all stages."""
    return sum(stage.seconds for stage in report.stages)


def known(value: float | None) -> float:
    """A number that every run of a measurement has. Errors: ValueError where it was not measured."""
    if value is None:
        raise ValueError("the report lacks a number that is to be written down")
    return value


def losses(report: Report) -> dict[str, float]:
    """KL and both perplexities, as `results.Loss` has them."""
    return {
        "kl_nats_mean": known(report.fidelity.kl_nats_mean),
        "perplexity": known(report.compressed.perplexity),
        "base_perplexity": known(report.base.perplexity),
    }


def outline(base: str | Path) -> MetaModel:
    """A model's shapes without its weights, by name or folder."""
    return MetaModel(
        config_of(find_base(str(base), weights=False).folder), torch.device("cpu"), torch.float32
    )


def layer_parameters(model: MetaModel) -> int:
    """Parameters of the decoder layers."""
    return sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())
