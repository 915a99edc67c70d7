"""The table of model families: the name of every weight, and the axes it runs along.

No other module knows a weight's name. Everything structural follows from these facts: cutting an axis, moving
a scale across two weights, one Hessian for the linears that read one input, the bytes of a plan.
`tests/architectures/test_families.py` proves them on a tiny model: shapes, permutations of each axis, scales.
For a family that is not here, `derivation/` finds and proves the first of these facts on the spot. Nothing
here touches a tensor or imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmcompress.architectures.auto_classes import has_own_code
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import ModelError

__all__ = ["FAMILIES", "Anatomy", "anatomy_of"]

# The families. In a layer: kv = key-value heads, q = query heads of each kv head, d = head_dim; models
# without grouped heads have only kv heads. `scale_pairs` lists only exact identities: no norm that follows
# its sublayer, no scale through an activation other than relu. "x[1]" is the second part of a fused weight.

ATTENTION = {
    "self_attn.q_proj.weight": "(kv q d) hidden",
    "self_attn.k_proj.weight": "(kv d) hidden",
    "self_attn.v_proj.weight": "(kv d) hidden",
    "self_attn.o_proj.weight": "hidden (kv q d)",
}
ATTENTION_BIAS = {
    "self_attn.q_proj.bias": "(kv q d) if attention_bias",
    "self_attn.k_proj.bias": "(kv d) if attention_bias",
    "self_attn.v_proj.bias": "(kv d) if attention_bias",
    "self_attn.o_proj.bias": "hidden if attention_bias",
}
HEAD_NORMS = {"self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

MISTRAL = Anatomy(
    family="mistral",
    layers="model.layers",
    layer={
        "input_layernorm.weight": "hidden",
        **ATTENTION,
        "post_attention_layernorm.weight": "hidden",
        "mlp.gate_proj.weight": "ffn hidden",
        "mlp.up_proj.weight": "ffn hidden",
        "mlp.down_proj.weight": "hidden ffn",
    },
    outer={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    consumers=(QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)),
    scale_pairs={
        "input_layernorm": QKV,
        "self_attn.v_proj": ("self_attn.o_proj",),
        "post_attention_layernorm": GATE_UP,
        "mlp.up_proj": ("mlp.down_proj",),
    },
    sizes={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "kv": "num_key_value_heads",
        "q": "num_attention_heads",
        "d": "head_dim",
        "ffn": "intermediate_size",
    },
    embedding="model.embed_tokens",
    norm="model.norm",
)
LLAMA = MISTRAL.extend(
    "llama",
    layer={
        **ATTENTION_BIAS,
        "mlp.gate_proj.bias": "ffn if mlp_bias",
        "mlp.up_proj.bias": "ffn if mlp_bias",
        "mlp.down_proj.bias": "hidden if mlp_bias",
    },
)
QWEN2 = MISTRAL.extend(
    "qwen2",
    layer={
        "self_attn.q_proj.bias": "(kv q d)",
        "self_attn.k_proj.bias": "(kv d)",
        "self_attn.v_proj.bias": "(kv d)",
    },
)
QWEN3 = MISTRAL.extend("qwen3", layer={**ATTENTION_BIAS, **HEAD_NORMS})
GEMMA2 = MISTRAL.extend(
    "gemma2",
    layer={
        **ATTENTION_BIAS,
        "pre_feedforward_layernorm.weight": "hidden",
        "post_feedforward_layernorm.weight": "hidden",
    },
    scale_pairs={
        "input_layernorm": QKV,
        "self_attn.v_proj": ("self_attn.o_proj",),
        "pre_feedforward_layernorm": GATE_UP,
        "mlp.up_proj": ("mlp.down_proj",),
    },
    norm_offset=1.0,
)
GEMMA3 = GEMMA2.extend("gemma3_text", layer=HEAD_NORMS)
PHI3 = replace(
    MISTRAL,
    family="phi3",
    layer={
        "input_layernorm.weight": "hidden",
        "self_attn.qkv_proj.weight": "(kv q d | kv d | kv d) hidden",
        "self_attn.o_proj.weight": "hidden (kv q d)",
        "post_attention_layernorm.weight": "hidden",
        "mlp.gate_up_proj.weight": "(ffn | ffn) hidden",
        "mlp.down_proj.weight": "hidden ffn",
    },
    consumers=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    scale_pairs={
        "input_layernorm": ("self_attn.qkv_proj",),
        "self_attn.qkv_proj[2]": ("self_attn.o_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
        "mlp.gate_up_proj[1]": ("mlp.down_proj",),
    },
)
QWEN3_MOE = replace(
    MISTRAL.extend("qwen3_moe", sizes={"expert": "num_experts", "ffn": "moe_intermediate_size"}),
    layer={
        "input_layernorm.weight": "hidden",
        **ATTENTION,
        **ATTENTION_BIAS,
        **HEAD_NORMS,
        "post_attention_layernorm.weight": "hidden",
        "mlp.gate.weight": "expert hidden",
        "mlp.experts.gate_up_proj": "expert (ffn | ffn) hidden",
        "mlp.experts.down_proj": "expert hidden ffn",
    },
    consumers=(QKV, ("self_attn.o_proj",)),
    scale_pairs={
        "input_layernorm": QKV,
        "self_attn.v_proj": ("self_attn.o_proj",),
        "post_attention_layernorm": ("mlp.gate", "mlp.experts.gate_up_proj"),
        "mlp.experts.gate_up_proj[1]": ("mlp.experts.down_proj",),
    },
    router=("mlp.gate",),
    experts={"mlp.experts.gate_up_proj": False, "mlp.experts.down_proj": False},
    refuses=("mlp_only_layers", "decoder_sparse_step != 1", "num_experts == 0"),  # layers of two kinds
)
GPT2 = Anatomy(
    family="gpt2",
    layers="transformer.h",
    layer={
        "ln_1.weight": "hidden",
        "ln_1.bias": "hidden",
        "attn.c_attn.weight": "hidden (kv d | kv d | kv d)",
        "attn.c_attn.bias": "(kv d | kv d | kv d)",
        "attn.c_proj.weight": "(kv d) hidden",
        "attn.c_proj.bias": "hidden",
        "ln_2.weight": "hidden",
        "ln_2.bias": "hidden",
        "mlp.c_fc.weight": "hidden ffn",
        "mlp.c_fc.bias": "ffn",
        "mlp.c_proj.weight": "ffn hidden",
        "mlp.c_proj.bias": "hidden",
    },
    outer={
        "transformer.wte.weight": "vocab hidden",
        "transformer.wpe.weight": "position hidden",
        "transformer.ln_f.weight": "hidden",
        "transformer.ln_f.bias": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    consumers=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    scale_pairs={
        "ln_1": ("attn.c_attn",),
        "attn.c_attn[2]": ("attn.c_proj",),
        "ln_2": ("mlp.c_fc",),
        "mlp.c_fc if activation_function == 'relu'": ("mlp.c_proj",),
    },
    sizes={
        "vocab": "vocab_size",
        "position": "n_positions",
        "hidden": "n_embd",
        "kv": "n_head",
        "ffn": "n_inner",
    },
    embedding="transformer.wte",
    norm="transformer.ln_f",
    conv1d=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    refuses=("add_cross_attention",),
)
OPT_DECODER = "model.decoder"
OPT = Anatomy(
    family="opt",
    layers=f"{OPT_DECODER}.layers",
    layer={
        "self_attn_layer_norm.weight": "hidden if layer_norm_elementwise_affine",
        "self_attn_layer_norm.bias": "hidden if layer_norm_elementwise_affine",
        "self_attn.q_proj.weight": "(kv d) hidden",
        "self_attn.q_proj.bias": "(kv d) if enable_bias",
        "self_attn.k_proj.weight": "(kv d) hidden",
        "self_attn.k_proj.bias": "(kv d) if enable_bias",
        "self_attn.v_proj.weight": "(kv d) hidden",
        "self_attn.v_proj.bias": "(kv d) if enable_bias",
        "self_attn.out_proj.weight": "hidden (kv d)",
        "self_attn.out_proj.bias": "hidden if enable_bias",
        "final_layer_norm.weight": "hidden if layer_norm_elementwise_affine",
        "final_layer_norm.bias": "hidden if layer_norm_elementwise_affine",
        "fc1.weight": "ffn hidden",
        "fc1.bias": "ffn if enable_bias",
        "fc2.weight": "hidden ffn",
        "fc2.bias": "hidden if enable_bias",
    },
    outer={
        f"{OPT_DECODER}.embed_tokens.weight": "vocab embed if word_embed_proj_dim != hidden_size "
        "else vocab hidden",
        f"{OPT_DECODER}.project_in.weight": "hidden embed if word_embed_proj_dim != hidden_size",
        # the first two rows belong to no position
        f"{OPT_DECODER}.embed_positions.weight": "(2 | position) hidden",
        f"{OPT_DECODER}.final_layer_norm.weight": "hidden if do_layer_norm_before and not "
        "_remove_final_layer_norm and layer_norm_elementwise_affine",
        f"{OPT_DECODER}.final_layer_norm.bias": "hidden if do_layer_norm_before and not "
        "_remove_final_layer_norm and layer_norm_elementwise_affine",
        f"{OPT_DECODER}.project_out.weight": "embed hidden if word_embed_proj_dim != hidden_size",
        "lm_head.weight": "vocab embed if word_embed_proj_dim != hidden_size else vocab hidden",
    },
    consumers=(QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    scale_pairs={
        "self_attn_layer_norm if do_layer_norm_before and layer_norm_elementwise_affine": QKV,
        "self_attn.v_proj": ("self_attn.out_proj",),
        "final_layer_norm if do_layer_norm_before and layer_norm_elementwise_affine": ("fc1",),
        "fc1 if activation_function == 'relu'": ("fc2",),
    },
    sizes={
        "vocab": "vocab_size",
        "embed": "word_embed_proj_dim",
        "position": "max_position_embeddings",
        "hidden": "hidden_size",
        "kv": "num_attention_heads",
        "ffn": "ffn_dim",
    },
    embedding=f"{OPT_DECODER}.embed_tokens",
    norm=f"{OPT_DECODER}.final_layer_norm if do_layer_norm_before and not _remove_final_layer_norm",
)
GPT_NEOX = Anatomy(
    family="gpt_neox",
    layers="gpt_neox.layers",
    layer={
        "input_layernorm.weight": "hidden",
        "input_layernorm.bias": "hidden",
        "post_attention_layernorm.weight": "hidden",
        "post_attention_layernorm.bias": "hidden",
        "attention.query_key_value.weight": "(kv (d | d | d)) hidden",  # head by head, not part by part
        "attention.query_key_value.bias": "(kv (d | d | d)) if attention_bias",
        "attention.dense.weight": "hidden (kv d)",
        "attention.dense.bias": "hidden if attention_bias",
        "mlp.dense_h_to_4h.weight": "ffn hidden",
        "mlp.dense_h_to_4h.bias": "ffn",
        "mlp.dense_4h_to_h.weight": "hidden ffn",
        "mlp.dense_4h_to_h.bias": "hidden",
    },
    outer={
        "gpt_neox.embed_in.weight": "vocab hidden",
        "gpt_neox.final_layer_norm.weight": "hidden",
        "gpt_neox.final_layer_norm.bias": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    consumers=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    scale_pairs={
        "input_layernorm": ("attention.query_key_value",),
        "attention.query_key_value[2]": ("attention.dense",),
        # also with parallel residual, where each norm has its own reader
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        "mlp.dense_h_to_4h if hidden_act == 'relu'": ("mlp.dense_4h_to_h",),
    },
    sizes={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "kv": "num_attention_heads",
        "ffn": "intermediate_size",
    },
    embedding="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
)

FAMILIES: Mapping[str, Anatomy] = {
    table.family: table
    for table in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT2, OPT, GPT_NEOX, QWEN3_MOE)
}


def table_of(config: Any) -> Anatomy | None:
    """Return the table that describes a model of this config, with its conditions open; None if none does."""
    table = family_of(config)
    return None if table is None or table.refused(config) else table


def family_of(config: Any) -> Anatomy | None:
    """Return the table of a config's family; None if there is none, as for a model with code of its own,
    whatever its model_type."""
    return None if has_own_code(config) else FAMILIES.get(config.model_type)


def anatomy_of(config: Any) -> Anatomy:
    """Return the anatomy of a model of a family in the table, by its config.

    Raises ModelError for a family that the table lacks, and for a config that the rows do not cover.
    """
    family = getattr(config, "model_type", "")
    if family_of(config) is None:
        raise ModelError(
            f'"{family}" is not one of the families in the table ({", ".join(sorted(FAMILIES))})'
        )
    return FAMILIES[family].at(config)
