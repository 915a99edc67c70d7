"""Experts are proved on a tiny model, and what only looks like them is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from llmcompress.derivation.example_configs import example_config
from llmcompress.derivation.experts import proved_experts, stacked
from llmcompress.derivation.readers import readers_of
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.derivation.subject import Subject

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def subject_of(family: str, change: Callable[[nn.Module], None] = lambda experts: None) -> Subject:
    model = tiny_model(shrunk(example_config(family), 2))
    change(model.get_submodule("model.layers.0.mlp.experts"))
    return Subject.of(model, "model.layers")


@pytest.mark.parametrize(("family", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_experts_are_found_in_order_of_computation(family: str, transposed: bool) -> None:
    assert proved_experts(subject_of(family), 0) == dict.fromkeys(BOTH, transposed)


def test_a_parameter_that_is_read_as_a_whole_too_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(experts: nn.Module) -> None:
        experts.register_forward_hook(lambda module, args, out: out + module.down_proj.mean())

    subject = subject_of("mixtral", read)
    assert [*proved_experts(subject, 0)] == BOTH[:1]
    assert [*proved_experts(subject, 1)] == BOTH
    why = readers_of(subject, 0).kept[BOTH[1]]
    assert why == "has three axes, and its code takes it as a whole"


def test_a_parameter_that_no_call_reads_is_none() -> None:
    def add(experts: nn.Module) -> None:
        experts.register_parameter("spare", nn.Parameter(torch.ones(6, 5, 7, dtype=torch.float64)))

    subject = subject_of("mixtral", add)
    assert "mlp.experts.spare" in stacked(subject.layers[0])
    assert [*proved_experts(subject, 0)] == BOTH


def test_what_is_proved_leaves_the_model_as_it_was() -> None:
    subject = subject_of("gpt_oss")
    before = {name: parameter.clone() for name, parameter in subject.model.named_parameters()}
    proved_experts(subject, 0)
    after = dict(subject.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
