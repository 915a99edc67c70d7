"""Embedding and head stay in the dtype in which they are stored, and compute what float32 copies compute."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import ModelError
from llmcompress.modeling import stored_matrices
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import logits
from llmcompress.modeling.stored_matrices import compute_from_stored, widen
from llmcompress.stages.distill.student import whole
from tests.models import FAMILIES, noise, pico

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_matrices, "SLICE", 1000)


@torch.no_grad()
def rounded(family: str) -> PreTrainedModel:
    """A float32 model whose weights are numbers of bfloat16."""
    model = pico(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its state dict in bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stored_linear_gives_the_products_and_gradients_of_a_float32_one(
    dtype: torch.dtype, bias: bool
) -> None:
    linear = nn.Linear(24, 500, bias=bias).requires_grad_(False)
    linear.weight.data = linear.weight.data.to(dtype)
    plain = copy.deepcopy(linear).float()
    compute_from_stored(linear, torch.float32)
    x = noise(2, 7, 24).requires_grad_()
    found, expected = linear(x), plain(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    g = noise(2, 7, 500, seed=1)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, g)[0], torch.autograd.grad(expected, x, g)[0], rtol=1e-5, atol=1e-5
    )


def test_a_stored_embedding_looks_up_the_rows_of_a_float32_one_also_beside_a_padding_token() -> None:
    embedding = nn.Embedding(500, 24, padding_idx=499).requires_grad_(False).bfloat16()
    plain = copy.deepcopy(embedding).float()
    compute_from_stored(embedding, torch.float32)
    tokens = torch.tensor([[3, 499, 3, 0], [7, 7, 1, 2]])
    assert torch.equal(embedding(tokens), plain(tokens))
    assert embedding.weight.shape == (500, 24) and embedding.padding_idx == 499


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["live", "on disk"])
def test_a_model_in_half_precision_gives_the_logits_of_its_float32_copy(
    family: str, where: str, tmp_path: Path
) -> None:
    model = rounded(family)
    tokens = torch.randint(1, model.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    if where == "live":
        resident: DiskModel | InMemoryModel = InMemoryModel(model.config, stored(model), CPU)
    else:
        pico(family).bfloat16().save_pretrained(tmp_path)
        resident = DiskModel(tmp_path, CPU)
    outside = (f"{resident.anatomy.embedding}.weight", f"{resident.anatomy.head}.weight")
    assert {resident.model.get_parameter(name).dtype for name in outside} == {torch.bfloat16}
    assert {resident.outer_weight(name).dtype for name in outside} == {torch.float32}
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    found = torch.cat(list(logits(resident, tokens)))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_student_is_float32_throughout_and_runs_its_own_forward(family: str) -> None:
    model = rounded(family)
    student = whole(InMemoryModel(model.config, stored(model), CPU))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad():
        found, expected = student(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in student.modules())


def test_a_widened_module_is_an_ordinary_one() -> None:
    linear = nn.Linear(4, 6).bfloat16().requires_grad_(False)
    compute_from_stored(linear, torch.float32)
    widen(linear, torch.float32)
    assert linear.weight.dtype == torch.float32
    assert "forward" not in vars(linear)


def test_the_matrices_are_freed_with_the_model() -> None:
    model = rounded("llama")
    resident = InMemoryModel(model.config, stored(model), CPU)
    matrix = weakref.ref(resident.model.get_parameter(f"{resident.anatomy.head}.weight"))
    gc.disable()
    try:
        del resident
        assert matrix() is None, "a circle of references holds it"
    finally:
        gc.enable()


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = pico("llama").bfloat16()
    model.save_pretrained(tmp_path)
    wider = pico("llama", vocab_size=176).bfloat16()
    wider.save_pretrained(tmp_path / "wider")
    (tmp_path / "wider" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit its config\.json.*; fetch it again"):
        DiskModel(tmp_path, CPU)
