"""States that rest on the host between two passes."""

from __future__ import annotations

import psutil
import pytest
import torch

from llmcompress.modeling.host_memory import CPU, moved, to_host


def test_what_is_on_the_host_stays_as_it_is() -> None:
    x = torch.randn(3, 4)
    assert to_host(x) is x
    out = moved((x, None, [x, "word"]), CPU)
    assert out[0] is x and out[1] is None and out[2][0] is x and out[2][1] == "word"


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
