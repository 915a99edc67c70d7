"""Float32 matrix products on AMD processors with AVX-512, where torch's own take only AVX2.

torch multiplies float32 matrices by MKL, which does not use AVX-512 on processors of other makers: a product
takes more than twice as long as by oneDNN, which torch carries too. oneDNN is taken where torch is allowed to
multiply float32 matrices in bfloat16. A processor without AMX has no such product, so float32 is what is
computed, by oneDNN's AVX-512 code. On a processor with AMX nothing is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def fast_float32_products() -> Iterator[None]:
    """Multiply float32 matrices by the faster of torch's libraries within the context, in full precision."""
    with _precision("bf16" if _better_by_onednn() else None):
        yield


@contextmanager
def plain_float32_products() -> Iterator[None]:
    """Multiply float32 matrices as torch does by itself, for measurements of what a user will see."""
    with _precision("none" if _better_by_onednn() else None):
        yield


@contextmanager
def _precision(wanted: str | None) -> Iterator[None]:
    """Set torch's switch within the context, unless None is wanted."""
    if wanted is None:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def _better_by_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512 and without AMX, and torch has oneDNN."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(matmul, "fp32_precision")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.cpu._is_amx_tile_supported()
        and _maker() == "AuthenticAMD"
    )


def _maker() -> str:
    """The maker of the processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
