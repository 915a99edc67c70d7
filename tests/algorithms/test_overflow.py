"""Numbers beyond the range of their dtype."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.algorithms.overflow import all_finite

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    dtype: torch.dtype, value: float, place: int
) -> None:
    x = torch.randn(7, 143)
    assert all_finite(x.to(dtype)) and all_finite(x.to(dtype).T) and all_finite(x[:0].to(dtype))
    x.view(-1)[place] = value
    assert not all_finite(x.to(dtype)) and not all_finite(x.to(dtype).T)


def test_the_largest_numbers_are_finite_and_a_gradient_does_not_matter() -> None:
    x = torch.full((3,), torch.finfo(torch.float32).max).requires_grad_()
    assert all_finite(x) and all_finite(-x)
