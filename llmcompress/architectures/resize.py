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
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from llmcompress.architectures.auto_classes import auto_class, has_own_code
from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.per_layer import build_layers, config_of_layer, fields_for, mixed, overrides
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.architectures.spec import Anatomy
from llmcompress.architectures.unfilled import Unfilled
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
    changes = (
        _of_proved(config, anatomy, widths)
        if anatomy.cuts is not None
        else _of_table(config, anatomy, widths)
    )
    why = _refusal(config, changes, anatomy, widths)
    if (
        why is not None
        and (twin := None if has_own_code(config) else TWINS.get(anatomy.family))
        and not any(getattr(config, name, False) for name in twin[2])
    ):
        named = {"model_type": twin[0], "architectures": [twin[1]], "sliding_window": None}
        # transformers takes the tokenizer of an old Mistral to be damaged
        named |= {"transformers_version": transformers.__version__}
        if _refusal(config, changes | named) is None:
            return changes | named
    if why is not None:
        spoken = ", ".join(
            f"{'-'.join(str(n) for n in sorted({min(each), max(each)}))} of {axis}"
            for axis, each in widths.items()
        )
        layers = len(next(iter(widths.values())))
        raise ModelError(
            f"a {anatomy.family} model can't have {spoken} in its {layers} layers ({why}); choose another "
            "keep"
        )
    return changes


def _of_table(
    config: PretrainedConfig, anatomy: Anatomy, widths: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """The fields that change in a model of a family of the table; its layers may have widths of their own."""
    different = [axis for axis, counts in widths.items() if len(set(counts)) > 1]
    if inseparable := [axis for axis in different if axis in anatomy.outer_axes]:
        raise ModelError(
            f'axis "{inseparable[0]}" has one size in the whole model; keep as many of it in every layer'
        )
    if not mixed(config) and not different:
        return _fields(config, anatomy, {axis: each[0] for axis, each in widths.items()})
    said = overrides(config)
    for index, fields in enumerate(said):
        own, counts = config_of_layer(config, index), {axis: each[index] for axis, each in widths.items()}
        fields |= {name: getattr(own, name) for other in said for name in other if name not in fields}
        fields |= _fields(own, anatomy, counts)
    return fields_for(said)


def _of_proved(
    config: PretrainedConfig, anatomy: Anatomy, widths: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """The fields that change in a model whose axes are proved.

    Errors: ModelError if one field would have to say two numbers, as for layers of different widths.
    """
    text, layers = config.get_text_config(decoder=True), len(next(iter(widths.values())))
    said, found = text.to_dict(), dict[str, Any]()
    for index in range(layers):
        own = anatomy.of_layer(index)
        counts = {axis: each[index] for axis, each in widths.items() if axis in own.sizes}
        for name, count in proved_fields(own, counts, text).items():
            if isinstance(value := said.get(name), list) and len(value) == layers:
                found.setdefault(name, [*value])[index] = count
            elif found.setdefault(name, count) != count:
                raise ModelError(
                    f"the config of a {anatomy.family} model says {name} once for all layers, so "
                    f"{found[name]} and {count} of it can't be; use allocation: uniform"
                )
    return nested(config, found)


def proved_fields(anatomy: Anatomy, counts: Mapping[str, int], text: PretrainedConfig) -> dict[str, int]:
    """The fields that say how many units of proved axes a layer has; `text` is the part of the config that
    describes the decoder."""
    now = {**anatomy.counts, **counts}
    fields = {anatomy.sizes[axis]: count for axis, count in counts.items() if axis not in ("kv", "q")}
    if heads := counts.keys() & {"kv", "q"}:
        fields[anatomy.sizes["kv"]] = now["kv"]
        if "q" in anatomy.sizes:  # it counts those of all key-value heads
            fields[anatomy.sizes["q"]] = now["kv"] * now["q"]
    if anatomy.head_dim and (heads or "hidden" in counts):
        width = getattr(text, anatomy.head_dim, None)
        fields[anatomy.head_dim] = width or text.hidden_size // text.num_attention_heads
    return fields


def nested(config: PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the part of a config that describes the decoder, as changes of the whole."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return dict(fields)
    (name,) = (name for name in config.sub_configs if getattr(config, name, None) is text)
    return {name: text.to_diff_dict() | dict(fields)}


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
    if (why := _refusal(config, fields)) is not None:
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
    fields = config.to_dict() | dict(changes)
    build = type(config) if has_own_code(config) else AutoConfig.for_model
    found: PretrainedConfig = build(**fields)
    return found


def _refusal(
    given: PretrainedConfig,
    changes: Mapping[str, Any],
    anatomy: Anatomy | None = None,
    widths: Mapping[str, Sequence[int]] | None = None,
) -> str | None:
    """Return why transformers builds no model of a config with these changes, or None if it does. With proved
    axes, its layers must have the given widths."""
    try:
        with init_empty_weights(), Unfilled():
            config = changed(given, changes)
            model = auto_class(config).from_config(config)
            if mixed(model.config):
                table = anatomy_of(model.config)
                build_layers(model, model.get_submodule(table.layers), table)
            if anatomy is not None and anatomy.cuts is not None:
                return _misfit(model, anatomy, widths or {})
    except Exception as error:  # each family checks its fields in its own way
        return " ".join(str(error).split())[:160]
    return None


def _misfit(model: PreTrainedModel, anatomy: Anatomy, widths: Mapping[str, Sequence[int]]) -> str | None:
    """Which weight of a model has another shape than the rows of its layers say at these widths, or None."""
    for index, layer in enumerate(model.get_submodule(anatomy.layers).children()):
        own = anatomy.of_layer(index)
        sizes = {**own.counts, **{axis: each[index] for axis, each in widths.items() if axis in own.sizes}}
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        for name, row in own.layer.items():
            if shapes[name] != (expected := Spelling.parse(row).shape(sizes)):
                return f"{name} of layer {index} would have the shape {shapes[name]}, not {expected}"
    return None
