"""Tiny copies of realistic configs keep how a model is built, layer by layer, and run in milliseconds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmcompress.derivation.example_configs import causal_types, example_config
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.errors import ModelError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_DENSE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
# model type -> what a released config says beyond the defaults of its class
REALISTIC: dict[str, dict[str, Any]] = {
    "llama": {
        **_DENSE,
        "vocab_size": 128256,
        "eos_token_id": [128001, 128008, 128009],
        "attention_bias": True,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "gpt2": {"n_embd": 1600, "n_layer": 48, "n_head": 25, "activation_function": "gelu"},
    "falcon": {
        "num_kv_heads": 8,
        "num_attention_heads": 128,
        "hidden_size": 8192,
        "new_decoder_architecture": True,
    },
    "bloom": {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "gemma2": {"num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16},
    "gemma4_text": {"num_hidden_layers": 35, "num_kv_shared_layers": 20, "num_key_value_heads": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": True},
    "mixtral": {"hidden_act": "gelu"},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "mamba2": {"hidden_size": 2560, "num_heads": 80, "n_groups": 1},
    "gpt_oss": {},
    "phi": {"hidden_size": 2560, "partial_rotary_factor": 0.4, "qk_layernorm": True},
    "phi3": {
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
        },
    },
    "cohere2": {"num_hidden_layers": 40, "use_qk_norm": True},
    "qwen3_5_text": {},
    "gemma3n_text": {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": [8192] * 30},
    "nemotron_h": {"hybrid_override_pattern": "ME*-MEMEM*", "num_hidden_layers": 10},
    "falcon_h1": {"hidden_size": 3072, "mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128},
}
FLAGS = (
    "attention_bias",
    "tie_word_embeddings",
    "hidden_act",
    "activation_function",
    "mlp_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "parallel_attn",
    "new_decoder_architecture",
    "scoring_func",
    "norm_topk_prob",
    "qk_layernorm",
    "use_qk_norm",
    "use_conv_bias",
)

# These read weights of another model, are no language models, or need a package.
IMPOSSIBLE = {
    "gemma3n": "timm",
    "gemma4_assistant": "layer types",
    "gemma4_unified_assistant": "layer types",
    "musicgen": "dropout",
    "musicgen_melody": "dropout",
}
# They compute in float32, whatever their weights are.
FLOAT32 = {"blt", "inkling2_text", "xglm"}
# More layers than four, as the first ones hold only one of the layers that share weights.
DEEPER = {"zamba": 8}
# The last layer of all is the only one with a bias.
LAST_DIFFERS = {"gpt_neox_japanese"}


def realistic(family: str) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(family, **REALISTIC[family])
    return config


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits [2, 24, V] of two random sequences."""
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def check_runs(model: PreTrainedModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    first, second = logits(model)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert not torch.allclose(first, second)


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules in a model, by name; those inside a layer are left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
    }


def kinds(layer: nn.Module) -> list[tuple[str, str]]:
    """The classes and the parameters of a layer, by name."""
    modules = [(name, type(module).__name__) for name, module in layer.named_modules()]
    return modules + [(name, "parameter") for name, _ in layer.named_parameters()]


def check_prefix(config: PretrainedConfig, layers: int) -> None:
    """The layers of the tiny model are of the same kinds as the first ones of the real model."""
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    tiny = tiny_model(shrunk(config, layers))
    found = stacks(tiny)
    assert found
    assert found.keys() == stacks(real).keys()
    for name, stack in found.items():
        for layer, original in zip(stack, stacks(real)[name], strict=False):
            assert kinds(layer) == kinds(original)


@pytest.mark.parametrize("family", REALISTIC)
def test_a_tiny_copy_runs(family: str) -> None:
    check_runs(tiny_model(shrunk(realistic(family), 4)))


@pytest.mark.parametrize("family", REALISTIC)
def test_its_layers_are_of_the_kinds_of_the_first_real_ones(family: str) -> None:
    check_prefix(realistic(family), 4)


@pytest.mark.parametrize("family", REALISTIC)
def test_flags_are_kept_and_the_given_config_is_not_changed(family: str) -> None:
    config = realistic(family)
    before = config.to_dict()
    tiny = shrunk(config, 3)
    assert config.to_dict() == before
    assert {name: getattr(tiny, name, None) for name in FLAGS} == {
        name: getattr(config, name, None) for name in FLAGS
    }
    assert (tiny.hidden_size, tiny.vocab_size, tiny.num_hidden_layers) == (64, 160, 3)
    assert shrunk(tiny, 3).to_dict() == tiny.to_dict()


@pytest.mark.parametrize(("heads", "tiny"), [(32, 8), (8, 2), (1, 1)])
def test_query_heads_share_keys_as_they_did(heads: int, tiny: int) -> None:
    config = shrunk(AutoConfig.for_model("llama", **{**_DENSE, "num_key_value_heads": heads}), 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, tiny)


def test_special_tokens_are_inside_the_vocabulary_and_stay_apart() -> None:
    tiny = shrunk(realistic("llama"), 2)
    assert len(set(tiny.eos_token_id)) == 3
    assert max(tiny.eos_token_id) < 160


def test_windows_are_shorter_than_a_probe() -> None:
    assert shrunk(realistic("gemma2"), 2).sliding_window == 8


def test_layers_that_reuse_keys_are_those_that_did() -> None:
    config = realistic("gemma3n_text")  # the last 10 of 30
    assert [shrunk(config, layers).num_kv_shared_layers for layers in (4, 20, 23)] == [0, 0, 3]


def test_the_last_layer_is_of_the_kind_that_it_is_in_the_real_model() -> None:
    config = realistic("gemma4_text")
    assert shrunk(config, 3).layer_types == config.layer_types[:3]


def test_layers_of_different_widths_still_differ() -> None:
    config = AutoConfig.for_model("laguna", num_attention_heads_per_layer=[48, 64] * 24, num_hidden_layers=48)
    assert shrunk(config, 4).num_attention_heads_per_layer == [8, 16, 8, 16]


def test_a_config_of_several_parts_is_tiny_in_all_of_them() -> None:
    tiny = shrunk(AutoConfig.for_model("gemma3"), 3)
    assert tiny.text_config.num_hidden_layers == 3
    assert tiny.text_config.hidden_size == tiny.vision_config.hidden_size == 64


def test_a_tiny_model_is_the_same_each_time_and_leaves_the_random_state() -> None:
    config = shrunk(realistic("qwen3_moe"), 2)
    state = torch.get_rng_state()
    one, same, other = tiny_model(config), tiny_model(config), tiny_model(config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.training
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float64}
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))


def test_parameters_are_random_around_what_they_are_initialised_to() -> None:
    model = tiny_model(shrunk(AutoConfig.for_model("gpt2"), 4))
    norms = torch.cat(
        [p for name, p in model.named_parameters() if "ln_" in name and name.endswith("weight")]
    )
    biases = torch.cat([p for name, p in model.named_parameters() if name.endswith("bias")])
    assert norms.mean().item() == pytest.approx(1.0, abs=0.05)
    assert norms.std().item() == pytest.approx(0.3, abs=0.05)
    assert biases.mean().item() == pytest.approx(0.0, abs=0.05)
    assert biases.std().item() == pytest.approx(0.3, abs=0.05)
    reads_256 = model.get_parameter("transformer.h.0.mlp.c_proj.weight")  # stored as [in, out]
    assert reads_256.std().item() == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("family", "fields", "layers"),
    [("llama", {}, 0), ("reformer", {}, 2), ("qwen4_exp_text", {}, 4)],
)
def test_what_has_no_tiny_model_is_refused_in_one_line(
    family: str, fields: dict[str, Any], layers: int
) -> None:
    with pytest.raises(ModelError) as caught:
        tiny_model(shrunk(AutoConfig.for_model(family, **fields), layers))
    assert "\n" not in str(caught.value)
    assert family in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", causal_types())
@pytest.mark.filterwarnings("ignore")
def test_every_causal_lm_of_transformers_has_a_tiny_copy(family: str) -> None:
    config = example_config(family)
    layers = DEEPER.get(family, 4)
    layers = min(layers, getattr(config.get_text_config(decoder=True), "num_hidden_layers", layers))
    before = config.to_dict()
    tiny = shrunk(config, layers)
    assert config.to_dict() == before
    assert shrunk(tiny, layers).to_dict() == tiny.to_dict()
    if family in IMPOSSIBLE:
        with pytest.raises(ModelError, match=IMPOSSIBLE[family]) as caught:
            tiny_model(tiny)
        assert "\n" not in str(caught.value)
        return
    check_runs(tiny_model(tiny, dtype=torch.float32 if family in FLOAT32 else torch.float64))
    if family not in LAST_DIFFERS:
        check_prefix(config, layers)
