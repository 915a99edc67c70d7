"""What a stage is given besides the model: data, the journal it writes to, a seed, and a way to show progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.data import Blocks
from llmcompress.journal import Journal
from llmcompress.residency import Resident
from llmcompress.walk import Track

OUTER = "outer"  # what the journal calls what lies outside the blocks


@dataclass(frozen=True)
class Source:
    """A model that is not read yet."""

    open: Callable[[], Resident]
    fingerprint: Callable[[], str]  # a digest of its config and every weight
    digest: Callable[[], str]  # one of the weights alone


@dataclass(frozen=True)
class Context:
    """Frozen, every field required: no stage finds anything by any other way."""

    teacher: Callable[[str | None], Source]  # a model by its name; without one, that which the run began with
    origin: Sequence[int]  # which layers of that one the model's own were
    data: Blocks
    journal: Journal
    scratch: Path  # a folder for files that only this run reads
    cache: Path  # a folder for what other runs may read too
    seed: int
    track: Track


@dataclass
class Facts:
    """What a stage did, as it goes into the report."""

    name: str
    linears: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)  # one entry a block
    details: dict[str, Any] = field(default_factory=dict)  # how the stage was set

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take in what the journal says of blocks, and of the linears in each."""
        for entry in entries:
            self.linears += entry.pop("linears")
            self.blocks.append(entry)
