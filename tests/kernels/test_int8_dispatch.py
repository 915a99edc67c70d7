"""The Triton kernels of integer linears against the plain forms of what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.formats import integer, integer_linear
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.schemes import IntegerScheme
from llmcompress.kernels import int8_dispatch
from tests.kernels.on_gpu import DEVICE, marks

SHAPES = [(1, 48, 96), (2, 17, 33), (5, 40, 300), (17, 64, 65), (32, 33, 128)]  # tokens, rows, columns
pytestmark = marks(int8_dispatch.KERNELS)
by_shape = pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
by_bits = pytest.mark.parametrize("bits", [4, 8, 16])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def whole(largest: int, *shape: int, seed: int = 0, lowest: int | None = None) -> Tensor:
    generator, lowest = torch.Generator().manual_seed(seed), -largest if lowest is None else lowest
    return torch.randint(lowest, largest + 1, shape, generator=generator).to(DEVICE)


def plain(x: Tensor, bits: int, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of the plain form on a CPU; torch divides by a number less exactly on a GPU."""
    codes, scale = integer.quantize_tokens(x.cpu().float(), bits, step)
    return codes.to(DEVICE), scale.to(DEVICE)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the last bits of float32, or the last one of a shorter type."""
    assert found.dtype == expected.dtype
    rounding = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=max(1e-5, rounding), atol=1e-6)


@by_bits
@by_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_get_the_codes_of_the_plain_form(
    bits: int, tokens: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    x = noise(tokens, columns).to(dtype)
    x[0, : columns // 2] = 0
    for step in (None, torch.tensor([0.02])):
        codes, scale = plain(x, bits, step)
        found, same = int8_dispatch.quantize_tokens(x, bits, None if step is None else step.to(DEVICE))
        assert torch.equal(found, integer.split(codes) if bits == 16 else codes) and torch.equal(same, scale)


def test_halves_go_to_the_even_code_and_zeros_stay() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.0], [0.0] * 8], device=DEVICE)
    codes, scale = int8_dispatch.quantize_tokens(x, 8)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 126, 0], [0] * 8] and bool(scale.isfinite().all())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_gets_no_finite_scale_and_touches_no_other(broken: float) -> None:
    x = noise(5, 33)
    codes, scale = int8_dispatch.quantize_tokens(x, 8)
    x[0, 3] = broken
    found, other = int8_dispatch.quantize_tokens(x, 8)
    assert not other[0].isfinite() and torch.equal(found[1:], codes[1:]) and torch.equal(other[1:], scale[1:])


@by_bits
@by_shape
def test_sums_are_scaled_as_in_the_plain_form(bits: int, tokens: int, rows: int, columns: int) -> None:
    sums = whole(10**6, tokens * (2 if bits == 16 else 1), rows).int()
    total = sums.float() if bits < 16 else integer.HIGH * sums[:tokens].float() + sums[tokens:].float()
    scale_R, bias = noise(rows, seed=1), noise(rows, seed=2)
    for scale in (noise(tokens, 1, seed=3).abs(), torch.tensor([0.02], device=DEVICE)):
        for dtype, add in ((torch.float32, bias), (torch.bfloat16, None), (torch.float16, bias.half())):
            expected = integer_linear.scaled(total * 1e-4, scale, scale_R, add, dtype)
            close(int8_dispatch.scaled(sums, scale * 1e-4, scale_R, add, dtype, bits), expected)


@by_bits
@by_shape
def test_few_tokens_get_the_plain_product(bits: int, tokens: int, rows: int, columns: int) -> None:
    matrix, scale_R, bias = (
        whole(127, rows, columns).to(torch.int8),
        noise(rows).abs() * 1e-3,
        noise(rows, seed=2),
    )
    x = noise(tokens, columns)
    for step, add, dtype in ((None, bias, torch.float32), (torch.tensor([0.02]), None, torch.bfloat16)):
        rounded, scale = plain(x, bits, step)
        expected = integer_linear.scaled(
            (rounded.double() @ matrix.double().t()).float(), scale, scale_R, add, dtype
        )
        codes, scale = int8_dispatch.quantize_tokens(x, bits, None if step is None else step.to(DEVICE))
        close(int8_dispatch.few_tokens(codes, scale, matrix, scale_R, add, dtype, bits), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    "scheme",
    [
        IntegerLayout("w8a8"),
        IntegerLayout("w8a16"),
        IntegerLayout("w4a8", group_size=32),
        IntegerLayout("w8a8", "static"),
    ],
)
def test_a_linear_on_a_gpu_is_that_of_a_cpu_for_few_tokens_and_many(scheme: IntegerLayout) -> None:
    found: Any = IntegerScheme(scheme).nearest(
        noise(96, 64).cpu(), 0.03 if scheme.activations == "static" else None
    )
    module = integer_linear.linear(found, noise(96).cpu())
    for shape in (
        (64,),
        (1, 64),
        (2, 3, 64),
        (int8_dispatch.FEW, 64),
        (int8_dispatch.FEW + 1, 64),
        (4, 100, 64),
    ):
        x = noise(*shape).cpu()
        with torch.no_grad():
            expected = module(x)
            assert int8_dispatch.usable(x.cuda())
            torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
        module.cpu()
