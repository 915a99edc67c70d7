"""The rounding of activations against whole numbers in int64 and float64, and the histogram against all that
it has seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.activation_quantization import (
    Magnitudes,
    round_but_outliers,
    round_static,
    round_tokens,
    static_scale,
)
from llmcompress.formats import integer
from tests.models import noise

stock: Any = functional  # typed in part only
BITS = (4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BIN = 2.0 ** (2 * Magnitudes.SPAN / Magnitudes.BINS)  # one end of a bin over the other
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens, 8 bits": lambda x: round_tokens(x, 8),
    "tokens, 4 bits": lambda x: round_tokens(x, 4),
    "static, 8 bits": lambda x: round_static(x, 8, 0.02),
    "static, 4 bits": lambda x: round_static(x, 4, torch.tensor([0.3])),
    "outliers left": lambda x: round_but_outliers(x, 2.5),
    "threshold 0": lambda x: round_but_outliers(x, 0.0),
}
by_rounding = pytest.mark.parametrize("name", ROUNDINGS)


def largest(bits: int) -> int:
    return {8: 127, 4: 7}[bits]


def quarters(bits: int, T: int, C: int, seed: int = 0) -> Tensor:
    """Quarters of whole numbers whose largest in each token is the largest code: the step is one, int64 [T,
    C] in quarters."""
    top = 4 * largest(bits)
    x_TC = torch.randint(-top, top + 1, (T, C), generator=torch.Generator().manual_seed(seed))
    x_TC[torch.arange(T), torch.arange(T) % C] = torch.where(torch.arange(T) % 2 == 0, top, -top)
    return x_TC


def whole(quarter: int) -> int:
    """A quarter of this, rounded, halves to the even neighbour."""
    below, rest = divmod(quarter, 4)
    return below + (rest == 3 or (rest == 2 and below % 2 == 1))


def check(x: Tensor, found: Tensor, step: Tensor | float, bits: int) -> None:
    """In float64: whole multiples of the step, none beyond the codes, each as near to x (clipped to them) as
    half a step."""
    step = torch.as_tensor(step).double()
    codes = (found.double() / step).round()
    loss = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 1e-6
    assert found.shape == x.shape and found.dtype == x.dtype
    assert bool((codes.abs() <= largest(bits)).all())
    torch.testing.assert_close(found.double(), codes * step, rtol=loss, atol=0)
    wanted = x.double().clamp(-largest(bits) * step, largest(bits) * step)
    assert bool(((codes * step - wanted).abs() <= step * (0.5 + 1e-4)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(9, 16), (1, 1), (50, 3)])
def test_tokens_become_the_whole_numbers_of_integer_arithmetic(bits: int, shape: tuple[int, int]) -> None:
    quarter_TC = quarters(bits, *shape)
    expected = [[whole(quarter) for quarter in row] for row in quarter_TC.tolist()]
    assert round_tokens(quarter_TC / 4, bits).long().tolist() == expected
    # a power of two is lost on no step
    assert round_tokens(quarter_TC / 4 * 2.0**-9, bits).mul(2.0**9).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_one_scale_gives_the_whole_numbers_of_integer_arithmetic_and_clips_beyond_them(bits: int) -> None:
    quarter_TC = quarters(bits, 20, 15) * 3
    expected = [
        [max(-largest(bits), min(largest(bits), whole(q))) for q in row] for row in quarter_TC.tolist()
    ]
    assert round_static(quarter_TC / 4, bits, 1.0).long().tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), T=st.integers(1, 9), C=st.integers(1, 40))
def test_each_token_is_as_near_as_its_own_steps_let_it(
    bits: int, dtype: torch.dtype, seed: int, T: int, C: int
) -> None:
    x = (noise(2, T, C, seed=seed) * noise(2, T, 1, seed=seed + 1).exp()).to(dtype)
    check(x, round_tokens(x, bits), x.double().abs().amax(-1, keepdim=True) / largest(bits), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), scale=st.floats(2.0**-10, 8, width=32))
def test_one_scale_leaves_half_a_step_and_what_is_clipped(
    bits: int, dtype: torch.dtype, seed: int, scale: float
) -> None:
    x = (noise(3, 4, 11, seed=seed) * 5).to(dtype)
    check(x, round_static(x, bits, scale), scale, bits)
    assert torch.equal(round_static(x, bits, scale), round_static(x, bits, torch.tensor([scale])))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_are_those_of_the_codes_that_the_integer_product_takes(
    bits: int, dtype: torch.dtype
) -> None:
    x = (noise(5, 7, 64) * 3).to(dtype)
    codes_TC, step = integer.quantize_tokens(x, bits)
    assert torch.equal(round_tokens(x, bits), (codes_TC * step).reshape(x.shape).to(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_under_one_scale_too_whatever_its_shape(
    bits: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, scale = (noise(5, 7, 64) * 3).to(dtype), torch.full(shape, 0.03)
    codes_TC, step = integer.quantize_tokens(x, bits, scale)
    assert torch.equal(round_static(x, bits, scale), (codes_TC * step).reshape(x.shape).to(dtype))


@by_rounding
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_zeros_stay_zeros_and_change_no_other(name: str, dtype: torch.dtype) -> None:
    x = noise(6, 8).to(dtype)
    x[2] = 0
    found, others = ROUNDINGS[name](x), torch.arange(6) != 2
    assert found[2].tolist() == [0] * 8
    assert torch.equal(found[others], ROUNDINGS[name](x[others]))
    assert ROUNDINGS[name](torch.zeros_like(x)).count_nonzero() == 0


@by_rounding
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 0, 8)])
def test_an_empty_batch_stays_an_empty_batch(name: str, shape: tuple[int, ...]) -> None:
    found = ROUNDINGS[name](torch.zeros(shape, dtype=torch.bfloat16))
    assert found.shape == shape and found.dtype == torch.bfloat16


@by_rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e5, -1e5, 1e-30])
def test_huge_and_tiny_tokens_stay_finite_and_keep_their_largest(
    name: str, dtype: torch.dtype, size: float
) -> None:
    x = noise(4, 8).to(dtype)
    x[1, 3], x[2] = size, size
    found = ROUNDINGS[name](x)
    assert bool(found.isfinite().all())
    if "static" not in name:
        torch.testing.assert_close(found[2], x[2], rtol=2 * torch.finfo(dtype).eps, atol=0)


@by_rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_as_if_nothing_were_rounded(name: str, dtype: torch.dtype) -> None:
    x, upstream = noise(4, 8).to(dtype).mul(2).requires_grad_(), noise(4, 8, seed=1).to(dtype)
    ROUNDINGS[name](x).backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)


@by_rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e5])
def test_what_asks_for_a_gradient_is_rounded_to_the_same_values(
    name: str, dtype: torch.dtype, size: float
) -> None:
    x = (noise(16, 8) * size).to(dtype)
    assert torch.equal(ROUNDINGS[name](x.clone().requires_grad_()).detach(), ROUNDINGS[name](x))


@by_rounding
def test_rounding_leaves_what_it_reads(name: str) -> None:
    x = noise(4, 8)
    before = x.clone()
    ROUNDINGS[name](x)
    assert torch.equal(x, before)


def test_columns_that_reach_the_threshold_stay_and_the_others_are_rounded_among_themselves() -> None:
    x = noise(2, 10, 16).clamp(-2, 2)
    x[..., [5, 9]] = 0.01  # small elsewhere, so that no token has its largest below the threshold here
    x[1, 4, 5], x[0, 2, 9] = 6.0, -7.5  # one is the threshold itself
    found, rest = round_but_outliers(x, 6.0), torch.tensor([c not in (5, 9) for c in range(16)])
    assert torch.equal(found[..., ~rest], x[..., ~rest])
    assert torch.equal(found[..., rest], round_tokens(x[..., rest], 8))


@pytest.mark.parametrize("threshold", [0.0, 1e6])
def test_a_threshold_of_zero_or_beyond_all_rounds_everything(threshold: float) -> None:
    x = noise(3, 5, 16) * 20
    assert torch.equal(round_but_outliers(x, threshold), round_tokens(x, 8))


def test_where_every_column_reaches_the_threshold_nothing_is_rounded() -> None:
    x = noise(64, 8)
    assert torch.equal(round_but_outliers(x, float(x.abs().amax(0).min())), x)


@pytest.mark.parametrize("threshold", [0.0, 4.0, 5.0])
def test_outliers_leave_the_values_that_bitsandbytes_computes_with(threshold: float) -> None:
    x_TC = noise(12, 32) * 2  # in the outlier columns, too, most tokens stay below the threshold
    codes_TC, top_T, outliers = stock.int8_vectorwise_quant(x_TC.clone(), threshold=threshold)
    expected = codes_TC * top_T[:, None] / 127
    if outliers is not None:
        assert 0 < len(outliers) < 32
        expected[:, outliers] = x_TC[:, outliers]
    torch.testing.assert_close(round_but_outliers(x_TC, threshold), expected, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999), count=st.integers(1, 3000), share=st.floats(1e-4, 1.0), spread=st.floats(0, 4)
)
def test_a_quantile_is_within_a_bin_of_the_true_one(
    seed: int, count: int, share: float, spread: float
) -> None:
    x = noise(count, seed=seed) * (noise(count, seed=seed + 1) * spread).exp()
    seen = Magnitudes()
    seen.add(x)
    sizes = x.abs().double()
    below, above = (float(torch.quantile(sizes, share, interpolation=way)) for way in ("lower", "higher"))
    assert below / BIN <= seen.quantile(share) <= above * BIN
    assert seen.quantile(1.0) == pytest.approx(float(seen.top), rel=BIN - 1)
    assert float(seen.top) == float(x.abs().max())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), cuts=st.lists(st.integers(0, 600), max_size=6))
def test_a_histogram_does_not_depend_on_how_the_inputs_are_cut(seed: int, cuts: list[int]) -> None:
    x = noise(600, seed=seed) * 3
    at_once, cut = Magnitudes(), Magnitudes()
    at_once.add(x.reshape(2, 10, 30))
    for part in reversed(torch.tensor_split(x, sorted(cuts))):
        cut.add(part)
    assert torch.equal(at_once.counts, cut.counts)
    assert float(at_once.counts.sum()) == 600
    assert torch.equal(at_once.top, cut.top)


def test_what_lies_about_the_middle_of_a_bin_is_counted_in_that_bin() -> None:
    seen = Magnitudes()
    for off in (-0.45, 0.0, 0.45):  # of a bin
        seen.add(-seen.values() * BIN**off)
    assert seen.counts.tolist() == [3] * Magnitudes.BINS


def test_zeros_and_sizes_beyond_the_bins_are_counted_at_the_ends() -> None:
    seen = Magnitudes()
    seen.add(torch.tensor([0.0, 0.0, 1e-20, 1.0, 1e20]))
    assert (float(seen.counts[0]), float(seen.counts[-1])) == (3, 1)
    assert float(seen.top) == pytest.approx(1e20)
    assert seen.quantile(0.6) < 1e-12 and seen.quantile(0.8) == pytest.approx(1.0, rel=BIN - 1)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", BITS)
def test_where_nothing_or_zeros_were_seen_the_scale_is_zero_and_rounding_by_it_gives_zeros(
    method: str, bits: int
) -> None:
    for x in (torch.zeros(0, 4), torch.zeros(3, 4)):
        seen = Magnitudes()
        seen.add(x)
        assert static_scale(seen, bits, method) == 0.0
    assert round_static(noise(3, 4), bits, 0.0).tolist() == torch.zeros(3, 4).tolist()


def heavy(tail: str, seed: int, count: int = 20_000) -> Tensor:
    """Inputs of which a few are many times the typical size."""
    x = noise(count, seed=seed)
    if tail == "student":
        return x / noise(3, count, seed=seed + 100).square().mean(0).sqrt()
    if tail == "lognormal":
        return x * (1.5 * noise(count, seed=seed + 100)).exp()
    return torch.where(torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.005, x * 60, x)


def squared(x: Tensor, bits: int, scale: float) -> float:
    """Error over all of x in float64, by the plain form."""
    codes = (x.double() / scale).round().clamp(-largest(bits), largest(bits))
    return float((codes * scale - x.double()).square().sum())


by_tail = pytest.mark.parametrize("tail", ["student", "lognormal", "outliers"])


@by_tail
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(3))
def test_the_least_squares_scale_loses_less_on_the_data_than_the_one_that_reaches_all(
    tail: str, bits: int, seed: int
) -> None:
    x, seen = heavy(tail, seed), Magnitudes()
    for part in x.split(3000):
        seen.add(part)
    scales = {method: static_scale(seen, bits, method) for method in ("minmax", "percentile", "mse")}
    assert scales["minmax"] == pytest.approx(float(x.abs().max()) / largest(bits))
    share = float((x.abs() <= scales["percentile"] * largest(bits) * BIN).double().mean())
    assert share >= 0.9999 and scales["percentile"] < scales["minmax"]
    lost = {method: squared(x, bits, scale) for method, scale in scales.items()}
    assert lost["mse"] < lost["minmax"]
    assert lost["mse"] <= 1.01 * lost["percentile"]  # the scales that are tried are 1 % of the largest apart
    best = min(squared(x, bits, float(seen.top) * percent / 100 / largest(bits)) for percent in range(5, 101))
    assert lost["mse"] <= 1.01 * best
