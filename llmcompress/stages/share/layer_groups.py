"""Find which layers are to share a part: those whose swapping changes the model's predictions least.

Quick scores (cosine of weights, CKA of outputs) only choose what is tried. Then one layer after another is
given up for another layer's weights, each time the one with the least loss, measured on the model with all
swaps so far. Layers that were given up for the same layer are a group. `cka`, `cosine` and `adjacent` decide
without measuring; they are there for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from llmcompress.algorithms.layer_similarity import adjacent, agglomerate, cka, cosines
from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import SAMPLE, Edit, divergences, variants, walk
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context

Likeness = Literal["kl", "cka", "cosine", "adjacent"]
NEAR = 4  # most similar layers, by each score, that are tried in place of a layer
TOKENS = 2048  # tokens on which outputs are compared
AT_ONCE = 24  # swaps in one pass: each has a stream of hidden states of its own


class FoundGroups(JournalFacts):
    """The groups of layers and, if swaps were measured, KL in nats/token after each."""

    groups: tuple[tuple[int, ...], ...]
    kl_nats: tuple[float, ...] | None = None


def find(
    model: LayerwiseModel, context: Context, linears: Sequence[str], count: int, by: Likeness
) -> FoundGroups:
    """Find `count` groups of layers that are to share `linears`. A group starts from the weights of its first
    layer."""
    layers = len(model.layers)
    if by == "adjacent" or count == layers:
        return _found(adjacent(layers, count))
    likeness = _likeness(model, context, linears)
    if by != "kl":
        return _found(agglomerate(likeness[by], count))
    sequences = context.data.calibration
    sequences = first_sequences(sequences, SAMPLE)
    full = variants(model, sequences, {})[None]
    taken = [_with_weights_of(model, linears, source) for source in range(layers)]
    given_up: dict[int, int] = {}  # layer -> the one whose weights it has
    kl_nats: list[float] = []
    for _ in context.track(range(layers - count), "share (layers, kl)", layers - count):
        swaps = _swaps(likeness, layers, given_up)
        edits = {
            pair: {layer: taken[source] for layer, source in moved.items()} for pair, moved in swaps.items()
        }
        losses: dict[tuple[int, int], float] = {}
        for start in range(0, len(edits), AT_ONCE):
            some = dict(list(edits.items())[start : start + AT_ONCE])
            streams = variants(model, sequences, some)
            swapped = {pair: states for pair, states in streams.items() if pair is not None}
            losses |= divergences(model, full, swapped, context.data.unscored)
        best = min(losses, key=lambda pair: (losses[pair], pair))
        given_up = swaps[best]
        kl_nats.append(losses[best])
    kept = [index for index in range(layers) if index not in given_up]
    groups = [
        [index, *sorted(other for other, source in given_up.items() if source == index)] for index in kept
    ]
    return _found(groups, kl_nats)


def _found(groups: Sequence[Sequence[int]], kl_nats: Sequence[float] | None = None) -> FoundGroups:
    return FoundGroups(groups=tuple(map(tuple, groups)), kl_nats=None if kl_nats is None else tuple(kl_nats))


def _swaps(
    likeness: Mapping[str, Tensor], layers: int, given_up: Mapping[int, int]
) -> dict[tuple[int, int], dict[int, int]]:
    """What may be given up next, as a layer and its replacement: all swaps with it. Layers that had that
    layer's weights get the replacement's."""
    left = [index for index in range(layers) if index not in given_up]
    found = {}
    for index in left:
        others = [other for other in left if other != index]
        near = {
            other
            for score in likeness.values()
            for other in sorted(others, key=lambda o: -float(score[index, o]))[:NEAR]
        }
        near |= set(sorted(others, key=lambda other: abs(other - index))[:2])
        for other in sorted(near):
            moved = {layer: other if source == index else source for layer, source in given_up.items()}
            found[index, other] = moved | {index: other}
    return found


def _with_weights_of(model: LayerwiseModel, linears: Sequence[str], source: int) -> Edit:
    def edit(layer: DecoderLayer) -> dict[str, Tensor]:
        with model.layer(source) as module:
            return {
                f"{linear}.weight": module.get_parameter(f"{linear}.weight").data.clone()
                for linear in linears
            }

    return edit


@torch.no_grad()
def _likeness(model: LayerwiseModel, context: Context, linears: Sequence[str]) -> dict[str, Tensor]:
    """The similarity of any two layers: the cosine of their weights, and the CKA of the part's outputs."""
    sequences = context.data.calibration
    weights: list[Tensor] = []
    outputs: list[Tensor] = []
    for layer in walk(model, first_sequences(sequences, TOKENS)):
        weights.append(torch.cat([layer.weight(linear).flatten() for linear in linears]).cpu())
        last = next(group for group in layer.anatomy.consumers if linears[-1] in group)
        read = torch.cat([read[last[0]].flatten(0, -2) for read, _ in layer.reads(last)])
        outputs.append((read @ layer.weight(linears[-1]).T).cpu())
    return {"cosine": cosines(weights), "cka": cka(outputs)}
