"""The compiled kernel against torch's look-up and product, and that nothing breaks where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.codebook import look_up
from llmcompress.formats.codebook import pack
from llmcompress.kernels import lut_gemm

needs_kernel = pytest.mark.skipif(
    not lut_gemm.available(),
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)


def linear(R: int, C: int, rows: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Packed indices, levels [G, L], and the weight [R, C]."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(-(-R // rows), 2**bits, generator=generator)
    codes = torch.randint(2**bits, (R, C), generator=generator)
    return pack(codes, bits), levels, look_up(codes, levels, rows)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The kernel is looked for again, before and after."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    lut_gemm._attempt.cache_clear()
    lut_gemm.available.cache_clear()


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


def test_a_switch_turns_the_kernel_off(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "0")
    assert not lut_gemm.available() and lut_gemm.form() is None
    assert lut_gemm.why_not() == "LLMCOMPRESS_KERNELS is 0"
    assert not caplog.records, "who switches it off knows"
    with pytest.raises(ValueError, match="no kernel here"):
        lut_gemm.matmul(torch.ones(1, 4), torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 16), 1, 4)


WHY = {
    "no compiler": "there is no C compiler (no-such-compiler) on the PATH",
    "no such flag": "lookup.c is compiled by none of",
    "no folder": "Not a directory",
    "no libgomp": "without libgomp",
}


@pytest.mark.parametrize("broken", WHY)
def test_without_what_it_takes_there_is_no_kernel_and_one_warning(
    broken: str,
    fresh: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    if broken == "no compiler":
        monkeypatch.setattr(lut_gemm, "COMPILERS", ("no-such-compiler",))
    elif broken == "no such flag":
        monkeypatch.setattr(lut_gemm, "FLAGS", ("-march=no-such-processor",))
    elif broken == "no folder":
        (tmp_path / "cache").write_text("a file where the folder would be")
    else:
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert not lut_gemm.available()
    assert not lut_gemm.available()
    assert not list(tmp_path.glob("cache/kernels/*"))
    (record,) = caplog.records  # once a process
    assert record.levelname == "WARNING" and str(lut_gemm.why_not()) in record.getMessage()
    assert WHY[broken] in record.getMessage()


@pytest.mark.slow
@needs_kernel
def test_many_that_compile_at_once_make_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lut_gemm._load, [tmp_path / "kernels"] * 4))
    assert all(kernel is not None for kernel in found)
    (made,) = (tmp_path / "kernels").iterdir()
    assert made.name.startswith("lookup-") and made.suffix == ".so"
    stamp = made.stat().st_mtime_ns
    assert lut_gemm._load(tmp_path / "kernels") is not None and made.stat().st_mtime_ns == stamp, (
        "it is compiled once"
    )


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
    kernel = Path(str(lut_gemm._loaded()._name))
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
    others = (flag for flag in lut_gemm.FLAGS if flag != "-march=native")
    monkeypatch.setattr(lut_gemm, "FLAGS", (*others, *(f"-march={name}" for name in march)))
    _forget()
    assert lut_gemm.form() == form and not lut_gemm.halves(4)
    for bits in (2, 3, 4, 8):
        packed, levels, W_RC = linear(9, 333, 2, bits)
        x_TC = torch.randn(5, 333)
        torch.testing.assert_close(
            lut_gemm.matmul(x_TC, packed, levels, 2, bits), x_TC @ W_RC.T, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(lut_gemm.expand(packed, levels, 2, bits, 333), W_RC)


KILLED = """
import sys, torch
from llmcompress.kernels import lut_gemm
kernel = lut_gemm._load(lut_gemm.Path(sys.argv[1]))
print(kernel.lookup_form().decode())
"""


def loads(folder: Path) -> str:
    """The form of the kernel that another process loads from a folder."""
    command = [sys.executable, "-c", KILLED, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@needs_kernel
@pytest.mark.slow
def test_a_kernel_that_was_cut_short_is_compiled_again(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert lut_gemm._load(folder) is not None
    (made,) = folder.iterdir()
    sound = made.read_bytes()
    for damaged in (sound[: len(sound) // 2], b"", sound[:-1] + bytes([sound[-1] ^ 1])):
        made.unlink()  # the file that this process has loaded stays as it is
        made.write_bytes(damaged)
        made.chmod(0o600)
        assert loads(folder) == lut_gemm.form()
        assert [file.read_bytes() for file in folder.iterdir()] == [sound]


@pytest.mark.slow(keep=1)
@needs_kernel
@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
@pytest.mark.parametrize("open_to", ["the folder", "the one above", "another owner", "a link"])
def test_what_others_may_write_is_never_loaded(
    open_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "temporary"  # what other processes make in the system's is theirs
    own.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    folder = tmp_path / "above" / "kernels"
    folder.mkdir(mode=0o700, parents=True)
    if open_to == "the folder":
        folder.chmod(0o770)
    elif open_to == "the one above":
        folder.parent.chmod(0o777)
    elif open_to == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        pytest.skip("only root may give a folder away")
    assert lut_gemm._load(folder) is not None, "it is compiled elsewhere"
    assert not any(folder.iterdir()) and not any(own.iterdir())


@needs_kernel
def test_a_kernel_that_others_may_write_is_compiled_again(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert lut_gemm._load(folder) is not None
    (made,) = folder.iterdir()
    assert not made.stat().st_mode & 0o077
    made.chmod(0o666)
    assert lut_gemm._load(folder) is not None
    assert [file.stat().st_mode & 0o777 for file in folder.iterdir()] == [0o600]
