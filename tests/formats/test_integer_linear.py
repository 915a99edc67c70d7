"""The ways an integer linear multiplies and the steps that a GPU runs compiled, against the plain
arithmetic."""

import itertools

import pytest
import torch
from torch import Tensor

from llmcompress.formats import integer, integer_linear
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.integer_linear import PIECE, float_sums, integer_sums, linear, scaled
from tests.models import noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


WIDE = 2**15  # columns, of which a piece takes 32 rows
SHAPES = [
    (1, 1),
    (7, 3),
    (17, 33),
    (PIECE // WIDE, WIDE),
    (PIECE // WIDE + 1, WIDE),
    (2 * PIECE // WIDE + 5, WIDE),
    (2, PIECE + 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_sums_in_floats_are_those_of_the_integers(shape: tuple[int, int], tokens: int) -> None:
    matrix, x = codes(*shape), codes(tokens, shape[1], seed=1)
    matrix[:, 0], x[:, 0] = 127, 127
    exact = x.long() @ matrix.long().T
    assert int(exact.abs().max()) < 2**24  # as far as floats are exact
    for given in (x, x.float()):
        found = float_sums(given, matrix)
        assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found.long(), exact)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (17, 33), (32, 64)])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_sums_of_the_integer_kernel_are_exact(shape: tuple[int, int], tokens: int) -> None:
    matrix, x = codes(*shape), codes(tokens, shape[1], seed=1)
    found = integer_sums(x, matrix)
    assert found.dtype == torch.int32 and torch.equal(found.long(), x.long() @ matrix.long().T)


@pytest.mark.parametrize(
    "scheme",
    [
        IntegerLayout("w8a8"),
        IntegerLayout("w8a8", "static"),
        IntegerLayout("w4a4", group_size=8),
        IntegerLayout("w8a16"),
    ],
    ids=str,
)
def test_a_processor_with_a_kernel_computes_what_one_without_does(
    scheme: IntegerLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = integer.LARGEST[scheme.weight_bits]
    groups = None if scheme.group_size is None else torch.full((17, 5), 3, dtype=torch.uint8)
    step = torch.tensor(0.02) if scheme.activations == "static" else None
    weight = IntegerWeight(
        codes(17, 33).clamp(-largest, largest), noise(17, seed=2).abs(), scheme, groups, step
    )
    for dtype, bias in itertools.product(DTYPES, (None, noise(17, seed=3))):
        module, x, found = linear(weight, bias), noise(2, 5, 33, seed=4).to(dtype), []
        for kernel in (True, False):
            monkeypatch.setattr(integer_linear, "KERNEL", kernel)
            with torch.no_grad():
                found.append(module(x))
        assert torch.equal(*found) and found[0].dtype == dtype


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_same_in_floats(bits: int, dtype: torch.dtype) -> None:
    x = noise(5, 33).to(dtype)
    for step in (None, torch.tensor(0.02)):
        whole, scale = integer.quantize_tokens(x, bits, step)
        floats, same = integer.quantize_tokens(x, bits, step, torch.float32)
        assert (
            floats.dtype == torch.float32 and torch.equal(floats, whole.float()) and torch.equal(scale, same)
        )


# torch 2.13's own compiler does what the warning is about
compiler = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.slow
@compiler
def test_the_steps_round_a_product_are_one_graph_each_to_a_compiler() -> None:
    for bits, step in ((8, None), (8, torch.tensor(0.02)), (16, None)):
        torch.compiler.reset()
        quantize = torch.compile(integer.quantize_tokens, dynamic=True, fullgraph=True, backend="aot_eager")
        for x in (noise(tokens, 33, seed=tokens).bfloat16() for tokens in (1, 5, 9)):
            found, plain = quantize(x, bits, step), integer.quantize_tokens(x, bits, step)
            assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
    finish = torch.compile(scaled, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens, bias in itertools.product((1, 5, 9), (None, noise(17, seed=3))):
        sums, scale, scale_R = codes(tokens, 17).int(), noise(tokens, 1).abs(), noise(17, seed=2)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(
                finish(sums, scale, scale_R, bias, dtype), scaled(sums, scale, scale_R, bias, dtype)
            )
