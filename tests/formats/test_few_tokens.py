"""Few tokens through our linears: the dequantised weight in float64, with the kernel and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms.grids import GGML
from llmcompress.formats import bitsandbytes_layout, four_bit, ggml, integer_linear
from llmcompress.formats.base import StoredLinear
from llmcompress.formats.ggml import GgmlLayout, GgmlWeight
from llmcompress.formats.integer import LARGEST, IntegerLayout, IntegerWeight, quantize_tokens
from llmcompress.kernels import packed_gemm
from tests.models import noise

pytestmark = pytest.mark.usefixtures("fresh_compiler")
needs_kernel = pytest.mark.skipif(
    not packed_gemm.KERNEL.available,
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)
Make = Callable[[int, int, Tensor | None], StoredLinear]


def of_ggml(format: str) -> Make:
    def make(R: int, C: int, bias: Tensor | None) -> StoredLinear:
        assert format in GGML
        codes = torch.randint(16, (R, C), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        layout = GgmlLayout(format)  # type: ignore[arg-type]
        return ggml.linear(GgmlWeight(codes, noise(R, C // 32, seed=1).half(), layout), bias)

    return make


def of_four_bits(format: bitsandbytes_layout.FourBitFormat, nested: bool) -> Make:
    def make(R: int, C: int, bias: Tensor | None) -> StoredLinear:
        return four_bit.linear(bitsandbytes_layout.quantize_nearest(noise(R, C), format, 32, nested), bias)

    return make


def of_integers(layout: IntegerLayout) -> Make:
    def make(R: int, C: int, bias: Tensor | None) -> StoredLinear:
        largest, generator = LARGEST[layout.weight_bits], torch.Generator().manual_seed(0)
        codes = torch.randint(-largest, largest + 1, (R, C), generator=generator, dtype=torch.int8)
        groups = None if layout.group_size is None else -(-C // layout.group_size)
        times = None if groups is None else torch.randint(1, 19, (R, groups), generator=generator).byte()
        step = torch.tensor(0.02) if layout.activations == "static" else None
        weight = IntegerWeight(codes, noise(R, seed=2).abs(), layout, times, step)
        return integer_linear.linear(weight, bias)

    return make


WHOLE: dict[str, Make] = {  # formats that do not round tokens
    "q4_0": of_ggml("q4_0"),
    "iq4_nl": of_ggml("iq4_nl"),
    "nf4": of_four_bits("nf4", False),
    "fp4, nested": of_four_bits("fp4", True),
    "w8a16, none": of_integers(IntegerLayout("w8a16", "none")),
    "w4a16, none": of_integers(IntegerLayout("w4a16", "none", 32)),
}
ROUNDED: dict[str, IntegerLayout] = {
    "w8a8": IntegerLayout("w8a8"),
    "w8a8, static": IntegerLayout("w8a8", "static"),
    "w8a16": IntegerLayout("w8a16"),
    "w4a8": IntegerLayout("w4a8", group_size=32),
    "w4a8, odd groups": IntegerLayout("w4a8", group_size=24),
    "w4a4": IntegerLayout("w4a4", group_size=64),
}
every_whole = pytest.mark.parametrize("name", WHOLE)


@needs_kernel
@every_whole
@pytest.mark.parametrize("dtype", packed_gemm.DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_few_tokens_are_multiplied_with_the_dequantised_weight(
    name: str, dtype: torch.dtype, biased: bool
) -> None:
    for R, C in ((1, 32), (7, 96), (32, 576)):
        bias = noise(R, seed=3) if biased else None
        module = WHOLE[name](R, C, bias).to(dtype)
        W_RC = module.dequantized(torch.float32).double()
        for T in range(1, packed_gemm.FEW + 1):
            x = noise(1, T, C, seed=T).to(dtype)
            with torch.no_grad():
                found = module(x)
            exact = x.double() @ W_RC.T + (0 if module.bias is None else module.bias.double())
            assert found.dtype == dtype and found.shape == exact.shape
            size = x.double().abs() @ W_RC.abs().T + 1
            assert float(((found.double() - exact).abs() / size).max()) < max(1e-6, torch.finfo(dtype).eps)


@needs_kernel
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", packed_gemm.DTYPES)
def test_rounded_tokens_give_the_same_with_the_kernel_and_without(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for R, C in ((1, 32), (7, 97), (32, 576)):
        module = of_integers(ROUNDED[name])(R, C, noise(R, seed=3))
        for T in (1, 3, 5, 9):
            x, found = noise(T, C, seed=T).to(dtype), []
            for here in (True, False):
                monkeypatch.setitem(packed_gemm.KERNEL.__dict__, "available", here)
                with torch.no_grad():
                    found.append(module(x))
            assert torch.equal(*found) and found[0].dtype == dtype


def noting(called: list[str], name: str) -> Callable[..., Tensor]:
    """A product of the kernel that writes its name into `called`."""
    product: Callable[..., Tensor] = getattr(packed_gemm, name)

    def noted(*args: Any, **options: Any) -> Tensor:
        called.append(name)
        return product(*args, **options)

    return noted


@needs_kernel
def test_the_kernel_multiplies_what_the_integers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module asks the kernel, whose outputs are those of codes and scales in float64."""
    called = list[str]()
    for name in ("integers_product", "nibbles_product", "floats_product"):
        monkeypatch.setattr(packed_gemm, name, noting(called, name))
    for layout, asked in (
        (IntegerLayout("w8a8"), "integers_product"),
        (IntegerLayout("w4a8", group_size=32), "nibbles_product"),
        (IntegerLayout("w8a16", "none"), "floats_product"),
    ):
        module, x = of_integers(layout)(32, 96, None), noise(3, 96, seed=4)
        with torch.no_grad():
            found = module(x)
        if layout.activations != "none":
            codes, scale = quantize_tokens(x, layout.activation_bits)
            x = codes.float() * scale
        exact = x.double() @ module.dequantized(torch.float32).double().T
        assert called == [asked] and float((found - exact).norm() / exact.norm()) < 1e-6
        called.clear()


@every_whole
def test_without_a_kernel_torch_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_gemm.KERNEL.__dict__, "available", False)
    module, x = WHOLE[name](33, 96, noise(33, seed=3)), noise(3, 96, seed=4)
    with torch.no_grad():
        found = module(x)
    exact = torch.nn.functional.linear(x, module.dequantized(torch.float32), module.bias)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@every_whole
def test_gradients_go_to_the_input_and_the_bias(name: str) -> None:
    module = WHOLE[name](32, 96, noise(32, seed=3)).train()
    assert module.bias is not None
    module.bias.requires_grad_()
    W_RC, bias = module.dequantized(torch.float32), module.bias.detach().clone().requires_grad_()
    first, second = (noise(3, 96, seed=4).requires_grad_() for _ in range(2))
    module(first).sin().sum().backward()
    torch.nn.functional.linear(second, W_RC, bias).sin().sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module.bias.grad, bias.grad, rtol=1e-3, atol=1e-3)


# torch 2.13's own compiler does what the warning is about
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["q4_0", "w8a16, none", "w4a16, none"])
def test_a_linear_compiles_into_one_graph(name: str) -> None:
    module, x = WHOLE[name](32, 96, noise(32, seed=3)), noise(2, 96, seed=4)
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
