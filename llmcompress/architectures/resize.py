"""The config of a model whose axes have other sizes, and the check that transformers builds such a model.

The table of axes says which field counts an axis; the other fields that must change follow from how heads are
counted. Whether the numbers are valid together is asked of transformers itself, by building the model without
memory. Only Llama requires its query heads to divide the hidden width. Mistral is the same model without this
rule, so such a Llama becomes a Mistral.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, PretrainedConfig

from llmcompress.architectures.auto_classes import auto_class
from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.per_layer import build_layers, config_of_layer, fields_for, mixed, overrides
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import ModelError

# family -> model_type and architecture of a twin, and the fields that the twin lacks
TWINS = {"llama": ("mistral", "MistralForCausalLM", ("attention_bias", "mlp_bias"))}


def resized(
    config: PretrainedConfig, anatomy: Anatomy, widths: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the changes of the config for layers of these widths: for each axis the units that each layer
    keeps.

    Errors: ModelError if there is no such model.
    """
    layers, different = (
        config.num_hidden_layers,
        [axis for axis, counts in widths.items() if len(set(counts)) > 1],
    )
    if inseparable := [axis for axis in different if axis in anatomy.outer_axes]:
        raise ModelError(
            f'axis "{inseparable[0]}" has one size in the whole model; keep as many of it in every layer'
        )
    if mixed(config) or different:
        said = overrides(config)
        for index, fields in enumerate(said):
            own, counts = config_of_layer(config, index), {axis: each[index] for axis, each in widths.items()}
            fields |= {name: getattr(own, name) for other in said for name in other if name not in fields}
            fields |= _fields(own, anatomy, counts)
        changes = fields_for(said)
    else:
        changes = _fields(config, anatomy, {axis: each[0] for axis, each in widths.items()})
    why = _refusal(config.to_dict() | changes)
    if (
        why is not None
        and (twin := TWINS.get(anatomy.family))
        and not any(getattr(config, name, False) for name in twin[2])
    ):
        named = {"model_type": twin[0], "architectures": [twin[1]], "sliding_window": None}
        # transformers takes the tokenizer of an old Mistral to be damaged
        named |= {"transformers_version": transformers.__version__}
        if _refusal(config.to_dict() | changes | named) is None:
            return changes | named
    if why is not None:
        spoken = ", ".join(
            f"{'-'.join(str(n) for n in sorted({min(each), max(each)}))} of {axis}"
            for axis, each in widths.items()
        )
        raise ModelError(
            f"a {anatomy.family} model can't have {spoken} in its {layers} layers ({why}); choose another "
            "keep"
        )
    return changes


def _fields(config: PretrainedConfig, anatomy: Anatomy, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields that count the units, in a config whose layers are all alike."""
    names = {axis: config.attribute_map.get(name, name) for axis, name in anatomy.sizes.items()}
    fields: dict[str, Any] = {names[axis]: count for axis, count in counts.items() if axis not in ("kv", "q")}
    if not counts.keys() & {"kv", "q", "hidden"}:
        return fields
    if "q" not in anatomy.sizes or "d" not in anatomy.sizes:
        raise ModelError(
            f"the heads of a {anatomy.family} model share out its hidden width, so neither can be cut; cut "
            "ffn or layers"
        )
    sizes = {**anatomy.axis_sizes(config), **counts}
    return fields | {names["kv"]: sizes["kv"], names["q"]: sizes["kv"] * sizes["q"], names["d"]: sizes["d"]}


def shortened(config: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return the changes of the config if only these layers are left, in this order.

    Errors: ModelError if there is no such model.
    """
    total, whole = config.num_hidden_layers, config.to_dict()
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    fields: dict[str, Any] = {name: len(layers)}
    for key, value in whole.items():  # lists with one entry per layer
        if (
            isinstance(value, list)
            and len(value) == total
            and key.startswith(("layer", "no_rope_layer", "attention_layer"))
        ):
            fields[key] = [value[index] for index in layers]
    if mixed(config):
        said = overrides(config)
        fields |= fields_for([said[index] for index in layers])
    if (why := _refusal(whole | fields)) is not None:
        raise ModelError(
            f"a {config.model_type} model can't have {len(layers)} layers ({why}); choose another keep"
        )
    return fields


def renumbered(name: str, layers: str, gone: Collection[int]) -> str | None:
    """Return the new name of a tensor, of the model or a file, once the layers `gone` are removed from
    `layers`.

    Returns None if the tensor belongs to a removed layer.
    """
    found = re.search(rf"(?:^|\.){layers.rpartition('.')[2]}\.(\d+)\.", name)
    if found is None or not gone:
        return name
    index = int(found[1])
    number = index - sum(other < index for other in gone)
    return None if index in gone else f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"


def changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config with some fields changed; it may become one of another family."""
    found: PretrainedConfig = AutoConfig.for_model(**(config.to_dict() | dict(changes)))
    return found


def _refusal(fields: Mapping[str, Any]) -> str | None:
    """Return why transformers builds no model from these fields, or None if it does."""
    try:
        with init_empty_weights():
            config = AutoConfig.for_model(**fields)
            model = auto_class(config).from_config(config)
            if mixed(model.config):
                anatomy = anatomy_of(model.config)
                build_layers(model, model.get_submodule(anatomy.layers), anatomy)
    except Exception as error:  # each family checks its fields in its own way
        return " ".join(str(error).split())[:160]
    return None
