"""Attention in bfloat16 by the C kernel against attention in float64, and where torch's is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.kernels import attention as kernel
from llmcompress.kernels.attention import FastAttention, attention
from llmcompress.modeling.half_precision import half_precision

CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(
    not kernel.takes(CPU), reason="this CPU has no AVX512-BF16, or there is no C compiler"
)
CLOSE = 0.006  # relative error that roundings to bfloat16 make; torch's own attention makes as much


def drawn(B: int, heads: int, L: int, D: int, seed: int) -> Tensor:
    """Heads [B, heads, L, D] in bfloat16, in memory as a projection leaves them: [B, L, heads, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, heads, D, generator=generator).bfloat16().transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention in float64, written out."""
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v


def assert_close(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).norm()
    assert float(error) <= CLOSE * float(expected.norm()) + 1e-6


SHAPES = st.tuples(
    st.integers(1, 3),  # sequences
    st.sampled_from([(1, 1), (2, 1), (6, 3), (4, 4)]),  # heads of queries, of keys
    st.one_of(st.integers(1, 130), st.sampled_from([511, 512, 513, 600])),  # tokens
    st.sampled_from([2, 6, 16, 30, 32, 64, 80, 96, 128, 256]),  # numbers a head
)


@needs_kernel
@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=SHAPES, causal=st.booleans(), scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))
def test_output_and_gradients_are_those_of_exact_attention(
    shape: tuple[int, tuple[int, int], int, int], causal: bool, scale: float | None, seed: int
) -> None:
    B, (H, G), L, D = shape
    q, k, v = (drawn(B, heads, L, D, seed + i).requires_grad_() for i, heads in enumerate((H, G, G)))
    grad = drawn(B, H, L, D, seed + 3)
    out = attention(q, k, v, causal=causal, scale=scale)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, (q, k, v), grad)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = exact(wide[0], wide[1], wide[2], causal, scale)
    assert_close(out.detach(), expected.detach())
    # what cancels to nothing, as the gradient of q does for one token, is known to the size of its terms only
    rest = 1e-3 * float(grad.double().norm())
    for ours, theirs in zip(found, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert float((ours.double() - theirs).norm()) <= CLOSE * float(theirs.norm()) + rest


@needs_kernel
def test_threads_and_memory_layouts_change_nothing() -> None:
    q, k, v = (drawn(2, heads, 150, 64, i) for i, heads in enumerate((6, 3, 3)))
    whole = attention(q, k, v, causal=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(attention(q, k, v, causal=True), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True), whole)
    scattered = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    assert scattered[0].stride(-1) == 2
    assert torch.equal(attention(scattered[0], scattered[1], scattered[2], causal=True), whole)


@needs_kernel
def test_large_scores_do_not_overflow_and_nan_is_seen() -> None:
    q, k, v = (drawn(1, 1, 70, 32, i) for i in range(3))
    found = attention(1000 * q, 1000 * k, v, causal=True)
    assert_close(found, exact((1000 * q).double(), (1000 * k).double(), v.double(), True, None))
    v[0, 0, 3, 5] = torch.nan
    found = attention(q, k, v, causal=True)
    assert bool(found[0, 0, 3:, 5].isnan().all())


@needs_kernel
def test_calls_of_torch_under_autocast_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counted(*args: Tensor, causal: bool, scale: float | None) -> Tensor:
        calls.append(causal)
        return attention(*args, causal=causal, scale=scale)

    monkeypatch.setattr(kernel, "attention", counted)
    q, k, v = (drawn(1, heads, 20, 16, i).float() for i, heads in enumerate((4, 2, 2)))
    expected = exact(q.double(), k.double(), v.double(), True, None)
    with half_precision(CPU, True):
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert calls == [True] and found.dtype == torch.bfloat16
    assert_close(found, expected)
    with half_precision(CPU, False):
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert calls == [True], "the mode was left on"


@needs_kernel
def test_what_the_kernel_cannot_compute_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Tensor, **kwargs: object) -> Tensor:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernel, "attention", never)
    q, long = drawn(1, 2, 8, 16, 0), drawn(1, 2, 9, 16, 1)
    odd, wide = drawn(1, 2, 8, 15, 2), drawn(1, 2, 8, 258, 3)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16), FastAttention():
        assert F.scaled_dot_product_attention(q, q, q, attn_mask=mask).shape == q.shape
        assert F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).shape == q.shape
        assert F.scaled_dot_product_attention(q, long, long).shape == q.shape
        assert F.scaled_dot_product_attention(odd, odd, odd).shape == odd.shape
        assert F.scaled_dot_product_attention(wide, wide, wide).shape == wide.shape
        assert F.scaled_dot_product_attention(q[0], q[0], q[0]).shape == q[0].shape
        assert F.scaled_dot_product_attention(q[:, :, :0], q, q).shape == (1, 2, 0, 16)
    with torch.autocast("cpu", torch.float16), FastAttention():
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.float16
    with FastAttention():  # without autocast, q stays in its precision
        assert F.scaled_dot_product_attention(q.float(), q.float(), q.float()).dtype == torch.float32
