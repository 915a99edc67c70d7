"""What a stage is given besides the model: data, the journal it writes to, a seed, and a way to show progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmcompress.data.calibration import CalibrationData
from llmcompress.errors import ModelError, first_line
from llmcompress.io.journal import Journal
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Track

OUTER = "outer"  # what the journal calls what lies outside the layers


@contextmanager
def naming_layer(layer: str) -> Iterator[None]:
    """Say of which layer a method says that its numbers are too large. Errors: ModelError."""
    try:
        yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise ModelError(
            f"{layer}: {first_line(error)}; the base's weights are too large here, take a sound copy, or skip this layer or "
            "stage"
        ) from None


def require_numbers(value: Any, layer: str) -> None:
    """Refuse facts that hold NaN or infinite numbers, which no report can. Errors: ModelError."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            require_numbers(entry, f"{value['name']}: {name}" if "name" in value else f"{layer}, {name}")
    elif isinstance(value, list | tuple):
        for entry in value:
            require_numbers(entry, layer)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ModelError(
            f"{layer} is {value}: the base's weights are too large to be measured in float32; take a sound copy, or skip this "
            "layer or stage"
        )


@dataclass(frozen=True)
class ModelSource:
    """A model that is not read yet."""

    open: Callable[[], LayerwiseModel]
    fingerprint: Callable[[], str]  # a digest of its config and every weight
    digest: Callable[[], str]  # one of the weights alone


@dataclass(frozen=True)
class Context:
    """Frozen, every field required: no stage finds anything by any other way."""

    teacher: Callable[[str | None], ModelSource]  # a model by its name; without one, that which the run began with
    origin: Sequence[int]  # which layers of that one the model's own were
    data: CalibrationData
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
    layers: list[dict[str, Any]] = field(default_factory=list)  # one entry a layer
    details: dict[str, Any] = field(default_factory=dict)  # how the stage was set

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take in what the journal says of layers, and of the linears in each."""
        for entry in entries:
            self.linears += entry.pop("linears")
            self.layers.append(entry)
