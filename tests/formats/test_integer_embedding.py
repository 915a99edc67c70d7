"""Int8 embeddings through plain `from_pretrained`, alone and as one matrix with the head, in models that are
else float."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from llmcompress.algorithms.rowwise_int8 import round_rows
from llmcompress.errors import ModelError
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.integer_embedding import IntegerEmbedding, embedding
from llmcompress.integrations import transformers_quantizer
from tests.artefacts import distance
from tests.models import pico

pytestmark = pytest.mark.usefixtures("short_runs")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = torch.arange(3, 27)[None]
FAMILIES = ("llama", "gemma3_text", "gpt2", "opt", "gpt_neox")
W8A8, NONE = IntegerLayout("w8a8"), IntegerLayout("w8a8", "none")


def rounded(weight: Tensor, scheme: IntegerLayout = W8A8) -> IntegerWeight:
    return IntegerWeight(*round_rows(weight.detach()), scheme)


def artefact(
    folder: Path,
    family: str = "llama",
    scheme: IntegerLayout | None = None,
    *,
    tied: bool = True,
    **config: Any,
) -> Any:
    """Write a model whose embedding, and head if tied, is in int8; returns the float model of the same
    weights."""
    model = cast(Any, pico(family, tie_word_embeddings=tied, **config))
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    weight, names = (
        rounded(model.get_input_embeddings().weight, scheme or (W8A8 if tied else NONE)),
        [name, head],
    )
    model.get_input_embeddings().weight.data = weight.dequantize()
    state = {
        part: tensor for part, tensor in model.state_dict().items() if not (tied and part == f"{head}.weight")
    }
    del state[f"{name}.weight"]
    state.update({f"{name}.{part}": tensor for part, tensor in weight.tensors().items()})
    fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
    fields["quantization_config"] = transformers_quantizer.quantization_config(
        [(weight.scheme, names if tied else names[:1])]
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


def load(folder: Path, **options: Any) -> Any:
    model, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options))
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def is_shared(model: Any) -> bool:
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return head.weight is inputs.weight and head.weight_scale is inputs.weight_scale


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return cast(Tensor, model(TOKENS).logits).float()


# The module by itself.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [nn.Embedding, Gemma2TextScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_rows_are_those_of_the_float_embedding_of_the_same_kind(kind: Any, dtype: torch.dtype) -> None:
    plain = kind(40, 24, 0) if kind is nn.Embedding else kind(40, 24, 0, embed_scale=24**0.5)
    module = embedding("embed", plain.to(dtype), rounded(plain.weight.float()))
    again, ids = cast(Any, module.plain(dtype)), torch.arange(40).reshape(2, 20)
    assert type(again) is kind and again.padding_idx == 0 and again.weight.dtype == dtype
    assert torch.equal(module(ids), again(ids)) and module(ids).dtype == dtype
    assert distance(module(ids).float(), plain(ids).detach().float()) < 0.02
    exact = embedding("embed", plain.to(torch.float32), rounded(plain.weight.float())).to(dtype)
    assert torch.equal(exact(ids), module(ids)) and exact.weight_scale.dtype == torch.float32
    with pytest.raises(IndexError):
        module(torch.tensor([40]))


def test_an_embedding_of_another_kind_is_refused() -> None:
    class Sine(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sin()

    for plain, why in (
        (Sine(8, 4), "a Sine"),
        (nn.Linear(4, 8), "a Linear"),
        (nn.Embedding(8, 4, max_norm=1.0), "max_norm"),
    ):
        with pytest.raises(ModelError, match=why):
            IntegerEmbedding("embed", plain, W8A8, dtype=torch.float32)


# In a model.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_computes_what_the_float_one_does_and_goes_back_to_it(
    family: str, tied: bool, tmp_path: Path
) -> None:
    oracle = artefact(tmp_path / "model", family, NONE, tied=tied)
    model = load(tmp_path / "model")
    torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-5, atol=1e-5)
    plain = model.dequantize()
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    assert type(plain.get_input_embeddings()) is type(oracle.get_input_embeddings())
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    plain.tie_weights()
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))
    assert torch.equal(logits(plain), logits(oracle))


def moved(model: Any, folder: Path) -> dict[str, Any]:
    """The model after each thing that could pull the two apart."""
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder / "again")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    automatic = load(folder / "model", device_map="auto")
    return {
        "cast": copy.deepcopy(model).to(torch.float64).to(torch.float32),
        "copied": other,
        "tied": model,
        "saved": load(folder / "again"),
        "shards": load(folder / "shards"),
        "placed": load(folder / "model", device_map={"": "cpu"}),
        "automatic": automatic,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_stays_the_same_matrix(family: str, tmp_path: Path) -> None:
    artefact(tmp_path / "model", family)
    model = load(tmp_path / "model")
    before, kept = logits(model), type(model)._tied_weights_keys
    for what, other in moved(model, tmp_path).items():
        assert is_shared(other), what
        assert torch.equal(logits(other), before), what
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model/model.safetensors"
    ).read_bytes()
    shards = [load_file(file) for file in (tmp_path / "shards").glob("*.safetensors")]
    assert len(shards) > 1 and not any(name.startswith("lm_head") for tensors in shards for name in tensors)
    assert type(model)._tied_weights_keys == kept, "other models of the class are as they were"


def test_the_embedding_and_its_head_may_lie_on_the_disk(tmp_path: Path) -> None:
    artefact(tmp_path / "model")
    before = logits(load(tmp_path / "model"))
    places = {
        "model.embed_tokens": "disk",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    model = load(
        tmp_path / "model", device_map=places | {"lm_head": "disk"}, offload_folder=str(tmp_path / "off")
    )
    assert model.model.embed_tokens.weight.device.type == "meta"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    with pytest.raises(ModelError, match="offloaded"):
        model.dequantize()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_model_in_half_precision_says_so_and_generates_with_a_static_cache(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    artefact(tmp_path / "model", "gemma3_text", dtype="bfloat16")
    exact = load_file(tmp_path / "model/model.safetensors")["model.embed_tokens.weight_scale"]
    for model in (load(tmp_path / "model", dtype=dtype), load(tmp_path / "model").to(dtype)):
        assert model.dtype == model.model.dtype == dtype and is_shared(model)
        assert (
            torch.equal(model.lm_head.weight_scale, exact)
            and model.lm_head.weight_scale.dtype == torch.float32
        )
        assert model.get_input_embeddings()(TOKENS).dtype == logits(model).to(dtype).dtype == dtype
        options = {
            "max_new_tokens": 4,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(TOKENS),
        }
        assert model.generate(
            TOKENS, cache_implementation="static", disable_compile=True, **options
        ).shape == (1, 28)
        model.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == str(dtype).removeprefix(
            "torch."
        )


# torch 2.13's own compiler does what the warning is about
@pytest.mark.slow(keep=1)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "opt"])
def test_a_model_compiles_and_lets_gradients_through_its_head(family: str, tmp_path: Path) -> None:
    artefact(tmp_path, family)
    model = load(tmp_path)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-3, atol=1e-3)
    model.enable_input_require_grads()
    model(TOKENS, labels=TOKENS).loss.backward()
    norm = next(p for name, p in model.named_parameters() if "norm" in name or "ln_" in name)
    assert norm.grad is not None and float(norm.grad.abs().sum()) > 0


# What is refused.


@pytest.mark.parametrize("lost", ["weight", "weight_scale"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_lost_tensor_is_an_error(tied: bool, lost: str, tmp_path: Path) -> None:
    artefact(tmp_path, tied=tied)
    whole = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in whole.items() if name != f"model.embed_tokens.{lost}"}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks model.embed_tokens.{lost}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_cannot_be_is_refused(tmp_path: Path) -> None:
    name, head = "model.embed_tokens", "lm_head"
    for schemes, why in (
        ([(W8A8, [name])], "lm_head, tied to it, not the same"),
        ([(W8A8, [name]), (NONE, [head])], "lm_head, tied to it, not the same"),
        ([(W8A8, [head])], "its weight is tied to another"),
        ([(IntegerLayout("w4a8", group_size=32), [name, head])], "an embedding has int8 rows"),
        ([(IntegerLayout("w8a8", "static"), [name, head])], "an embedding has int8 rows"),
        ([(FourBitLayout("nf4", 64), [name, head])], "an embedding has int8 rows"),
    ):
        artefact(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = transformers_quantizer.quantization_config(cast(Any, schemes))
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=why):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_tied_head_with_a_bias_is_refused() -> None:
    model = cast(Any, pico("llama", tie_word_embeddings=True))
    model.lm_head.bias = nn.Parameter(torch.zeros(160))
    twin = embedding("model.embed_tokens", model.model.embed_tokens, rounded(model.lm_head.weight))
    with pytest.raises(ModelError, match="has a bias"):
        transformers_quantizer.set_embedding(model, "model.embed_tokens", twin, "lm_head")


def test_the_types_of_other_models_are_as_they_were() -> None:
    held, other = cast(Any, pico("llama")).to(torch.bfloat16), cast(Any, pico("llama")).to(torch.float16)
    plain = held.model.embed_tokens
    transformers_quantizer.set_embedding(
        held, "model.embed_tokens", embedding("model.embed_tokens", plain, rounded(plain.weight.float()))
    )
    assert held.dtype == held.model.dtype == torch.bfloat16
    assert other.dtype == other.model.dtype == torch.float16 and pico("gpt2").dtype == torch.float32
