"""The compiled kernel against torch's look-up and product, and that nothing breaks where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.codebook import look_up
from llmcompress.formats.codebook import pack
from llmcompress.kernels import compiled, lut_gemm

needs_kernel = pytest.mark.skipif(
    not lut_gemm.KERNEL.available,
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)


def linear(R: int, C: int, rows: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Packed indices, levels [G, L], and the weight [R, C]."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(-(-R // rows), 2**bits, generator=generator)
    codes = torch.randint(2**bits, (R, C), generator=generator)
    return pack(codes, bits), levels, look_up(codes, levels, rows)


@needs_kernel
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    T=st.integers(1, 40),
    R=st.integers(1, 20),
    C=st.integers(1, 200),
    rows=st.integers(1, 21),
    bits=st.sampled_from([2, 3, 4, 8]),
)
def test_products_and_weights_are_torchs(seed: int, T: int, R: int, C: int, rows: int, bits: int) -> None:
    packed, levels, W_RC = linear(R, C, rows, bits, seed)
    x_TC = torch.randn(T, C, generator=torch.Generator().manual_seed(seed))
    exact = x_TC.double() @ W_RC.double().T
    size = (x_TC.double().abs() @ W_RC.double().abs().T).clamp_min(1e-30)
    assert float(((lut_gemm.matmul(x_TC, packed, levels, rows, bits) - exact).abs() / size).max()) < 1e-6
    assert float(((lut_gemm.product(x_TC, packed, levels, rows, bits) - exact).abs() / size).max()) < 1e-6
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(lut_gemm.expand(packed, levels.to(dtype), rows, bits, C), W_RC.to(dtype))
    if lut_gemm.halves(bits):
        half = x_TC.bfloat16()
        exact = half.double() @ W_RC.bfloat16().double().T
        assert float(((lut_gemm.matmul(half, packed, levels, rows, bits) - exact).abs() / size).max()) < 1e-6


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_rows_of_a_large_linear(bits: int, threads: int) -> None:
    packed, levels, W_RC = linear(301, 515, 7, bits)
    x_TC, before = torch.randn(3, 515), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(
            lut_gemm.matmul(x_TC, packed, levels, 7, bits), x_TC @ W_RC.T, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(lut_gemm.expand(packed, levels, 7, bits, 515), W_RC)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_piece_of_the_rows_is_expanded_alone(bits: int) -> None:
    packed, levels, W_RC = linear(30, 70, 4, bits)
    out = torch.full((9, 70), torch.nan)
    assert lut_gemm.expand(packed, levels, 4, bits, 70, start=6, out=out) is out
    assert torch.equal(out, W_RC[6:15])


@needs_kernel
@pytest.mark.parametrize("T", [1, lut_gemm.FEW, lut_gemm.FEW + 1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_product_has_the_type_of_its_input_in_pieces_too(
    T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lut_gemm, "PIECE", 1000)
    packed, levels, W_RC = linear(40, 300, 3, 4)
    x_TC = torch.randn(T, 300, dtype=dtype)
    out = lut_gemm.product(x_TC, packed, levels.half(), 3, 4)
    exact = x_TC.double() @ W_RC.half().double().T
    assert out.dtype == dtype and out.is_contiguous()
    error = float((out.double() - exact).abs().max() / exact.abs().max())
    assert error < 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps


@needs_kernel
def test_bfloat16_products_are_near_where_the_processor_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lut_gemm, "BFLOAT16", True)
    packed, levels, W_RC = linear(40, 300, 3, 4)
    x_TC = torch.randn(40, 300, dtype=torch.bfloat16)
    out = lut_gemm.product(x_TC, packed, levels, 3, 4)
    exact = x_TC.double() @ W_RC.double().T
    assert out.dtype == torch.bfloat16 and float((out - exact).norm() / exact.norm()) < 0.01


@needs_kernel
def test_what_is_not_a_weight_is_refused_and_not_read() -> None:
    packed, levels, _ = linear(8, 40, 2, 4)
    x_TC = torch.randn(2, 40)
    for wrong in (
        (x_TC, packed[:, :-1].contiguous(), levels, 2, 4),
        (x_TC, packed, levels[:3].contiguous(), 2, 4),
        (x_TC, packed, levels, 3, 4),
        (x_TC, packed, levels, 2, 3),
        (x_TC, packed.int(), levels, 2, 4),
        (x_TC, packed, levels, 0, 4),
    ):
        with pytest.raises(ValueError, match="are no weight of 40 columns"):
            lut_gemm.matmul(*wrong)
    bytes_, many, _ = linear(8, 40, 2, 8)  # 256 levels take floats only
    for wrong in (
        (x_TC.double(), packed, levels, 2, 4),
        (torch.randn(40, 2).t(), packed, levels, 2, 4),
        (x_TC.half(), packed, levels, 2, 4),
        (x_TC.bfloat16(), bytes_, many, 2, 8),
    ):
        with pytest.raises(ValueError, match="must be float32 and contiguous"):
            lut_gemm.matmul(*wrong)
    for start, out in (
        (5, torch.empty(4, 40)),
        (0, torch.empty(4, 41)),
        (-1, None),
        (0, torch.empty(4, 40).half()),
    ):
        with pytest.raises(ValueError, match=f"rows from {start} of 8 x 40 do not go"):
            lut_gemm.expand(packed, levels, 2, 4, 40, start=start, out=out)


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has loaded")
def test_the_kernel_runs_on_the_threads_of_torch() -> None:
    packed, levels, _ = linear(64, 4096, 1, 4)
    lut_gemm.matmul(torch.randn(1, 4096), packed, levels, 1, 4)
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "torch/lib/libgomp" in line
    }
    kernel = Path(str(lut_gemm.KERNEL.required._name))
    assert len(loaded) == 1 and Path(loaded.pop()).name.encode() in kernel.read_bytes()


@needs_kernel
@pytest.mark.parametrize(
    ("form", "march"), [("plain", ()), ("avx2", ("haswell",)), ("avx512", ("skylake-avx512",))]
)
def test_the_forms_for_other_processors_compute_the_same(
    form: str, march: tuple[str, ...], fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = ["plain", "avx2", "avx512"]
    if forms.index(form) > forms.index(str(lut_gemm.form())):
        pytest.skip(f"this processor has no {form.upper()}")
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    others = (flag for flag in compiled.FLAGS if flag != "-march=native")
    monkeypatch.setattr(compiled, "FLAGS", (*others, *(f"-march={name}" for name in march)))
    lut_gemm.KERNEL.forget()
    assert lut_gemm.form() == form and not lut_gemm.halves(4)
    for bits in (2, 3, 4, 8):
        packed, levels, W_RC = linear(9, 333, 2, bits)
        x_TC = torch.randn(5, 333)
        torch.testing.assert_close(
            lut_gemm.matmul(x_TC, packed, levels, 2, bits), x_TC @ W_RC.T, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(lut_gemm.expand(packed, levels, 2, bits, 333), W_RC)
