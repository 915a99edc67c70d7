"""Float32 products by oneDNN: full precision, and torch's switch as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from llmcompress.kernels import float32_products
from llmcompress.kernels.float32_products import fast_float32_products, plain_float32_products

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this torch has no switch for the precision of float32 products",
)


def switch() -> str:
    found: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("shape", [(576, 576, 576), (2048, 576, 1536), (64, 3, 500), (1, 2048, 4096)])
def test_products_keep_the_precision_of_float32(shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    exact = a.double() @ b.double()
    with fast_float32_products():
        found = a @ b
    assert float((found - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("better", [False, True])
def test_the_switch_is_as_it_was_even_after_an_error(better: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "_better_by_onednn", lambda: better)
    before, seen = switch(), list[str]()

    @fast_float32_products()
    def fails() -> None:
        seen.append(switch())
        with plain_float32_products():
            seen.append(switch())
        seen.append(switch())
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        fails()
    assert seen == (["bf16", "none", "bf16"] if better else 3 * [before])
    assert switch() == before


def test_only_amd_processors_with_avx512_and_without_amx_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for maker, amx, wanted in (
        ("AuthenticAMD", False, True),
        ("AuthenticAMD", True, False),
        ("GenuineIntel", False, False),
        ("", False, False),
    ):
        monkeypatch.setattr(float32_products, "_maker", lambda maker=maker: maker)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert float32_products._better_by_onednn.__wrapped__() == wanted
