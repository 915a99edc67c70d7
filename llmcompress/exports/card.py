"""What an export says of itself: export.json, and its model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import CompressError, OutputError, first_line
from llmcompress.exports.target import Target, Written
from llmcompress.io.checkpoint import read_json
from llmcompress.io.local_names import short_name
from llmcompress.io.units import amount, number
from llmcompress.report.model_card import INHERITED
from llmcompress.report.redaction import for_others
from llmcompress.report.rows import nats
from llmcompress.report.schema import Report

FILE = "export.json"
SCHEMA = 1  # raised when a key changes its meaning or goes


@dataclass(frozen=True)
class ExportFacts:
    """export.json, key by key.

    `artefact` is the last name of the folder that was exported, `base` the model that it was made from and
    `revision` its commit; these are null for an artefact without a report. `converted` says of each matrix
    that is stored in another form what that form is, by full name.
    """

    target: str
    llmcompress: str
    artefact: str
    recipe_digest: str | None
    base: str | None
    revision: str | None
    artefact_bytes: int
    size_bytes: int
    converted: dict[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> ExportFacts:
        """Read the export.json of a folder. Errors: OutputError."""
        try:
            said = read_json(folder / FILE)
            return cls(**{key: value for key, value in said.items() if key != "schema"})
        except (CompressError, TypeError) as error:
            raise OutputError(
                f"{folder / FILE} can't be read ({first_line(error)}); export again to write it anew"
            ) from None

    @property
    def kinds(self) -> dict[str, int]:
        """How many matrices became what."""
        return dict(Counter(self.converted.values()))

    def to_json(self) -> str:
        """The text of export.json."""
        return json.dumps({"schema": SCHEMA} | asdict(self), indent=2, ensure_ascii=False) + "\n"


def facts_of(
    target: Target, written: Written, report: Report | None, name: str, sizes: tuple[int, int], version: str
) -> ExportFacts:
    """The facts of an export of the artefact `name`; `sizes` are the bytes of its weights and of the
    export's."""
    shared = None if report is None else for_others(report)
    return ExportFacts(
        target=target.name,
        llmcompress=version,
        artefact=short_name(name),
        recipe_digest=None if shared is None else shared.recipe_digest,
        base=None if shared is None else shared.base.model,
        revision=None if shared is None else shared.base.revision,
        artefact_bytes=sizes[0],
        size_bytes=sizes[1],
        converted=dict(written.tensors),
        notes=written.notes,
    )


def card(
    facts: ExportFacts, target: Target, report: Report | None, inherited: Mapping[str, Any], name: str
) -> str:
    """Return the text of README.md; `inherited` is the card data of the artefact (may be empty), `name` the
    folder of the export."""
    front: dict[str, Any] = {key: inherited[key] for key in INHERITED if key in inherited}
    if facts.revision is not None:
        front |= {"base_model": facts.base, "base_model_relation": "quantized"}
    front |= {"pipeline_tag": "text-generation", "tags": ["llmcompress", target.name]}
    head = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
    return head + "\n\n".join(part for part in _parts(facts, target, report, short_name(name)) if part) + "\n"


def _parts(facts: ExportFacts, target: Target, report: Report | None, name: str) -> list[str]:
    revision = f" at revision `{facts.revision}`" if facts.revision else ""
    of = f", which llmcompress made of `{facts.base}`{revision}" if facts.base else ""
    rows = "\n".join(f"| {kind} | {count} |" for kind, count in facts.kinds.items())
    code = target.loading.format(name=name)
    return [
        f"# {name}",
        f"The artefact `{facts.artefact}` of llmcompress{of}, repacked for {target.loads_with}. Its codes "
        f"are those of the artefact: nothing was quantised again. {amount(facts.artefact_bytes, 'B')} of "
        f"weights became {amount(facts.size_bytes, 'B')}.",
        f"## Load it\n\n```{target.language}\n{code}\n```",
        f"## What was converted\n\n| matrices | number |\n|:--|--:|\n{rows}" if rows else "",
        "\n".join(f"- {note}" for note in facts.notes),
        _measured(report),
    ]


def _measured(report: Report | None) -> str:
    """What was measured of the artefact, not of the export."""
    if report is None or report.compressed.perplexity is None:
        return ""
    return (
        "## Quality\n\nMeasured on the artefact, in transformers: perplexity "
        f"{number(report.base.perplexity)} became {number(report.compressed.perplexity)}, KL divergence from "
        f"the base {nats(report.fidelity.kl_nats_mean)}. The export was not measured."
    )
