"""Layers of different widths: what a config says of each, and the model that it means.

transformers can say in a config what is different in single layers (`per_layer_config`), and its caches go by that, but most of
its families build every block from what is said for all. So their blocks are built again here, each from a config of its own.
Where that is not done the shapes of the checkpoint fit no block, and loading fails, as it should.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

SCHEMA = "per_layer_config"
ALLOW = "allow_global_per_layer_attribute_access"  # or a model can't even be built for its blocks to be replaced


def mixed(config: PretrainedConfig) -> bool:
    """Whether layers have widths of their own."""
    return bool(getattr(config, "is_heterogeneous", False))


def config_of_layer(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """The config that one layer is built from."""
    return config.per_layer_config[index] if mixed(config) else config


def overrides(config: PretrainedConfig) -> list[dict[str, Any]]:
    """What the config says of each layer alone."""
    said: Mapping[Any, dict[str, Any]] = config.to_dict().get(SCHEMA) or {}
    by_index = {int(index): fields for index, fields in said.items()}
    return [dict(by_index.get(index, {})) for index in range(config.num_hidden_layers)]


def fields_for(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a config whose layers have these values; those that are the same in all are said for all alone."""
    names = {name for fields in layers for name in fields}
    same = {name: layers[0].get(name) for name in names if len({fields.get(name) for fields in layers}) == 1}
    own = {str(index): {k: v for k, v in fields.items() if k not in same} for index, fields in enumerate(layers)}
    different = {index: fields for index, fields in own.items() if fields}
    return same | ({SCHEMA: different, ALLOW: True} if different else {SCHEMA: None})


def build_layers(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Build the blocks of a model anew where its config says that they differ; their weights are to come."""
    config = model.config
    if not mixed(config):
        return
    for index, layer in enumerate(list(layers)):
        like = next(layer.parameters())
        own = config.per_layer_config[index]
        built: nn.Module = type(layer)(own, index)  # so are the blocks of all families
        for module in built.modules():
            if getattr(module, "config", None) is own:
                module.config = config  # type: ignore[assignment]  # what is set for the model reaches its blocks
        layers[index] = built.to(like.dtype).train(layer.training)
