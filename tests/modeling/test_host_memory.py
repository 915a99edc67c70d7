"""States that rest on the host between two passes."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from llmcompress.modeling.host_memory import at_rest, moved, to_host


def test_what_is_small_and_on_the_host_stays_as_it_is() -> None:
    x = torch.randn(3, 4)
    assert to_host(x) is x
    for out in (at_rest((x, None, [x, "word"])), moved((x, None, [x, "word"]), torch.device("cpu"))):
        assert out[0] is x and out[1] is None and out[2][0] is x and out[2][1] == "word"


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is kept free")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_large_rests_in_memory_that_goes_back_to_the_system(dtype: torch.dtype) -> None:
    process, x = psutil.Process(), torch.randn(300, 2, 40_000).to(dtype).transpose(0, 1)
    held = to_host(x)
    assert torch.equal(held, x) and held.dtype == dtype and held.data_ptr() != x.data_ptr()
    assert held.data_ptr() % 4096 == 0, "it shares no page with the heap"
    held.add_(1)
    before = process.memory_info().rss
    size = held.nbytes
    del held
    assert process.memory_info().rss <= before - size * 0.9
    assert moved(kept := at_rest((x,)), torch.device("cpu"))[0] is kept[0], "it is not copied to be read"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_of_a_gpu_is_page_locked_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 300, 40, device="cuda").transpose(1, 2)
    found = to_host(x)
    assert found.is_pinned() and torch.equal(found, x.cpu())
    assert torch.equal(moved((found,), torch.device("cuda"))[0], x)
    nearly = type(psutil.virtual_memory())(*(0 for _ in psutil.virtual_memory()))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: nearly)
    full = to_host(x)
    assert not full.is_pinned() and torch.equal(full, x.cpu())
