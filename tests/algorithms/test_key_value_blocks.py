"""Codes of keys and values: their error is at most half a step, and known blocks have known codes."""

from itertools import product

import pytest
import torch

from llmcompress.algorithms.key_value_blocks import (
    LARGEST,
    Per,
    bytes_of_token,
    dequantize,
    group_of,
    quantize,
)

CASES = [*product((8, 4), ("channel", "token"))]


def blocks(spread: float = 3.0, shift: float = 0.0, D: int = 32) -> torch.Tensor:
    """Random blocks [2, 3, 4, 16, D], with channels that differ in offset and range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 16, D, generator=generator)
    return x * torch.logspace(-2, 1, D) * spread + shift * torch.linspace(-1, 1, D)


@pytest.mark.parametrize(("bits", "per"), CASES)
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_an_error_is_at_most_half_a_step(bits: int, per: Per, shift: float) -> None:
    x = blocks(shift=shift)
    codes = quantize(x, bits, per)
    back = dequantize(codes, bits, per)
    dim = -2 if per == "channel" else -1
    # steps of the exact range, widened by at most a 500th of it and of the offset by float16
    widened = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True) + x.abs().amax(dim, keepdim=True) / 500
    assert torch.all((back - x).abs() <= widened * 1.002 / (2**bits - 1) / 2 + 1e-4)
    step = codes.scale.float().expand(
        *x.shape[:3], 16, codes.scale.shape[-2], x.shape[-1] // codes.scale.shape[-2]
    )
    assert torch.all((back - x).abs() <= step.flatten(-2) / 2 * (1 + 1e-4) + x.abs() * 2e-7)


def test_a_block_with_exact_steps_has_these_codes_per_channel() -> None:
    ramp = torch.arange(16.0)
    x = torch.stack((ramp, 5 - ramp / 2), dim=-1)[None, None, None]  # [1, 1, 1, 16, 2]
    codes = quantize(x, 4, "channel")
    assert codes.scale.flatten().tolist() == [1.0, 0.5]
    assert codes.offset.flatten().tolist() == [0.0, -2.5]
    # the first channel is in the low half
    assert codes.codes_BHNTP.flatten().tolist() == [low | (15 - low) << 4 for low in range(16)]
    assert torch.equal(dequantize(codes, 4, "channel"), x)


def test_a_token_with_exact_steps_has_these_codes_per_token() -> None:
    x = torch.tensor([[0.0, 255.0, 7.0, 100.0], [-1.0, -1.0, -1.0, -1.0]])[None, None, None]
    codes = quantize(x, 8, "token")
    assert codes.codes_BHNTP[0, 0, 0].tolist() == [[0, 255, 7, 100], [0, 0, 0, 0]]
    assert torch.equal(dequantize(codes, 8, "token"), x)


def test_the_scale_of_a_channel_does_not_see_the_others() -> None:
    x = blocks()
    alone = dequantize(quantize(x, 4, "channel"), 4, "channel")
    x[..., 1] = 1000.0
    beside = dequantize(quantize(x, 4, "channel"), 4, "channel")
    assert torch.equal(alone[..., 2:], beside[..., 2:])
    assert torch.equal(beside[..., 1], x[..., 1])


def test_blocks_are_rounded_each_alone() -> None:
    x = blocks()
    whole = dequantize(quantize(x, 4, "channel"), 4, "channel")
    parts = [dequantize(quantize(x[:, :, n : n + 1], 4, "channel"), 4, "channel") for n in range(4)]
    assert torch.equal(whole, torch.cat(parts, dim=2))


@pytest.mark.parametrize(("bits", "per"), CASES)
def test_the_bytes_of_a_token_are_those_of_the_tensors(bits: int, per: Per) -> None:
    for D in (8, 64, 80, 128):
        codes = quantize(torch.randn(1, 1, 2, 32, D), bits, per)
        held = sum(tensor.nbytes for tensor in codes.tensors)
        assert held == 64 * bytes_of_token(D, bits, per, 32)


def test_groups_divide_the_channels() -> None:
    assert [group_of(channels) for channels in (8, 64, 80, 96, 128, 192, 256)] == [8, 64, 40, 48, 64, 64, 64]


@pytest.mark.parametrize(("bits", "per"), CASES)
def test_numbers_beyond_float16_stay_finite(bits: int, per: Per) -> None:
    x = torch.tensor([1e30, -1e30, 0.0, 60000.0])[None, None, None, None]
    back = dequantize(quantize(x, bits, per), bits, per)
    assert torch.all(back.isfinite())
    assert back.abs().max() <= LARGEST * 1.01


def test_odd_channels_are_refused_in_4_bits() -> None:
    with pytest.raises(ValueError, match="5 channels"):
        quantize(torch.zeros(1, 1, 1, 2, 5), 4, "token")
