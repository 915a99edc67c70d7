"""Int8 rounding of whole rows under one scale each, without calibration, for embeddings, whose rows are
looked up.

Nothing is known of how a row is used, so the squared error of the row is minimised. The matrices have a row
for each token of the vocabulary. They are processed in pieces, so memory is that of the codes and of one
piece. The time is that of about 13 roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

# multiples of the absolute maximum, among which the best 8-bit scale lies
RATIOS = (1.0, *torch.linspace(0.9, 1.05, 12).tolist())
LARGEST = 127
PIECE = 1 << 20  # weights at a time


def round_rows(W_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 [R, C] in -127..127 and a positive scale float32 [R] per row, W ~ scale * code, on
    the device of W.

    Of the scales tried, it takes the one with the least squared error under its nearest codes, and of equals
    the first, that of the absolute maximum. A row of zeros has codes of zero.
    """
    pieces = [_round(piece.float()) for piece in W_RC.split(max(1, PIECE // max(1, W_RC.shape[1])))]
    codes, scales = zip(*pieces, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _round(W_RC: Tensor) -> tuple[Tensor, Tensor]:
    # for smaller scales divisions are not exact enough to stay within the codes
    tiny = torch.finfo(torch.float32).tiny
    top = (W_RC.abs().amax(1, keepdim=True) / LARGEST).clamp_min(tiny)
    best, least = top, torch.full_like(top, float("inf"))
    for ratio in RATIOS:
        scale = (top * ratio).clamp_min(tiny)
        error = (W_RC - _codes(W_RC, scale) * scale).square_().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return _codes(W_RC, best).to(torch.int8), best[:, 0]


def _codes(W_RC: Tensor, scale_R1: Tensor) -> Tensor:
    return (W_RC / scale_R1).round_().clamp_(-LARGEST, LARGEST)
