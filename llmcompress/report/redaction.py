"""The report in the form that is shared, without names that have meaning only on the machine it was made on.

In the folder of an artefact, report.json keeps the paths of base, text, teacher and student, under those keys
only, so that `reproduce` finds them again. Everything that is shared, and the model card even in that folder,
is made from `for_others`: it gives files and folders by their last names, and what comes from the Hub by its
id.
"""

from __future__ import annotations

from typing import Any

from llmcompress import hub
from llmcompress.data.sources import PYTHON_DOCS
from llmcompress.io.local_names import short_name, without_paths
from llmcompress.report.schema import Report, SampleFacts, StageFacts, TrainingFacts

WITHHELD = SampleFacts(left_out="the text is not public")


def others_in(stage: StageFacts | TrainingFacts) -> dict[str, str]:
    """The teacher and the student that a recipe names for a training, by role."""
    facts = stage.model_extra or {}
    return {role: name for role in ("teacher", "student") if isinstance(name := facts.get(role), str)}


def is_local_text(report: Report) -> bool:
    """Whether the text was a file or folder of the machine that the report was made on."""
    return report.data.revision is None and report.data.source != PYTHON_DOCS


def local_names(report: Report) -> list[str]:
    """The names in a report of files and folders of the machine that it was made on, as spelled there."""
    names = [report.compressed.model]
    names += [report.base.model] if report.base.revision is None else []
    names += [report.data.source] if is_local_text(report) else []
    return names + [
        name for stage in report.stages for name in others_in(stage).values() if not _on_hub(name)
    ]


def for_others(report: Report, repo: str | None = None) -> Report:
    """The report in the form that is shared, under the id `repo` if given; local files and folders have their
    last names.

    With `repo` it leaves this machine, and goes without samples of a text that was a local file.
    """
    names, withheld = local_names(report), repo and report.samples and is_local_text(report)
    base, data = report.base, report.data
    text = short_name(data.source) if is_local_text(report) else data.source
    return report.model_copy(
        update={
            "base": base if base.revision else base.model_copy(update={"model": short_name(base.model)}),
            "compressed": report.compressed.model_copy(
                update={"model": repo or short_name(report.compressed.model)}
            ),
            "data": data.model_copy(update={"source": text}),
            "stages": tuple(_stage(stage, names) for stage in report.stages),
            "samples": WITHHELD if withheld else report.samples,
        }
    )


def _on_hub(name: str) -> bool:
    """Whether the name of a teacher or student is a Hub id with a commit."""
    return hub.is_commit(hub.split(name)[1])


def _stage(stage: StageFacts, names: list[str]) -> StageFacts:
    roles = {role: name if _on_hub(name) else short_name(name) for role, name in others_in(stage).items()}
    return StageFacts.model_validate(_told(stage.model_dump(mode="json"), names) | roles)


def _told(value: Any, names: list[str]) -> Any:
    """A value of a stage's facts, without paths in any of its strings."""
    if isinstance(value, dict):
        return {key: _told(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_told(inner, names) for inner in value]
    return without_paths(value, names) if isinstance(value, str) else value
