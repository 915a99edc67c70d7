"""Our modules turned back into plain float ones, all or some of a model's, with the config updated to match.

`model.dequantize()` turns all of them. `resize_token_embeddings` turns the embedding and the head, which have
no codes for new rows. Merging an adapter turns the linears that it changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompress.architectures.per_layer import mixed
from llmcompress.errors import ModelError
from llmcompress.formats.base import StoredLinear, StoredModule
from llmcompress.formats.integer_embedding import IntegerEmbedding
from llmcompress.formats.quantization_config import CompressedConfig, read_config
from llmcompress.integrations.expert_linears import divided_in, unite
from llmcompress.integrations.transformers_compat import Conv1D

WRAPPED = ".base_layer"  # PEFT's suffix for the name of a linear under an adapter


def ours(model: PreTrainedModel) -> Iterator[tuple[str, StoredModule]]:
    """Yield our modules in a model, by full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StoredModule))


def known_ties(model: PreTrainedModel, ties: Mapping[str, str]) -> dict[str, str]:
    """The ties by the names of the tensors in this model, which lack a prefix if it has no head."""
    prefix = f"{model.base_model_prefix}."
    shorter = model.base_model is model and all(name.startswith(prefix) for name in ties)
    return (
        {target.removeprefix(prefix): source.removeprefix(prefix) for target, source in ties.items()}
        if shorter
        else dict(ties)
    )


def make_plain(model: PreTrainedModel, names: Collection[str], dtype: torch.dtype) -> None:
    """Replace those of our modules that are named by float modules, and update the config.

    Errors: ModelError for offloaded weights, and for modules that share tensors with others that are not
    named.
    """
    modules = {name: module for name, module in ours(model) if name in names}
    config = getattr(model.config, "quantization_config", None)
    said = config if isinstance(config, CompressedConfig) else read_config(config)
    own = known_ties(model, said.ties)
    for name, module in modules.items():
        if any(parameter.device.type == "meta" for parameter in module.parameters()):
            raise ModelError(
                f"the weights of {name} are offloaded; load the model in memory to dequantise it"
            )
    bare = {name.replace(WRAPPED, "") for name in modules}
    # if all become plain, no ties remain: the config of a plain model has no field for them
    whole = len(modules) == sum(1 for _ in ours(model))
    if not whole:
        _require_apart(bare, {**own, **model.all_tied_weights_keys})
    for name, module in modules.items():
        model.set_submodule(name, plain_of(module, dtype))
    for name in divided_in(model) if whole else ():
        unite(model, name)
    for ties in (model._tied_weights_keys or {}, model.all_tied_weights_keys):
        for part in [part for part in ties if part in own or part.endswith(".weight_scale")]:
            if whole or part.rpartition(".")[0] in bare:
                del ties[part]
    model.tie_weights(recompute_mapping=False)
    prefix = f"{model.base_model_prefix}."
    _say(model, CompressedConfig() if whole else said.without({*bare, *(f"{prefix}{name}" for name in bare)}))


def _require_apart(names: Collection[str], ties: Mapping[str, str]) -> None:
    """Raise ModelError if only one of two modules with a shared tensor is to become plain."""
    for target, source in ties.items():
        owners = [name.rpartition(".")[0] for name in (target, source)]
        if sum(owner in names for owner in owners) == 1:
            raise ModelError(
                f"{owners[0]} and {owners[1]} share a tensor, so one alone can't change; use "
                "model.dequantize() first"
            )


def _say(model: PreTrainedModel, said: CompressedConfig) -> None:
    """Update the quantisation config of the model, or remove it if no layouts are left."""
    config, quantizer = cast(Any, model.config), getattr(model, "hf_quantizer", None)
    if said.schemes or said.ties or mixed(model.config):
        config.quantization_config = said
        if quantizer is not None:
            quantizer.quantization_config = said
    elif quantizer is not None:
        quantizer.remove_quantization_config(model)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def plain_of(module: StoredModule, dtype: torch.dtype) -> nn.Module:
    """The float module that replaces one of ours: a linear, a Conv1D where it was one, or an embedding."""
    if isinstance(module, IntegerEmbedding):
        return module.plain(dtype)
    assert isinstance(module, StoredLinear)
    weight = module.dequantized(dtype)
    if module.transposed:
        plain: Any = Conv1D(*weight.shape)
        weight = weight.T.contiguous()
    else:
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.data.to(dtype))
    return cast(nn.Module, plain).train(module.training)


def let_resize(model: PreTrainedModel) -> None:
    """Make `resize_token_embeddings` of a model first turn our embedding and head plain, because codes have
    no new rows."""
    kind: Any = type(model)
    # set on the class: a model that references itself would not be freed
    if kind.resize_token_embeddings is PreTrainedModel.resize_token_embeddings:
        kind.resize_token_embeddings = _resized


def _resized(
    model: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **options: Any
) -> nn.Module:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in ours(model) if any(module is end for end in ends)]
    if names and (new_num_tokens is not None or args or options):
        make_plain(model, names, model.dtype)
    return PreTrainedModel.resize_token_embeddings(model, new_num_tokens, *args, **options)
