"""Blocks of keys or values as integer codes: rounded to a scale and an offset per channel or per token.

Keys have outliers in the same channels at every token, so their scale is that of one channel over a block of
tokens. Values have none, so theirs is that of one token over a group of channels. Scales and offsets are the
range of what they cover, in float16, so no calibration is needed and no value lies outside the codes.

Source: KIVI, arXiv:2402.02750. Differs: a block is rounded once and never again, and the range is widened by
what float16 rounds away, so that an error is at most half a step.
Shapes: B sequences, H heads, N blocks, T tokens of a block, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Per = Literal["channel", "token"]

LARGEST = torch.finfo(torch.float16).max
STEP_UP = 2.0**-10  # of a float16, relative: more than the distance to the next number
SMALLEST = 2.0**-24  # the least scale, which is the least positive float16
GROUP = 64  # the most channels under one scale of a token


@dataclass(frozen=True, eq=False)
class Codes:
    """N blocks of T tokens: codes_BHNTP uint8 [B, H, N, T, P], two codes a byte for 4 bits, and scale and
    offset in float16, [B, H, N, 1, D, 1] per channel or [B, H, N, T, G, 1] per token for G groups."""

    codes_BHNTP: Tensor
    scale: Tensor
    offset: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors, of which the first dimension is that of sequences and the third that of blocks."""
        return self.codes_BHNTP, self.scale, self.offset


def group_of(channels: int) -> int:
    """The channels under one scale of a token: the most that divide `channels`, and at most GROUP."""
    return next(size for size in range(min(GROUP, channels), 0, -1) if channels % size == 0)


def bytes_of_token(channels: int, bits: int, per: Per, block: int) -> float:
    """Bytes that one token of one head takes, with its share of scales and offsets."""
    scales = channels / block if per == "channel" else channels / group_of(channels)
    return channels * bits / 8 + 2 * torch.float16.itemsize * scales


def quantize(X_BHNTD: Tensor, bits: int, per: Per) -> Codes:
    """Round blocks [B, H, N, T, D] of keys or values to codes of 8 or 4 bits.

    The error of a value is at most half of its scale, except for values beyond float16, which are taken as
    its largest. Raises ValueError for an odd number of channels in 4 bits.
    """
    if bits == 4 and X_BHNTD.shape[-1] % 2:
        raise ValueError(f"{X_BHNTD.shape[-1]} channels can't be two to a byte")
    grouped = _grouped(X_BHNTD.float().clamp(-LARGEST, LARGEST), per)
    dim = -3 if per == "channel" else -1
    offset = _at_most(grouped.amin(dim, keepdim=True))
    scale = _at_least((grouped.amax(dim, keepdim=True) - offset.float()) / (2**bits - 1))
    codes = ((grouped - offset.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return Codes(_packed(codes.flatten(-2), bits), scale, offset)


def dequantize(codes: Codes, bits: int, per: Per, dtype: torch.dtype = torch.float32) -> Tensor:
    """The blocks [B, H, N, T, D] that codes stand for."""
    values = _grouped(_unpacked(codes.codes_BHNTP, bits).float(), per)
    X_BHNTD = values.mul_(codes.scale.float()).add_(codes.offset.float()).flatten(-2)
    return X_BHNTD.to(dtype)


def _grouped(X_BHNTD: Tensor, per: Per) -> Tensor:
    """Channels as [..., D, 1] per channel, and [..., G, D / G] per token."""
    D = X_BHNTD.shape[-1]
    return X_BHNTD.reshape(*X_BHNTD.shape[:-1], *((D, 1) if per == "channel" else (-1, group_of(D))))


def _at_most(X: Tensor) -> Tensor:
    """Float16 numbers that are not above those of X."""
    near = X.half()
    lower = (X - X.abs() * STEP_UP - SMALLEST).clamp(min=-LARGEST).half()
    return torch.where(near.float() > X, lower, near)


def _at_least(X: Tensor) -> Tensor:
    """Positive float16 numbers that are not below those of X."""
    near = X.half()
    higher = (X * (1 + STEP_UP) + SMALLEST).half()
    return torch.where(near.float() < X, higher, near).clamp(min=SMALLEST)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] of 4 bits two to a byte, the even channel in the low half; those of 8 bits as they
    are."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes [..., D] of bytes."""
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
