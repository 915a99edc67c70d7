"""Let the weights of a linear share a few values: a codebook for each row, for some rows or for the whole
linear.

The values, and the value that each weight takes, are solved for as the codes of a quantisation are
(`algorithms.codebook`), under the second moments of the inputs and against the full model. The indices are
stored packed, beside the codebooks; a product looks the values up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.algorithms.hessian import Factors, Moments
from llmcompress.architectures.spec import LINEARS
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.registry import StoredWeight
from llmcompress.integrations.distributed import By
from llmcompress.io.journal import Journal
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, StageResult, Time, Workload
from llmcompress.stages.cost import ERRORS, FACTORS, IN_TURN, SOLVER
from llmcompress.stages.linear_rewriting import Rewriting, rewritable, rewriting_memory, rewriting_note
from llmcompress.stages.routed_experts import ExpertStage, replaced_parameters

STAGE = "codebook"


class Codebook(ExpertStage):
    """Stores the weights of linears as indices into a few values."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "coded weights"
    rewrites: ClassVar[bool] = True
    has_levels: ClassVar[bool] = True
    retired: ClassVar[Mapping[str, str]] = {"codebook": "it is called entries"}

    entries: Literal[4, 8, 16, 256] = Field(
        description="number of values in a codebook: 2, 3, 4 or 8 bits per index",
    )
    per: Literal["row", "group", "linear"] = Field(
        default="row", description="which weights share a codebook; `group`: those of adjacent `rows`"
    )
    rows: Annotated[int, Field(ge=2, le=MOST_COUNTED)] | None = Field(
        default=None, description="number of adjacent rows that share a codebook, with `per: group`"
    )
    skip: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="names of linears to keep; `*` matches anything",
    )
    experts: Literal["codebook", "keep"] = Field(
        default="codebook",
        description="whether the experts of a mixture have codebooks too; routers are kept",
    )

    @model_validator(mode="after")
    def _rows_of_groups(self) -> Codebook:
        if self.rows is not None and self.per != "group":
            raise ValueError(f"rows is for per: group, not {self.per}")
        if self.rows is None and self.per == "group":
            raise ValueError("per: group needs rows, how many adjacent rows share a codebook, as 4")
        return self

    def layout(self, model: LayerwiseModel, linear: str) -> CodebookLayout:
        """The layout of a linear of a model, by its full name."""
        dtype = "bfloat16" if model.dtype_of(f"{linear}.weight") is torch.bfloat16 else "float16"
        return CodebookLayout(self.entries, {"row": 1, "group": self.rows, "linear": None}[self.per], dtype)

    def choose(self, model: LayerwiseModel) -> tuple[dict[str, CodebookLayout], dict[str, str]]:
        """Return the layout of each linear, by full name, and those to keep with the reason. Raises
        ModelError if none is left."""
        return rewritable(
            model,
            partial(self.layout, model),
            self.skip,
            "have a codebook ({why}); leave the stage",
            experts=self.takes_experts,
        )

    @property
    def needs(self) -> int:
        """What each linear reads."""
        return LINEARS

    @property
    def weight_bits(self) -> tuple[float, float]:
        """The bits of an index; the few levels are not counted."""
        index = math.ceil(math.log2(self.entries))
        return index, index

    @property
    def kernel(self) -> str:
        """The format of all its linears."""
        return "codebook"

    @property
    def leaves(self) -> str:
        """How many values weights can have."""
        return f"{self.entries} values per {self.per}, {self.weight_bits[0]:g} bits per weight"

    @property
    def takes_experts(self) -> bool:
        """Whether experts have codebooks too."""
        return self.experts == "codebook"

    @property
    def needs_plugin(self) -> bool:
        """True: indices and levels are in a layout of the plug-in."""
        return True

    @property
    def takes_all(self) -> bool:
        """Whether it codes every linear, so that another code finds none."""
        return self.skip == () and self.takes_experts

    @property
    def divides(self) -> By:
        """The batches of the text."""
        return "batch"

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How linears are written."""
        return StageResult(*self.choose(model), removed=replaced_parameters(model))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of moments, codes and levels."""
        chosen, kept = self.choose(model)
        shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
        bits = {name: model.bits_of(name) - chosen[name].bits(shapes[name]) for name in shapes}
        saved = int(sum(math.prod(shapes[name]) * fewer for name, fewer in bits.items()) / 8)
        time = work.passes(IN_TURN, half=work.half) + work.moments(2, half=work.half)
        time += work.routed(2, half=work.half)
        time += Time({FACTORS: sum(work.machine.factor(C) for _, C in shapes.values())})
        solvers = (work.machine.solver(shapes[name], CodebookScheme(chosen[name])) for name in shapes)
        time += Time({SOLVER: sum(solvers)})
        time += work.products(3, shapes.values())  # the corrected weight
        time += work.products(2, shapes.values(), what=ERRORS)
        return Estimate(
            stage=f"codebook ({self.entries} entries)",
            parameters=left.parameters(),
            size_bytes=work.size_bytes - model.stored_bytes() + left.stored_bytes() - saved,
            peak_memory_bytes=rewriting_memory(model, work, chosen),
            time=time,
            notes=rewriting_note(shapes, kept),
        )

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Rewrite every layer that the journal does not hold yet, and leave its tensors and facts there."""
        chosen, kept = self.choose(model)
        facts = Rewriting(STAGE, f"codebook ({self.entries} entries)", _solve).done(
            model, context, chosen, kept
        )
        facts.details = {**self.model_dump(exclude={"skip"}, exclude_none=True), **facts.details}
        return facts


def _solve(name: str, W_RC: Tensor, moments: Moments, layout: CodebookLayout) -> StoredWeight:
    """Solve for the codes and levels of a linear against the full model's outputs. Errors: Overflow for
    weights beyond the levels' dtype."""
    return CodebookScheme(layout).solve(W_RC, Factors(moments)).stored
