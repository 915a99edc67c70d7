"""What an effort chose where a recipe says nothing, written into the recipe as it ran and into the report."""

from __future__ import annotations

from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DEFAULT, DataSpec
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import EffortFacts

Chosen = dict[str, int | str]  # key of the recipe, such as stages.0.quantize.rounding -> what it was set to


def chosen_for_stages(asked: Recipe, settled: Recipe) -> Chosen:
    """The settings of stages that `asked` does not say and `settled`, its `with_effort`, does."""
    return {
        f"stages.{number}.{stage.name}.{key}": getattr(stage, key)
        for number, (before, stage) in enumerate(zip(asked.stages, settled.stages, strict=True))
        for key in sorted(stage.model_fields_set - before.model_fields_set)
    }


def effort_facts(
    asked: Recipe, settled: Recipe, spec: DataSpec, samples: int, length: int
) -> EffortFacts | None:
    """What the effort of `settled` chose, for the report; None if everything was said.

    `spec` is the text that was asked for, of which `samples` sequences of `length` tokens are used.
    """
    chosen: Chosen = {}
    if spec.samples is None:
        chosen["data.samples"] = samples
    if spec.length is None and (spec.samples is None or settled.effort):
        chosen["data.length"] = length
    chosen |= chosen_for_stages(asked, settled)
    return EffortFacts(level=settled.effort or DEFAULT, chosen=chosen) if chosen else None


def as_it_ran(settled: Recipe, text: CalibrationData) -> Recipe:
    """The recipe with the number and length of the sequences written out, if an effort decided them.

    So the recipe of an artefact gives the same sequences again, whatever an effort means by then.
    """
    data = settled.data
    if data.samples and not settled.effort:
        return settled
    used = {"samples": len(text.calibration), "length": text.calibration.shape[1]}
    unsaid = {key: value for key, value in used.items() if getattr(data, key) is None}
    return settled.model_copy(update={"data": data.model_copy(update=unsaid)}) if unsaid else settled
