"""search.json, which a search writes beside its recipes: what was found, and the models of one format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from llmcompress.errors import CompressError
from llmcompress.io.safe_parsing import Unreadable, json_of
from llmcompress.io.user_paths import path_of
from llmcompress.report.counted import Counted

FILE = "search.json"
PAGE = "search.html"
LARGEST = 1 << 26  # bytes
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WayFacts(_Facts):
    """How many linears are stored in a way, their bytes on disk, and their expected loss in nats/token."""

    way: str
    linears: NonNegativeInt
    size_bytes: NonNegativeInt
    nats: float


class FoundFacts(_Facts):
    """The best choice within a budget: `reached` is in what the budget counts, `ways` by linear, `widths` the
    units that each layer keeps by axis."""

    file: str
    asked: str
    reached: Positive
    base_bytes: PositiveInt
    size_bytes: PositiveInt
    expected_nats: float
    outside: str
    rows: tuple[WayFacts, ...]
    ways: Annotated[dict[str, str], Field(min_length=1)]
    widths: dict[str, Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]] = {}
    recipe: dict[str, Any]


def width_words(widths: Mapping[str, Sequence[int]]) -> list[str]:
    """How many units the layers keep, a line for each axis that is cut."""
    found = []
    for axis, kept in widths.items():
        some = [count for count in kept if count] or [0]
        without = f", none in {kept.count(0)} of {len(kept)}" if 0 in kept else ""
        found.append(f"units of {axis} in a layer: {min(some)} to {max(some)}{without}")
    return found


class UniformFacts(_Facts):
    """A model in which every linear that can takes the same way."""

    way: str
    outside: str
    reached: Positive
    size_bytes: PositiveInt
    nats: float


class SearchFacts(_Facts):
    """What a search found. `base` is what the base has of what is counted; `bits` are those of each way;
    `context` are the tokens whose keys and values are in memory."""

    model: str
    counted: Counted
    context: PositiveInt | None = None
    base: Positive
    bits: dict[str, Amount]
    found: Annotated[tuple[FoundFacts, ...], Field(min_length=1)]
    uniform: tuple[UniformFacts, ...]

    @model_validator(mode="after")
    def _knows_every_way(self) -> SearchFacts:
        for found in self.found:
            if unknown := sorted({*found.ways.values()} - self.bits.keys()):
                raise ValueError(f"the way {unknown[0]} is without its bits")
        return self

    @classmethod
    def of(cls, folder: Path) -> SearchFacts:
        """Read the search.json of a folder. Errors: CompressError."""
        file = path_of(folder, "folder") / FILE
        try:
            with file.open("rb") as opened:
                text = opened.read(LARGEST + 1)
            return cls.model_validate(json_of(text, largest=LARGEST))
        except OSError as error:
            why = error.strerror or type(error).__name__
        except Unreadable as error:
            why = str(error)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise CompressError(f"{file} can't be read ({why}); search again to write it anew")
