"""The stages of a recipe one after another: what a run on disk and one in memory have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.pipeline.outcome import outline_after
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import Fidelity, environment
from llmcompress.report.schema import (
    DATA_PLACE,
    CostFacts,
    DataFacts,
    EnvironmentFacts,
    FidelityFacts,
    ModelFacts,
    Report,
    StageFacts,
)
from llmcompress.stages.base import Context, Stage, StageResult, naming_layer, require_numbers


def require_possible(recipe: Recipe, model: LayerwiseModel) -> None:
    """Refuse now a stage that can't be done to the model as the stages before it leave it. Errors:
    ModelError."""
    before: list[StageResult] = []
    for stage in recipe.stages:
        stage.require_possible(model, before, recipe.data.seed)
        before.append(stage.result(model))
        model = outline_after(stage, model)


def run_stage(stage: Stage, model: LayerwiseModel, context: Context) -> StageFacts:
    """Do a stage, or what its journal lacks of it; raises CompressError as the stage does."""
    start = time.monotonic()
    earlier = sum(context.journal.has(stage.name, index) for index in range(len(model.layers) + 1))
    with naming_layer(f"stage {stage.name}"):
        facts = stage.apply(model, context)
    if earlier:
        facts.notes.append(
            f"{earlier} layers were done by an earlier run that was interrupted; the seconds are those of "
            "this run"
        )
    if damaged := context.journal.damaged:
        facts.notes.append(
            f"{len(damaged)} files of the journal were damaged on the disk ({min(damaged)}), and what they "
            "held was done again"
        )
    fixed = {
        "name": facts.name,
        "linears": facts.linears,
        "kept": facts.kept,
        "notes": facts.notes,
        "layers": facts.layers,
    }
    require_numbers(facts.details | fixed, f"stage {stage.name}")
    return StageFacts.model_validate(facts.details | fixed | {"seconds": time.monotonic() - start})


def report_of(
    recipe: Recipe,
    before: ModelFacts,
    after: ModelFacts,
    measured: Fidelity,
    sequences: CalibrationData,
    stages: Sequence[StageFacts],
    cost: CostFacts,
    device: torch.device,
) -> Report:
    """The report of a run."""
    return Report(
        recipe_digest=recipe.digest,
        recipe=recipe.origin,
        base=before,
        compressed=after,
        fidelity=FidelityFacts.model_validate(measured.facts()),
        data=DataFacts(
            source=sequences.spec.source,
            **_place(sequences.spec),
            sha256=sequences.sha256,
            calibration_tokens=sequences.calibration_tokens,
            evaluation_tokens=sequences.evaluation_tokens,
            bos=True if sequences.unscored else None,
        ),
        stages=tuple(stages),
        cost=cost,
        environment=EnvironmentFacts.model_validate(environment(device)),
    )


def _place(spec: DataSpec) -> dict[str, str]:
    """Which part of its source a text is: what there is to say of a Hub data set, and the column of any
    table."""
    said = spec.model_dump(include=set(DATA_PLACE), exclude_none=True)
    if spec.revision is None:
        del said["split"]
    return {key: value for key, value in said.items() if (key, value) != ("column", "text")}
