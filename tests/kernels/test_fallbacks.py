"""A kernel that is not there says so once a process, as a warning of the log."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from llmcompress.formats import integer_linear
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.kernels import column_loops_gpu, int8_dispatch, lookup_dispatch, packed_gemm
from llmcompress.kernels.triton_device import TritonKernels

TRITON = (int8_dispatch.KERNELS, column_loops_gpu.KERNELS, lookup_dispatch.KERNELS)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing was said before, and nothing is remembered after."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for kernels in TRITON:
        kernels.forget()
    integer_linear._warn_of_float_sums.cache_clear()


@pytest.mark.parametrize("kernels", TRITON, ids=lambda kernels: kernels.name)
def test_triton_that_is_not_installed_is_said_once(
    kernels: TritonKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, f"llmcompress.kernels.{kernels.name}", None)
    for _ in range(2):
        assert not kernels.compiles(torch.device("cuda:0"))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cuda:0: Triton is not installed" in record.getMessage()


def test_a_compiler_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def attempt(device: torch.device) -> None:
        raise RuntimeError(f"no {device}")

    kernels = TritonKernels("triton_device", attempt, "slower")
    for _ in range(2):
        assert not kernels.compiles(torch.device("cuda:0"))
    (record,) = caplog.records
    assert record.getMessage() == "slower on cuda:0: Triton cannot compile for it: no cuda:0"


@pytest.mark.parametrize("kernel", [True, False])
def test_a_cpu_without_int8_products_is_said_once(
    kernel: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(integer_linear, "KERNEL", kernel)
    codes_RC, scale_R = torch.ones(17, 33, dtype=torch.int8), torch.ones(17)
    module = integer_linear.linear(IntegerWeight(codes_RC, scale_R, IntegerLayout("w8a8"), None, None), None)
    with torch.no_grad():
        for _ in range(2):
            module(torch.ones(packed_gemm.FEW_INTEGERS + 1, 33))
    assert [record.levelname for record in caplog.records] == ([] if kernel else ["WARNING"])
    assert kernel or "no AVX512" in caplog.text
