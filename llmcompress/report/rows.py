"""The rows of a report's tables as plain text: how much smaller and how much worse the model is, what took
the time, what was kept.

The console, the page, the model card and the plots show the same words in the same units.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.io.units import NONE, amount, duration, measured_percent, number
from llmcompress.report.schema import (
    CacheFacts,
    EffortFacts,
    Interval,
    ModelFacts,
    Report,
    TrainingFacts,
)

WORST = 5
KEPT_SHOWN = 12  # rows; the rest of a long list is only counted

Rows = Sequence[tuple[str, ...]]


def nats(value: float | None) -> str:
    """Format a KL divergence: 0.002010 nats/token."""
    return NONE if value is None else f"{number(value)} nats/token"


def with_interval(value: float | None, interval: Interval | None) -> str:
    """Format a value and its interval: 12.34 [12.10, 12.60]."""
    return number(value) + (
        f" [{number(interval[0])}, {number(interval[1])}]" if interval is not None else ""
    )


def change(before: float | None, after: float | None) -> str:
    """Format the change from `before` to `after` in percent: -53.6 %, +0.3 %, =."""
    if before is None or after is None or before == 0:
        return NONE
    return "=" if before == after else f"{100 * (after / before - 1):+.3g} %"


def before_after(report: Report) -> Rows:
    """Rows (what, base, compressed, change), which are also the table of the model card."""
    base, small = report.base, report.compressed
    bits = [
        8 * m.size_bytes / m.parameters if m.size_bytes is not None and m.parameters else None
        for m in (base, small)
    ]
    texts = [with_interval(m.perplexity, m.perplexity_ci95) for m in (base, small)]
    return [
        (
            "bytes on disk",
            amount(base.size_bytes, "B"),
            amount(small.size_bytes, "B"),
            change(base.size_bytes, small.size_bytes),
        ),
        (
            "parameters",
            amount(base.parameters),
            amount(small.parameters),
            change(base.parameters, small.parameters),
        ),
        *_active(base, small),
        ("bits per parameter", number(bits[0]), number(bits[1]), change(*bits)),
        ("perplexity [95 %]", *texts, change(base.perplexity, small.perplexity)),
        (
            "bytes in memory",
            amount(base.memory_bytes, "B"),
            amount(small.memory_bytes, "B"),
            change(base.memory_bytes, small.memory_bytes),
        ),
        ("tokens/s, reading", *_pair(base.tokens_per_s, small.tokens_per_s)),
        ("tokens/s, writing", *_pair(base.decode_tokens_per_s, small.decode_tokens_per_s)),
    ]


def _active(base: ModelFacts, small: ModelFacts) -> Rows:
    """The row of what a token goes through, if that is not all of a model."""
    counts = base.active_parameters, small.active_parameters
    return [("of these for a token", *map(amount, counts), change(*counts))] if any(counts) else []


def _pair(before: float | None, after: float | None) -> tuple[str, str, str]:
    return amount(before), amount(after), change(before, after)


def fidelity_rows(report: Report) -> Rows:
    """Rows (what, value) of the distance between the two models."""
    facts = report.fidelity
    return [
        ("KL(base || compressed), mean", nats(facts.kl_nats_mean)),
        ("KL, 99th percentile", nats(facts.kl_nats_p99)),
        ("top-1 agreement", measured_percent(facts.top1_agreement)),
        ("perplexity ratio [95 %]", with_interval(facts.perplexity_ratio, facts.perplexity_ratio_ci95)),
    ]


CACHE_HEADER = ("tokens of text", "bytes per token", "plain", "KL from plain", "perplexity", "plain")


def cache_rows(facts: CacheFacts | None) -> Rows:
    """Rows under CACHE_HEADER of the model with its KV cache as stored, beside itself with a plain one; none
    if it was not measured."""
    return [
        (
            f"{at.length:,}",
            amount(at.bytes_per_token, "B"),
            amount(at.plain_bytes_per_token, "B"),
            nats(at.kl_nats_mean),
            number(at.perplexity),
            number(at.plain_perplexity),
        )
        for at in (facts.lengths if facts else ())
    ]


def cache_title(facts: CacheFacts | None) -> str:
    """What stands above the rows."""
    return f"KV cache in {facts.bits} bits" if facts else ""


def kept_rows(report: Report, shown: int = KEPT_SHOWN) -> Rows:
    """Rows (linear, why it was kept); a last row counts those beyond `shown`."""
    kept = report.kept
    more = [(f"... and {len(kept) - shown} more", "")] if len(kept) > shown else []
    return [(linear.name, linear.why) for linear in kept[:shown]] + more


def worst_rows(report: Report, shown: int = WORST) -> Rows:
    """Rows (linear, format, bits, relative error), largest error first."""
    worst = sorted(report.linears, key=lambda linear: -linear.relative_error)[:shown]
    return [
        (linear.name, linear.format, number(linear.bits), measured_percent(linear.relative_error))
        for linear in worst
    ]


def training_rows(report: Report) -> Rows:
    """Rows (loss, steps, KL on held-out text before and after, share recovered) for each stage that
    trained."""
    return [
        (
            training.loss,
            steps(training),
            nats(training.kl_before),
            nats(training.kl_after),
            measured_percent(training.recovered),
        )
        for training in report.trainings
    ]


def steps(training: TrainingFacts) -> str:
    """Format the number of steps: 1,000, or 300 of 1,000 if the training ended early."""
    asked, done = training.steps, training.steps_done
    return f"{asked:,}" if done == asked else f"{done:,} of {asked:,}"


def chosen_words(effort: EffortFacts) -> str:
    """What an effort chose: effort balanced: data.samples 128, data.length 512."""
    return f"effort {effort.level}: {', '.join(f'{key} {value}' for key, value in effort.chosen.items())}"


def time_rows(report: Report) -> Rows:
    """Rows (stage, seconds, share of the run); the time outside stages is loading, measuring and writing."""
    whole = report.cost.seconds
    times = [(stage.name, stage.seconds) for stage in report.stages]
    times.append(("load, measure, write", max(0.0, whole - sum(seconds for _, seconds in times))))
    return [
        (name, duration(seconds), measured_percent(seconds / whole) if whole else NONE)
        for name, seconds in [*times, ("all", whole)]
    ]
