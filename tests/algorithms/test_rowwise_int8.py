"""Rows rounded to 8 bits under a scale each, against a search in float64 of every row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms import rowwise_int8
from llmcompress.algorithms.rowwise_int8 import RATIOS, round_rows


def matrix(R: int, C: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    sizes = torch.logspace(-6, 6, R)[:, None]
    return (torch.randn(R, C) * sizes).to(dtype)


def error(W: Tensor, scale: Tensor) -> Tensor:
    """Squared error of each row under its nearest codes, float64."""
    codes = (W.double() / scale.double()[:, None]).round().clamp(-127, 127)
    return (W.double() - codes * scale.double()[:, None]).square().sum(1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 64), (7, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_row_has_the_scale_of_least_error_and_its_nearest_codes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = matrix(*shape).clamp(-6e4, 6e4).to(dtype)
    codes, scale = round_rows(W)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and codes.shape == W.shape
    top = (W.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    least = torch.stack([error(W, top * ratio) for ratio in RATIOS]).amin(0)
    found = (W.double() - codes.double() * scale.double()[:, None]).square().sum(1)
    assert bool((found <= least * (1 + 1e-4) + 1e-30).all()) and bool((scale > 0).all())


def test_the_search_is_worth_something() -> None:
    W = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    _, scale = round_rows(W)
    assert float(error(W, scale).sum()) < 0.95 * float(error(W, W.abs().amax(1) / 127).sum())


def test_rows_of_zeros_and_rows_near_zero_have_finite_scales() -> None:
    W = torch.zeros(4, 8)
    W[1, 2], W[2] = 1e-44, 1e-38
    codes, scale = round_rows(W)
    assert not codes[0].any() and bool(scale.isfinite().all()) and bool((scale > 0).all())


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(50, 20)
    once = round_rows(W)
    monkeypatch.setattr(rowwise_int8, "PIECE", 60)
    assert all(torch.equal(a, b) for a, b in zip(once, round_rows(W), strict=True))
