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
        return layer.outputs_with(batches, rounded, layer.device, parts, final)
    finally:
        layer.rounds.clear()
        layer.rounds.update(before)
