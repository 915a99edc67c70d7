"""The run loop: run the stages of a recipe one after another on the model of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from llmcompress.architectures.spec import FACTS
from llmcompress.data.calibration import CalibrationData
from llmcompress.errors import ModelError
from llmcompress.integrations import distributed
from llmcompress.integrations.distributed import ALONE, Processes
from llmcompress.io.cache import cache_folder
from llmcompress.io.journal import Journal
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Track
from llmcompress.pipeline.outcome import Outcome, outline_after
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import StageFacts
from llmcompress.stages.base import Context, ModelSource, Stage, StageResult, naming_layer, require_numbers


class Store(Protocol):
    """Where the model is between two stages: on disk, or in memory."""

    @property
    def model(self) -> LayerwiseModel:
        """The model as the stages so far have left it."""

    @property
    def shared(self) -> bool:
        """Whether several processes work on one model. Then rank 0 alone runs the stages that neither train
        nor divide their work."""

    def working(self, number: int) -> AbstractContextManager[tuple[Journal, Path]]:
        """Return a context with the journal of stage `number` and a folder for its temporary files."""

    def take_in(self, outcome: Outcome, *, last: bool) -> str | None:
        """Make what a stage left the current model. Returns a note for the report, or None."""


def run_stages(
    recipe: Recipe,
    store: Store,
    teacher: Callable[[str | None], ModelSource],
    text: CalibrationData,
    track: Track,
) -> list[StageFacts]:
    """Run all stages of a recipe on the model of a store and return their facts. Raises CompressError as the
    stages do."""
    origin, facts = [] if recipe.student else list(range(len(store.model.layers))), list[StageFacts]()
    for number, stage in enumerate(recipe.stages):
        stage.prepare(store.model)
        with store.working(number) as (journal, scratch):
            divided = stage.divides if store.shared else None
            context = Context(
                teacher,
                origin,
                text,
                journal,
                scratch,
                cache_folder(),
                recipe.data.seed,
                track,
                Processes.all(divided) if divided else ALONE,
            )
            if not store.shared or distributed.first() or stage.trains or divided:
                facts.append(run_stage(stage, store.model, context))
            if store.shared:
                distributed.wait()
            outcome = Outcome(stage, store.model, journal)
            origin = outcome.left_of(origin)
            if note := store.take_in(outcome, last=number == len(recipe.stages) - 1):
                facts[-1] = facts[-1].model_copy(update={"notes": (*facts[-1].notes, note)})
    return facts


def require_possible(recipe: Recipe, model: LayerwiseModel) -> None:
    """Refuse, before any work, a stage that can't run on the model as the stages before it leave it. Errors:
    ModelError."""
    before: list[StageResult] = []
    for stage in recipe.stages:
        require_stage(stage, model, before, recipe.data.seed)
        before.append(stage.result(model))
        model = outline_after(before[-1], model)


def require_stage(stage: Stage, model: LayerwiseModel, before: Sequence[StageResult], seed: int) -> None:
    """Refuse one stage that can't run on the model, and prepare the model for it otherwise. Errors:
    ModelError."""
    if model.anatomy.level < stage.needs:
        raise ModelError(
            f"{stage.name} needs {FACTS[stage.needs]}, and of a {model.anatomy.family} model is only known "
            f"{FACTS[model.anatomy.level]}; leave {stage.name} out, or what it does beside rounding"
        )
    stage.prepare(model)
    stage.require_possible(model, before, seed)


def run_stage(stage: Stage, model: LayerwiseModel, context: Context) -> StageFacts:
    """Run one stage, resuming from its journal. Raises CompressError as the stage does."""
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
    told = facts.report()
    require_numbers(told, f"stage {stage.name}")
    return StageFacts.model_validate(told | {"seconds": time.monotonic() - start})
