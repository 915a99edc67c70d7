"""The Triton kernel of looked-up weights against products with the weight as it is dequantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms.codebook import look_up
from llmcompress.formats import codebook, ggml, integer_linear
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight, pack
from llmcompress.formats.ggml import GgmlLayout, GgmlWeight
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.schemes import IntegerScheme
from llmcompress.kernels import lookup_dispatch, packed_gemm
from llmcompress.kernels.lookup_dispatch import few_tokens
from tests.kernels.on_gpu import DEVICE, marks

pytestmark = marks(lookup_dispatch.KERNELS)
SHAPES = [(1, 48, 96), (2, 17, 64), (5, 40, 320), (17, 64, 160), (32, 33, 128)]  # tokens, rows, columns
by_shape = pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
# Triton's interpreter can't multiply bfloat16
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE == "cuda" else ()))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(bits: int, *shape: int) -> Tensor:
    drawn = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return drawn.to(DEVICE)


def expected(x_TC: Tensor, weight_RC: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product with the weight in the type of the input, in double precision, and its rounding once."""
    out = x_TC.double() @ weight_RC.to(x_TC.dtype).double().t()
    return (out if bias is None else out + bias.double()).to(x_TC.dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the last bits of sums in float32, or the last one of a shorter type."""
    assert found.dtype == wanted.dtype
    rounding = torch.finfo(wanted.dtype).eps
    largest = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=max(1e-5, rounding), atol=1e-6 * largest)


@by_shape
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sharing", [None, 1, 8])
def test_codebooks_are_looked_up(
    bits: int, sharing: int | None, tokens: int, rows: int, columns: int
) -> None:
    index_RC, columns = codes(bits, rows, columns - 1), columns - 1  # no whole number of bytes
    levels_GL = noise(-(-rows // (sharing or rows)), 2**bits, seed=1).half()
    weight_RC = look_up(index_RC.int(), levels_GL.float(), sharing or rows)
    for dtype in DTYPES:
        x, bias = noise(tokens, columns).to(dtype), noise(rows, seed=2)
        found = few_tokens(x, pack(index_RC, bits), levels_GL, bits, sharing=sharing, bias=bias)
        close(found, expected(x, weight_RC, bias))


@by_shape
@pytest.mark.parametrize("group", [32, 64, 1024])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.uint8])
def test_levels_are_scaled_by_group(
    group: int, kind: torch.dtype, tokens: int, rows: int, columns: int
) -> None:
    size = min(group, columns)
    index_RC, groups = codes(4, rows, columns), -(-columns // size)
    levels = noise(1, 16, seed=1)
    drawn = noise(rows, groups, seed=3)
    scale_RG = drawn.abs().mul(9).to(kind) if kind == torch.uint8 else drawn.to(kind)
    row_scale_R = noise(rows, seed=4)
    whole_RC = scale_RG.float().repeat_interleave(size, dim=1)[:, :columns]
    weight_RC = look_up(index_RC.int(), levels, rows) * whole_RC
    for dtype in DTYPES:
        x, packed = noise(tokens, columns).to(dtype), pack(index_RC, 4)
        found = few_tokens(x, packed, levels, 4, scale_RG=scale_RG, group_size=group)
        close(found, expected(x, weight_RC))
    scaled_RC = weight_RC * row_scale_R[:, None]
    found = few_tokens(
        x.float(), packed, levels, 4, scale_RG=scale_RG, group_size=group, row_scale_R=row_scale_R
    )
    close(found, expected(x.float(), scaled_RC))


@by_shape
def test_int8_codes_are_the_values(tokens: int, rows: int, columns: int) -> None:
    codes_RC, scale_R = codes(8, rows, columns).view(torch.int8), noise(rows, seed=1)
    for dtype in DTYPES:
        x, bias = noise(tokens, columns).to(dtype), noise(rows, seed=2).to(dtype)
        found = few_tokens(x, codes_RC, None, 8, row_scale_R=scale_R, bias=bias)
        sums = x.double() @ codes_RC.double().t()
        close(found, (sums * scale_R.double() + bias.double()).to(dtype))


def test_what_does_not_fit_is_refused() -> None:
    x, packed, levels = noise(2, 64), pack(codes(4, 8, 64), 4), noise(1, 16)
    wrong: list[Callable[[], Tensor]] = [
        lambda: few_tokens(x[:, :62], packed, levels, 4),
        lambda: few_tokens(x, packed, levels, 2),
        lambda: few_tokens(x, packed, levels, 4, sharing=2),
        lambda: few_tokens(noise(lookup_dispatch.FEW + 1, 64), packed, levels, 4),
        lambda: few_tokens(x, packed, None, 4),
        lambda: few_tokens(x, packed, levels, 4, scale_RG=noise(8, 1), group_size=32),
        lambda: few_tokens(x, packed, levels, 4, scale_RG=noise(8, 2), group_size=48),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="don't fit codes"):
            call()


def module_of(name: str, weight: Tensor, bias: Tensor) -> Any:
    """A live linear on DEVICE."""
    if name == "q4_0":
        R, C = weight.shape
        scale_RG = noise(R, C // ggml.GROUP_SIZE, seed=5).cpu().half()
        stored: Any = GgmlWeight(codes(4, R, C).cpu(), scale_RG, GgmlLayout("q4_0"))
        return ggml.linear(stored, bias, device=DEVICE)
    if name == "codebook":
        levels, layout = noise(len(weight), 4, seed=5).cpu().half(), CodebookLayout(4, 1, "float16")
        stored = CodebookWeight(codes(2, *weight.shape).cpu(), levels, layout)
        return codebook.linear(stored, bias, device=DEVICE)
    unrounded = {
        "w4a16": IntegerLayout("w4a16", "none", group_size=32),
        "w8a16": IntegerLayout("w8a16", "none"),
    }
    stored = IntegerScheme(unrounded[name]).nearest(weight, None)
    return integer_linear.linear(stored, bias, device=DEVICE)


@pytest.mark.parametrize("name", ["q4_0", "codebook", "w4a16", "w8a16"])
def test_linears_of_our_formats_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = module_of(name, noise(48, 96).cpu(), noise(48, seed=2).cpu()), list[str]()
    x = noise(2, 3, 96)
    weight_RC = module.dequantized(torch.float32)
    kernel = lookup_dispatch.few_tokens

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(name)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(lookup_dispatch, "few_tokens", counted)
    if DEVICE == "cpu":  # the interpreter's CPU stands for a GPU
        monkeypatch.setattr(lookup_dispatch, "usable", lambda *_: True)
        monkeypatch.setattr(packed_gemm, "usable", lambda *_, **__: False)
    with torch.no_grad():
        found = module(x)
    assert calls and found.shape == (2, 3, 48)
    close(found.reshape(6, 48), expected(x.reshape(6, 96), weight_RC, module.bias))
