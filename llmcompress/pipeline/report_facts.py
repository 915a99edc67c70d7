"""Build the report of a run from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from llmcompress.architectures.auto_classes import auto_class
from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import Fidelity, Speed, environment
from llmcompress.report.schema import (
    DATA_PLACE,
    CostFacts,
    DataFacts,
    EffortFacts,
    ModelFacts,
    Report,
    StageFacts,
)


@dataclass(frozen=True)
class Stored:
    """What a model stores: its parameters, those of experts that a token is not routed to, and its bytes; and
    whether transformers loads it without the plug-in."""

    parameters: int
    idle: int
    size_bytes: int
    plain: bool = True


@dataclass(frozen=True)
class Ran:
    """A run: its recipe as it ran, text, device, what its stages and its effort came to, and its cost."""

    recipe: Recipe
    text: CalibrationData
    device: torch.device
    stages: Sequence[StageFacts]
    effort: EffortFacts | None
    cost: CostFacts


@dataclass(frozen=True)
class Compared:
    """The base and the result, and how far the result is from the base."""

    base: ModelFacts
    compressed: ModelFacts
    fidelity: Fidelity


@dataclass(frozen=True)
class Loads:
    """What decides how the result is loaded: its config, whether transformers loads it without the plug-in,
    and whether it has code of its own."""

    config: PretrainedConfig
    plain: bool
    own_code: bool


def report_of(run: Ran, models: Compared, loads: Loads) -> Report:
    """Build the report of a run."""
    kind, text = auto_class(loads.config).__name__, run.text
    return Report(
        recipe_digest=run.recipe.digest,
        recipe=run.recipe.origin,
        effort=run.effort,
        auto_class=None if kind == "AutoModelForCausalLM" else kind,
        plug_in=None if loads.plain else True,
        own_code=loads.own_code or None,
        base=models.base,
        compressed=models.compressed,
        fidelity=models.fidelity.facts(),
        data=DataFacts(
            source=text.spec.source,
            **_place(text.spec),
            sha256=text.sha256,
            calibration_tokens=text.calibration_tokens,
            evaluation_tokens=text.evaluation_tokens,
            bos=True if text.unscored else None,
        ),
        stages=tuple(run.stages),
        cost=run.cost,
        environment=environment(run.device),
    )


def model_facts(
    name: str,
    perplexity: float | None,
    ci95: tuple[float, float] | None,
    *,
    stored: Stored,
    revision: str | None = None,
    speed: Speed | None = None,
) -> ModelFacts:
    """The measurements of one model; without `speed` if it was not timed."""
    return ModelFacts(
        model=name,
        revision=revision,
        parameters=stored.parameters,
        active_parameters=stored.parameters - stored.idle if stored.idle else None,
        size_bytes=stored.size_bytes,
        perplexity=perplexity,
        perplexity_ci95=ci95,
        tokens_per_s=speed.prefill_tokens_per_s if speed else None,
        decode_tokens_per_s=speed.decode_tokens_per_s if speed else None,
        memory_bytes=speed.memory_bytes if speed else None,
    )


def _place(spec: DataSpec) -> dict[str, str]:
    """The fields that say which part of its source a text is: those of a Hub data set, and the column of any
    table."""
    said = spec.model_dump(include=set(DATA_PLACE), exclude_none=True)
    if spec.revision is None:
        del said["split"]
    return {key: value for key, value in said.items() if (key, value) != ("column", "text")}
