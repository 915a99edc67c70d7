"""bitsandbytes' own linears, whose few tokens our kernel multiplies, against bitsandbytes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from llmcompress.integrations import bitsandbytes_products
from llmcompress.kernels import packed_gemm
from tests.models import noise

needs_kernel = pytest.mark.skipif(
    not packed_gemm.KERNEL.available,
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_type = pytest.mark.parametrize("dtype", DTYPES)


def biased(module: Any, rows: int, dtype: torch.dtype, bias: bool) -> Any:
    if bias:
        module.bias = nn.Parameter(noise(rows, seed=7).to(dtype), requires_grad=False)
    return module.eval()


def four_bit(R: int, C: int, kind: str, nested: bool, dtype: torch.dtype, bias: bool = False) -> Any:
    """A linear that bitsandbytes quantised, on a processor without AVX512-BF16."""
    module: Any = Linear4bit(C, R, bias=False, compress_statistics=nested, quant_type=kind, device="meta")
    module.weight = Params4bit(
        noise(R, C).to(dtype), requires_grad=False, quant_type=kind, blocksize=64, compress_statistics=nested
    )
    module = module.to("cpu")
    module.support_avx512bf16_for_cpu = False
    return biased(module, R, dtype, bias)


def int8(R: int, C: int, threshold: float, dtype: torch.dtype, bias: bool = False) -> Any:
    module: Any = Linear8bitLt(C, R, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    module.weight = Int8Params(noise(R, C).to(dtype), requires_grad=False, has_fp16_weights=False)
    return biased(module.to("cpu"), R, dtype, bias)


def stock(module: Any, x: Tensor) -> Tensor:
    """What bitsandbytes computes by itself."""
    out: Tensor = type(module).forward.__wrapped__(module, x)
    return out


@needs_kernel
@every_type
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_is_bitsandbytes_bit_for_bit(dtype: torch.dtype, threshold: float, bias: bool) -> None:
    for R, C in ((1, 7), (33, 130), (64, 576)):
        module = int8(R, C, threshold, dtype, bias)
        for shape in ((1, C), (2, 3, C), (1, 40, C)):
            x = noise(*shape, seed=R).to(dtype)
            x[..., 0] = 0
            with torch.no_grad():
                few = x.numel() <= packed_gemm.FEW_INTEGERS * C
                assert (bitsandbytes_products.int8(module, x) is not None) == few
                found, theirs = module(x), stock(module, x)
            assert torch.equal(found, theirs) and found.dtype == theirs.dtype and found.shape == theirs.shape


@needs_kernel
def test_inputs_that_reach_the_threshold_are_left_to_bitsandbytes() -> None:
    module, x = int8(32, 64, 6.0, torch.float32), noise(2, 64, seed=1)
    x[1, 5] = -6.0
    with torch.no_grad():
        assert bitsandbytes_products.int8(module, x) is None
        assert torch.equal(module(x), stock(module, x))
        x[1, 5] = -5.9
        assert bitsandbytes_products.int8(module, x) is not None


@needs_kernel
@every_type
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_four_bits_are_the_dequantised_weight(
    dtype: torch.dtype, kind: str, nested: bool, bias: bool
) -> None:
    for R, C in ((3, 64), (33, 192), (64, 576)):
        module = four_bit(R, C, kind, nested, dtype, bias)
        for shape in ((1, C), (2, 3, C), (packed_gemm.FEW + 1, C)):
            x = noise(*shape, seed=R).to(dtype)
            with torch.no_grad():
                few = x.numel() <= packed_gemm.FEW * C
                assert (bitsandbytes_products.four_bit(module, x) is not None) == few
                found, theirs = module(x), stock(module, x)
                # bitsandbytes' product of the identity is the weight, in float32
                exact = x.double() @ stock(four_bit(R, C, kind, nested, dtype), torch.eye(C)).double()
            exact = exact if module.bias is None else exact + module.bias.double()
            assert found.dtype == theirs.dtype == dtype and found.shape == theirs.shape
            error = float((found.double() - exact).norm() / exact.norm())
            assert error <= max(1e-6, 1.01 * float((theirs.double() - exact).norm() / exact.norm()))


@needs_kernel
def test_rows_that_are_no_whole_groups_are_left_to_bitsandbytes() -> None:
    module, x = four_bit(8, 100, "nf4", False, torch.float32), noise(1, 100, seed=1)
    with torch.no_grad():
        assert bitsandbytes_products.four_bit(module, x) is None
        assert torch.equal(module(x), stock(module, x))


@needs_kernel
def test_a_processor_for_which_bitsandbytes_repacks_is_left_to_it() -> None:
    module, x = four_bit(32, 64, "nf4", False, torch.float32), noise(1, 64, seed=1)
    cast_module: Any = module
    cast_module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        assert bitsandbytes_products.four_bit(module, x) is None


@needs_kernel
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bitsandbytes_four_bit", lambda: four_bit(33, 192, "nf4", True, torch.float32, True)),
        ("bitsandbytes_four_bit", lambda: four_bit(33, 192, "fp4", False, torch.float32)),
        ("bitsandbytes_int8", lambda: int8(33, 130, 0.0, torch.float32, True)),
        ("bitsandbytes_int8", lambda: int8(33, 130, 6.0, torch.float32)),
    ],
    ids=["nf4", "fp4", "int8", "int8, threshold 6"],
)
def test_a_compiler_sees_one_operator(name: str, module: Callable[[], Any]) -> None:
    """Few tokens are multiplied as they are without a compiler, bit for bit; many come close."""
    linear, seen = module(), list[str]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for shape in ((1, linear.in_features), (2, 3, linear.in_features), (40, linear.in_features)):
        x = noise(*shape, seed=1)
        with torch.no_grad():
            exact = linear(x)
            torch._dynamo.reset()
            compiled: Any = torch.compile(linear, fullgraph=True, backend=backend)
            found = compiled(x)
        assert f"llmcompress.{name}.default" in seen and found.dtype == exact.dtype
        if x.numel() > packed_gemm.FEW_INTEGERS * x.shape[-1]:
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
        else:
            assert torch.equal(found, exact)
        seen.clear()


@needs_kernel
@pytest.mark.parametrize("kind", ["four_bit", "int8"])
def test_gradients_are_those_of_bitsandbytes(kind: str) -> None:
    module: Any = (
        four_bit(32, 64, "nf4", True, torch.float32)
        if kind == "four_bit"
        else int8(32, 64, 0.0, torch.float32)
    )
    first, second = (noise(2, 64, seed=1).requires_grad_() for _ in range(2))
    module(first).square().sum().backward()
    stock(module, second).square().sum().backward()
    assert first.grad is not None and second.grad is not None and torch.equal(first.grad, second.grad)


@needs_kernel
def test_another_weight_is_seen() -> None:
    """What is kept of a weight is used while it is where it was."""
    module, x = four_bit(32, 64, "nf4", True, torch.float32), noise(1, 64, seed=1)
    other = four_bit(32, 64, "fp4", False, torch.float32)
    with torch.no_grad():
        before = module(x)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), before)
        module.weight, theirs = other.weight, stock(other, x)
        assert torch.allclose(module(x), theirs, atol=1e-5) and not torch.allclose(before, theirs, atol=1e-2)
        assert torch.equal(twin(x), before)


@needs_kernel
def test_a_state_dict_is_what_it_was() -> None:
    module = four_bit(32, 64, "nf4", True, torch.float32)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        module(noise(1, 64))
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


SCRIPT = """
import llmcompress
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
print([hasattr(kind.forward, "__wrapped__") for kind in (Linear4bit, Linear8bitLt)])
"""


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(("value", "wrapped"), [("0", False), ("1", True), (None, True)])
def test_it_can_be_turned_off(value: str | None, wrapped: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "LLMCOMPRESS_BITSANDBYTES"}
    if value is not None:
        environment["LLMCOMPRESS_BITSANDBYTES"] = value
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[-2] == str([wrapped, wrapped])


@pytest.mark.parametrize("kind", ["four_bit", "int8"])
def test_without_a_kernel_bitsandbytes_multiplies(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_gemm.KERNEL.__dict__, "available", False)
    module: Any = (
        four_bit(32, 64, "nf4", True, torch.float32)
        if kind == "four_bit"
        else int8(32, 64, 0.0, torch.float32)
    )
    x = noise(1, 64, seed=1)
    with torch.no_grad():
        assert getattr(bitsandbytes_products, kind)(module, x) is None
        assert torch.equal(module(x), stock(module, x))
