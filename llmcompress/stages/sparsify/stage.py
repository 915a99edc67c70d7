"""Set single weights to zero: a share of them, or two of every four in a row, and store the rest without the zeros' bytes.

Each layer is done with the inputs that the layers before it give, and within it the linears that read one input after
another, as in `quantize`. `magnitude` takes the smallest weights away and is the classical baseline, nothing more: no inputs
are looked at. `wanda` asks how large the inputs are that a weight meets; what stays is as it was. `sparsegpt` also has what
stays make up for what went, against the full model's outputs. The last two put the mean output right through the bias,
where there is one. A layer that the journal holds is not done again.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from llmcompress.algorithms.hessian import Moments, retarget
from llmcompress.algorithms.saliency import wanda_weights
from llmcompress.algorithms.sparsegpt import keep_mask, sparsegpt
from llmcompress.formats.base import DTYPES
from llmcompress.formats.sparse import SparseLayout, SparseWeight
from llmcompress.io.journal import Journal
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.stages.base import Context, Facts
from llmcompress.stages.linear_rewriting import Rewriting, rewritable

STAGE = "sparsify"
BASE_60 = {124: "2:4", 248: "4:8"}  # what YAML takes 2:4 and 4:8 for, where they are not quoted


class Sparsify(BaseModel):
    """`prune: {pattern, keep, score, skip}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str] = STAGE

    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        description="which weights may become zero: any, or all but 2 of every 4 (4 of every 8) neighbours in a row"
    )
    keep: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="unstructured: share that stays")
    score: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        default="sparsegpt", description="what a weight is worth; sparsegpt also adjusts those that stay"
    )
    skip: tuple[str, ...] = Field(default=(), strict=False, description="linears to keep, by name; * matches anything")

    @model_validator(mode="before")
    @classmethod
    def _no_axis(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and "axis" in entry:
            raise ValueError("axis cuts whole units and pattern single weights; give one of them, or two prune stages")
        return entry

    @field_validator("pattern", mode="before")
    @classmethod
    def _not_base_60(cls, given: Any) -> Any:
        return BASE_60.get(given, given) if type(given) is int else given

    @model_validator(mode="after")
    def _fits_together(self) -> Sparsify:
        if self.pattern == "unstructured" and self.keep is None:
            raise ValueError("pattern: unstructured needs keep, the share of the weights that stays, as 0.5")
        if self.pattern != "unstructured" and self.keep is not None:
            raise ValueError(f"keep is for pattern: unstructured; {self.pattern} says how many stay")
        return self

    def choose(self, model: LayerwiseModel) -> tuple[dict[str, SparseLayout], dict[str, str]]:
        """How each linear that loses weights is written, by full name, and those to keep with the reason.

        Raises ModelError where none is left.
        """

        def layout(name: str) -> SparseLayout:
            dtype = str(model.dtype_of(f"{name}.weight")).removeprefix("torch.")
            return SparseLayout(self.pattern, dtype if dtype in DTYPES else "float32", self.keep)

        return rewritable(model, layout, self.skip, "lose weights ({why}); try another keep or skip")

    def settled(self, model: LayerwiseModel, journal: Journal) -> tuple[dict[str, SparseLayout], dict[str, str]]:
        """As `choose`: there is nothing that only `apply` finds out."""
        return self.choose(model)

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Do every layer that the journal does not hold yet; leave its tensors and facts there."""
        chosen, kept = self.choose(model)
        rewriting = Rewriting(STAGE, f"prune ({self.pattern}, {self.score})", self._solve, self.score != "magnitude")
        facts = rewriting.done(model, context, chosen, kept)
        facts.details = self.model_dump(exclude={"skip"}, exclude_none=True) | facts.details
        return facts

    def _solve(self, name: str, W_RC: Tensor, moments: Moments, layout: SparseLayout) -> SparseWeight:
        """What stays of a linear."""
        keep = layout.choice(W_RC.shape[1])
        if self.score == "sparsegpt":
            W_RC = sparsegpt(retarget(W_RC, moments), moments.H_CC, keep)
            return SparseWeight.of(W_RC, stays(W_RC, layout), layout)
        score_RC = wanda_weights(W_RC, moments.H_CC.diagonal().sqrt()) if self.score == "wanda" else W_RC.abs()
        return SparseWeight.of(W_RC, keep_mask(score_RC, keep), layout)


def stays(W_RC: Tensor, layout: SparseLayout) -> Tensor:
    """The mask of a weight that has its zeros already; where it has more, as the base may, the first of them stay too."""
    if layout.allows(mask_RC := W_RC != 0):
        return mask_RC
    keep = layout.choice(W_RC.shape[1])
    return keep_mask(W_RC.abs() if layout.keep is None else W_RC.abs().reshape(1, -1), keep).view_as(W_RC)
