"""The interface of every stage: its settings, its checks and estimates before the run, its work, and its
result.

The pipeline calls this interface and never asks which kind of stage it has. A new stage is a subclass of
`Stage` in a folder of its own and a line in `recipe.entries.STAGES`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, model_serializer, model_validator

from llmcompress.architectures.spec import AXES
from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import Effort
from llmcompress.errors import ModelError, argument, first_line
from llmcompress.formats.registry import RewrittenLayout
from llmcompress.formats.schemes import QuantScheme
from llmcompress.integrations.distributed import By, Processes
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import Track
from llmcompress.stages.cost import Time as Time
from llmcompress.stages.cost import Workload as Workload

LinearScheme = QuantScheme | RewrittenLayout  # how one linear is written
OUTER = "outer"  # journal entry of the tensors outside the layers


@contextmanager
def naming_layer(layer: str) -> Iterator[None]:
    """Turn a method's error about numbers that are too large, or about memory, into one that names the layer.
    Errors: ModelError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{layer}: {first_line(error).partition(' GPU ')[0]} Use a GPU with more memory, or "
            f"{argument('device')} cpu"
        ) from None
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise ModelError(
            f"{layer}: {first_line(error)}; the base's weights are too large here, take a sound copy, or "
            "skip this layer or stage"
        ) from None


def require_numbers(value: Any, layer: str) -> None:
    """Refuse facts with NaN or infinite numbers, which a report can't hold. Errors: ModelError."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            require_numbers(entry, f"{value['name']}: {name}" if "name" in value else f"{layer}, {name}")
    elif isinstance(value, list | tuple):
        for entry in value:
            require_numbers(entry, layer)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ModelError(
            f"{layer} is {value}: the base's weights are too large to be measured in float32; take a sound "
            "copy, or skip this layer or stage"
        )


@dataclass(frozen=True)
class ModelSource:
    """A model that is not read yet."""

    open: Callable[[], LayerwiseModel]
    fingerprint: Callable[[], str]  # a digest of its config and every weight
    digest: Callable[[], str]  # a digest of the weights alone


@dataclass(frozen=True)
class Context:
    """Everything that a stage works with. It is frozen and every field is required, so a stage finds nothing
    by any other way."""

    # model name -> the model; None -> the model that the run began with
    teacher: Callable[[str | None], ModelSource]
    origin: Sequence[int]  # for each layer, its index in that model
    data: CalibrationData
    journal: Journal
    scratch: Path  # a folder for files that only this run reads
    cache: Path  # a folder for what other runs may read too
    seed: int
    track: Track
    processes: Processes  # which divide the calibration text among themselves


class LinearRecord(JournalFacts):
    """What became of one linear: its format, bits per weight, and its errors.

    `relative_error` is |Y - Y'| / |Y| of the outputs Y on the calibration text, `weight_error` the same of
    the weights.
    """

    name: str
    format: str
    bits: float
    relative_error: float
    weight_error: float


class LayerRecord(JournalFacts):
    """What became of one layer, as in the journal and the report. A stage adds fields of its own."""

    name: str
    linears: tuple[LinearRecord, ...] = ()


@dataclass
class Facts:
    """What a stage did, as the report shows it."""

    name: str
    linears: list[LinearRecord] = field(default_factory=list)
    kept: Mapping[str, str] = field(default_factory=dict)  # linears that stay as they are -> the reason
    notes: list[str] = field(default_factory=list)
    per_layer: list[LayerRecord] = field(default_factory=list)
    details: Mapping[str, JsonValue] = field(default_factory=dict)  # how the stage was set

    def add(self, layers: Iterable[LayerRecord]) -> None:
        """Add the journal's records of layers, and of the linears in each."""
        for layer in layers:
            self.linears += layer.linears
            self.per_layer.append(layer)

    def report(self) -> dict[str, JsonValue]:
        """The keys of the stage in report.json, except for its seconds."""
        return {
            **self.details,
            "name": self.name,
            "linears": [linear.model_dump() for linear in self.linears],
            "kept": [{"name": name, "why": why} for name, why in self.kept.items()],
            "notes": list(self.notes),
            "per_layer": [
                layer.model_dump(mode="json", exclude={"linears"}, exclude_none=True)
                for layer in self.per_layer
            ],
        }


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves of a model, besides the tensors in its journal."""

    schemes: Mapping[str, LinearScheme] = field(default_factory=dict)  # how linears are written, by full name
    kept: Mapping[str, str] = field(default_factory=dict)  # linears that stay as they are, with the reason
    # tensor -> the tensor that it is stored as, by their names in the model
    ties: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json that change
    removed_layers: tuple[int, ...] = ()
    removed: frozenset[str] = frozenset()  # tensors that are no longer stored, by their names in the model


@dataclass(frozen=True)
class Estimate:
    """What a stage would leave and cost."""

    stage: str  # the stage in words
    parameters: int
    size_bytes: int
    peak_memory_bytes: int
    time: Time
    notes: tuple[str, ...] = ()


class Settings(BaseModel):
    """Settings of a recipe: frozen, without unknown keys; a key that was renamed is refused with its new
    name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    retired: ClassVar[Mapping[str, str]] = {}  # key -> what to write instead
    newer: ClassVar[frozenset[str]] = frozenset()  # keys that are newer than the others

    @model_validator(mode="before")
    @classmethod
    def _without_retired_keys(cls, entry: Any) -> Any:
        for key in entry if isinstance(entry, Mapping) else ():
            if key in cls.retired:
                raise ValueError(f"{key} is no key any more; {cls.retired[key]}")
        return entry

    @model_serializer(mode="wrap")
    def _older_keys_alone_unless_newer_are_set(self, handler: Any) -> Any:
        """Leave out newer keys that have their defaults, so that recipes keep the digests that they had
        before these keys."""
        defaults = {key: type(self).model_fields[key].default for key in self.newer}
        return {
            key: value
            for key, value in handler(self).items()
            if key not in defaults or value != defaults[key]
        }


class Stage(Settings):
    """One stage of a recipe.

    Its fields are what a recipe says of it. The methods are what the pipeline asks, in the order in which it
    asks: whether the stage may stand where it stands, whether the model can take it, what it would cost, then
    the work, then what it left.
    """

    name: ClassVar[str]  # in recipes, journals and reports
    section: ClassVar[str] = "other"  # heading in the list of shipped recipes
    trains: ClassVar[bool] = False  # whether it trains, which divides batches by itself
    quantizes: ClassVar[bool] = False  # whether nothing but training may follow it
    rewrites: ClassVar[bool] = False  # whether it leaves linears that can't be pruned: no plain matrices
    has_levels: ClassVar[bool] = False  # whether its codes have levels that training can move
    combines: ClassVar[bool] = False  # whether it costs so much that training belongs after it
    shares: ClassVar[bool] = False  # whether layers may have one weight after it
    keeps_weights: ClassVar[bool] = False  # whether it changes no weight, so that it may follow any other

    @property
    def models(self) -> dict[str, str]:
        """The models that the stage names besides the base, by their roles: teacher, student."""
        return {}

    def with_models(self, names: Mapping[str, str]) -> Stage:
        """Return the stage with other names for these roles."""
        return self.model_copy(update=dict(names)) if names else self

    def with_effort(self, effort: Effort, before: Sequence[Stage]) -> Stage:
        """Return the stage with every setting written out that an effort decides and the recipe does not say.
        `before` are the stages before it."""
        return self

    def unsaid(self, **settings: JsonValue) -> dict[str, JsonValue]:
        """Those of the settings that were not given to the stage."""
        return {name: value for name, value in settings.items() if name not in self.model_fields_set}

    @property
    def divides(self) -> By | None:
        """What several processes divide among themselves; None if rank 0 does the work and the others
        wait."""
        return None

    @property
    def needs(self) -> int:
        """How far the facts about a model must go: LINEARS, SCALES or AXES."""
        return AXES

    @property
    def takes_all(self) -> bool:
        """Whether it codes every linear of the layers, so that another code finds none."""
        return False

    @property
    def leaves(self) -> str:
        """What is left of the model, in a few words for lists of recipes; empty if no size changes."""
        return ""

    @property
    def weight_bits(self) -> tuple[float, float] | None:
        """The least and the most bits per weight of the linears that it codes, scales included."""
        return None

    @property
    def needs_plugin(self) -> bool:
        """Whether the result loads only where llmcompress is imported."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it takes steps of gradient descent, which take most of a run's time."""
        return self.trains

    @property
    def kernel(self) -> str | None:
        """The format whose kernel runs what it coded, if that is one format."""
        return None

    @property
    def spares(self) -> bool:
        """Whether it may leave single linears in their dtype beside those that it codes."""
        return False

    def training_tokens(self, length: int) -> int:
        """Tokens of text that the stage trains on, for sequences of `length` tokens."""
        return 0

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse a place between other stages of a recipe. Errors: ValueError, which says why."""
        if any(stage.quantizes for stage in before):
            raise ValueError(
                "a quantised model can't be changed again, but for what is not in codes: after the one "
                "quantize comes nothing, or distill with train: scales, norms or all"
            )
        if (
            self.combines
            and any(stage.trains for stage in before)
            and not any(stage.trains for stage in after)
        ):
            raise ValueError(
                f"distill heals what comes before it, and {self.name} comes after the last one; put distill "
                f"after {self.name}"
            )

    def prepare(self, model: LayerwiseModel) -> None:
        """Bring a model, of which the weights may be unknown, into the form that the other methods take."""

    def require_possible(self, model: LayerwiseModel, before: Sequence[StageResult], seed: int) -> None:
        """Refuse, before any work, what can't be done to this model. `before` holds the results of earlier
        stages.

        Errors: CompressError.
        """

    @abstractmethod
    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """Return what the stage leaves of `model`.

        Without a journal, the result is what is known before the stage has run: all layers alike, the last
        ones removed. Errors: ModelError if the model can't take the stage.
        """

    @abstractmethod
    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Return what the stage would cost on `model`, of which it leaves `left`."""

    @abstractmethod
    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Run the stage, resuming from the journal, and leave tensors and facts there. Errors:
        CompressError."""
