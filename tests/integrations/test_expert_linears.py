"""Experts as linears: the family's own code runs them, and nothing else takes their weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.derivation.example_configs import example_config
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.integrations.expert_linears import ExpertWeights, divide, divided_in, unite
from tests.models import pico

E, R, C = 3, 4, 6


class Experts(nn.Module):
    """A parameter of experts, whose code is given with each call."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (E, C, R) if transposed else (E, R, C)
        self.proj = nn.Parameter(torch.randn(shape, generator=generator))


def inputs() -> Tensor:
    return torch.randn(E, 5, C, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("transposed", "product"),
    [
        (False, lambda x, w: F.linear(x[1], w[1])),
        (False, lambda x, w: F.linear(x[1], w[torch.tensor(1)], torch.ones(R))),
        (False, lambda x, w: F.linear(x[1], w[1], bias=torch.ones(R))),
        (False, lambda x, w: x[2] @ w[2].T),
        (False, lambda x, w: torch.matmul(x[2], w[2].t())),
        (False, lambda x, w: torch.bmm(x, w.transpose(1, 2))),
        (True, lambda x, w: x[0] @ w[0]),
        (True, lambda x, w: torch.mm(x[0], w[0])),
        (True, lambda x, w: F.linear(x[0], w[0].T)),
        (True, lambda x, w: torch.bmm(x, w)),
    ],
)
def test_products_with_slices_are_calls_of_linears(transposed: bool, product: object) -> None:
    assert callable(product)
    experts, x = Experts(transposed), inputs()
    whole = experts.proj.detach().clone()
    expected = product(x, whole)
    names = divide(experts, "proj", transposed=transposed)
    assert names == [f"proj_linears.{expert}" for expert in range(E)]
    called = []
    for name in names:
        experts.get_submodule(name).register_forward_pre_hook(lambda module, args: called.append(module))
    torch.testing.assert_close(product(x, experts.proj), expected)
    assert called and isinstance(experts.proj, ExpertWeights) and experts.proj.shape == whole.shape
    unite(experts, "proj")
    assert torch.equal(experts.proj, whole) and not divided_in(experts)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: F.linear(x[0], w[0].T),
        lambda x, w: x[0] @ w[0],
        lambda x, w: torch.bmm(x, w),
        lambda x, w: w[0] @ x[0].T,
        lambda x, w: w.transpose(0, 1),
        lambda x, w: torch.einsum("etc,erc->etr", x, w),
    ],
)
def test_other_uses_of_the_weights_are_refused(use: object) -> None:
    """A product the other way round would compute something else, or nothing."""
    assert callable(use)
    experts = Experts(False)
    divide(experts, "proj", transposed=False)
    with pytest.raises(TypeError):
        use(inputs(), experts.proj)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "granitemoe", "jetmoe", "inkling_text"])
def test_a_family_computes_the_same_through_linears(family: str) -> None:
    model = tiny_model(shrunk(example_config(family), 2))
    ids = torch.arange(3, 27)[None]
    transposed = family in ("gpt_oss", "llama4_text")
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and ".layers." in name and "conv" not in name
    ]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for name in names:
            divide(model, name, transposed=transposed)
        assert names and [*divided_in(model)] == names
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        torch.testing.assert_close(copy.deepcopy(model)(ids, use_cache=False).logits, expected)


def test_experts_run_their_own_loop_whatever_the_model_asks_for() -> None:
    model = pico("qwen3_moe").eval()
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for name in [name for name, parameter in model.named_parameters() if parameter.dim() == 3]:
            divide(model, name, transposed=False)
        for implementation in ("grouped_mm", "batched_mm"):
            model.set_experts_implementation(implementation)
            found = model(ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
