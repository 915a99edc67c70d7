"""A config for each type of causal language model: that of its class, with what the class leaves out."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig

from llmcompress.errors import ModelError, first_line

MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
# What the configs of these types have in released models, and their classes leave out.
COMPLETED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen4_exp_text": {
        "head_dim": 128,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 64,
        "output_gate_type": "sigmoid",
    },
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
COMPLETED["qwen4_exp"] = {"text_config": COMPLETED["qwen4_exp_text"]}


def causal_types() -> list[str]:
    """Every type of causal language model of the installed transformers."""
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return sorted(name for name, config in transformers.CONFIG_MAPPING.items() if config in mapping)


def example_config(model_type: str) -> PretrainedConfig:
    """A config of a type, of the size that its class has by default. Errors: ModelError."""
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(f"transformers {transformers.__version__} has no model_type {model_type}")
    try:
        config: PretrainedConfig = transformers.CONFIG_MAPPING[model_type](**COMPLETED.get(model_type, {}))
    except Exception as error:  # each class checks its fields in its own way
        raise ModelError(f"its config class has no defaults ({first_line(error)[:120]})") from error
    if getattr(config, "is_decoder", True) is False:  # of an encoder that can be a decoder
        config.is_decoder = True
    return config
