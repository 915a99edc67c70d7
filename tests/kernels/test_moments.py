"""Second moments of inputs in bfloat16 against those of the plain class."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.kernels import moments as half_moments
from llmcompress.kernels.moments import HalfMoments

CPU = torch.device("cpu")
DEVICES = [
    pytest.param(
        CPU,
        marks=pytest.mark.skipif(
            not half_moments.takes(CPU), reason="this CPU has no AVX512-BF16, or there is no C compiler"
        ),
    ),
    pytest.param(
        torch.device("cuda"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def drawn(T: int, C: int, seed: int) -> Tensor:
    """Inputs whose columns have very different sizes and means."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, C, generator=generator) * torch.randn(C, generator=generator).exp() + 0.3


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    columns=st.integers(1, 130),
    batches=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    reference=st.booleans(),
)
def test_they_are_those_of_the_rounded_inputs(
    device: torch.device, seed: int, columns: int, batches: list[int], dtype: torch.dtype, reference: bool
) -> None:
    T = sum(batches)
    x, f = (drawn(T, columns, seed + more).to(dtype) for more in (0, 1))
    found = HalfMoments(columns, device)
    for part, full in zip(x.split(batches), f.split(batches), strict=True):
        found.add(part.to(device), full.to(device) if reference else None)
    assert found.tokens == T
    if not T:
        return
    rounded = x.bfloat16().double()
    close(found.H_CC, rounded.T @ rounded / T)
    assert torch.equal(found.H_CC, found.H_CC.T)
    close(found.mean_C, x.double().mean(0))
    assert torch.equal(found.top_C.cpu(), x.float().abs().amax(0))
    close(found.full_C, (f if reference else x).double().mean(0))
    if reference:
        assert found.gap_FC is not None
        gap = (f.float() - x.float()).bfloat16().double()
        close(found.gap_FC, gap.T @ rounded / T)
    else:
        assert found.gap_FC is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(device: torch.device, bad: float) -> None:
    x = drawn(600, 50, 0)
    x[411, 49] = bad
    found = HalfMoments(50, device)
    found.add(x.to(device))
    assert not found.finite


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_that_are_a_view_are_read_as_they_are(device: torch.device) -> None:
    x = drawn(40, 64, 3).to(device)
    found, expected = HalfMoments(20, device), Moments(20, device)
    found.add(x[:, 8:28])
    expected.add(x[:, 8:28].bfloat16())
    torch.testing.assert_close(found.H_CC, expected.H_CC, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_sums(threads: int) -> None:
    if not half_moments.takes(CPU):
        pytest.skip("this CPU has no AVX512-BF16, or there is no C compiler")
    before, x = torch.get_num_threads(), drawn(600, 200, 1)
    alone = HalfMoments(200)
    torch.set_num_threads(1)
    try:
        alone.add(x, x + 1)
        torch.set_num_threads(threads)
        found = HalfMoments(200)
        found.add(x, x + 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.H_CC, alone.H_CC)
    assert found.gap_FC is not None and alone.gap_FC is not None
    assert torch.equal(found.gap_FC, alone.gap_FC)
