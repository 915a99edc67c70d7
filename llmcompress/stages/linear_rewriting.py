"""What stages that rewrite linears have in common: which linears a recipe selects, their bits, their order,
and their installation.

The order is that of the computation. Each layer gets the inputs that the rewritten layers before it give.
Within a layer, the linears that read one input are rewritten before those that read the next, so that each
corrects what those before it lost against the full model. The experts of a mixture come last, each under the
tokens that the router sends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.least_squares import bias_shift
from llmcompress.algorithms.quantize_weight import output_error, weight_error
from llmcompress.errors import ModelError
from llmcompress.formats import registry
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.registry import RewrittenLayout, StoredWeight
from llmcompress.formats.sparse import SparseLayout
from llmcompress.io.checkpoint import by_module
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import walk
from llmcompress.stages.base import (
    Context,
    Facts,
    LinearRecord,
    LinearScheme,
    Workload,
    naming_layer,
)
from llmcompress.stages.routed_experts import (
    KEEP,
    ExpertsRecord,
    completed,
    expert_tokens,
    expert_turns,
    kept_experts,
    moments_bytes,
    starved_experts,
)

Shaped = TypeVar("Shaped", SparseLayout, CodebookLayout)  # layouts that depend only on the shape of a linear


def require_known(
    what: str, patterns: Iterable[str], names: Collection[str], axes: Collection[str] = ()
) -> None:
    """Refuse a pattern that matches no linear, and is no axis where axes are allowed. Errors: ModelError."""
    for pattern in patterns:
        if pattern not in axes and not any(fnmatchcase(name, pattern) for name in names):
            also = f", and axes {', '.join(axes)}" if axes else ""
            shown = min(name for name in names if "." in name)
            raise ModelError(
                f'{what} "{pattern}" matches no linear of this model; they have names like {shown}{also}'
            )


def mean_bits(bits: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Mean bits per weight on disk of the linears in `shapes`."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def install(layer: DecoderLayer, written: Mapping[str, LinearScheme], tensors: Mapping[str, Tensor]) -> None:
    """Put the journal's weights and biases into the layer, and round inputs as the kernels do."""
    modules = by_module(tensors)
    for linear, how in written.items():
        parts = registry.parts_of(f"{layer.name}.{linear}", modules.get(f"{layer.name}.{linear}", {}))
        packed = how.read(parts, layer.weight(linear).shape[1])
        layer.set_weight(linear, registry.dequantize(packed, device=layer.device))
        if (bias := tensors.get(f"{layer.name}.{linear}.bias")) is not None:
            layer.set_bias(linear, bias)
        scale = parts["input_scale"].to(layer.device) if "input_scale" in parts else None
        if inputs := how.inputs(scale):
            layer.round_input(linear, inputs)


def refused(name: str, model: LayerwiseModel, skip: Iterable[str], *, experts: bool) -> str | None:
    """Why a stage that rewrites the linears of layers keeps this one as it is, or None. `experts` says
    whether it takes experts."""
    if name == model.anatomy.head:
        return "the head stays"
    if name not in model.layer_linears:
        return model.kept_weights.get(name, "outside the layers")
    if (layout := model.layouts.get(name)) is not None:
        return f"is stored as {layout.format} already"
    if any(fnmatchcase(name, pattern) for pattern in skip):
        return "skip"
    return KEEP if not experts and name in model.expert_linears else None  # an earlier stage divided them


def rewritable(
    model: LayerwiseModel,
    layout_of: Callable[[str], Shaped],
    skip: Sequence[str],
    becomes: str,
    *,
    experts: bool,
) -> tuple[dict[str, Shaped], dict[str, str]]:
    """Return the linears of layers that their layouts accept, by full name, and those to keep with the
    reason.

    `layout_of` is called with the full name of each linear. Raises ModelError if a pattern of `skip` matches
    none, and if no linear is left; `becomes` completes the message "no linear of this model can ...".
    """
    ours = model.layer_linears
    require_known("skip", skip, ours)
    maps = dict(model.linear_maps())
    reasons = {
        name: refused(name, model, skip, experts=experts) or layout_of(name).refusal(shape)
        for name, shape in maps.items()
    }
    kept = {name: why for name, why in reasons.items() if why}
    kept |= model.kept_weights | dict.fromkeys(model.expert_weights, KEEP)
    chosen = {name: layout_of(name) for name in maps if name not in kept}
    if not chosen:
        raise ModelError(f"no linear of this model can {becomes.format(why=next(iter(kept.values())))}")
    return chosen, kept


@dataclass(frozen=True)
class Rewriting:
    """Rewrites linears one after another.

    `stage` is the stage's name in the journal, `what` names the work, and `solve` rewrites one linear.
    `solve` is given the full name, the weight [R, C], the moments of the inputs, and the layout. If not
    `calibrated`, it only uses the weight, and no full model runs beside.
    """

    stage: str
    what: str
    solve: Callable[[str, Tensor, Moments, Any], StoredWeight]
    calibrated: bool = True

    def done(
        self,
        model: LayerwiseModel,
        context: Context,
        chosen: Mapping[str, RewrittenLayout],
        kept: Mapping[str, str],
    ) -> Facts:
        """Rewrite every layer that the journal does not hold yet, and leave its tensors and facts there."""
        journal, layers = context.journal, len(model.layers)
        if not all(journal.has(self.stage, index) for index in range(layers)):
            visited = walk(
                model,
                context.data.calibration,
                reference=self.calibrated,
                half=True,
                processes=context.processes,
            )
            for layer in context.track(visited, self.what, layers):
                layouts = layer.own(chosen)
                if journal.has(self.stage, layer.index):
                    install(layer, layouts, journal.load(self.stage, layer.index))
                else:
                    journal.save(self.stage, layer.index, *self._layer(model, layer, layouts))
        facts = Facts(self.stage, kept=kept)
        records = [journal.facts(self.stage, index, ExpertsRecord) for index in range(layers)]
        facts.add(records)
        facts.notes += starved_experts(records, model.hidden_size)
        shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
        facts.details = {"bits": mean_bits({linear.name: linear.bits for linear in facts.linears}, shapes)}
        return facts

    def _layer(
        self, model: LayerwiseModel, layer: DecoderLayer, layouts: Mapping[str, RewrittenLayout]
    ) -> tuple[dict[str, Tensor], ExpertsRecord]:
        """Rewrite the linears of a layer and put them in place. Returns the changed tensors by full name, and
        their errors.

        The second moments of experts are `completed`, if weights depend on them, and dropped once their
        linears are solved.
        """
        tensors, linears, tokens = dict[str, Tensor](), list[LinearRecord](), dict[str, int]()
        for consumers in [group for group in layer.anatomy.consumers if layouts.keys() & set(group)]:
            moments = layer.moments(consumers, in_turn=True)
            tensors |= self._rewritten(model, layer, layouts, consumers, moments, linears)
        for experts in expert_turns(layer, layouts):
            moments = layer.moments(*experts, in_turn=True)
            tokens |= {linear: read.tokens for linear, read in moments.items()}
            if self.calibrated:
                moments = completed(layer, moments)
            tensors |= self._rewritten(model, layer, layouts, [*moments], moments, linears)
        dense = {name: layer.module.get_parameter(name).data for name in kept_experts(model, layer, layouts)}
        tensors |= model.as_stored(dense, f"{layer.name}.")
        read = expert_tokens(layer, tokens)
        return tensors, ExpertsRecord(name=layer.name, linears=tuple(linears), expert_tokens=read)

    def _rewritten(
        self,
        model: LayerwiseModel,
        layer: DecoderLayer,
        layouts: Mapping[str, RewrittenLayout],
        together: Sequence[str],
        moments: Mapping[str, Moments],
        linears: list[LinearRecord],
    ) -> dict[str, Tensor]:
        """Rewrite those linears of a layer that are solved `together`, and put them in place. Returns the
        changed tensors by full name; the records of the linears are appended to `linears`."""
        tensors: dict[str, Tensor] = {}
        for linear, packed in self._solved(layer, layouts, together, moments).items():
            W_RC, layout, name = layer.weight(linear), layouts[linear], f"{layer.name}.{linear}"
            S_RC = registry.dequantize(packed, device=W_RC.device)
            layer.set_weight(linear, S_RC)
            parts = registry.tensors_of(packed)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            if self.calibrated and (bias := f"{linear}.bias") in layer.anatomy.layer:
                shift_R = bias_shift(W_RC, moments[linear].full_C, S_RC, moments[linear].mean_C)
                dtype = model.dtype_of(f"{name}.bias")
                layer.shift_bias(linear, shift_R, dtype)
                tensors[f"{name}.bias"] = layer.module.get_parameter(bias).data.to(dtype).cpu()
            linears.append(
                LinearRecord(
                    name=name,
                    format=layout.name,
                    bits=8 * sum(part.nbytes for part in parts.values()) / W_RC.numel(),
                    relative_error=output_error(W_RC, S_RC, moments[linear].H_CC),
                    weight_error=weight_error(W_RC, S_RC),
                )
            )
        return tensors

    def _solved(
        self,
        layer: DecoderLayer,
        layouts: Mapping[str, RewrittenLayout],
        together: Sequence[str],
        moments: Mapping[str, Moments],
    ) -> dict[str, StoredWeight]:
        """Solve for linears of which none reads what another gives, divided among the processes."""
        processes, solved = layer.shard.processes, dict[str, StoredWeight]()
        weights = {linear: layer.weight(linear) for linear in together if linear in layouts}
        owners = processes.owners({linear: W_RC.numel() for linear, W_RC in weights.items()})
        for linear, W_RC in weights.items():
            if owners[linear] == processes.rank:
                name = f"{layer.name}.{linear}"
                with naming_layer(name):
                    solved[linear] = self.solve(name, W_RC, moments[linear], layouts[linear])
        if processes.count == 1:
            return solved
        for linear, W_RC in weights.items():
            own = registry.tensors_of(solved[linear]) if linear in solved else {}
            parts = {part: tensor.cpu() for part, tensor in processes.sent(own, owners[linear]).items()}
            solved[linear] = layouts[linear].read(parts, W_RC.shape[1])
        return {linear: solved[linear] for linear in weights}


def rewriting_note(shapes: Collection[str], kept: Mapping[str, str]) -> tuple[str, ...]:
    """A note for a plan: how many linears are rewritten and how many are kept. Empty if none is kept."""
    if not kept:
        return ()
    return (
        f"{len(shapes)} linears are rewritten, {len(kept)} kept ({'; '.join(sorted(set(kept.values())))})",
    )


def rewriting_memory(model: MetaModel, work: Workload, chosen: Collection[str]) -> int:
    """Bytes that rewriting the `chosen` linears holds at once: four copies of a layer, two streams of states
    twice, the widest solver, the second moments of experts."""
    widest = max(C for _, (_, C) in model.linear_maps())
    states: int = 4 * work.tokens * model.hidden_size
    inner = 4 * model.inner_parameters() // len(model.layers)
    return 4 * (inner + states + 6 * widest**2) + moments_bytes(model, chosen)
