"""Set single weights to zero, a share of them or two of every four in a row, and store the rest without the
zeros' bytes.

Each layer gets the inputs that the layers before it give. Within it, the linears that read one input come
before those that read the next, as in `quantize`. `magnitude` removes the smallest weights without looking at
the inputs; it is the classical baseline, nothing more. `wanda` also takes into account how large the inputs
of a weight are; the weights that stay are unchanged. `sparsegpt` also adjusts the weights that stay to make
up for those removed, against the full model's outputs. The last two correct the mean output through the bias,
if there is one. A layer that the journal holds is not done again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from llmcompress.algorithms.hessian import Moments, retarget
from llmcompress.algorithms.saliency import wanda_weights
from llmcompress.algorithms.sparsegpt import keep_mask, sparsegpt
from llmcompress.architectures.spec import LINEARS
from llmcompress.formats.base import DTYPES
from llmcompress.formats.sparse import SparseLayout, SparseWeight
from llmcompress.integrations.distributed import By
from llmcompress.io.journal import Journal
from llmcompress.io.units import asked_percent
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.cost import IN_TURN
from llmcompress.stages.linear_rewriting import Rewriting, rewritable
from llmcompress.stages.routed_experts import ExpertStage, moments_bytes, replaced_parameters

STAGE = "sparsify"
BASE_60 = {124: "2:4", 248: "4:8"}  # what YAML reads 2:4 and 4:8 as if they are not quoted


class Sparsify(ExpertStage):
    """Sets single weights to zero and stores those that stay with a bitmask."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "sparse weights"
    rewrites: ClassVar[bool] = True

    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        description="`unstructured`: any weights; `2:4`, `4:8`: all but 2 of 4 (4 of 8) neighbours in a row"
    )
    keep: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of the weights that stay, with `pattern: unstructured`"
    )
    score: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        default="sparsegpt", description="how weights are ranked; `sparsegpt` also adjusts those that stay"
    )
    skip: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="names of linears to keep; `*` matches anything",
    )
    experts: Literal["sparsify", "keep"] = Field(
        default="sparsify",
        description="whether the experts of a mixture lose weights too; routers are kept",
    )

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
        """Return the layout of each linear that loses weights, by full name, and those to keep with the
        reason.

        Raises ModelError if none is left.
        """

        def layout(name: str) -> SparseLayout:
            dtype = str(model.dtype_of(f"{name}.weight")).removeprefix("torch.")
            return SparseLayout(self.pattern, dtype if dtype in DTYPES else "float32", self.keep)

        becomes = "lose weights ({why}); try another keep or skip"
        return rewritable(model, layout, self.skip, becomes, experts=self.takes_experts)

    @property
    def needs(self) -> int:
        """What each linear reads."""
        return LINEARS

    @property
    def leaves(self) -> str:
        """The share of the weights that stays."""
        return (
            "50 % of the weights, " + self.pattern
            if self.keep is None
            else f"{asked_percent(self.keep)} of the weights"
        )

    @property
    def takes_experts(self) -> bool:
        """Whether experts lose weights too."""
        return self.experts == "sparsify"

    @property
    def needs_plugin(self) -> bool:
        """True: masks and values are in a layout of the plug-in."""
        return True

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse a place before another stage that changes weights. Errors: ValueError."""
        if other := next((stage.name for stage in before if stage.rewrites), None):
            raise ValueError(
                f"sparsify comes before {other}: weights that are shared, products or codes can't be cut "
                "any more"
            )
        if later := [stage for stage in after if not stage.keeps_weights]:
            why = "rounding would move its zeros" if later[0].quantizes else "its zeros are stored by place"
            raise ValueError(
                f"sparsify is the last stage: {why}; cut whole units before it, and quantise none"
            )
        super().require_place(before, after)

    @property
    def divides(self) -> By:
        """The batches of the text."""
        return "batch"

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How linears that lose weights are written."""
        return StageResult(*self.choose(model), removed=replaced_parameters(model))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of moments and of the solver."""
        chosen, kept = self.choose(model)
        shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
        parameters, inner, layers = model.parameters(), model.inner_parameters(), len(model.layers)
        saved = sum(
            math.prod(shape) * (model.bits_of(name) - chosen[name].bits(shape))
            for name, shape in shapes.items()
        )
        calibrated = self.score != "magnitude"
        streams = 2 if calibrated else 1
        factors = {"magnitude": 0, "wanda": 1, "sparsegpt": 2}[self.score]
        time = work.passes(IN_TURN if calibrated else 2, half=work.half) + work.moments(
            streams, half=work.half
        )
        time += work.routed(streams, half=work.half, factors=factors)
        time += work.factors(factors)  # for the corrected weight, and for what the others make up for
        time += work.products(2 + 3 * factors, shapes.values())  # the measured error too
        states = work.tokens * model.hidden_size * (4 if calibrated else 2)
        outer, widest = parameters - inner, max(C for _, C in shapes.values())
        reasons = "; ".join(sorted(set(kept.values())))
        return Estimate(
            stage=f"sparsify ({self.pattern}, {self.score})",
            parameters=parameters - sum(R * (C - chosen[name].kept(C)) for name, (R, C) in shapes.items()),
            size_bytes=int(model.stored_bytes() - saved / 8),
            peak_memory_bytes=4 * (4 * inner // layers + outer + states + 4 * widest**2)
            + moments_bytes(model, chosen),
            time=time,
            notes=(f"{len(shapes)} linears lose weights, {len(kept)} are kept ({reasons})",) if kept else (),
        )

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Rewrite every layer that the journal does not hold yet, and leave its tensors and facts there."""
        chosen, kept = self.choose(model)
        rewriting = Rewriting(
            STAGE, f"sparsify ({self.pattern}, {self.score})", self._solve, self.score != "magnitude"
        )
        facts = rewriting.done(model, context, chosen, kept)
        facts.details = {**self.model_dump(exclude={"skip"}, exclude_none=True), **facts.details}
        return facts

    def _solve(self, name: str, W_RC: Tensor, moments: Moments, layout: SparseLayout) -> SparseWeight:
        """Return the weights of a linear that stay."""
        keep = layout.choice(W_RC.shape[1])
        if self.score == "sparsegpt":
            W_RC = sparsegpt(retarget(W_RC, moments), moments.H_CC, keep)
            return SparseWeight.of(W_RC, stays(W_RC, layout), layout)
        score_RC = (
            wanda_weights(W_RC, moments.H_CC.diagonal().sqrt()) if self.score == "wanda" else W_RC.abs()
        )
        return SparseWeight.of(W_RC, keep_mask(score_RC, keep), layout)


def stays(W_RC: Tensor, layout: SparseLayout) -> Tensor:
    """The mask of a weight that has its zeros already. If it has more than the layout, as the base may, the
    first zeros count as staying."""
    if layout.allows(mask_RC := W_RC != 0):
        return mask_RC
    keep = layout.choice(W_RC.shape[1])
    return keep_mask(W_RC.abs() if layout.keep is None else W_RC.abs().reshape(1, -1), keep).view_as(W_RC)
