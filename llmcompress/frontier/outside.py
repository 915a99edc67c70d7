"""What becomes of the weights outside the layers: kept, or embedding and head in int8.

A head that is tied to the embedding is the same matrix. The loss of rounding them is measured, on a sample of
the text, in the full model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.algorithms.rowwise_int8 import round_rows
from llmcompress.errors import ModelError
from llmcompress.formats import registry
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.schemes import IntegerScheme
from llmcompress.frontier.choice import Outer
from llmcompress.frontier.costs import Priced, header_bytes
from llmcompress.frontier.ways import KEEP
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import divergence, logits
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE, first_sequences
from llmcompress.stages.quantize.config import FormatConfig
from llmcompress.stages.quantize.embedding import embedding_codings

HEADER = 64  # bytes of a safetensors header beside its tensors
INT8 = {"format": "w8a16"}  # of a head of its own


def outers(
    model: LayerwiseModel,
    units: Sequence[Priced],
    opened: Callable[[], LayerwiseModel],
    sequences: Tensor,
    unscored: int,
) -> list[Outer]:
    """What the weights outside the layers may become, beside the linears of `units`, by falling size.

    `opened` gives the model anew, as the matrices of one are rounded for good. Their loss is measured on the
    first of the `sequences`.
    """
    size = _stored_outside(model, units)
    found = [Outer(KEEP.name, {}, {}, 0.0, size, native=True)]
    embedding, head = model.anatomy.embedding, model.anatomy.head
    tied = model.reader(embedding) == head
    few = first_sequences(sequences, TOKENS_AT_ONCE)
    for name, matrices in {
        "int8 head": [] if tied else [head],
        "int8 embedding": [embedding] if _can_be_int8(model) else [],
        "int8 embedding and head": [] if tied or not _can_be_int8(model) else [embedding, head],
    }.items():
        saved = sum(_saved(model, matrix) for matrix in matrices)
        if saved > 0:
            nats = _rounded(model, opened(), matrices, few, unscored)
            settings = {"embedding": "int8"} if embedding in matrices else {}
            overrides = {head: INT8} if head in matrices else {}
            if head in matrices:
                settings["head"] = "quantize"
            found.append(Outer(name, settings, overrides, nats, size - saved, native=False))
    return sorted(found, key=lambda outer: -outer.size_bytes)


def _can_be_int8(model: LayerwiseModel) -> bool:
    """Whether the embedding does nothing but look rows up."""
    try:
        embedding_codings(model, FormatConfig(format="w8a16"))
    except ModelError:
        return False
    return True


def _saved(model: LayerwiseModel, name: str) -> int:
    """The bytes that int8 codes with a scale a row save of a matrix."""
    V, D = model.model.get_parameter(f"{name}.weight").shape
    coded = V * D + 4 * V + header_bytes(f"{name}.weight_scale", (V,))
    return V * D * model.dtype_of(f"{name}.weight").itemsize - coded


def _stored_outside(model: LayerwiseModel, units: Sequence[Priced]) -> int:
    """The bytes of everything that no way changes."""
    within = sum(unit.costs[KEEP.name].native_bytes for unit in units)
    names = model.anatomy.rows(model.config)
    headers = sum(header_bytes(name, model.model.get_parameter(name).shape) for name in names)
    return HEADER + model.stored_bytes() + headers - within


@torch.no_grad()
def _rounded(
    model: LayerwiseModel, rounded: LayerwiseModel, matrices: Sequence[str], sequences: Tensor, unscored: int
) -> float:
    """KL in nats/token of a model in which some matrices outside the layers are rounded to int8."""
    for name in matrices:
        W_VD = rounded.outer_weight(f"{name}.weight")
        if name == model.anatomy.embedding:
            codes_VD, scale_V = round_rows(W_VD)
            rounded.set_embedding(codes_VD.float() * scale_V[:, None], None)
        else:
            packed = IntegerScheme(IntegerLayout("w8a16")).nearest(W_VD)
            rounded.model.get_parameter(f"{name}.weight").data = registry.dequantize(packed).to(W_VD)
    return lost(model, rounded, sequences, unscored)


@torch.no_grad()
def lost(model: LayerwiseModel, other: LayerwiseModel, sequences: Tensor, unscored: int) -> float:
    """KL in nats/token of another model's predictions from those of `model`."""
    total, scored = 0.0, 0
    for ours, theirs in zip(
        logits(other, sequences, unscored=unscored),
        logits(model, sequences, unscored=unscored),
        strict=True,
    ):
        count = theirs[..., 0].numel()
        total += divergence(theirs.float().log_softmax(-1), ours) * count
        scored += count
    return total / scored
