"""Pico models of every family, made on the spot.

The widths differ from each other (hidden 64, query rows 128, key rows 32, ffn 320, vocabulary 160), so that a
mixed-up shape shows; all but the key and value rows are multiples of 64, so that groups of 64 fit. Every
weight is random, norms and biases too, and large enough that each has a say in the logits. They cost some
milliseconds and 0.5 MB each.
"""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmcompress.derivation.example_configs import example_config
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.derivation.subject import depth_needed, paths_of_layers
from llmcompress.modeling.model_config import skeleton

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "qwen3_moe",
)

_TOKENS = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
}
_PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
# shorter than the tests' texts
_LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma2": {**_GROUPED, **_LOCAL, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_GROUPED, **_LOCAL, "query_pre_attn_scalar": 16},
    "phi3": {**_GROUPED, "original_max_position_embeddings": 96},
    "gpt2": {"n_embd": 64, "n_inner": 320, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "opt": {**_PLAIN, "ffn_dim": 320, "word_embed_proj_dim": 64},
    "gpt_neox": {**_PLAIN, "intermediate_size": 320},
    "qwen3_moe": {**_GROUPED, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 192},
}

# Configs that add, drop or reshape weights or change the order of a layer, beside each family's plain one.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    ("gemma2", {"attention_bias": True}),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": True}),
    ("gpt2", {"n_inner": None, "activation_function": "relu", "tie_word_embeddings": False}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),  # as opt-350m is
    ("opt", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False, "hidden_act": "relu"}),
)


def pico(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal LM of a family, float32, in eval mode, the same each time; `overrides` are config
    fields."""
    config = AutoConfig.for_model(family, **{**_TOKENS, **_FIELDS[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            _randomise(name, parameter, centre=0.0 if "gemma" in family else 1.0)
    model.train(False)
    return model


@torch.no_grad()
def _randomise(name: str, parameter: torch.Tensor, centre: float) -> None:
    """Matrices keep the size of what they read; norms lie around the centre (gemma adds 1 to its own), biases
    around 0."""
    if parameter.dim() == 1:
        parameter.normal_(centre if name.endswith("weight") else 0.0, 0.3)
    else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float32, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# types whose layers are called with arguments that depend on the tokens
TOKENS_ENTER_LAYERS = ("gemma4_text", "gemma4", "zamba", "zamba2")


# types whose layers hand on more than their states, by the names of SHARING too
HANDING_ON = ("gemma4_e2b", "gemma4_e4b", "gemma4_wrapper", "gemma3n", "zaya", "hy_v4")
# types whose layers take states of four dimensions
STREAMS = ("gemma3n", "deepseek_v4", "hy_v4")
_E2B = {
    "num_hidden_layers": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "use_double_wide_mlp": True,
}
_E4B = {**_E2B, "num_key_value_heads": 2, "use_double_wide_mlp": False}
_GEMMA3N = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 4,
    "intermediate_size": 16384,
    "activation_sparsity_pattern": [0.95, *[0.0] * 7],
}
# models whose last layers read the keys and values of earlier ones, as the released small ones do
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_e2b": ("gemma4_text", _E2B),
    "gemma4_e4b": ("gemma4_text", _E4B),
    "gemma3n": ("gemma3n_text", _GEMMA3N),
}


def config_of(name: str) -> PretrainedConfig:
    """A config of a type, or of one of SHARING, of the size that its class has by default."""
    if name == "gemma4_wrapper":
        return AutoConfig.for_model("gemma4", text_config=config_of("gemma4_e2b").to_dict())
    if name not in SHARING:
        return example_config(name)
    model_type, fields = SHARING[name]
    return AutoConfig.for_model(model_type, **fields)


def tiny_config(model_type: str) -> PretrainedConfig:
    """A small config of any type, with a layer of each kind, and two that share weights if any do."""
    return deepcopy(_tiny_config(model_type))


@cache
def _tiny_config(model_type: str) -> PretrainedConfig:
    """It takes a second for some types, as it looks at a whole model."""
    config = config_of(model_type)
    whole = skeleton(config, torch.float32)
    return shrunk(config, depth_needed(whole, paths_of_layers(whole)[0]))


def tiny(model_type: str) -> PreTrainedModel:
    """A tiny random causal LM of any type, float32."""
    return tiny_model(tiny_config(model_type), dtype=torch.float32)
