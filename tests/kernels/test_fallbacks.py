"""A kernel that is not there says so once a process, as a warning of the log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmcompress.formats import integer_linear
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.kernels import int8_dispatch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing was said before, and nothing is remembered after."""
    once = (int8_dispatch.compiles, integer_linear._warn_of_float_sums)
    for said in once:
        said.cache_clear()
    yield
    for said in once:
        said.cache_clear()


def test_triton_that_is_not_installed_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(int8_dispatch, "int8_triton", None)
    assert not int8_dispatch.compiles(torch.device("cuda:0"))
    assert not int8_dispatch.compiles(torch.device("cuda:0"))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cuda:0: Triton is not installed" in record.getMessage()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_cpu_without_int8_products_is_said_once(
    kernel: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(integer_linear, "KERNEL", kernel)
    codes_RC, scale_R = torch.ones(17, 33, dtype=torch.int8), torch.ones(17)
    module = integer_linear.linear(IntegerWeight(codes_RC, scale_R, IntegerLayout("w8a8"), None, None), None)
    with torch.no_grad():
        module(torch.ones(2, 33))
        module(torch.ones(2, 33))
    assert [record.levelname for record in caplog.records] == ([] if kernel else ["WARNING"])
    assert kernel or "no AVX512" in caplog.text
