"""Reports of several artefacts of one base side by side: who is smaller, and who is nearer to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.report.model_card import needed
from llmcompress.report.redaction import for_others
from llmcompress.report.schema import Report

SAME = 1e-3  # relative: the base's perplexities on one text differ by less between machines


@dataclass(frozen=True)
class ComparedRow:
    """One artefact: numbers of its report, and the name of an artefact that is no larger and no farther from
    the base, if there is one. None means not measured."""

    name: str
    size_bytes: int | None
    share: float | None  # of the base's bytes
    kl_nats_mean: float | None
    perplexity: float | None
    top1_agreement: float | None
    loads_with: tuple[str, ...]  # packages
    seconds: float
    beaten_by: str | None = None


def compared(reports: Sequence[tuple[str, Report]]) -> list[ComparedRow]:
    """Return a row for each named report, smallest first; those without a size are last."""
    rows = [_row(name, report, reports) for name, report in reports]
    return sorted(rows, key=lambda row: (row.size_bytes is None, row.size_bytes or 0, row.kl_nats_mean or 0))


def _row(name: str, report: Report, reports: Sequence[tuple[str, Report]]) -> ComparedRow:
    size, base = report.compressed.size_bytes, report.base.size_bytes
    winners = [other for other, rival in reports if _beats(rival, report)]
    return ComparedRow(
        name=name,
        size_bytes=size,
        share=size / base if size is not None and base else None,
        kl_nats_mean=report.fidelity.kl_nats_mean,
        perplexity=report.compressed.perplexity,
        top1_agreement=report.fidelity.top1_agreement,
        loads_with=("transformers", *needed(report)),
        seconds=report.cost.seconds,
        beaten_by=winners[0] if winners else None,
    )


def _beats(one: Report, other: Report) -> bool:
    """Whether one artefact has no more bytes and no more KL than the other, and less of one, on one text."""
    sizes = one.compressed.size_bytes, other.compressed.size_bytes
    kl = one.fidelity.kl_nats_mean, other.fidelity.kl_nats_mean
    if None in (*sizes, *kl) or difference(one, other):
        return False
    mine, theirs = (sizes[0], kl[0]), (sizes[1], kl[1])
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))  # type: ignore[operator]


def warning_of(reports: Sequence[tuple[str, Report]]) -> str | None:
    """What the first report and another were not measured alike on; None if all numbers compare."""
    first, report = reports[0]
    for name, other in reports[1:]:
        if told := difference(report, other):
            return f"{first} and {name} differ in the {told}, so their KL and perplexity do not compare"
    return None


def difference(one: Report, other: Report) -> str | None:
    """What two reports were not measured alike on, in words; None if their numbers compare.

    The hash of the tokens is of the calibration text too, so the base's perplexity tells whether the
    evaluation text is the same.
    """
    mine, theirs = for_others(one), for_others(other)
    told = [
        ("base", mine.base.model, theirs.base.model),
        ("commit of the base", mine.base.revision, theirs.base.revision),
        ("bytes of the base", mine.base.size_bytes, theirs.base.size_bytes),
        ("text", mine.data.source, theirs.data.source),
        ("commit of the text", mine.data.revision, theirs.data.revision),
        ("number of evaluated tokens", mine.data.evaluation_tokens, theirs.data.evaluation_tokens),
        ("BOS", bool(mine.data.bos), bool(theirs.data.bos)),
    ]
    for what, here, there in told:
        if here != there:
            return f"{what} ({here}, {there})"
    before, after = mine.base.perplexity, theirs.base.perplexity
    if before is not None and after is not None and abs(before - after) > SAME * before:
        return f"evaluated text (perplexity of the base {before:.6g}, {after:.6g})"
    return None
