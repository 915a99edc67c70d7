"""Submodules that are final: their outputs are kept, or made from what their last linear read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmcompress.modeling.finished_parts import FinishedParts

CPU = torch.device("cpu")


class Part(nn.Module):
    """A submodule whose last linear is `out`; it returns that output in one of several ways."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(6, 4)
        self.returns, self.runs = returns, 0

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, object]:
        self.runs += 1
        found: Tensor = self.out(self.first(x).tanh())
        if self.returns == "plain":
            return found
        if self.returns == "with None":
            return found, None
        return (found, x) if self.returns == "with a tensor" else 2 * found


class Layer(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.part = Part(returns)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(x)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result


@pytest.mark.parametrize("returns", ["plain", "with None", "with a tensor", "doubled"])
@torch.no_grad()
def test_an_output_made_from_what_the_last_linear_read_is_that_of_a_plain_pass(returns: str) -> None:
    layer, batches = Layer(returns), [torch.randn(3, 6) for _ in range(4)]
    parts = FinishedParts({"part": "part.out"})
    for i, x in enumerate(batches):
        parts.keep_input(i, "part.out", layer.part.first(x).tanh())
    layer.part.out.weight.mul_(0.5)  # the linear is solved for after its input was read
    expected = [layer(x) for x in batches]
    layer.part.runs = 0
    for _ in range(2):
        for i, x in enumerate(batches):
            with parts.reused(layer, i, CPU, final=["part"]):
                assert torch.equal(layer(x), expected[i])
    # the first batch shows what the submodule returns
    assert layer.part.runs == (1 if returns in ("plain", "with None") else len(batches))
    assert "forward" not in layer.part.__dict__, "the module is as it was"


def test_only_inputs_of_last_linears_are_kept_and_what_changed_is_forgotten() -> None:
    parts = FinishedParts({"part": "part.out"})
    parts.keep_input(0, "part.first", torch.ones(1))
    assert parts.empty
    parts.keep_input(0, "part.out", torch.ones(1))
    assert not parts.empty
    parts.forget(["part"], ["part.first"])
    assert not parts.empty
    parts.forget(["part"], ["part.out"])
    assert parts.empty


@torch.no_grad()
def test_a_submodule_that_is_wanted_is_run() -> None:
    layer, parts, x = Layer("plain"), FinishedParts({"part": "part.out"}), torch.randn(2, 6)
    with parts.reused(layer, 0, CPU, final=["part"]):
        layer(x)
    with parts.reused(layer, 0, CPU, wanted=["part"]):
        layer(x)
    with parts.reused(layer, 0, CPU):
        layer(x)
    assert layer.part.runs == 2
    assert parts.output(0, "part") is not None and parts.output(1, "part") is None
