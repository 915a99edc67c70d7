"""Layers of different widths: what a config says of each, and the model that it means.

transformers can say in a config what is different in single layers (`per_layer_config`), and its caches go by
that, but most of its families build every layer from what is said for all. So their layers are built again
here, each from a config of its own. A layer may have nothing left of its attention or of its feed-forward
part: no heads, or no neurons. Its weights are then empty, and stand in the checkpoint as such. Where layers
are not built anew no shape there fits, and loading fails, as it should.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import CompressError, ModelError

SCHEMA = "per_layer_config"
ALLOW = (
    "allow_global_per_layer_attribute_access"  # or a model can't even be built for its layers to be replaced
)


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
    """The fields of a config whose layers have these values; those that are the same in all are said for all
    alone."""
    names = {name for fields in layers for name in fields}
    same = {name: layers[0].get(name) for name in names if len({fields.get(name) for fields in layers}) == 1}
    own = {
        str(index): {k: v for k, v in fields.items() if k not in same} for index, fields in enumerate(layers)
    }
    different = {index: fields for index, fields in own.items() if fields}
    return same | ({SCHEMA: different, ALLOW: True} if different else {SCHEMA: None})


class Absent(nn.Module):
    """In the place of an attention that has no head left: its weights are empty, and it puts out the bias of
    `reader`.

    It keeps nothing in a cache. Caches tell the length of a text by the first layer of each kind, so that
    one's must stay.
    """

    def __init__(self, attention: nn.Module, reader: str) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.reader = reader

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """What the layer adds for hidden states [B, L, D], and no attention map."""
        return self.get_submodule(self.reader)(hidden_states.new_zeros(*hidden_states.shape[:-1], 0)), None


def build_layers(model: PreTrainedModel, layers: nn.ModuleList, anatomy: Anatomy) -> None:
    """Build the layers of a model anew where its config says that they differ; their weights are to come."""
    config = model.config
    if not mixed(config):
        return
    for index, layer in enumerate(list(layers)):
        like = next(layer.parameters())
        try:
            built = _built(type(layer), config, index, anatomy)
        except CompressError:
            raise
        except (
            Exception
        ) as error:  # each family builds in its own way; to the user each says: this config is wrong
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise ModelError(
                f"config.json's {SCHEMA} makes no layer {index} ({why}); take it again from its source"
            ) from None
        layers[index] = built.to(like.dtype).train(layer.training)


def _built(kind: type[nn.Module], config: PretrainedConfig, index: int, anatomy: Anatomy) -> nn.Module:
    """One layer, with weights that are not set, as the config says that it is."""
    own = config.per_layer_config[index]
    sizes = anatomy.axis_sizes(own)
    if not sizes["kv"]:  # which no family builds
        own = copy.deepcopy(own)
        for axis in ("kv", "q"):
            setattr(own, own.attribute_map.get(anatomy.sizes[axis], anatomy.sizes[axis]), 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        built: nn.Module = kind(own, index)  # so are the layers of all families
    for module in built.modules():
        if getattr(module, "config", None) is own:
            module.config = config  # type: ignore[assignment]  # what is set for the model reaches its layers
    if not sizes["kv"]:
        _empty(built, anatomy, sizes)
    return built


def _empty(layer: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Leave a layer without attention, and its weights without what runs along the heads."""
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
