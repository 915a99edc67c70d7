"""A walk carries what layers hand on beside their states: keys and values, and what a router has seen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from llmcompress.modeling.backward import following, gradients
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.handed_on import HandedOn
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import leave, logits, variants, walk
from llmcompress.modeling.token_limit import TokenLimit
from tests.models import HANDING_ON, STREAMS, tiny

CPU = torch.device("cpu")
LENGTH = 24
SEQUENCES = torch.randint(3, 100, (7, LENGTH), generator=torch.Generator().manual_seed(1))
# transformers warns of kernels that are not installed
pytestmark = pytest.mark.filterwarnings("ignore")


def resident(model: PreTrainedModel, tokens: int = 2 * LENGTH) -> InMemoryModel:
    """A model whose batches have so many tokens."""
    found = InMemoryModel(model.config, model.state_dict(), CPU)
    found.limit = TokenLimit(CPU, tokens)
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-3 * expected.std()


@torch.no_grad()
def whole(model: PreTrainedModel) -> Tensor:
    return model(input_ids=SEQUENCES, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", [*HANDING_ON, *STREAMS])
def test_a_walk_gives_the_logits_of_the_whole_model_for_every_batch(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    expected = whole(model)
    model.save_pretrained(tmp_path)
    for walked in (resident(model), DiskModel(tmp_path, CPU)):
        walked.limit = TokenLimit(CPU, 2 * LENGTH)
        assert bool(walked.anatomy.form.handed_on) == (model_type in HANDING_ON)
        assert (walked.anatomy.form.stream_dim is not None) == (model_type in STREAMS)
        close(torch.cat([*logits(walked, SEQUENCES)]), expected)
        *_, last = walk(walked, SEQUENCES, reference=True, through=True)
        assert [len(hidden) for hidden in last.inputs] == [2, 2, 2, 1]
        assert all(torch.equal(*pair) for pair in zip(last.inputs, last.reference, strict=True))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("model_type", ["gemma4_e2b", "gemma3n", "zaya", "hy_v4"])
def test_layers_read_what_the_changed_layers_before_them_hand_on(model_type: str) -> None:
    """Each weight is changed once its layer's moments are read in turn; what was read and what comes out are
    those of the whole model with all weights changed."""
    model = tiny(model_type)
    before = whole(model)
    changed, read = dict(model.state_dict()), dict[str, Tensor]()
    for layer in walk(resident(model), SEQUENCES, reference=True, through=True):
        for group in layer.anatomy.consumers if layer.index < len(resident(model).layers) else ():
            moments = layer.moments(group, in_turn=True)
            for linear in group:
                name = f"{layer.name}.{linear}"
                read[name] = moments[linear].H_CC
                layer.set_weight(linear, layer.weight(linear).roll(1, 0))
                changed[f"{name}.weight"] = changed[f"{name}.weight"].roll(1, 0)
        last = layer
    close(torch.cat([*last_logits(resident(model), last.reference)]), before)
    model.load_state_dict(changed)
    expected, inputs = seen(model, read)
    assert (expected - before).abs().max() > 0.1 * before.std()
    close(torch.cat([*last_logits(resident(model), last.inputs)]), expected)
    for name, H_CC in read.items():
        close(H_CC, inputs[name].T @ inputs[name] / len(inputs[name]))


def last_logits(walked: InMemoryModel, states: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leave(walked, hidden) for hidden in states]


def seen(model: PreTrainedModel, linears: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of the whole model, and the inputs [T, C] of some linears."""
    inputs = dict[str, Tensor]()

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].flatten(0, -2)

    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name))
    return whole(model), inputs


@pytest.mark.parametrize("model_type", ["gemma4_e2b", "gemma3n", "zaya"])
def test_gradients_go_back_through_what_layers_hand_on(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    walked = resident(model)
    watched = ["self_attn.k_proj.weight", "self_attn.qkv_proj.k_proj.weight", "self_attn.q_proj.weight"]
    layers = [layer for _, layer in model.get_submodule(walked.anatomy.layers).named_children()]
    parameters = {
        (index, name): parameter.requires_grad_()
        for index, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
        if name in watched
    }
    scores = model(input_ids=SEQUENCES, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(scores.flatten(0, 1), SEQUENCES[:, 1:].flatten(), reduction="sum")
    expected = dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))
    found = {
        (index, name): grad
        for index, _, own in gradients(walked, SEQUENCES, tmp_path, following, watched)
        for name, grad in own.items()
    }
    assert found.keys() == expected.keys() and len(found) > len(layers) // 2
    for key, grad in found.items():
        close(grad, expected[key])


def test_each_variant_reads_what_its_own_layers_hand_on() -> None:
    model = tiny("gemma4_e2b")
    walked = resident(model)
    writer = next(i for i in range(len(walked.layers)) if walked.anatomy.of_layer(i).writes)
    name = "self_attn.k_proj.weight"

    def edit(layer: DecoderLayer) -> dict[str, Tensor]:
        return {name: layer.module.get_parameter(name).data.roll(1, 0)}

    found = variants(walked, SEQUENCES, {"changed": {writer: edit}, "none": {0: _same}})
    plain = whole(model)
    for key in (None, "none"):
        close(torch.cat(last_logits(walked, found[key])), plain)
    weight = model.get_parameter(f"model.layers.{writer}.{name}")
    weight.data = weight.data.roll(1, 0)
    expected = whole(model)
    assert (expected - plain).abs().max() > 0.1 * plain.std()
    close(torch.cat(last_logits(walked, found["changed"])), expected)


def _same(layer: DecoderLayer) -> dict[str, Tensor]:
    return {}


def test_keys_and_values_are_kept_once_whatever_the_number_of_layers_that_read_them() -> None:
    walked, kept = resident(tiny("gemma4_e2b")), list[int]()
    for layer in walk(walked, SEQUENCES):
        tensors = [leaf for each in layer.handed.entering.values() for leaf in tree_leaves(each)]
        kept.append(sum(tensor.nbytes for tensor in tensors))
        assert all(tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes for tensor in tensors)
    writers = [i for i in range(len(kept)) if walked.anatomy.of_layer(i).writes]
    assert len(writers) == 2 and set(kept[: writers[0] + 1]) == {0}
    # keys and values of one head with 16 channels, of the last sliding layer and of the last full one
    assert set(kept[writers[1] + 1 :]) == {SEQUENCES.numel() * (16 + 16) * 2 * 4}


def test_a_call_without_the_number_of_its_sequences_is_an_error_where_something_was_handed_on() -> None:
    handed = HandedOn({"shared": 0})
    assert handed.of(None, 2, CPU) == {}
    handed.keep(0, 2, {}, {"shared": {"full": (torch.ones(2, 3),)}})
    assert handed.of(0, 2, CPU) == {}  # it enters the next layer
    handed.advance()
    assert handed.of(1, 1, CPU)["shared"]["full"][0].shape == (1, 3)
    with pytest.raises(ValueError, match="which sequences are they"):
        handed.of(None, 2, CPU)


def test_layers_that_look_up_the_tokens_are_called_with_those_of_each_batch() -> None:
    """The table of a hash router is empty in a tiny model and says nothing of the tokens."""
    model = tiny("deepseek_v4")
    generator = torch.Generator().manual_seed(2)
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid")}
    for table in tables.values():
        table.copy_(torch.rand(len(table), 6, generator=generator).argsort(-1)[:, : table.shape[1]])
    walked = resident(model)
    assert tables and walked.anatomy.arguments_by_batch
    close(torch.cat([*logits(walked, SEQUENCES)]), whole(model))
