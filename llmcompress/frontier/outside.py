"""What becomes of the weights outside the layers: kept, or an int8 embedding with the head tied to it.

The loss of a rounded embedding is measured, on a sample of the text, in the full model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.algorithms.rowwise_int8 import round_rows
from llmcompress.errors import ModelError
from llmcompress.frontier.choice import Outer
from llmcompress.frontier.costs import Priced, header_bytes
from llmcompress.frontier.ways import KEEP
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import divergence, logits
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE, first_sequences
from llmcompress.stages.quantize.config import FormatConfig
from llmcompress.stages.quantize.embedding import embedding_codings

HEADER = 64  # bytes of a safetensors header beside its tensors


def outers(
    model: LayerwiseModel,
    units: Sequence[Priced],
    opened: Callable[[], LayerwiseModel],
    sequences: Tensor,
    unscored: int,
) -> list[Outer]:
    """What the weights outside the layers may become, beside the linears of `units`.

    `opened` gives the model anew, as the embedding of one is rounded for good. Their loss is measured on the
    first of the `sequences`.
    """
    embedding = f"{model.anatomy.embedding}.weight"
    size = _stored_outside(model, units)
    found = [Outer(KEEP.name, {}, 0.0, size, native=True)]
    V, D = model.model.get_parameter(embedding).shape
    coded = V * D + 4 * V + header_bytes(embedding, (V, D)) + header_bytes(f"{embedding}_scale", (V,))
    saved = V * D * model.dtype_of(embedding).itemsize - coded
    try:
        embedding_codings(model, FormatConfig(format="w8a16"))
    except ModelError:  # an embedding that does more than look rows up
        return found
    if saved > 0:
        few = first_sequences(sequences, TOKENS_AT_ONCE)
        nats = _rounded_embedding(model, opened(), few, unscored)
        found.append(Outer("int8", {"embedding": "int8"}, nats, size - saved, native=False))
    return found


def _stored_outside(model: LayerwiseModel, units: Sequence[Priced]) -> int:
    """The bytes of everything that no way changes."""
    within = sum(unit.costs[KEEP.name].native_bytes for unit in units)
    names = model.anatomy.rows(model.config)
    headers = sum(header_bytes(name, model.model.get_parameter(name).shape) for name in names)
    return HEADER + model.stored_bytes() + headers - within


@torch.no_grad()
def _rounded_embedding(
    model: LayerwiseModel, rounded: LayerwiseModel, sequences: Tensor, unscored: int
) -> float:
    """KL in nats/token of a model whose embedding, and a head tied to it, are rounded to int8."""
    codes_VD, scale_V = round_rows(rounded.outer_weight(f"{model.anatomy.embedding}.weight"))
    rounded.set_embedding(codes_VD.float() * scale_V[:, None], None)
    lost, scored = 0.0, 0
    for ours, theirs in zip(
        logits(rounded, sequences, unscored=unscored),
        logits(model, sequences, unscored=unscored),
        strict=True,
    ):
        count = theirs[..., 0].numel()
        lost += divergence(theirs.float().log_softmax(-1), ours) * count
        scored += count
    return lost / scored
