"""Weights in the blocks of a GGUF file: 32 columns of a row, their float16 scale first, then their codes.

Q4_0 and IQ4_NL have 16 bytes of codes, whose low halves are the first 16 columns and whose high halves are
the others; Q8_0 has 32 signed bytes. R rows (out), C columns (in), G = C / 32 groups, B bytes of a row.

Source: block_q4_0, block_iq4_nl and block_q8_0 of llama.cpp, as in the `gguf` package (gguf.quants).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.exports.artefact import Artefact, Matrix
from llmcompress.formats.ggml import GROUP_SIZE, GgmlLayout, GgmlWeight
from llmcompress.formats.integer import Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.registry import StoredWeight

PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BLOCK_BYTES = {"Q4_0": 18, "IQ4_NL": 18, "Q8_0": 34}


@dataclass(frozen=True)
class Blocks:
    """The bytes of a weight, uint8 [R, B], or its plain numbers [R, C]; and by how much its largest changed
    scale changed, relative to itself."""

    data: Tensor
    changed: float = 0.0


def refusal(matrix: Matrix) -> str | None:
    """Return why GGUF can't hold a matrix without rounding it again, or None."""
    layout, columns = matrix.layout, matrix.shape[1]
    if matrix.format in ("nf4", "fp4"):
        return f"GGUF has no {matrix.format}; use q4_0 or iq4_nl"
    if isinstance(layout, FactoredLayout) and layout.rank:
        return "GGUF has no product of two matrices"
    if matrix.format == "codebook":
        return "GGUF has no codebooks but its own; use iq4_nl"
    if isinstance(layout, IntegerLayout | GgmlLayout) or matrix.format == "int8":
        if columns % GROUP_SIZE:
            return f"its {columns} columns don't divide into blocks of {GROUP_SIZE}; give it to skip"
        size = layout.group_size if isinstance(layout, IntegerLayout) else None
        if size is not None and size % GROUP_SIZE and size < columns:
            return f"its groups of {size} columns don't divide into blocks of {GROUP_SIZE}"
    return None


def kind_of(matrix: Matrix, artefact: Artefact) -> str:
    """The type in a GGUF file of a matrix that is not refused."""
    layout = matrix.layout
    if isinstance(layout, GgmlLayout):
        return layout.format.upper()
    if isinstance(layout, IntegerLayout):
        return "Q8_0" if layout.weight_bits == 8 else "Q4_0"
    if layout is None:
        return "Q8_0"
    return PLAIN[artefact.dense_dtype(matrix)]


def size_of(kind: str, rows: int, columns: int) -> int:
    """The bytes of a weight [rows, columns] of a type."""
    if kind in BLOCK_BYTES:
        return rows * columns // GROUP_SIZE * BLOCK_BYTES[kind]
    return rows * columns * (4 if kind == "F32" else 2)


def blocks_of(stored: StoredWeight) -> Blocks:
    """The blocks of codes as they are stored. Codes stay; scales are rounded to float16 if they are not."""
    if isinstance(stored, GgmlWeight):
        return Blocks(_four_bits(stored.codes_RC, stored.scale_RG))
    whole = stored.as_integer() if isinstance(stored, Int8Weight) else stored
    assert isinstance(whole, IntegerWeight)
    groups = whole.codes_RC.shape[1] // GROUP_SIZE
    if whole.multiplier_RG is None:
        half_R1, changed = _halves(whole.scale_R[:, None])
        return Blocks(_eight_bits(whole.codes_RC, half_R1.expand(-1, groups)), changed)
    half_RG, changed = _halves(whole.scale_R[:, None] * whole.multiplier_RG)
    half_RG = half_RG.repeat_interleave(-(-groups // half_RG.shape[1]), dim=1)[:, :groups]
    return Blocks(_four_bits((whole.codes_RC + 8).to(torch.uint8), half_RG), changed)


def _halves(scale: Tensor) -> tuple[Tensor, float]:
    """Scales in float16, and their largest change relative to themselves."""
    half = scale.to(torch.float16)
    change = ((half.float() - scale) / scale).nan_to_num(0.0).abs()  # a row of zeros has the scale zero
    return half, float(change.max()) if change.numel() else 0.0


def _four_bits(codes_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Blocks of codes 0..15."""
    codes = codes_RC.unflatten(1, (-1, 2, GROUP_SIZE // 2))
    return _joined(scale_RG, codes[:, :, 0] | (codes[:, :, 1] << 4))


def _eight_bits(codes_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Blocks of signed codes."""
    return _joined(scale_RG, codes_RC.view(torch.uint8).unflatten(1, (-1, GROUP_SIZE)))


def _joined(scale_RG: Tensor, bytes_RGS: Tensor) -> Tensor:
    """The bytes of each scale before those of its group."""
    scale = scale_RG.contiguous().view(torch.uint8).unflatten(1, (-1, 2))
    return torch.cat([scale, bytes_RGS], dim=2).flatten(1)
