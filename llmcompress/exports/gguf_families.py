"""The families that a GGUF file can hold as llama.cpp has them: their names there, and what the file says.

For each `model_type` of transformers: the architecture of llama.cpp, whether its rotary embedding pairs
adjacent channels, for which rows of queries and keys are put in another order, and whether 1 is added to the
weights of norms. What a config may say beyond that is refused.

Source: llama.cpp's convert_hf_to_gguf.py and src/llama-arch.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a family."""

    architecture: str  # a name of gguf.MODEL_ARCH
    adjacent: bool = False
    norms_plus_one: bool = False
    activation: str = "silu"


FAMILIES = {
    "llama": Family("LLAMA", adjacent=True),
    "mistral": Family("LLAMA", adjacent=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma2": Family("GEMMA2", norms_plus_one=True, activation="gelu_pytorch_tanh"),
    "gemma3_text": Family("GEMMA3", norms_plus_one=True, activation="gelu_pytorch_tanh"),
}
ROPES = ("default", "linear", "llama3")
# of how many layers one attends to all, and the layers of the model that scales queries in another way
GEMMA = {"gemma2": (2, 46), "gemma3_text": (6, 62)}


def refusal(config: Any) -> str | None:
    """Return why llama.cpp would not compute what transformers does with this config, or None."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"a GGUF file of {config.model_type} is not written here; only {', '.join(FAMILIES)} are"
    said = getattr(config, "hidden_activation", None) or config.hidden_act
    if said != family.activation:
        return f"llama.cpp's {config.model_type} has the activation {family.activation}, not {said}"
    if (kind := rope_of(config).get("rope_type", "default")) not in ROPES:
        return f"the rotary embedding {kind} is not written here; only {', '.join(ROPES)} are"
    return _refusal_of_gemma(config, *GEMMA[config.model_type]) if config.model_type in GEMMA else None


def _refusal_of_gemma(config: Any, every: int, largest: int) -> str | None:
    """Why llama.cpp would not compute the same, or None: one of `every` layers attends to all, and a model of
    `largest` layers scales queries in another way."""
    whole = config.num_hidden_layers == largest
    width = config.hidden_size // config.num_attention_heads if whole else config.head_dim
    if config.query_pre_attn_scalar != width:
        return f"llama.cpp takes {width} for query_pre_attn_scalar, which is {config.query_pre_attn_scalar}"
    full = [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if full != [*range(every - 1, config.num_hidden_layers, every)]:
        return f"in llama.cpp one of {every} layers attends to all, and layer_types says otherwise"
    if getattr(config, "use_bidirectional_attention", False):
        return "in llama.cpp tokens attend to what comes before them alone"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping is not None:
        return "llama.cpp's Gemma 3 has no attn_logit_softcapping"
    if config.model_type == "gemma2":
        if None in (config.attn_logit_softcapping, config.final_logit_softcapping):
            return "llama.cpp's Gemma 2 caps the logits of attention and of tokens, and this model does not"
        if not config.tie_word_embeddings:
            return "llama.cpp's Gemma 2 has no lm_head of its own"
    return None


def rope_of(config: Any) -> Mapping[str, Any]:
    """What a config says of the rotary embedding, of layers that attend to all where there are two."""
    said: Mapping[str, Any] = config.rope_parameters
    found: Mapping[str, Any] = said.get("full_attention", said)
    return found


def describe(config: Any, writer: Any) -> None:
    """Tell a `gguf.GGUFWriter` the sizes and constants of a config."""
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    rope = rope_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(_linear())
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _linear() -> Any:
    from gguf import RopeScalingType

    return RopeScalingType.LINEAR


def head_dim_of(config: Any) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def order_of_rows(name: str, config: Any) -> Tensor | None:
    """Where each row of a tensor of this name comes from, if llama.cpp has them in another order, else None.

    transformers pairs the first half of a head's channels with the second, llama.cpp's Llama adjacent ones.
    """
    part = name.split(".")[-2]
    if not FAMILIES[config.model_type].adjacent or part not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    rows = torch.arange(heads * head_dim_of(config))
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rope_factors(config: Any) -> Tensor | None:
    """By what each frequency of the rotary embedding is divided, float32 [head_dim / 2], or None: of Llama
    3.1 and later, whose long waves are stretched.

    Source: `rope_type: llama3` of transformers (modeling_rope_utils).
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim, old = head_dim_of(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    divided: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return divided.float()


def notes(config: Any) -> list[str]:
    """What llama.cpp does in another way than transformers."""
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "qwen2", "qwen3") and window:
        windowed = config.model_type == "mistral" or "sliding_attention" in getattr(config, "layer_types", ())
        if windowed and window < config.max_position_embeddings:
            return [f"Beyond {window} tokens llama.cpp attends to all tokens, and transformers to so many."]
    return []
