"""What vLLM's loaders read of a Llama checkpoint, restated from its source, so that a checkpoint can be
held against it where vLLM can't run.

The bitsandbytes rules are those of vLLM 0.27.1, the last release that has that loader (0.28.0 does not).
The rules of compressed-tensors are those of vLLM 0.33.0. Each rule names the file, below
`vllm/model_executor/`, and the function or class that it is of. A rule that a checkpoint breaks raises
`Broken`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from torch import Tensor

# models/llama.py, LlamaForCausalLM.packed_modules_mapping
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes")


class Broken(Exception):
    """A rule of vLLM's loader that a checkpoint does not keep to."""


def require(holds: bool, rule: str) -> None:
    """Raise Broken, which says the rule, unless it holds."""
    if not holds:
        raise Broken(rule)


@dataclass(frozen=True)
class Linear:
    """A linear as vLLM builds it: the rows of each of its parts, by their names in the checkpoint, and the
    columns."""

    name: str  # in vLLM, such as model.layers.0.self_attn.qkv_proj
    parts: dict[str, int]
    columns: int

    @property
    def rows(self) -> int:
        """The rows of all parts."""
        return sum(self.parts.values())


def linears_of(config: dict[str, Any]) -> Iterator[Linear]:
    """The linears of the layers, with the sizes that config.json gives (models/llama.py, LlamaAttention,
    LlamaMLP).

    Each layer has the same sizes: `per_layer_config` is not read.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = config["num_key_value_heads"] * head
    wide = config["intermediate_size"]
    for index in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        rows = {"q_proj": heads * head, "k_proj": keys, "v_proj": keys}
        yield Linear(f"{attention}qkv_proj", {attention + part: R for part, R in rows.items()}, hidden)
        yield Linear(f"{attention}o_proj", {f"{attention}o_proj": hidden}, heads * head)
        yield Linear(f"{mlp}gate_up_proj", {f"{mlp}{part}_proj": wide for part in ("gate", "up")}, hidden)
        yield Linear(f"{mlp}down_proj", {f"{mlp}down_proj": hidden}, wide)


def plain_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors outside the linears of the layers, with their shapes (models/llama.py, LlamaForCausalLM).
    With tied embeddings, what begins with lm_head. is passed over (load_weights)."""
    hidden = config["hidden_size"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{index}.{norm}.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors of a checkpoint of one file (model_loader/weight_utils.py,
    safetensors_weights_iterator)."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if config["tie_word_embeddings"]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    return config, tensors


def take_plain(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Take the plain tensors out of `tensors` (models/utils.py, AutoWeightsLoader.load_weights: a name that
    the model lacks raises; default_weight_loader: so does another shape)."""
    for name, shape in plain_names(config).items():
        require(name in tensors, f"{name} is not initialised from the checkpoint")
        tensor = tensors.pop(name)
        require(tensor.is_floating_point() and tuple(tensor.shape) == shape, f"{name} is {shape} numbers")


# 1. bitsandbytes, vLLM 0.27.1


def is_skipped(prefix: str, skip: list[str]) -> bool:
    """layers/quantization/bitsandbytes.py, is_layer_skipped_bnb: an entry is a whole part of the name, or its
    beginning up to a dot."""
    parts = prefix.split(".")
    beginnings = {".".join(parts[: number + 1]) for number in range(len(parts))}
    return any(entry in parts for entry in skip) or bool(beginnings & {*skip})


def is_state(name: str) -> bool:
    """model_loader/bitsandbytes_loader.py, _is_4bit_weight_name: whether a tensor is of a quantisation
    state."""
    return any(word in name.split(".")[-1] for word in STATE)


def load_bitsandbytes(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights [R, C] of the fused linears as vLLM holds them, float32, by their names in it. Errors:
    Broken.

    `dtype` is that of the model in vLLM.
    """
    config, tensors = read(folder)
    said = config["quantization_config"]
    # BitsAndBytesModelLoader._verify_model_compatibility
    require(said["quant_method"] == "bitsandbytes", "quant_method is bitsandbytes")
    # BitsAndBytesConfig.__init__
    require(said.get("bnb_4bit_quant_storage", "uint8") == "uint8", "bnb_4bit_quant_storage is uint8")
    eight = bool(said.get("load_in_8bit"))
    require(eight or bool(said.get("load_in_4bit", True)), "load_in_8bit or load_in_4bit is true")
    # BitsAndBytesLinearMethod.create_weights: Int8Params holds codes
    require(not said.get("llm_int8_has_fp16_weight"), "llm_int8_has_fp16_weight is false")
    states = _states8(tensors) if eight else _states4(tensors)
    skip, found = said.get("llm_int8_skip_modules") or [], {}
    for linear in linears_of(config):
        plain = is_skipped(linear.name, skip)
        weights = []
        for part, R in linear.parts.items():
            name, C = f"{part}.weight", linear.columns
            require(name in tensors, f"{name} is not initialised from the checkpoint")
            tensor = tensors.pop(name)
            if plain:
                require(name not in states, f"{linear.name} is skipped, so {name} is plain")
                require(tuple(tensor.shape) == (R, C), f"{name} is {R} x {C}")
                weights.append(tensor.float())
                continue
            # _bind_quant_states_to_params numbers the states of the parts, and each needs its own
            require(name in states, f"{linear.name} is quantised, so {name} has a state")
            weights.append(
                _weight8(name, tensor, states[name], R, C)
                if eight
                else _weight4(name, tensor, states[name], R, C, linear, dtype)
            )
        found[linear.name] = torch.cat(weights)
    take_plain(config, tensors)
    require(not tensors, f"there is no module or parameter named {next(iter(tensors), '')}")
    return found


def _states4(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """_quantized_4bit_generator and _parse_quant_state: the states of the weights, taken out of `tensors`."""
    beside = {name: tensors.pop(name) for name in [*tensors] if is_state(name)}
    found, used = {}, set[str]()
    for name in tensors:
        if any(f"{name}.quant_state.bitsandbytes__{kind}" in beside for kind in ("nf4", "fp4")):
            # any key that contains the name of the weight and a dot is given to bitsandbytes
            own = {key: tensor for key, tensor in beside.items() if f"{name}." in key}
            used |= own.keys()
            found[name] = cast(Any, QuantState).from_dict(own, device=torch.device("cpu"))
    require(used == beside.keys(), "each tensor of a state belongs to a weight")
    return found


def _states8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """_quantized_8bit_generator: the scales of the weights, by names in lower case; `weight_format` is
    dropped."""
    found = {}
    for name in [*tensors]:
        if name.lower().endswith((".scb", ".weight_format")):
            tensor = tensors.pop(name)
            if name.lower().endswith(".scb"):
                found[name.lower().replace(".scb", ".weight")] = tensor
    return found


def _weight4(
    name: str, codes: Tensor, state: Any, R: int, C: int, linear: Linear, dtype: torch.dtype
) -> Tensor:
    """One part of a 4-bit linear."""
    # create_qweight_for_4bit: two codes a byte in a model of 16 bits, and nothing else fits
    ratio = torch.finfo(dtype).bits // 8
    total = linear.rows * C
    require(total % ratio == 0, f"{linear.name} has a whole number of bytes")
    # layers/linear.py, adjust_bitsandbytes_4bit_shard: the place of a part follows from its share of the rows
    size = R * (total // ratio) // linear.rows
    require(codes.dtype == torch.uint8 and tuple(codes.shape) == (size, 1), f"{name} is uint8 [{size}, 1]")
    require(tuple(state.shape) == (R, C), f"the state of {name} says {R} x {C}")
    # _bind_quant_states_to_params: where the codes of the next part begin
    require(math.prod(state.shape) // ratio == size, f"the codes of {name} end where the next begin")
    weight: Tensor = dequantize_4bit(codes, state)
    return weight.float()


def _weight8(name: str, codes: Tensor, absmax_R: Tensor, R: int, C: int) -> Tensor:
    """One part of an int8 linear (_apply_8bit_weight: CB and SCB of a MatmulLtState)."""
    # _stack_quantization_states looks for the lower-case name among the model's parameters
    require(name == name.lower(), f"{name} is lower case")
    require(codes.dtype == torch.int8 and tuple(codes.shape) == (R, C), f"{name} is int8 [{R}, {C}]")
    require(absmax_R.dtype == torch.float32 and tuple(absmax_R.shape) == (R,), f"SCB of {name} is [{R}]")
    return codes * absmax_R[:, None] / 127


# 2. compressed-tensors, vLLM 0.33.0


def load_compressed_tensors(folder: Path) -> dict[str, str]:
    """The class of the scheme of each fused linear and of the head, by their names in vLLM; `plain` without
    one. Errors: Broken."""
    config, tensors = read(folder)
    said = config["quantization_config"]
    require(said["quant_method"] == "compressed-tensors", "quant_method is compressed-tensors")
    # CompressedTensorsConfig._parse_sparsity_config raises for one with targets
    require(not said.get("sparsity_config"), "there is no sparsity_config")
    groups = {target: group for group in said["config_groups"].values() for target in group["targets"]}
    found = {}
    head = Linear("lm_head", {"lm_head": config["vocab_size"]}, config["hidden_size"])
    headed = [] if config["tie_word_embeddings"] else [head]
    for linear in (*linears_of(config), *headed):
        group = _group_of(linear, groups, said["ignore"])
        if group is None:
            found[linear.name] = "plain"
            if linear is not head:
                for part, R in linear.parts.items():
                    tensor = tensors.pop(f"{part}.weight", torch.empty(0))
                    require(tuple(tensor.shape) == (R, linear.columns), f"{part}.weight is plain")
            continue
        form = group["format"] or said["format"]
        kind, needed = _scheme(group["weights"], group["input_activations"], form)
        found[linear.name] = kind
        _take(linear, kind, needed, group["weights"], tensors)
    if found.get("lm_head", "plain") != "plain":
        tensors["lm_head.weight"] = torch.empty(config["vocab_size"], config["hidden_size"])
    take_plain(config, tensors)
    require(not tensors, f"there is no module or parameter named {next(iter(tensors), '')}")
    return found


def _group_of(linear: Linear, groups: dict[str, Any], ignore: list[str]) -> dict[str, Any] | None:
    """compressed_tensors/utils.py: should_ignore_layer and find_matched_target.

    Names are matched whole here: our configs have no regular expressions.
    """
    parts = [linear.name] if linear.name in ignore else [*linear.parts]
    ignored = [part in ignore for part in parts]
    require(all(ignored) or not any(ignored), f"all parts of {linear.name} are ignored, or none")
    if all(ignored):
        return None
    if linear.name in groups:
        return cast(dict[str, Any], groups[linear.name])
    # _match_fused_layer takes the first part's group for all, if all have one
    if len(linear.parts) > 1 and all(part in groups for part in linear.parts):
        first = groups[next(iter(linear.parts))]
        require(all(groups[part] is first for part in linear.parts), f"{linear.name} has one scheme")
        return cast(dict[str, Any], first)
    # the class of a linear contains the word, that of the head (ParallelLMHead) does not
    return None if linear.name == "lm_head" else groups.get("Linear")


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> tuple[str, set[str]]:
    """compressed_tensors.py, CompressedTensorsConfig._get_scheme_from_parts: the class, and the tensors
    that its create_weights registers."""
    require(weights["type"] == "int" and weights["symmetric"] and not weights["dynamic"], "int weights")
    require(weights["strategy"] in ("channel", "group"), "a scale per row or per group")
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    if inputs is not None:
        require(inputs["type"] == "int" and inputs["symmetric"], "int inputs")
    if form == "pack-quantized" and inputs is not None:
        # _is_wNaM_int
        dynamic = bool(inputs["dynamic"]) and inputs["strategy"] in ("token", "group")
        require(dynamic and inputs["num_bits"] in (4, 8), "packed weights take a scale per token")
        return f"CompressedTensorsWNA{inputs['num_bits']}Int", packed
    if form == "pack-quantized":  # _is_wNa16_group_channel
        return "CompressedTensorsWNA16", packed
    # _quantization_scheme_map_from_config asserts it of int weights
    require(form == "int-quantized" and inputs is not None, "int-quantized has inputs")
    assert inputs is not None
    require(weights["num_bits"] == inputs["num_bits"] == 8, "int8 weights and inputs")
    require(weights["strategy"] == "channel", "a scale per row")
    static = inputs["strategy"] == "tensor" and not inputs["dynamic"]  # _is_static_tensor_w8a8
    require(static or (inputs["strategy"] == "token" and bool(inputs["dynamic"])), "token or tensor")
    needed = {"weight", "weight_scale"} | ({"input_scale"} if static else set())
    return "CompressedTensorsW8A8Int8", needed


def _take(
    linear: Linear, kind: str, needed: set[str], weights: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """The create_weights of a scheme, and parameter.py: each part's tensors fit where they are copied to."""
    C, bits, scales = linear.columns, weights["num_bits"], set()
    groups = 1
    if weights["strategy"] == "group":
        # distributed/utils.py, verify_group_size_divides_partition
        require(C % weights["group_size"] == 0, f"groups divide the {C} columns of {linear.name}")
        groups = C // weights["group_size"]
    for part, R in linear.parts.items():
        mine = {name: tensors.pop(f"{part}.{name}") for name in needed if f"{part}.{name}" in tensors}
        require(mine.keys() == needed, f"{part} has {sorted(needed)}")
        shapes = {
            "weight": ((R, C), torch.int8),
            "weight_packed": ((R, math.ceil(C * bits / 32)), torch.int32),
            "weight_scale": ((R, groups), torch.float32),
            "weight_shape": ((2,), torch.int64),
            "input_scale": ((1,), torch.float32),
        }
        for name, tensor in mine.items():
            require((tuple(tensor.shape), tensor.dtype) == shapes[name], f"{part}.{name} is {shapes[name]}")
        if "weight_shape" in mine:
            require(mine["weight_shape"].tolist() == [R, C], f"{part} says its shape")
        if "input_scale" in mine:
            scales.add(float(mine["input_scale"]))
    # one parameter of one number, which each part overwrites (CompressedTensorsW8A8Int8.create_weights)
    require(len(scales) < 2, f"{kind} has one scale for the inputs of {linear.name}")
