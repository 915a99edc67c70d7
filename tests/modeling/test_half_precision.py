"""Passes in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmcompress.modeling.half_precision import compute_in_half

CPU = torch.device("cpu")


def test_a_module_is_computed_in_bfloat16_and_nothing_else_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(3, 16, requires_grad=True)
    exact = model(x)
    compute_in_half(model[0], CPU)
    first = model[0](x)
    assert first.dtype == torch.bfloat16 and first.grad_fn is not None
    assert not torch.is_autocast_enabled("cpu")
    found = model[1](first.float())
    assert found.dtype == torch.float32
    error = (found - exact).detach().norm()
    assert 0 < float(error) < 0.02 * float(exact.detach().norm())
    found.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_pass_that_fails_leaves_no_context_behind() -> None:
    layer = nn.Linear(4, 4)
    compute_in_half(layer, CPU)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    assert not torch.is_autocast_enabled("cpu")
    assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
