"""The journal's entries of a finished training."""

from __future__ import annotations

from llmcompress.io.journal import JournalFacts

STAGE, DONE = "distill", "distilled"  # entries of the journal
Curve = tuple[tuple[int, float | None], ...]  # (step, value), None if the value is NaN or Inf


class TrainedFacts(JournalFacts):
    """How a training went: KL(teacher || student) on held-out text in nats/token, before and at best, and
    curves by step."""

    kl_before: float
    kl_after: float
    curve: Curve
    perplexities: Curve
    losses: Curve
    notes: tuple[str, ...]
