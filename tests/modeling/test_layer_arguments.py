"""A walk calls each layer as the whole model does, also where its arguments depend on the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.integrations import layer_calls
from llmcompress.modeling.backward import following, gradients
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.modeling.sequential import enter, layer_of, logits, walk
from llmcompress.modeling.token_limit import TokenLimit, batches_of
from llmcompress.report.metrics import fidelity
from tests.models import TOKENS_ENTER_LAYERS, pico, tiny

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
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@torch.no_grad()
def whole(model: PreTrainedModel) -> Tensor:
    return model(input_ids=SEQUENCES, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", TOKENS_ENTER_LAYERS)
def test_a_walk_gives_the_logits_of_the_whole_model_for_every_batch(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    expected = whole(model)
    model.save_pretrained(tmp_path)
    for walked in (resident(model), DiskModel(tmp_path, CPU)):
        walked.limit = TokenLimit(CPU, 2 * LENGTH)
        assert walked.anatomy.arguments_by_batch
        close(torch.cat([*logits(walked, SEQUENCES)]), expected)
        *_, last = walk(walked, SEQUENCES, reference=True, through=True)
        assert [len(hidden) for hidden in last.inputs] == [2, 2, 2, 1]
        assert all(torch.equal(*pair) for pair in zip(last.inputs, last.reference, strict=True))


@pytest.mark.parametrize("model_type", TOKENS_ENTER_LAYERS)
def test_the_perplexity_of_a_walk_is_that_of_the_whole_model(model_type: str) -> None:
    model = tiny(model_type)
    found = fidelity(logits(resident(model), SEQUENCES), SEQUENCES).perplexity
    scores = whole(model)[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), SEQUENCES[:, 1:].flatten())
    assert found == pytest.approx(float(loss.exp()), rel=1e-5)


def test_gradients_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model = tiny("gemma4_text")
    watched, states = ["self_attn.q_proj.weight", "per_layer_projection.weight"], list[Tensor]()
    layers = model.get_submodule("model.layers")
    for layer in layers.children():
        layer.register_forward_hook(lambda module, args, out: states.append(out))
    parameters = [layer.get_parameter(name) for layer in layers.children() for name in watched]
    for parameter in parameters:
        parameter.requires_grad_()
    scores = model(input_ids=SEQUENCES, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), SEQUENCES[:, 1:].flatten(), reduction="sum"
    )
    expected = torch.autograd.grad(loss, [*states, *parameters])
    walked, count = resident(model), len(states)
    for index, grads, own in gradients(walked, SEQUENCES, tmp_path, following, watched):
        close(torch.cat(grads), expected[index])
        if own:
            for place, name in enumerate(watched):
                close(own[name], expected[count + index * len(watched) + place])


def first_layer(walked: LayerwiseModel, module: nn.Module) -> DecoderLayer:
    inputs, arguments = enter(walked, walked.limit.batches(SEQUENCES))
    return layer_of(walked, 0, module, arguments, inputs, [])


def tensors(arguments: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    return {
        name: [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        for name, value in arguments.items()
    }


def test_what_is_the_same_for_all_batches_is_kept_once_and_the_rest_without_that_of_other_layers() -> None:
    walked = resident(tiny("gemma4_text"))
    with walked.layer(0) as module:
        layer = first_layer(walked, module)
        one, other = (tensors(layer.arguments(2, first)) for first in (0, 2))
    pairs = [(name, *pair) for name in one for pair in zip(one[name], other[name], strict=True)]
    assert {name for name, first, second in pairs if first is not second} == {"per_layer_input"}
    for (x,) in (one["per_layer_input"], other["per_layer_input"]):
        assert x.untyped_storage().nbytes() == x.nbytes
    assert not torch.equal(one["per_layer_input"][0], other["per_layer_input"][0])


def test_a_call_without_the_number_of_its_sequences_is_an_error_where_it_counts() -> None:
    walked = resident(tiny("gemma4_text"))
    with walked.layer(0) as module:
        layer = first_layer(walked, module)
        with pytest.raises(ValueError, match="which sequences are they"):
            layer.run(layer.inputs[0])
    walked = resident(pico("llama"))
    with walked.layer(0) as module:
        layer = first_layer(walked, module)
        assert torch.equal(layer.run(layer.inputs[0]), layer.run(layer.inputs[0], first=4))


@pytest.mark.parametrize(("model", "each_layer"), [("llama", False), ("gemma4_text", True)])
def test_a_model_is_entered_once_for_each_batch_or_once_more_for_each_layer(
    model: str, *, each_layer: bool
) -> None:
    walked = resident(tiny(model) if each_layer else pico(model))
    with patch.object(layer_calls, "entering", wraps=layer_calls.entering) as entering:
        for layer in walk(walked, SEQUENCES, reference=True, through=True):
            if layer.index < len(walked.layers):
                layer.moments()
    batches = len(walked.limit.batches(SEQUENCES))
    assert entering.call_count == batches * (1 + len(walked.layers) * each_layer)


def test_batches_and_their_parts_and_units_of_them_are_called_alike() -> None:
    walked = resident(tiny("zamba"), 3 * LENGTH)
    for layer in walk(walked, SEQUENCES, through=True):
        if layer.index == len(walked.layers):
            break
        outputs = torch.cat(layer.outputs(layer.inputs))
        layer.limit = TokenLimit(CPU, 3 * LENGTH)
        layer.limit.most = LENGTH
        for batches in (layer.inputs, layer.limit.units(layer.inputs), batches_of(torch.cat(layer.inputs))):
            close(torch.cat(layer.outputs_with(batches, {}, CPU)), outputs)


def test_the_full_model_is_called_as_its_own_embedding_says() -> None:
    walked = resident(tiny("zamba"))
    *_, plain = walk(walked, SEQUENCES, through=True)
    full = enter(walked, walked.limit.batches(SEQUENCES))
    full[1].keep_embedding()
    weight = walked.outer_weight(f"{walked.anatomy.embedding}.weight")
    walked.set_embedding(weight.roll(1, 0), None)
    *_, last = walk(walked, SEQUENCES, reference=True, through=True, full=full)
    *_, rolled = walk(walked, SEQUENCES, through=True)
    assert all(torch.equal(*pair) for pair in zip(last.reference, plain.inputs, strict=True))
    assert all(torch.equal(*pair) for pair in zip(last.inputs, rolled.inputs, strict=True))
    assert not torch.equal(last.inputs[0], last.reference[0])


def test_an_embedding_for_each_layer_stays_as_it_is_stored(tmp_path: Path) -> None:
    model = tiny("gemma4_text")
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    walked = DiskModel(tmp_path, CPU)
    name = "model.embed_tokens_per_layer"
    assert walked.model.get_parameter(f"{name}.weight").dtype is torch.bfloat16 and name in walked.stored
    found = torch.cat([*logits(walked, SEQUENCES)])
    close(found, whole(model))


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_weights_that_layers_share_are_read_for_each_and_counted_once(
    model_type: str, tmp_path: Path
) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    stored = sum(parameter.numel() for parameter in model.parameters())
    for walked in (resident(model), DiskModel(tmp_path, CPU)):
        assert walked.parameters() == stored and walked.stored_bytes() == 4 * stored
        target, source = next(iter(walked.tied.items()))
        assert target not in walked.layer_linears
        found = []
        for name in (target, source):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            with walked.layer(int(index)) as module:
                found.append(module.get_parameter(rest).data)
        assert torch.equal(*found) and torch.equal(found[0], model.get_parameter(target))
