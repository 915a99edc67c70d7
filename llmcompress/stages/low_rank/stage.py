"""Write linears as products of low rank; layers can share the second factor, the basis of the inputs.

The basis of a group of adjacent layers is the best for the outputs of all of them, on the inputs that the
full model gives them. The coefficients are each layer's own. They are then solved for layer by layer, on the
inputs as they have become and against the full model. With one layer per group nothing is shared: this is
plain low-rank compression, in which the basis too is that of the inputs as they have become. So is it always
for the experts of a mixture, as each reads tokens of its own. A product of low rank has fewer operations as
well as fewer bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.algorithms.hessian import Moments, retarget
from llmcompress.algorithms.low_rank import coefficients, shared_basis
from llmcompress.architectures.spec import LINEARS
from llmcompress.errors import ModelError
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.integrations.distributed import By
from llmcompress.io.journal import Journal
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.io.units import asked_percent
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import walk
from llmcompress.stages.base import Context, Estimate, Facts, StageResult, Time, Workload
from llmcompress.stages.cost import IN_TURN, SOLVER
from llmcompress.stages.linear_rewriting import (
    Rewriting,
    refused,
    require_known,
    rewriting_memory,
    rewriting_note,
)
from llmcompress.stages.routed_experts import KEEP, ExpertStage, replaced_parameters

STAGE, FOUND = "low_rank", "found"  # entries of the journal


class LowRank(ExpertStage):
    """Writes linears as products of two thin matrices."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "shared or factorised weights"
    rewrites: ClassVar[bool] = True
    combines: ClassVar[bool] = True
    retired: ClassVar[Mapping[str, str]] = {"basis": "it is called layers_per_basis"}

    layers_per_basis: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        default=1, description="number of adjacent layers that share a basis; 1 is plain low rank"
    )
    rank: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="rank of every product, in place of `keep`"
    )
    keep: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="share of the parameters of the linears that stays; the ranks follow from it",
    )
    skip: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="names of linears to keep; `*` matches anything",
    )
    experts: Literal["low_rank", "keep"] = Field(
        default="low_rank",
        description="whether the experts of a mixture become products too; routers are kept",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> LowRank:
        if (self.rank is None) == (self.keep is None):
            raise ValueError("give rank or keep, one of them")
        return self

    def groups(self, model: LayerwiseModel) -> list[list[int]]:
        """The groups of layers that share a basis: neighbours of the same widths."""
        groups: list[list[int]] = []
        for index in range(len(model.layers)):
            last = groups[-1] if groups else []
            alike = last and model.sizes_of(last[0]) == model.sizes_of(index)
            if alike and len(last) < self.layers_per_basis:
                last.append(index)
            else:
                groups.append([index])
        return groups

    def sharing(self, model: LayerwiseModel) -> Iterator[list[str]]:
        """Yield the linears that share a basis, by full name: the same of each layer of a group. An expert
        has its own."""
        for group in self.groups(model):
            layers = [(model.layer_name(index), model.anatomy.of_layer(index)) for index in group]
            for linear in (linear for consumers in layers[0][1].consumers for linear in consumers):
                yield [f"{layer}.{linear}" for layer, _ in layers]
            for layer, anatomy in layers:
                for linears in anatomy.expert_linears:
                    yield from ([f"{layer}.{linear}"] for linear in linears)

    def choose(self, model: LayerwiseModel) -> tuple[dict[str, FactoredLayout], dict[str, str]]:
        """Return the layout of each linear, by full name, and those to keep with the reason. Raises
        ModelError if none is left."""
        if self.layers_per_basis > len(model.layers):
            raise ModelError(
                f"layers_per_basis: {self.layers_per_basis} is more than the {len(model.layers)} layers of "
                "this model; use fewer"
            )
        ours, shapes = model.layer_linears, dict(model.linear_maps())
        require_known("skip", self.skip, ours)
        chosen: dict[str, FactoredLayout] = {}
        kept = {name: why for name in shapes if (why := self._refused(name, model))}
        for names in self.sharing(model):
            if any(name not in shapes or name in kept for name in names):
                kept |= {
                    name: "another of its group is kept"
                    for name in names
                    if name in shapes and name not in kept
                }
                continue
            (R, C), count = shapes[names[0]], len(names)
            rank = self.rank or int((self.keep or 0) * count * R * C / (count * R + C))
            fewer = rank >= 1 and rank * (count * R + C) < count * R * C and rank <= min(C, count * R)
            why = f"a product of rank {rank} for {R} x {C} weights stores no less"
            if fewer:
                chosen |= dict.fromkeys(names, FactoredLayout("basis", rank))
            else:
                kept |= dict.fromkeys(names, why if rank else f"keep leaves no rank of {R} x {C} weights")
        kept |= model.kept_weights | dict.fromkeys(model.expert_weights, KEEP)
        if not chosen:
            why = next(why for name, why in kept.items() if name in ours)
            raise ModelError(f"no linear of this model becomes smaller ({why}); use another rank or keep")
        return chosen, kept

    def _refused(self, name: str, model: LayerwiseModel) -> str | None:
        """Why a linear stays as it is, whatever its shape, or None."""
        return refused(name, model, self.skip, experts=self.takes_experts)

    @property
    def needs(self) -> int:
        """What each linear reads."""
        return LINEARS

    @property
    def leaves(self) -> str:
        """The rank of linears, or the share of their parameters that stays."""
        return (
            f"linears of rank {self.rank}"
            if self.rank
            else f"{asked_percent(self.keep or 1)} of the parameters of linears"
        )

    @property
    def takes_experts(self) -> bool:
        """Whether experts become products too."""
        return self.experts == "low_rank"

    @property
    def needs_plugin(self) -> bool:
        """True: products are in a layout of the plug-in."""
        return True

    @property
    def divides(self) -> By:
        """The batches of the text."""
        return "batch"

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """How linears are written, and which bases are shared."""
        return StageResult(*self.choose(model), self.ties(model), removed=replaced_parameters(model))

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of moments, bases and coefficients."""
        chosen, kept = self.choose(model)
        shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
        # a basis that layers share is found in a pass of its own
        alone = self.layers_per_basis == 1
        time = work.passes(IN_TURN if alone else IN_TURN + 2, half=work.half) + work.moments(
            2, half=work.half
        )
        time += work.routed(2, half=work.half, factors=2)
        time += work.factors(2) + work.products(7, shapes.values())
        # the eigenvectors of a basis
        time += Time({SOLVER: sum(9 * work.machine.factor(C) for _, C in shapes.values())})
        return Estimate(
            stage=f"low_rank (a basis for {self.layers_per_basis} layers)",
            parameters=left.parameters(),
            size_bytes=work.size_bytes - model.stored_bytes() + left.stored_bytes(),
            peak_memory_bytes=rewriting_memory(model, work, chosen),
            time=time,
            notes=rewriting_note(shapes, kept),
        )

    def ties(self, model: LayerwiseModel, journal: Journal | None = None) -> dict[str, str]:
        """The stored tensors that are other tensors, by name: the shared bases."""
        chosen, _ = self.choose(model)
        pairs = [(name, names[0]) for names in self.sharing(model) for name in names[1:]]
        return {f"{name}.weight_right": f"{source}.weight_right" for name, source in pairs if name in chosen}

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Rewrite every layer that the journal does not hold yet, and leave its tensors and facts there."""
        (chosen, kept), groups = self.choose(model), self.groups(model)
        if self.layers_per_basis > 1:
            self._find(model, context, groups, chosen)
        number_of = {
            model.layer_name(index): number for number, group in enumerate(groups) for index in group
        }

        first_of = {name: names[0] for names in self.sharing(model) for name in names}

        @functools.lru_cache(maxsize=1)  # groups come one after another
        def found(number: int) -> dict[str, Tensor]:
            return context.journal.load(FOUND, number)

        def solve(name: str, W_RC: Tensor, moments: Moments, layout: FactoredLayout) -> FactoredWeight:
            layer = next(layer for layer in number_of if name.startswith(f"{layer}."))
            W_RC = retarget(W_RC.float(), moments)
            if self.layers_per_basis > 1 and name not in model.expert_linears:
                basis_KC = found(number_of[layer])[name.removeprefix(f"{layer}.")].to(W_RC)
            else:
                _, basis_KC = shared_basis([W_RC], [moments.H_CC], layout.rank)
            # one dtype for those that share the basis
            dtype = model.dtype_of(f"{first_of[name]}.weight")
            basis_KC = basis_KC.to(dtype).to(W_RC)  # as it will be read back
            left_RK = coefficients(W_RC, moments.H_CC, basis_KC)
            return FactoredWeight(layout, left_RK=left_RK, right_KC=basis_KC).to(dtype)

        facts = Rewriting(STAGE, f"low_rank (a basis for {self.layers_per_basis} layers)", solve).done(
            model, context, chosen, kept
        )
        shared = self.ties(model)
        facts.linears = [
            linear.model_copy(update={"format": f"{linear.format}, shared"})
            if f"{linear.name}.weight_right" in shared
            else linear
            for linear in facts.linears
        ]
        facts.details = self.model_dump(exclude={"skip"}, exclude_none=True)
        return facts

    def _find(
        self,
        model: LayerwiseModel,
        context: Context,
        groups: Sequence[Sequence[int]],
        chosen: dict[str, FactoredLayout],
    ) -> None:
        """Journal the bases of every group, by linear, from the inputs of its layers in the full model."""
        journal = context.journal
        if all(journal.has(FOUND, number) for number in range(len(groups))):
            return
        number_of = {index: number for number, group in enumerate(groups) for index in group}
        weights: dict[str, list[Tensor]] = {}
        moments: dict[str, list[Tensor]] = {}
        for layer in context.track(
            walk(model, context.data.calibration, processes=context.processes),
            "low_rank (find bases)",
            len(model.layers),
        ):
            read = layer.moments()  # experts have bases of their own
            layouts = {linear: layout for linear, layout in layer.own(chosen).items() if linear in read}
            for linear in layouts:
                weights.setdefault(linear, []).append(layer.weight(linear))
                moments.setdefault(linear, []).append(read[linear].H_CC)
            number = number_of[layer.index]
            if layer.index == groups[number][-1]:
                bases = {
                    name: shared_basis(weights[name], moments[name], layouts[name].rank)[1].cpu()
                    for name in layouts
                }
                journal.save(FOUND, number, bases)
                weights, moments = {}, {}
