"""The compiled products of packed weights against float64 and the plain steps of integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.formats import integer, integer_linear
from llmcompress.kernels import compiled, packed_gemm
from llmcompress.kernels.packed_gemm import Table

needs_kernel = pytest.mark.skipif(
    not packed_gemm.KERNEL.available,
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)
KINDS = ("float32", "float16", "multipliers", "nested")


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(kind: str, R: int, C: int, group_size: int, seed: int = 0) -> tuple[Table, Tensor]:
    """A weight with scales of one kind, and the same dequantised in float32."""
    generator, G = drawn(seed), -(-C // group_size)
    packed = torch.randint(256, (R, -(-C // 2)), generator=generator, dtype=torch.uint8)
    levels, scales = torch.randn(16, generator=generator), torch.randn(R, G, generator=generator)
    codes = torch.stack((packed >> 4, packed & 15), 2).reshape(R, -1)[:, :C].int()
    if kind in ("float32", "float16"):
        scales = scales.to(getattr(torch, kind))
        made, plain = Table(packed, levels, scales, R, C, group_size), scales.float()
        return made, levels[codes] * plain.repeat_interleave(group_size, 1)[:, :C]
    bytes_ = torch.randint(256, (R, G), generator=generator, dtype=torch.uint8)
    if kind == "multipliers":
        row_scale = torch.rand(R, generator=generator)
        made = Table(packed, levels, bytes_, R, C, group_size, row_scale=row_scale)
        return made, levels[codes] * bytes_.repeat_interleave(group_size, 1)[:, :C] * row_scale[:, None]
    nested, nested_levels = torch.rand(-(-R * G // 256), generator=generator), torch.randn(256)
    offset, place = torch.randn(1, generator=generator), torch.arange(R * G).reshape(R, G)
    made = Table(packed, levels, bytes_, R, C, group_size, nested, nested_levels, offset)
    plain = nested_levels[bytes_.int()] * nested[place // 256] + offset
    return made, levels[codes] * plain.repeat_interleave(group_size, 1)[:, :C]


def error(found: Tensor, x_TC: Tensor, W_RC: Tensor, bias: Tensor | None = None) -> float:
    """The greatest error of a product, of what its terms add up to in magnitude."""
    exact = x_TC.double() @ W_RC.double().T + (0 if bias is None else bias.double())
    size = x_TC.double().abs() @ W_RC.double().abs().T + (0 if bias is None else bias.double().abs())
    return float(((found.double() - exact).abs() / size.clamp_min(1e-30)).max())


def check_table(kind: str, T: int, R: int, C: int, group_size: int, seed: int) -> None:
    made, W_RC = table(kind, R, C, group_size, seed)
    assert torch.equal(made.expand(torch.float32), W_RC)
    assert torch.equal(made.expand(torch.bfloat16), W_RC.bfloat16())
    x_TC, bias = torch.randn(T, C, generator=drawn(seed)), torch.randn(R, generator=drawn(seed + 1))
    assert error(made.product(x_TC), x_TC, W_RC) < 1e-6
    assert error(made.product(x_TC, bias), x_TC, W_RC, bias) < 1e-6
    half = made.product(x_TC.bfloat16(), bias.bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, x_TC.bfloat16(), W_RC, bias.bfloat16()) < 2**-8


def check_integers(T: int, R: int, C: int, group_size: int, bits: int, static: bool, seed: int) -> None:
    """Rounded tokens, sums and outputs are those of the plain steps, bit for bit."""
    generator = drawn(seed)
    x_TC, step = torch.randn(T, C, generator=generator), torch.tensor([0.02]) if static else None
    codes_RC = torch.randint(-127, 128, (R, C), generator=generator, dtype=torch.int8)
    scale_R, bias = torch.rand(R, generator=generator), torch.randn(R, generator=generator)
    small_RC = codes_RC.clamp(-7, 7)
    times_RG = torch.randint(1, 19, (R, -(-C // group_size)), generator=generator, dtype=torch.uint8)
    codes_TC, scale = integer.quantize_tokens(x_TC, bits, step)

    def exact(weight: Tensor) -> Tensor:
        if bits == 16:
            high, low = (integer.split(codes_TC).long() @ weight.long().T).float().chunk(2)
            sums = high.mul(integer.HIGH).add(low)
        else:
            sums = (codes_TC.long() @ weight.long().T).int()
        return integer_linear.scaled(sums, scale, scale_R, bias, torch.float32)

    rounding: packed_gemm.Rounding = "static" if static else "dynamic"
    found = packed_gemm.integers_product(
        x_TC, codes_RC, scale_R, bias, bits=bits, rounding=rounding, step=step
    )
    assert torch.equal(found, exact(codes_RC))
    found = packed_gemm.nibbles_product(
        x_TC, integer.pack(small_RC), times_RG, scale_R, group_size, bias, bits=bits, step=step
    )
    assert torch.equal(found, exact(integer.expand(small_RC, times_RG, group_size)))
    floats = packed_gemm.floats_product(x_TC, codes_RC, scale_R, bias)
    assert error(floats, x_TC, codes_RC * scale_R[:, None], bias) < 1e-6


TOKENS, ROWS, COLUMNS = st.integers(1, 9), st.integers(1, 20), st.integers(1, 300)
GROUPS = st.sampled_from([32, 64, 96, 128, 512])


@needs_kernel
@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), TOKENS, ROWS, COLUMNS, GROUPS, st.integers(0, 99))
def test_levels_and_scales_are_multiplied_as_a_dequantised_weight(
    kind: str, T: int, R: int, C: int, group_size: int, seed: int
) -> None:
    check_table(kind, T, R, C, group_size, seed)


@needs_kernel
@settings(max_examples=120, deadline=None, derandomize=True)
@given(TOKENS, ROWS, COLUMNS, GROUPS, st.sampled_from([4, 8, 16]), st.booleans(), st.integers(0, 99))
def test_integers_are_multiplied_bit_for_bit(
    T: int, R: int, C: int, group_size: int, bits: int, static: bool, seed: int
) -> None:
    check_integers(T, R, C, group_size, bits, static, seed)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    ("form", "march"), [("plain", "x86-64"), ("avx2", "haswell"), ("avx512", "skylake-avx512")]
)
def test_the_forms_for_other_processors_compute_the_same(
    form: str, march: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = ["plain", "avx2", "avx512"]
    if forms.index(form) > forms.index(str(packed_gemm.form())):
        pytest.skip(f"this processor has no {form.upper()}")
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    others = (flag for flag in compiled.FLAGS if flag != "-march=native")
    monkeypatch.setattr(compiled, "FLAGS", (*others, f"-march={march}"))
    packed_gemm.KERNEL.forget()
    assert packed_gemm.form() == form
    for T, C in ((1, 33), (2, 576), (5, 130), (9, 64)):
        for kind in KINDS:
            check_table(kind, T, 9, C, 64, seed=T)
        for bits, static in ((4, False), (8, True), (16, False)):
            check_integers(T, 9, C, 32, bits, static, seed=T)


@pytest.mark.slow
@needs_kernel
def test_torchs_restriction_to_older_instructions_restricts_the_kernel(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = packed_gemm.form()
    if native == "plain":
        pytest.skip("this processor has neither AVX2 nor AVX-512")
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    for asked, form in (("avx2", "avx2"), ("default", "plain"), ("other", native)):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
        packed_gemm.KERNEL.forget()
        assert packed_gemm.form() == form


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_rows_of_a_large_linear(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_table("nested", 3, 301, 512, 64, seed=0)
        check_integers(3, 301, 512, 64, 8, False, seed=0)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 96), (2, packed_gemm.FEW // 2, 96), (1, packed_gemm.FEW + 1, 96)])
@pytest.mark.parametrize("dtype", packed_gemm.DTYPES)
def test_any_number_of_tokens_in_any_type(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_gemm, "PIECE", 1000)
    made, W_RC = table("float16", 40, 96, 32)
    x, bias = torch.randn(shape, generator=drawn(0)).to(dtype), torch.randn(40, generator=drawn(1)).to(dtype)
    found = made.linear(x, bias)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 40)
    half = dtype == torch.bfloat16 and packed_gemm.FAST_HALVES and x.numel() > packed_gemm.FEW * 96
    W_RC = W_RC.bfloat16() if half else W_RC
    assert error(found.flatten(0, -2), x.flatten(0, -2), W_RC, bias) < max(1e-6, 2 * torch.finfo(dtype).eps)


@needs_kernel
def test_tokens_that_are_not_finite_give_outputs_that_are_not() -> None:
    x_TC, codes_RC = torch.zeros(4, 40), torch.ones(3, 40, dtype=torch.int8)
    x_TC[1, 7], x_TC[2, 8] = torch.nan, -torch.inf
    for bits in (4, 8, 16):
        found = packed_gemm.integers_product(x_TC, codes_RC, torch.ones(3), bits=bits)
        assert found.isfinite().all(1).tolist() == [True, False, False, True]
        assert not found[[0, 3]].any(), "rows of zeros are zero"


@needs_kernel
def test_what_is_not_a_weight_is_refused_and_not_read() -> None:
    made, _ = table("nested", 4, 64, 32)
    parts = dict(vars(made))
    for change in (
        {"packed": made.packed[:, 1:].contiguous()},
        {"packed": made.packed.int()},
        {"levels": made.levels[:15].contiguous()},
        {"scales": made.scales[:3].contiguous()},
        {"scales": made.scales.int()},
        {"group_size": 16},
        {"rows": 5},
        {"offset": torch.zeros(2)},
        {"levels": torch.randn(32)[::2]},
    ):
        with pytest.raises(ValueError, match="are no weight of"):
            Table(**{**parts, **change})
    for wrong in (torch.randn(2, 63), torch.randn(64), torch.randn(2, 64).double()):
        with pytest.raises(ValueError, match=r"are not \[T, 64\]"):
            made.product(wrong)
    with pytest.raises(ValueError, match="a bias of 4 rows"):
        made.product(torch.randn(2, 64), torch.randn(3))
    with pytest.raises(ValueError, match="rows from 3 of 4 x 64 do not go"):
        made.expand(torch.float32, start=3, out=torch.empty(2, 64))
    codes, scale, x_TC = torch.ones(4, 64, dtype=torch.int8), torch.ones(4), torch.randn(2, 64)
    for given_codes, given_scale in ((codes.int(), scale), (codes, scale[:3]), (codes.t(), torch.ones(64))):
        with pytest.raises(ValueError, match="are no int8 weight"):
            packed_gemm.integers_product(x_TC, given_codes, given_scale)
    with pytest.raises(ValueError, match="needs a step"):
        packed_gemm.integers_product(x_TC, codes, scale, rounding="static")
    bytes_ = torch.ones(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="are no weight of 64 columns in groups of 24"):
        packed_gemm.nibbles_product(x_TC, bytes_, torch.ones(4, 3, dtype=torch.uint8), scale, 24)


@needs_kernel
def test_gradients_and_others_decisions_are_left_alone() -> None:
    x, bias = torch.randn(2, 64), torch.randn(4)
    assert packed_gemm.usable(x, bias)
    assert not packed_gemm.usable(x.clone().requires_grad_())
    assert not packed_gemm.usable(x, bias.clone().requires_grad_())
    with torch.no_grad():
        assert packed_gemm.usable(x.clone().requires_grad_(), bias.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not packed_gemm.usable(x)
    for wrong in (x[:0], x.double(), x.to("meta"), torch.randn(packed_gemm.FEW + 1, 64)):
        assert not packed_gemm.usable(wrong)
