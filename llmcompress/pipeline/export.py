"""export(): repack an artefact for another engine, from its codes as they are.

Everything that can be refused is refused before a byte is written. The result appears under its name by one
rename, with a card and export.json, which say what it was made from and what was converted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from llmcompress.errors import ModelError, OutputError, argument
from llmcompress.exports.artefact import Artefact
from llmcompress.exports.card import FILE, ExportFacts, card, facts_of
from llmcompress.exports.registry import target_of
from llmcompress.exports.target import Target
from llmcompress.io import own_code
from llmcompress.io.companion_files import is_inside
from llmcompress.io.output_folder import Writer
from llmcompress.io.tokenizer import keep_tokens, tokenizer_of
from llmcompress.io.user_paths import path_of
from llmcompress.report.metrics import environment
from llmcompress.report.model_card import front_matter
from llmcompress.report.schema import CARD, Report
from llmcompress.report.schema import FILE as REPORT


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder, and what export.json says."""

    folder: Path
    facts: ExportFacts


def export(
    folder: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Repack the artefact in `folder` for another engine and write it to the folder `out`.

    Codes, scales and plain weights are taken as they are: nothing is quantised again, and what a target can't
    say is refused. One matrix is in memory at a time.

    Args:
        folder: a folder that `compress` or `llmcompress run` wrote.
        to: the target, such as `compressed-tensors`.
        out: the folder for the result.
        overwrite: replace an earlier export in `out`.
        trust_remote_code: let the model run code of its own, which lies beside its weights.

    Raises:
        CompressError: there is no such target, the folder is no artefact, the target can't say it, or `out`
            can't be written.
    """
    target_of(to)
    place = path_of(folder, "folder", ModelError)
    with own_code.permission(trust_remote_code):
        own_code.trust(place)
        return repack(place, to, path_of(out, argument("out"), OutputError), overwrite=overwrite)


def repack(place: Path, to: str, out: Path, *, overwrite: bool) -> Exported:
    """Export the artefact in `place`, with the permission to run its code that is in force. Errors: as for
    `export`."""
    artefact, target = Artefact(place), target_of(to)
    require(artefact, target)
    return _write(artefact, target, out, overwrite)


def beside(out: Path, to: str) -> Path:
    """The folder of an export that a recipe asks for: OUT-gguf beside OUT."""
    return out.with_name(f"{out.name}-{to}")


def require_possible(to: str, config: PretrainedConfig) -> None:
    """Refuse a target that can hold no model of a config, or that this machine can't write. Errors:
    ModelError."""
    target = target_of(to)
    if (why := target.missing() or target.unsupported(config)) is not None:
        raise ModelError(f"the result can't be exported to {to}: {why}")


def require_places(
    targets: Sequence[str], out: Path, base: Path, config: PretrainedConfig, *, overwrite: bool
) -> None:
    """Refuse exports of a run for which the package, the family or the place is missing. Errors:
    CompressError."""
    for to in targets:
        require_possible(to, config)
        with Writer(beside(out, to), base, size_bytes=0, overwrite=overwrite, mark=FILE):
            pass


def require(artefact: Artefact, target: Target) -> None:
    """Refuse an artefact that a target can't say. Errors: ModelError with the target's reason."""
    if (why := target.refusal(artefact)) is not None:
        raise ModelError(f"{artefact.folder} can't be exported to {target.name}: {why}")


def _write(artefact: Artefact, target: Target, out: Path, overwrite: bool) -> Exported:
    place = artefact.folder
    report = Report.of(place) if (place / REPORT).is_file() else None
    size = target.size_bytes(artefact)
    with Writer(out, place, size_bytes=size, overwrite=overwrite, mark=FILE) as writer:
        written = target.write(artefact, writer)
        if (writer.artifact / "tokenizer_config.json").is_file():
            keep_tokens(writer.artifact, tokenizer_of(place), place)
        sizes = artefact.checkpoint.size_bytes, _weight_bytes(writer.artifact)
        version = environment().versions["llmcompress"]
        facts = facts_of(target, written, report, str(place), sizes, version)
        readme = place / CARD
        inherited = (
            front_matter(readme.read_text("utf-8", "replace"))
            if readme.is_file() and is_inside(readme, place)
            else {}
        )
        published = writer.publish(
            {FILE: facts.to_json(), CARD: card(facts, target, report, inherited, out.name)}
        )
    return Exported(published, facts)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in the folder of an export."""
    return sorted(file for end in ("safetensors", "gguf") for file in folder.glob(f"*.{end}"))


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))
