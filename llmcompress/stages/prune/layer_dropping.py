"""Remove whole layers: those without which the model's predictions change least.

With `kl`, one layer after another is removed, each time the one with the least loss, measured on the model
without it and without those removed before. One pass through the model carries a stream of hidden states for
every layer that could go, so each removal reads each layer once. `influence` measures in a single pass how
far each layer turns the hidden states, and removes those that turn them least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llmcompress.algorithms.saliency import block_influence
from llmcompress.io.journal import JournalFacts
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import SAMPLE, Part, divergences, walk, without_each
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context


class DroppedLayers(JournalFacts):
    """The removed layers in order, and KL in nats/token after each, or how far each turned the hidden
    states."""

    gone: tuple[int, ...]
    kl_nats: tuple[float, ...] | None = None
    influence: tuple[float, ...] | None = None


def find(model: LayerwiseModel, context: Context, count: int, score: str) -> DroppedLayers:
    """Find which layers to remove so that `count` stay.

    Source: kl: SLEB, Song et al. 2024, arXiv:2402.09025, Algorithm 1, with the KL divergence from the full
    model in place of the perplexity. influence: ShortGPT, Men et al. 2024, arXiv:2403.03853.
    """
    layers = len(model.layers)
    if score == "influence":
        turned = {}
        for layer in context.track(walk(model, _sample(context)), "prune (layer, influence)", layers):
            with torch.no_grad():
                pairs = [
                    (hidden, out)
                    for hidden, out in zip(layer.inputs, layer.outputs(layer.inputs), strict=True)
                ]
            turned[layer.index] = sum(block_influence(x, y) * len(x) for x, y in pairs) / sum(
                len(x) for x, _ in pairs
            )
        order = sorted(turned, key=lambda index: (turned[index], index))[: layers - count]
        return DroppedLayers(gone=tuple(order), influence=tuple(turned[index] for index in order))
    every, least = [(index, None) for index in range(layers)], layers - count
    order, kl_nats = greedy(model, context, every, lambda gone: len(gone) < least, least)
    return DroppedLayers(gone=tuple(index for index, _ in order), kl_nats=tuple(kl_nats))


def greedy(
    model: LayerwiseModel,
    context: Context,
    candidates: Sequence[Part],
    more: Callable[[Sequence[Part]], bool],
    steps: int,
    cost: Callable[[Part], float] = lambda part: 1.0,
) -> tuple[list[Part], list[float]]:
    """Remove parts while `more` of them are wanted, in about `steps` steps. Returns the parts, and KL in
    nats/token after each.

    Each step removes the part that adds least to the loss for its `cost`, in whatever unit.
    """
    sequences = _sample(context)
    gone: list[Part] = []
    kl_nats: list[float] = []
    full: list[Tensor] = []
    for _ in context.track(_while(lambda: more(gone)), "prune (kl)", steps):
        streams = without_each(model, sequences, candidates, gone)
        full = full or streams[None]
        cut = {part: states for part, states in streams.items() if part is not None}
        losses = divergences(model, full, cut, context.data.unscored)
        before = kl_nats[-1] if kl_nats else 0.0
        best = min(losses, key=lambda part: ((losses[part] - before) / cost(part), part))
        gone.append(best)
        kl_nats.append(losses[best])
    return gone, kl_nats


def _sample(context: Context) -> Tensor:
    """The sequences on which the removal is decided."""
    sequences = context.data.calibration
    return first_sequences(sequences, SAMPLE)


def _while(condition: Callable[[], bool]) -> Iterator[None]:
    while condition():
        yield
