"""A budget in place of stages: `pipeline.search` finds the stages of the best model within it before a run.

It is an entry of recipes and never runs: whoever runs a recipe puts what the search found in its place, so
that the recipe of the result has every choice spelled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from llmcompress.architectures.spec import LINEARS
from llmcompress.errors import ModelError
from llmcompress.exports.target import TargetName
from llmcompress.io.journal import Journal
from llmcompress.io.units import bytes_of, rate_of, share_of
from llmcompress.io.user_paths import shortened
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.report.counted import Counted
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload

STAGE = "budget"
Loader = Literal["transformers", "llmcompress", TargetName]
EXPORTED: tuple[TargetName, ...] = get_args(TargetName)  # what loads an export of the result
Chosen = Literal["quantize", "prune"]
CHOICES: tuple[Chosen, ...] = ("quantize", "prune")  # what may be done to a layer, by default


def choices(chosen: Sequence[str] | None, counted: Counted, loads_with: Loader) -> Sequence[str]:
    """What may be done to a layer, if `chosen` is what the user says of it."""
    widths = counted == "size" and loads_with not in EXPORTED
    return chosen or (CHOICES if widths else ("quantize",))


def unfit(chosen: Sequence[str], counted: Counted, loads_with: Loader) -> str | None:
    """Why a search within such a budget can't choose among these, or None."""
    if unknown := [word for word in chosen if word not in CHOICES]:
        return f"has {shortened(unknown[0])}, which is no choice; use {' or '.join(CHOICES)}"
    if "quantize" not in chosen:
        return "needs quantize; to prune alone, write a recipe with prune: {axis: ffn, size: ...}"
    if "prune" in chosen and counted != "size":
        return f"has prune, but widths are chosen within a size, not within {counted}; leave prune out"
    if "prune" in chosen and loads_with in EXPORTED:
        return f"has prune, but no widths are chosen for {loads_with}; leave prune out"
    return None


class Budget(Stage):
    """Finds the best model within a size, a memory or a time per token: the format of each linear, and the
    width of each layer."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "coded weights"
    quantizes: ClassVar[bool] = True
    newer: ClassVar[frozenset[str]] = frozenset({"choose_among"})

    size: str | None = Field(
        default=None,
        description="bytes of the files of the result, like `60MB`, or a share of the base's, like `40%`",
    )
    memory: str | None = Field(
        default=None,
        description="bytes in memory when the result generates, with the cache of `context` tokens, like "
        "`2GB`, or a share of the base's, like `40%`",
    )
    tokens_per_s: str | float | None = Field(
        default=None,
        description="least speed of writing at batch size 1 on this machine: tokens/s like `30`, or a "
        "multiple of the base's, like `1.5x`",
    )
    context: int | None = Field(
        default=None, ge=1, le=10**9, description="tokens in the cache that `memory` counts; 2048 if not set"
    )
    loads_with: Loader = Field(
        default="llmcompress",
        description="what is to load the result: `transformers` alone, or `llmcompress`, with all formats, "
        "or the `export` that is to hold it",
    )

    choose_among: Annotated[tuple[Chosen, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="what may be done to a layer: `quantize` gives each linear a format, `prune` each layer "
        "its neurons and heads, within a size alone, and not for exports; by default all that is possible",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        given = [name for name in get_args(Counted) if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"and got {' and '.join(given)}" if given else "and got none"
            raise ValueError(f"a budget is one of {', '.join(get_args(Counted))}, {told}")
        if self.counted == "tokens_per_s":
            if not rate_of(self.asked):
                raise ValueError(
                    f"tokens_per_s {self.asked} is no speed; write tokens/s like 30, or a multiple of the "
                    "base's like 1.5x"
                )
        elif not (bytes_of(self.asked) or share_of(self.asked)):
            raise ValueError(
                f"{self.counted} {self.asked} is no size; write bytes like 60MB, or a share of the base's "
                "like 40%"
            )
        if self.context is not None and self.memory is None:
            raise ValueError("context is the length of the cache that memory counts; leave it out")
        if self.choose_among is not None and (
            wrong := unfit(self.choose_among, self.counted, self.loads_with)
        ):
            raise ValueError(f"choose_among {wrong}")
        return self

    @property
    def counted(self) -> Counted:
        """What the budget is of."""
        given: list[Counted] = [name for name in get_args(Counted) if getattr(self, name) is not None]
        return given[0]

    @property
    def asked(self) -> str:
        """What is allowed of it."""
        value = getattr(self, self.counted)
        return value if isinstance(value, str) else f"{value:g}"

    @property
    def needs(self) -> int:
        """What each linear reads."""
        return LINEARS

    @property
    def leaves(self) -> str:
        """What is allowed."""
        words = {
            "size": "at most {}",
            "memory": "at most {} in memory",
            "tokens_per_s": "tokens/s of at least {}",
        }
        return words[self.counted].format(self.asked)

    @property
    def needs_plugin(self) -> bool:
        """Whether formats of the plug-in are allowed."""
        return self.loads_with != "transformers"

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
