"""A size in place of stages: `pipeline.search` finds the stages of the best model within it before a run.

It is an entry of recipes and never runs: whoever runs a recipe puts what the search found in its place, so
that the recipe of the result has every choice spelled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from llmcompress.architectures.spec import LINEARS
from llmcompress.errors import ModelError
from llmcompress.io.journal import Journal
from llmcompress.io.units import bytes_of, share_of
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload

STAGE = "budget"
Chosen = Literal["quantize", "prune"]
CHOICES: tuple[Chosen, ...] = ("quantize", "prune")  # what may be done to a layer, by default


class Budget(Stage):
    """Finds the best model within a size: the format of each linear, and the width of each layer."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "coded weights"
    quantizes: ClassVar[bool] = True
    newer: ClassVar[frozenset[str]] = frozenset({"choose_among"})

    size: str = Field(description="bytes of the result, like `60MB`, or a share of the base's, like `40%`")
    loads_with: Literal["transformers", "llmcompress"] = Field(
        default="llmcompress",
        description="what is to load the result: `transformers` alone, or `llmcompress`, with all formats",
    )

    choose_among: Annotated[tuple[Chosen, ...], Field(min_length=1, strict=False)] = Field(
        default=CHOICES,
        description="what may be done to a layer: `quantize` gives each linear a format, `prune` each layer "
        "its neurons and heads",
    )

    @field_validator("choose_among")
    @classmethod
    def _with_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "quantize" not in value:
            raise ValueError("needs quantize; to prune alone, write prune: {axis: ffn, size: ...}")
        return value

    @field_validator("size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        if not (bytes_of(value) or share_of(value)):
            raise ValueError("is no size; write bytes like 60MB, or a share of the base's like 40%")
        return value

    @property
    def needs(self) -> int:
        """What each linear reads."""
        return LINEARS

    @property
    def leaves(self) -> str:
        """The size."""
        return f"at most {self.size}"

    @property
    def needs_plugin(self) -> bool:
        """Whether formats of the plug-in are allowed."""
        return self.loads_with == "llmcompress"

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse another place than the first. Errors: ValueError."""
        if before:
            raise ValueError("budget comes first, as its search decides what is done to the base")

    def require_possible(self, model: LayerwiseModel, before: Sequence[StageResult], seed: int) -> None:
        """Refuse to be a stage: no search took its place. Errors: ModelError."""
        raise _unsearched()

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """Not known before the search. Errors: ModelError."""
        raise _unsearched()

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Not known before the search. Errors: ModelError."""
        raise _unsearched()

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """The search comes before the run. Errors: ModelError."""
        raise _unsearched()


def _unsearched() -> ModelError:
    return ModelError(
        "what budget stands for is found by a search that reads the weights: `llmcompress run` does it "
        "first, and `llmcompress search` writes the recipe, which can be planned, and applied in memory"
    )
