"""A cache of codes: it holds what its formula says, keeps first and latest tokens, and follows `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmcompress.algorithms.key_value_blocks import Per, dequantize, quantize
from llmcompress.errors import ModelError
from llmcompress.integrations.kv_cache import (
    FIELD,
    CacheSettings,
    QuantizedKeysAndValues,
    bytes_held,
    bytes_of_text,
    growing_layers,
    kv_cache,
    require_growing,
)
from llmcompress.integrations.transformers_compat import DynamicLayer, DynamicSlidingWindowLayer
from tests.models import FAMILIES, pico

SMALL = CacheSettings(bits=8, block=8, window=4, sinks=3)


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random keys and values [batch, 3, tokens, 16]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 3, tokens, 16, generator=generator)
    return keys, values


def filled(
    settings: CacheSettings, tokens: int, step: int = 1
) -> tuple[QuantizedKeysAndValues, Tensor, Tensor]:
    """A layer that was given random states some tokens at a time, and the keys and values that it last
    returned."""
    layer, (keys, values) = QuantizedKeysAndValues(settings), states(tokens)
    read: tuple[Tensor, Tensor] = (keys, values)
    for start in range(0, tokens, step):
        read = layer.update(keys[:, :, start : start + step], values[:, :, start : start + step])
    return layer, *read


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 160, (batch, length), generator=torch.Generator().manual_seed(3))


def close(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose config asks for a cache of codes, and that writes for as long as it is told."""
    setattr(model.config, FIELD, SMALL.to_dict())
    cast(Any, model).generation_config.eos_token_id = None
    model.eval()
    return model


@pytest.mark.parametrize("step", [1, 7, 40])
@pytest.mark.parametrize("per", ["channel", "token"])
def test_first_and_latest_tokens_are_as_they_were_and_others_are_their_codes(step: int, per: Per) -> None:
    settings = CacheSettings(bits=4, per=per, block=8, window=4, sinks=3)
    keys, values = states(40)
    layer, _, _ = filled(settings, 40, step)
    later = states(1, seed=1)
    read = layer.update(*later)
    # 33 of 40 have left the window behind the first 3: four blocks of 8
    assert settings.coded(40) == 32 and layer.codes is not None
    kinds: tuple[Per, Per] = (per, "token")
    for found, given, new, kind in zip(read, (keys, values), later, kinds, strict=True):
        blocks = quantize(given[:, :, 3:35].unflatten(2, (4, 8)), 4, kind)
        coded = dequantize(blocks, 4, kind).flatten(2, 3)
        expected = torch.cat([given[:, :, :3], coded, given[:, :, 35:], new], dim=2)
        assert torch.equal(found, expected)
        assert not torch.equal(coded, given[:, :, 3:35])


def test_a_prompt_is_read_with_its_own_keys_and_values() -> None:
    keys, values = states(40)
    read = QuantizedKeysAndValues(SMALL).update(keys, values)
    assert torch.equal(read[0], keys) and torch.equal(read[1], values)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("tokens", [1, 3, 14, 15, 100])
def test_the_bytes_held_are_those_of_the_formula(bits: int, per: Per, tokens: int) -> None:
    settings = CacheSettings(bits, per, block=8, window=4, sinks=3)
    layer, _, _ = filled(settings, tokens, step=5)
    held = sum(tensor.nbytes for tensor in layer.held())
    assert held == 2 * settings.bytes_of(tokens, heads=3, key_dim=16, value_dim=16, itemsize=4)
    # none of them is a view that keeps more memory alive
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in layer.held())


def test_a_long_text_takes_fewer_bytes() -> None:
    settings = [CacheSettings(bits, block=32, window=32, sinks=32) for bits in (8, 4)]
    held = [each.bytes_of(8192, heads=1, key_dim=128, value_dim=128, itemsize=2) for each in settings]
    # of 8192 tokens all but 64 are codes, with 16 bytes of scales for keys and 8 for values
    assert held == [8128 * (256 + 24) + 64 * 512, 8128 * (128 + 24) + 64 * 512]


@pytest.mark.parametrize("lost", [1, 4, 9, 20, 37, 38, 40, 50])
def test_a_crop_leaves_what_the_other_tokens_were_read_as(lost: int) -> None:
    layer, _, _ = filled(SMALL, 40)
    before, _ = layer.update(*states(1, seed=1))
    layer.crop(-(lost + 1))
    assert layer.get_seq_length() == max(0, 40 - lost)
    after, _ = layer.update(*states(1, seed=2))
    assert torch.equal(after[:, :, :-1], before[:, :, : max(0, 40 - lost)])
    for _ in range(20):  # it goes on as before
        layer.update(*states(1))
    assert layer.get_seq_length() == max(0, 40 - lost) + 21
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)


CHANGES: dict[str, tuple[Callable[[Any], None], Callable[[Tensor], Tensor]]] = {
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), lambda t: t[[1, 0]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda t: t[[0, 0, 1, 1]]),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda t: t[[1]]),
    "offload": (lambda layer: (layer.offload(), layer.prefetch())[0], lambda t: t),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sequences_are_moved_whole(name: str) -> None:
    change, expected = CHANGES[name]
    layer, _, _ = filled(SMALL, 40)
    kept, _, _ = filled(SMALL, 40)
    change(layer)
    new = states(1, seed=1)
    found = layer.update(*map(expected, new))
    assert all(map(torch.equal, found, map(expected, kept.update(*new))))


def test_a_reset_layer_is_as_new() -> None:
    layer, _, _ = filled(SMALL, 40)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.held() == []
    keys, values = states(20)
    assert torch.equal(layer.update(keys, values)[0], keys)


def test_half_precision_stays_half_precision() -> None:
    layer = QuantizedKeysAndValues(SMALL)
    for start in range(0, 40, 8):
        keys, values = (t[:, :, start : start + 8].bfloat16() for t in states(40))
        read = layer.update(keys, values)
    assert {t.dtype for t in read} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_of_each_family_reads_its_cache_or_is_refused(family: str) -> None:
    model = pico(family).eval()
    if not growing_layers(model.config):
        with pytest.raises(ModelError, match=r"no layer of this .* grows with the text .*DynamicSliding"):
            kv_cache(model, SMALL)
        return
    tokens, plain = ids(48), DynamicCache(config=model.config)
    stored = kv_cache(model, SMALL)
    for start in range(0, 48, 4):
        here = tokens[:, start : start + 4]
        expected = model(here, past_key_values=plain).logits
        found = model(here, past_key_values=stored).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    assert stored.get_seq_length() == 48
    assert bytes_held(stored) == bytes_of_text(stored, 48, 4, SMALL) < bytes_held(plain)
    assert bytes_held(plain) == bytes_of_text(plain, 48, 4, None)
    kinds = {type(layer) for layer in plain.layers}
    assert kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    if DynamicSlidingWindowLayer in kinds:  # such layers keep their own
        assert DynamicSlidingWindowLayer in {type(layer) for layer in stored.layers}


def test_generate_makes_the_cache_that_the_config_asks_for() -> None:
    model, prompt = close(pico("llama")), ids(30, batch=2)
    how = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    found = cast(Any, model).generate(prompt, **how)
    assert {type(layer) for layer in found.past_key_values.layers} == {QuantizedKeysAndValues}
    assert found.past_key_values.get_seq_length() == 49
    given = kv_cache(model)
    again = cast(Any, model).generate(prompt, past_key_values=given, **how)
    assert torch.equal(again.sequences, found.sequences) and again.past_key_values is given


def test_generate_leaves_a_cache_that_its_caller_names() -> None:
    model, prompt = close(pico("llama")), ids(30)
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    named = cast(Any, model).generate(prompt, cache_implementation="dynamic", **how)
    assert {type(layer) for layer in named.past_key_values.layers} == {DynamicLayer}
    given = DynamicCache(config=model.config)
    assert cast(Any, model).generate(prompt, past_key_values=given, **how).past_key_values is given
    assert {type(layer) for layer in given.layers} == {DynamicLayer}
    delattr(model.config, FIELD)
    plain = cast(Any, model).generate(prompt, **how)
    assert {type(layer) for layer in plain.past_key_values.layers} == {DynamicLayer}


def test_beams_and_left_padding_write_as_the_cache_is_read() -> None:
    model, prompt = close(pico("llama")), ids(30, batch=2)
    beams = cast(Any, model).generate(prompt, max_new_tokens=20, num_beams=3, do_sample=False)
    assert beams.shape == (2, 50)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), prompt], dim=1)
    mask = (torch.arange(35) >= 5).long().expand(2, 35)
    written = cast(Any, model).generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert written.shape == (2, 55)


def test_a_config_that_says_nonsense_is_refused() -> None:
    model = pico("llama")
    with pytest.raises(ModelError, match=f"no {FIELD}"):
        kv_cache(model)
    for said in ({"bits": 3}, {"per": "head"}, {"block": 0}, {"window": -1}, {"bits": 8, "codec": "x"}, "4"):
        setattr(model.config, FIELD, said)
        with pytest.raises(ModelError, match=FIELD):
            kv_cache(model)


def test_odd_heads_are_refused_in_4_bits_and_stored_in_8() -> None:
    keys = torch.randn(1, 1, 60, 5)
    with pytest.raises(ModelError, match="heads of 5 channels"):
        QuantizedKeysAndValues(CacheSettings(4)).update(keys, keys)
    layer = QuantizedKeysAndValues(CacheSettings(8, window=0, sinks=0))
    layer.update(keys, keys)
    assert layer.codes is not None


def test_a_model_whose_class_has_a_cache_of_its_own_is_refused() -> None:
    class XLSTM(type(pico("llama"))):  # type: ignore[misc]  # transformers goes by the name
        pass

    with pytest.raises(ModelError, match="cache of its own"):
        require_growing(pico("llama").config, XLSTM)
