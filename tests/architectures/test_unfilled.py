"""Models on the meta device are built without their initial values, and everything else as before."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from llmcompress.architectures.unfilled import Unfilled
from llmcompress.modeling.model_config import skeleton
from tests.models import FAMILIES, pico


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_buffers_are_those_of_a_model_that_was_filled(family: str) -> None:
    config = pico(family).config
    with init_empty_weights(include_buffers=False):
        filled = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours = skeleton(config, torch.float32)
    shapes = {name: tensor.shape for name, tensor in ours.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in filled.named_parameters()}
    assert all(tensor.is_meta for tensor in ours.parameters())
    buffers = dict(filled.named_buffers())
    assert buffers.keys() == dict(ours.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())


def test_tensors_on_the_meta_device_alone_are_left_as_they_are() -> None:
    real = torch.full((3,), 7.0)
    with Unfilled():
        torch.nn.init.zeros_(real)
        meta = torch.empty(3, device="meta")
        assert torch.nn.init.normal_(meta) is meta
        torch.nn.init.constant_(tensor=meta, val=1.0)
    assert real.tolist() == [0.0, 0.0, 0.0]
