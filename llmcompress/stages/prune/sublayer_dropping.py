"""Remove the attention or the feed-forward part of a layer alone: those without which predictions change
least.

A removed part has a width of zero: no heads, or no neurons. So the layers of the model differ in width, and
it loads once llmcompress is imported. The attention of the first layer of each kind stays, because caches
read the length of a text from it. The first ffn stays too, because a model without any can't be built. A
layer that loses both parts passes its input on, and may as well be cut by `axis: layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from llmcompress.architectures.shape_grammar import Spelling, take
from llmcompress.errors import ModelError
from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Part
from llmcompress.stages.base import Context
from llmcompress.stages.prune.allocation import Widths
from llmcompress.stages.prune.budget import PruningBudget
from llmcompress.stages.prune.layer_dropping import greedy

PARTS = {"kv": "attention", "ffn": "ffn"}  # axis on which a removed part has no units


class DroppedSublayers(JournalFacts):
    """The removed parts in order, as a layer and an axis, and KL in nats/token after each."""

    gone: tuple[tuple[int, str], ...]
    kl_nats: tuple[float, ...]


def candidates(model: LayerwiseModel) -> list[tuple[int, str]]:
    """The parts that can be removed, as a layer and an axis. Errors: ModelError if there are none."""
    if model.anatomy.cuts is not None:
        raise ModelError(
            f"layers of a {model.anatomy.family} model can't have widths of their own; use axis: layer"
        )
    # without the axes q and d, heads divide up the hidden width
    anatomy, heads = model.anatomy, {"q", "d"} <= model.sizes.keys()
    # Conv1D of transformers takes no empty input
    consumers = {axis: anatomy.consumer_of(axis) for axis in PARTS}
    axes = [
        axis
        for axis, name in consumers.items()
        if name and name not in anatomy.conv1d and (heads or axis != "kv")
    ]
    kinds: Sequence[str] = getattr(model.config, "layer_types", None) or [""] * len(model.layers)
    first = {"kv": {kinds.index(kind) for kind in kinds}, "ffn": {0}}
    found = [
        (index, axis)
        for index in range(len(model.layers))
        for axis in axes
        if model.sizes_of(index)[axis] and index not in first[axis]
    ]
    if not found:
        raise ModelError(
            f"no attention or ffn of this {anatomy.family} model can be taken out alone; use axis: layer"
        )
    return found


def sizes(model: LayerwiseModel) -> Widths:
    """The units that each layer has on the axes of parts."""
    axes = dict.fromkeys(axis for _, axis in candidates(model))
    return {axis: model.widths_of(axis) for axis in axes}


def widths(model: LayerwiseModel, gone: Sequence[tuple[int, str]]) -> Widths:
    """The sizes without the parts in `gone`."""
    return {
        axis: tuple(0 if (index, axis) in gone else size for index, size in enumerate(counts))
        for axis, counts in sizes(model).items()
    }


def require_removable(model: LayerwiseModel, gone: Sequence[tuple[int, str]]) -> None:
    """Refuse to take out parts that must stay. Errors: ModelError."""
    every = candidates(model)
    if kept := [part for part in gone if part not in every]:
        index, axis = kept[0]
        raise ModelError(f'keep 0 of axis "{axis}" in layer {index}, where it must stay; keep at least 1')


def enough(model: LayerwiseModel, budget: PruningBudget, gone: Sequence[tuple[int, str]]) -> bool:
    """Whether as many parts are gone as the stage asks for. Errors: ModelError if more would have to go than
    can."""
    every = candidates(model)
    if budget.keep is not None:
        whole = isinstance(budget.keep, float) and budget.keep == 1
        return len(gone) >= (0 if whole else len(every) - budget.count("sublayer", len(every), 1))
    reached = budget.spent(model, widths(model, gone))
    if reached > budget.allowed(model) and len(gone) == len(every):
        raise budget.refuse(model, reached)
    return reached <= budget.allowed(model)


def guess(model: LayerwiseModel, budget: PruningBudget) -> list[tuple[int, str]]:
    """The last parts, as many as the stage asks for, for a plan."""
    gone: list[tuple[int, str]] = []
    for part in reversed(candidates(model)):
        if enough(model, budget, gone):
            break
        gone.append(part)
    enough(model, budget, gone)
    return gone


def find(model: LayerwiseModel, context: Context, budget: PruningBudget) -> DroppedSublayers:
    """Find which parts to remove: each time the one that costs least, or for a budget, least per parameter.

    Source: SLEB, Song et al. 2024, arXiv:2402.09025, Algorithm 1, with parts in place of layers and the KL
    divergence from the full model in place of the perplexity.
    """
    axis_of = {model.anatomy.consumer_of(axis): axis for axis in PARTS}
    parts: list[Part] = [(index, model.anatomy.consumer_of(axis)) for index, axis in candidates(model)]

    def named(gone: Sequence[Part]) -> list[tuple[int, str]]:
        return [(index, axis_of[reader]) for index, reader in gone]

    def cost(part: Part) -> float:
        if budget.keep is not None:
            return 1.0
        return float(budget.spent(model) - budget.spent(model, widths(model, named([part]))))

    steps = len(guess(model, budget))
    gone, kl_nats = greedy(
        model, context, parts, lambda found: not enough(model, budget, named(found)), steps, cost
    )
    return DroppedSublayers(gone=tuple(named(gone)), kl_nats=tuple(kl_nats))


def cut(layer: DecoderLayer, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The empty tensors of the removed parts, by their names in the layer."""
    return {
        name: take(layer.module.get_parameter(name).data, row, layer.sizes, axis, [])
        for axis, count in counts.items()
        for name, row in layer.anatomy.layer.items()
        if not count and layer.sizes.get(axis) and axis in Spelling.parse(row).axes
    }


def spoken(gone: Sequence[tuple[int, str]], model: LayerwiseModel) -> str:
    """The removed parts, in words."""
    said = [
        f"{PARTS[axis]} of layer{'s' if len(of) > 1 else ''} {', '.join(map(str, of))}"
        for axis in PARTS
        if (of := sorted(index for index, other in gone if other == axis))
    ]
    return (
        f"{len(gone)} of {len(candidates(model))} sublayers go: {' and '.join(said)}"
        if gone
        else "all sublayers stay"
    )
