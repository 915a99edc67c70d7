"""A tiny model that is built as a given one is: its first layers, with other sizes.

What holds for the weights of a model follows from how its layers are built, not from how wide they are. So it
can be derived on a model of the same config that has 64 channels and runs in milliseconds. The tables below
give the sizes of such a config, by the name of a field. All other fields are kept. A number of 1 or less says
of what kind a model is (one key head, no shared expert), so it is kept too.
"""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.architectures.auto_classes import auto_class
from llmcompress.errors import ModelError
from llmcompress.integrations.transformers_compat import Conv1D

Fields = Mapping[str, Any]

HIDDEN = 64
HEADS = 8
VOCABULARY = 160
SPECIAL = 32  # ids of special tokens outside the vocabulary are moved to its last places
FIRST_SPECIAL = VOCABULARY - SPECIAL
NOISE = 0.3

# The whole name of a field, and its size. The first match counts.
SIZES = {
    # the residual stream and its embeddings
    r"hidden_size|n_embd|d_model|dim|(emb|embedding)_dim|\w*out(put)?_(hidden_size|dim)": HIDDEN,
    r"(decoder_|text_|shape_|pronunciation_)?vocab_size|n_words|unpadded_vocab_size": VOCABULARY,
    r"vocab_size_per_layer_input": VOCABULARY,
    r"encoder_hash_byte_group_vocab|ngram_vocab_size_base": 130,
    r"hidden_size_per_layer_input": 28,
    r"hidden_size_global": 2 * HIDDEN,
    r"max_position_embeddings|max_(target|source)_positions|n_positions|n_ctx|max_seq_len|context_length": 96,
    r"original_max_position_embeddings": 48,
    # attention
    r"\w*attention_heads(_per_layer)?|n_heads?|num_heads": HEADS,
    r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups": 2,
    r"num_global_key_value_heads": 4,
    r"head_dim|kv_channels|attention_head_(dim|size)|dim_head|d_head|d_kv|query_pre_attn_scalar": 16,
    r"swa_head_dim": 24,
    r"global_head_dim": 32,
    r"(sliding|keep|attention|local_attention)_window(_size|_len)?|window_size|local_attention": 8,
    r"attention_chunk_size|\w+_attn_chunk_length|heavily_compressed_attention": 8,
    r"q_lora_rank": 56,
    r"kv_lora_rank": 40,
    r"o_lora_rank": 44,
    r"qk_nope_head_dim": 24,
    r"qk_rope_head_dim": 8,
    r"qk_head_dim": 32,
    r"v_head_dim": 20,
    r"d_rel": 12,
    r"rel_extent": 32,
    # the choice of what to attend to
    r"index(er)?_n_heads": 4,
    r"index(er)?_head_dim": 18,
    r"index_topk": 10,
    r"index_topk_blocks": 2,
    r"index_block_size|indexer_compress_ratio": 4,
    r"indexer_budget": 8,
    # the feed-forward part and its experts
    r"moe_intermediate_size|expert_ffn_hidden_size": 48,
    r"\w*shared_experts?_intermediate_size|shared_intermediate_size": 80,
    r"intermediate_size_mlp|(prefix_)?dense_intermediate_size": 112,
    r"intermediate_size|\w*ffn_dim|d_ff|dff|dim_ff|[dn]_inner|ffn_hidden_size|feed_forward_size|mlp_dim": 96,
    r"block_multiple_of|ffn_round_up_to_multiple_of": 8,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts": 6,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|zero_expert_num": 2,
    r"n_group|num_expert_group": 2,
    r"topk_group": 1,
    r"moe_latent_size": 36,
    r"router_hidden_size": 22,
    # states, linear attention and convolutions
    r"(ssm_)?state_size|mamba_d_state": 12,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r"n_groups|mamba_n_?groups": 2,
    r"time_step_rank|mamba_dt_rank": 6,
    r"(mamba_)?chunk_size|block_size": 16,
    r"linear_num_key_heads": 2,
    r"linear_num(_value)?_heads": 4,
    r"linear(_key)?_head_dim": 20,
    r"linear_value_head_dim": 28,
    # ranks of small updates
    r"laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank": 14,
    # towers for images and sound
    r"adapter_in_dim|adapter_input_size|output_channels": HIDDEN,
    r"nemo_conv_channels|depthwise_separable_out_channel|ext_pw_out_channel": HIDDEN,
}

# A number that equals one of these others in its config still does.
EQUALS = {
    r"head_dim": ("qk_rope_head_dim", "qk_head_dim"),
    r"num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups": ("num_attention_heads",),
    r"swa_num_key_value_heads": ("swa_num_attention_heads",),
    r"linear_num_value_heads": ("linear_num_key_heads",),
    r"num_experts_per_tok": ("num_experts", "num_local_experts", "n_routed_experts"),
    r"topk_group": ("n_group",),
}

# A number that keeps its ratio to the hidden width.
WIDTHS = (
    r"embedding_size|(in|out)put_embedding_size|\w+_embed_(proj_)?dim|axial_pos_embds_dim"
    r"|attention_hidden_size|lru_width|mamba_d_ssm|backbone_hidden_size"
)

# The width of a state space's heads, which together keep their ratio to the hidden width, and their number.
STATE_HEAD_DIM = r"mamba_d_head|mamba_head_?dim"
STATE_HEADS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")

# What no rule can say of one model type: fields, and their values in a tiny config.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt_global_transformer": {"hidden_size": 2 * HIDDEN},  # two channels per channel of the local models
    "dots3_note_text": {"head_dim": 32},  # its config class asks sliding layers for nope and rope together
    "helium": {"head_dim": 8},  # its output projection takes the heads to fill the hidden width
    "xlnet": {"d_head": 8},  # its config class asks for the hidden width per head
}

DEPTH = r"(num_(hidden_|(en|de)coder_)?|n_|(en|de)coder_)layers|n_layer|depth|num_blocks"
TOKEN = r"\w*token_(id|index)|\w+_tokens"
# lists with an entry per layer, and lists of the indices of layers
PER_LAYER = r"\w*(layer|type|pattern)\w*|" + "|".join(SIZES)
LAYER_INDICES = r"\w*layers?_(ids|indices)|\w+_idxs|moe_layers|mlp_only_layers|cross_attention_layers"


def shrunk(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the config of a tiny model that differs from this one only in sizes.

    The tiny model has the first `layers` layers, or as many as there are, each of the kind that it is.

    Errors: ModelError if there is no such config.
    """
    try:
        if layers < 1:
            raise ValueError("a model has at least one layer")
        return _tiny(config, layers)
    except Exception as error:  # each family checks its fields in its own way
        raise ModelError(
            f"a {config.model_type} model has no tiny copy of {layers} layers ({_why(error)}); "
            "try another number of layers, or complete its config"
        ) from error


def tiny_model(
    config: PretrainedConfig,
    kind: type[PreTrainedModel] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> PreTrainedModel:
    """Return a random causal LM of a config, in eval mode, with plain attention and experts; of class `kind`,
    or the one that the auto class takes.

    Every parameter is random, and the same each time: vectors and biases are what they are initialised to
    plus noise of std 0.3, matrices have std fan_in ** -0.5.

    Errors: ModelError if transformers builds no model of this config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            build = kind._from_config if kind is not None else auto_class(config).from_config
            model: PreTrainedModel = build(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
            )
        except Exception as error:  # each family fails in its own way
            raise ModelError(
                f"transformers builds no {config.model_type} model of this config ({_why(error)}); "
                "try another number of layers, or complete its config"
            ) from error
        _randomise(model)
    nn.Module.to(model, dtype)
    model.train(False)
    return model


def _why(error: Exception) -> str:
    """Return what a foreign error says, as a part of a line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draw the parameters, and the biases that are buffers, of a model that has just been initialised."""
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        vector = parameter.dim() != 2 and parameter.squeeze().dim() < 2
        if vector or name.endswith("bias"):
            parameter.nan_to_num_(0.0).add_(torch.randn_like(parameter), alpha=NOISE)
        else:
            fan_in = parameter.shape[0 if id(parameter) in transposed else -1]
            parameter.normal_(0.0, fan_in**-0.5)
    for name, buffer in model.named_buffers():
        # a router's, to balance its experts; a mask may be called so too
        if name.endswith("bias") and buffer.is_floating_point() and buffer.dim() == 1:
            buffer.normal_(0.0, NOISE)


def _tiny(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the tiny config of a config, with the tiny configs of those inside it."""
    fields = config.to_dict()
    for name in ("auto_map", "quantization_config"):  # neither says how the model is built
        fields.pop(name, None)
    # some models read these two, though their config classes leave them open
    if fields.get("head_dim", 0) is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = config.num_attention_heads
    computed = "head_dim" in fields and not hasattr(type(config), "head_dim")  # no field of its class
    if computed and fields["head_dim"] * config.num_attention_heads == config.hidden_size:
        del fields["head_dim"]
    known = {name: fields[own] for name, own in config.attribute_map.items() if own in fields} | fields
    known.setdefault("num_hidden_layers", getattr(config, "num_hidden_layers", None))
    if known.get("qk_nope_head_dim") and known.get("qk_rope_head_dim"):
        known.setdefault("qk_head_dim", known["qk_nope_head_dim"] + known["qk_rope_head_dim"])
    tiny = {name: _value(name, value, known, layers) for name, value in fields.items()}
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            tiny[name] = _tiny(inner, layers)
    if shared := fields.get("num_kv_shared_layers"):  # the last ones of all layers
        tiny["num_kv_shared_layers"] = max(0, shared - max(0, known["num_hidden_layers"] - layers))
    if "attention_layers" in tiny:  # its config class makes this list from patterns and their repeats
        tiny["attention_types"] = [[tiny["attention_layers"], 1]]
    return _built(type(config), tiny | EXCEPTIONS.get(config.model_type, {}))


def _built(kind: type[PretrainedConfig], fields: Fields) -> PretrainedConfig:
    """Return the config of a class with these fields, lists with an entry per layer as they are given."""
    found = kind(**copy.deepcopy(dict(fields)))
    # some config classes set the kind of the last layer, which is another one here
    for name, value in fields.items():
        if isinstance(value, list) and re.fullmatch(PER_LAYER, name) and getattr(found, name, value) != value:
            setattr(found, name, value)
    return found


def resized(config: PretrainedConfig, fields: Fields) -> PretrainedConfig:
    """Return a tiny config with other sizes in the part that describes the decoder.

    Errors: whatever the config's class raises.
    """
    text = config.get_text_config(decoder=True)
    inner = _built(type(text), text.to_dict() | dict(fields))
    if text is config:
        return inner
    whole = config.to_dict()
    for name in config.sub_configs:
        own = getattr(config, name, None)
        whole[name] = inner if own is text else own
    return _built(type(config), whole)


def _value(name: str, value: Any, known: Fields, layers: int) -> Any:
    """Return the tiny value of a field; `known` are the fields around it, also by the names that all types
    share."""
    if name == "per_layer_config" and value:
        return {index: _value("", own, known, layers) for index, own in value.items() if int(index) < layers}
    if isinstance(value, Mapping):
        return {key: _value(str(key), inner, {**known, **value}, layers) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_entries(name, value, known, layers))
    if name == "partial_rotary_factor" and value:
        return _rotary(known) / _head_dim(known)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return min(value, layers) if re.fullmatch(DEPTH, name) else _number(name, value, known)


def _entries(name: str, values: Sequence[Any], known: Fields, layers: int) -> Sequence[Any]:
    """Return the tiny values of a list, of the first layers only if it has an entry per layer."""
    if re.fullmatch(LAYER_INDICES, name):
        return [index for index in values if index < layers]
    if name in ("short_factor", "long_factor"):  # one per frequency
        return values[: _rotary(known) // 2]
    if name == "mrope_section":  # it shares out the frequencies
        return [(_rotary(known) // 2 + place) // len(values) for place in reversed(range(len(values)))]
    if len(values) == known.get("num_hidden_layers") and re.fullmatch(PER_LAYER, name):
        values = values[:layers]
    if not all(type(value) is int for value in values):
        return values
    tiny: dict[int, int] = {}
    for value in sorted(set(values)):
        size = _number(name, value, known)
        if value > 1 and not re.fullmatch(TOKEN, name):  # sizes that differ between layers still do
            size = next(each for each in itertools.count(size, size) if each not in tiny.values())
        tiny[value] = size
    return [tiny[value] for value in values]


def _number(name: str, value: int, known: Fields) -> int:
    """Return the tiny value of a number."""
    if re.fullmatch(TOKEN, name):
        return value if value < VOCABULARY else FIRST_SPECIAL + value % SPECIAL
    if value <= 1:
        return value
    for pattern, others in EQUALS.items():
        for other in others if re.fullmatch(pattern, name) else ():
            if known.get(other) == value:
                return _number(other, value, known)
    if re.fullmatch(WIDTHS, name) and known.get("hidden_size"):
        width: int = round(value / known["hidden_size"] * HIDDEN)
        return max(1, width)
    if re.fullmatch(STATE_HEAD_DIM, name):
        heads = next(each for each in STATE_HEADS if each in known)
        width = round(value * known[heads] / known["hidden_size"] * HIDDEN)
        return width // _number(heads, known[heads], known)
    if name == "rotary_dim":
        before: int = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
        return _even(value * _head_dim(known) / before)
    found = (size for pattern, size in SIZES.items() if re.fullmatch(pattern, name))
    return next(found, value)


def _head_dim(known: Fields) -> int:
    """Return the tiny width of an attention head."""
    return _number("head_dim", known["head_dim"], known) if known.get("head_dim") else HIDDEN // HEADS


def _rotary(known: Fields) -> int:
    """Return how many channels of a tiny head are rotated."""
    return _even(_head_dim(known) * (known.get("partial_rotary_factor") or 1))


def _even(number: float) -> int:
    """Return the even number next to a number, at least 2: channels are rotated in pairs."""
    return 2 * max(1, round(number / 2))
