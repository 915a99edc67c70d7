"""Layers of different widths: what a config says of each layer, and how to build the model that it describes.

A config of transformers can say what differs in single layers (`per_layer_config`), and the caches of
transformers follow it. But most families build every layer from the fields of the whole model. So their
layers are rebuilt here, each from its own config. A layer may have lost all heads of its attention or all
neurons of its feed-forward part. Its weights are then empty, and are stored as empty tensors in the
checkpoint. If the layers are not rebuilt, the shapes do not match and loading fails, as it should.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.architectures.families import family_of
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import CompressError, ModelError

SCHEMA = "per_layer_config"
# without it transformers cannot build the model whose layers are to be replaced
ALLOW = "allow_global_per_layer_attribute_access"


def mixed(config: PretrainedConfig) -> bool:
    """Whether layers have widths of their own that transformers does not build: those of a family in the
    table."""
    return family_of(config) is not None and bool(getattr(config, "is_heterogeneous", False))


def config_of_layer(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """Return the config that one layer is built from."""
    return config.per_layer_config[index] if mixed(config) else config


def overrides(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return, for each layer, the fields that the config sets for this layer only."""
    said: Mapping[Any, dict[str, Any]] = config.to_dict().get(SCHEMA) or {}
    by_index = {int(index): fields for index, fields in said.items()}
    return [dict(by_index.get(index, {})) for index in range(config.num_hidden_layers)]


def fields_for(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of a config whose layers have these values.

    Fields that are the same in all layers are set once for the whole model.
    """
    names = {name for fields in layers for name in fields}
    same = {name: layers[0].get(name) for name in names if len({fields.get(name) for fields in layers}) == 1}
    own = {
        str(index): {k: v for k, v in fields.items() if k not in same} for index, fields in enumerate(layers)
    }
    different = {index: fields for index, fields in own.items() if fields}
    return same | ({SCHEMA: different, ALLOW: True} if different else {SCHEMA: None})


class Absent(nn.Module):
    """Replaces an attention that has no heads left: its weights are empty, and it outputs the bias of
    `reader`.

    It stores nothing in a cache. Caches take the length of a text from the first layer of each kind, so the
    attention of that layer must stay.
    """

    def __init__(self, attention: nn.Module, reader: str) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.reader = reader

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return what the layer adds to hidden states [B, L, D], and no attention map."""
        return self.get_submodule(self.reader)(hidden_states.new_zeros(*hidden_states.shape[:-1], 0)), None


def build_layers(model: PreTrainedModel, layers: nn.ModuleList, anatomy: Anatomy) -> None:
    """Rebuild the layers of a model whose config says that they differ. Their weights are not set yet.

    Raises ModelError if the config does not describe a layer.
    """
    config = model.config
    if not mixed(config):
        return
    for index, layer in enumerate(list(layers)):
        like = next(layer.parameters())
        try:
            built = _built(type(layer), config, index, anatomy)
        except CompressError:
            raise
        except Exception as error:  # each family fails in its own way; the config is wrong in all of them
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise ModelError(
                f"config.json's {SCHEMA} makes no layer {index} ({why}); take it again from its source"
            ) from None
        layers[index] = built.to(like.dtype).train(layer.training)


def _built(kind: type[nn.Module], config: PretrainedConfig, index: int, anatomy: Anatomy) -> nn.Module:
    """Return one layer as the config describes it, with weights that are not set."""
    own = config.per_layer_config[index]
    sizes = anatomy.axis_sizes(own)
    if not sizes["kv"]:  # no family builds a layer without heads, so it gets one at first
        own = copy.deepcopy(own)
        for axis in ("kv", "q"):
            setattr(own, own.attribute_map.get(anatomy.sizes[axis], anatomy.sizes[axis]), 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        built: nn.Module = kind(own, index)  # the layers of all families take these two
    for module in built.modules():
        if getattr(module, "config", None) is own:
            module.config = config  # type: ignore[assignment]  # so settings of the model reach its layers
    if not sizes["kv"]:
        _empty(built, anatomy, sizes)
    return built


def _empty(layer: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Remove the attention of a layer, and empty its weights that run along the heads."""
    for name, row in anatomy.layer.items():
        if "kv" in Spelling.parse(row).axes:
            owner, _, leaf = name.rpartition(".")
            linear: Any = layer.get_submodule(owner)
            old = linear.get_parameter(leaf)
            setattr(
                linear,
                leaf,
                nn.Parameter(old.new_empty(Spelling.parse(row).shape(sizes)), requires_grad=False),
            )
            if leaf == "weight":
                linear.out_features, linear.in_features = linear.weight.shape
    attention, _, reader = str(anatomy.consumer_of("kv")).rpartition(".")
    layer.set_submodule(attention, Absent(layer.get_submodule(attention), reader))
