"""Round the input embedding to int8 before anything else, so that every layer is calibrated on its rounded
output.

Each row gets the nearest codes under the scale with the least squared error. There is nothing to calibrate,
as each row is read alone. A head tied to the embedding is the same matrix and multiplies by the same codes.
Its inputs are rounded as the format of the other linears says. Weights outside the layers that stay dense are
journalled beside it, if a rotation changed them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.algorithms.rowwise_int8 import round_rows
from llmcompress.formats import registry
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.integer_embedding import factor_of
from llmcompress.formats.schemes import IntegerScheme, QuantScheme
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Entered, enter
from llmcompress.stages.base import OUTER, Context, LayerRecord, LinearRecord
from llmcompress.stages.quantize.config import FormatConfig

PIECE = 1 << 20  # weights at a time when errors are summed


def embedding_codings(model: LayerwiseModel, head: FormatConfig) -> dict[str, QuantScheme]:
    """The schemes of the embedding and of a head tied to it, by full name; `head` has the settings of such a
    head.

    Raises ModelError for an embedding of a kind that can't be rounded.
    """
    name = model.anatomy.embedding
    factor_of(name, model.model.get_submodule(name))
    shared = model.reader(name)
    if shared is None:
        return {name: IntegerScheme(IntegerLayout("w8a8", "none"))}
    if head.coding(model.weight_dtype).input_largest is None:
        coding = IntegerScheme(IntegerLayout("w8a8", "none"))
    else:
        coding = IntegerScheme(IntegerLayout("w8a16" if head.format in ("w8a16", "w4a16") else "w8a8"))
    return {name: coding, shared: coding}


def apart(model: LayerwiseModel) -> set[str]:
    """The embedding, and a head tied to it: no walk solves for them."""
    return {model.anatomy.embedding, model.reader(model.anatomy.embedding) or model.anatomy.embedding}


def settle_outer(
    model: LayerwiseModel, context: Context, chosen: Mapping[str, QuantScheme]
) -> tuple[Entered | None, LayerRecord | None]:
    """Journal what changes outside the layers, and let the embedding and a tied head use their int8 codes.

    Returns what the embedding gave before, and its record for the report; None and None if it is kept.
    """
    name, journal = model.anatomy.embedding, context.journal
    if (model.rotation or name in chosen) and not journal.has(OUTER, 0):
        journal.save(OUTER, 0, *_entry(model, chosen, context.data.calibration))
    if name not in chosen:
        return None, None
    tensors = journal.load(OUTER, 0)
    batches = model.limit.batches(context.data.calibration)
    full = enter(model, context.processes.shard(batches).batches)
    full[1].keep_embedding()
    packed = chosen[name].read(registry.parts_of(name, tensors), model.matrices()[name][1])
    model.set_embedding(registry.dequantize(packed), chosen[name].inputs())
    return full, journal.facts(OUTER, 0, LayerRecord)


@torch.no_grad()
def _entry(
    model: LayerwiseModel, chosen: Mapping[str, QuantScheme], sequences: Tensor
) -> tuple[dict[str, Tensor], LayerRecord]:
    """Return the journal's entry: the tensors that a rotation changed, in the dtype of the base, and the
    embedding's codes with their errors."""
    name, outer = model.anatomy.embedding, dict[str, Tensor]()
    if model.rotation:  # named_parameters has a tied one once
        outer = {part: p.data for part, p in model.model.named_parameters() if part in model.anatomy.outer}
    tensors = model.as_stored(outer)
    coding = chosen.get(name)
    if not isinstance(coding, IntegerScheme):
        return tensors, LayerRecord(name=OUTER)
    tensors.pop(f"{name}.weight", None)
    W_VD = model.model.get_parameter(f"{name}.weight").data
    codes_VD, scale_V = round_rows(W_VD)
    packed = IntegerWeight(codes_VD.cpu(), scale_V.cpu(), coding.scheme)
    relative_error, error = _errors(W_VD, packed, sequences)
    record = LinearRecord(
        name=name,
        format=coding.format,
        bits=coding.bits,
        relative_error=relative_error,
        weight_error=error,
    )
    coded = {f"{name}.{part}": tensor for part, tensor in packed.tensors().items()}
    return tensors | coded, LayerRecord(name=OUTER, linears=(record,))


def _errors(W_VD: Tensor, packed: IntegerWeight, sequences: Tensor) -> tuple[float, float]:
    """Relative errors of the rows as often as the text looks them up, and of the whole matrix."""
    counts_V, rows = torch.bincount(sequences.flatten(), minlength=len(W_VD)), max(1, PIECE // W_VD.shape[1])
    squares = []
    for start in range(0, len(W_VD), rows):
        W, codes, scale = (x[start : start + rows] for x in (W_VD, packed.codes_RC, packed.scale_R))
        lost = W.float() - codes.to(W.device) * scale.to(W.device)[:, None]
        squares.append(torch.stack((lost, W.float())).square().sum(-1).cpu())
    squares_2V = torch.cat(squares, 1).double()
    return _relative(*(squares_2V * counts_V).sum(1)), _relative(*squares_2V.sum(1))


def _relative(lost: Tensor, whole: Tensor) -> float:
    """The root of lost / whole, 0 if `whole` is 0."""
    return float((lost / whole).sqrt()) if whole > 0 else 0.0
