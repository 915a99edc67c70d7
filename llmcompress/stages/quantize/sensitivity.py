"""Which linears suffer most from their rounding, so that a small share of the weights can be spared it.

Each linear is rounded alone, in the full model. If e is the change in the output of its layer and F the
output Fisher matrix there, e F e^T / 2 is to second order the KL in nats that it costs. Linears are spared in
the order of nats per weight, as long as they fit in the share. This is the best choice except for what is
left over at the end. If the plug-in's layout rounds the inputs of a linear, only these are spared, as two
int8 codes hold 16 bits, and the linear keeps its bytes. Otherwise the linear stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from llmcompress.formats.integer import IntegerFormat
from llmcompress.formats.schemes import IntegerScheme, QuantScheme
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.finished_parts import FinishedParts
from llmcompress.stages.quantize.fake_quant import trial

TOKENS = 8192  # of the walk in which scales cross and the costs are measured
SAMPLE = 1  # units of tokens on which the costs are measured


def spared(coding: QuantScheme) -> QuantScheme | None:
    """The scheme of a linear that is spared; None if it is not quantised at all."""
    if not isinstance(coding, IntegerScheme) or coding.scheme.activations == "none":
        return None
    wide = cast(IntegerFormat, f"w{coding.scheme.weight_bits}a16")
    return replace(coding, scheme=replace(coding.scheme, format=wide))


@torch.no_grad()
def costs(layer: DecoderLayer, codings: Mapping[str, QuantScheme], F_DD: Tensor) -> dict[str, float]:
    """KL in nats/token that sparing each linear would save, by its name in the layer."""
    static = any(coding.static_scale(1.0) is not None for coding in codings.values())
    sample = layer.limit.units(layer.inputs)[: layer.shard.first(SAMPLE)]
    moments = layer.moments() if static else {}
    aims, F_DD, found = layer.outputs_with(sample, {}, layer.device), F_DD.to(layer.device), {}
    kept: dict[tuple[str, ...], FinishedParts] = {}  # of the submodules that end before a linear
    for linear, coding in codings.items():
        group = layer.anatomy.group_of(linear)
        final = tuple(layer.ending_before(group))
        parts = kept.setdefault(final, FinishedParts({}))
        tops = {linear: float(moments[linear].top_C.max())} if static else {linear: 0.0}
        lost = [
            nats(layer, trial(layer, {linear: one}, tops, sample, parts, final), aims, F_DD)
            for one in (coding, spared(coding))
            if one
        ]
        found[linear] = lost[0] - sum(lost[1:])
    return found


def nats(layer: DecoderLayer, outs: Sequence[Tensor], aims: Sequence[Tensor], F_DD: Tensor) -> float:
    """KL in nats/token of the error of a layer's outputs, over the samples of all processes."""
    mean, tokens = 0.0, 0
    if outs:
        errors = torch.cat([(out - aim).flatten(0, -2).float() for out, aim in zip(outs, aims, strict=True)])
        mean, tokens = float(((errors @ F_DD) * errors).sum(-1).mean() / 2), len(errors)
    return layer.shard.processes.mean(mean, tokens)


def most_hurt(costs: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """The linears to spare: at most `share` of all weights (`sizes`, by linear), the highest cost in nats per
    weight first."""
    room, found = share * sum(sizes.values()), []
    for linear in sorted(costs, key=lambda linear: costs[linear] / sizes[linear], reverse=True):
        if costs[linear] > 0 and sizes[linear] <= room:
            room -= sizes[linear]
            found.append(linear)
    return found
