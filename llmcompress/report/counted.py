"""What a search keeps within a budget: bytes on disk, bytes in memory or tokens/s, and the words for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmcompress.io.units import amount, measured_percent

Counted = Literal["size", "memory", "tokens_per_s"]


@dataclass(frozen=True)
class Words:
    """How a page and a picture call it: on an axis, as the head of a column, and before what was asked."""

    axis: str
    column: str
    within: str


WORDS: dict[Counted, Words] = {
    "size": Words("bytes on disk", "bytes", "within"),
    "memory": Words("bytes in memory", "in memory", "in memory within"),
    "tokens_per_s": Words("expected tokens/s", "tokens/s", "tokens/s of at least"),
}


def shown(counted: Counted, value: float) -> str:
    """A value with its unit: 16.8 MB, 31.4 tokens/s."""
    return f"{value:.3g} tokens/s" if counted == "tokens_per_s" else amount(value, "B")


def beside_base(counted: Counted, value: float, base: float) -> str:
    """A value as a share of the base's: 40.00 %, and of a speed 1.52 x."""
    return f"{value / base:.2f} x" if counted == "tokens_per_s" else measured_percent(value / base)
