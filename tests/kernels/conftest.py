"""What the tests of compiled kernels share."""

from collections.abc import Iterator

import pytest

from llmcompress.kernels import codebook_loops, column_loops, lut_gemm, packed_gemm


@pytest.fixture
def fresh() -> Iterator[None]:
    """The kernels are looked for again, before and after."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for kernel in (lut_gemm.KERNEL, packed_gemm.KERNEL, column_loops.KERNEL, codebook_loops.KERNEL):
        kernel.forget()
