"""A layer with some linears rounded to nearest, on which the searches before the real rounding decide."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llmcompress.formats import registry
from llmcompress.formats.base import Inputs
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
    weights, inputs = dict[str, Tensor](), dict[str, Inputs]()
    for linear, coding in codings.items():
        W_RC, scale = layer.weight(linear), coding.static_scale(tops[linear])
        weights[linear] = registry.dequantize(coding.nearest(W_RC, scale)).to(W_RC)
        if rounded := coding.inputs(scale):
            inputs[linear] = rounded
    return outputs_with(layer, weights, inputs, batches, parts, final)


def outputs_with(
    layer: DecoderLayer,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Inputs],
    batches: Sequence[Tensor],
    parts: FinishedParts | None = None,
    final: Collection[str] = (),
) -> list[Tensor]:
    """Return the layer's outputs for `batches` with other weights [R, C] of some linears, and inputs of some
    rounded. The layer is left unchanged; `parts` and `final` are those of `trial`."""
    before = dict(layer.rounds)
    layer.rounds.update(inputs)
    given = {f"{linear}.weight": layer.oriented(linear, W_RC) for linear, W_RC in weights.items()}
    try:
        return layer.outputs_with(batches, given, layer.device, parts, final)
    finally:
        layer.rounds.clear()
        layer.rounds.update(before)
