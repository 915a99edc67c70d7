"""A layer with some linears rounded to nearest, on which the searches before the real rounding decide."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llmcompress.formats import registry
from llmcompress.formats.schemes import QuantScheme
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.finished_parts import FinishedParts


@torch.no_grad()
def trial(
    layer: DecoderLayer,
    codings: Mapping[str, QuantScheme],
    tops: Mapping[str, float],
    batches: Sequence[Tensor],
    parts: FinishedParts | None = None,
    final: Collection[str] = (),
) -> list[Tensor]:
    """Return the layer's outputs for `batches` with the linears of `codings` rounded, and their inputs
    rounded as the kernels do.

    tops: the largest input of each linear, for static scales. The outputs of `final` submodules do not
    depend on the linears; they are kept in `parts`. The layer is left unchanged.
    """
    rounded, before = {}, dict(layer.rounds)
    for linear, coding in codings.items():
        W_RC, scale = layer.weight(linear), coding.static_scale(tops[linear])
        rounded[f"{linear}.weight"] = layer.oriented(
            linear, registry.dequantize(coding.nearest(W_RC, scale)).to(W_RC)
        )
        if inputs := coding.inputs(scale):
            layer.rounds[linear] = inputs
    try:
        return [_run(layer, i, hidden, rounded, parts, final) for i, hidden in enumerate(batches)]
    finally:
        layer.rounds.clear()
        layer.rounds.update(before)


def _run(
    layer: DecoderLayer,
    batch: int,
    hidden: Tensor,
    parameters: Mapping[str, Tensor],
    parts: FinishedParts | None,
    final: Collection[str],
) -> Tensor:
    """The layer's output for a batch."""
    if parts is None:
        return layer.run(hidden, parameters)
    with parts.reused(layer.module, batch, layer.device, final):
        return layer.run(hidden, parameters)
