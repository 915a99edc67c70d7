"""The classes of a model with code of its own: that of its config, and the one that its auto class then
builds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from llmcompress.architectures.auto_classes import OWN, auto_class, has_own_code, own_auto_class_name
from llmcompress.errors import ModelError, argument
from llmcompress.integrations.transformers_compat import add_generation_mixin_to_remote_model
from llmcompress.io import own_code


def own_config(folder: Path, auto_map: Mapping[str, Any]) -> PretrainedConfig:
    """Load a config by the code beside it, and register the model's class for the config's, as transformers
    does.

    Errors: ModelError if the code can't be imported, or names other things than a config and a model; and
    whatever the code raises.
    """
    name = own_auto_class_name(auto_map)
    model: Any = None if name is None else _class(folder, auto_map[name], PreTrainedModel)
    if "AutoConfig" in auto_map:
        kind: Any = _class(folder, auto_map["AutoConfig"], PretrainedConfig)
        kind.register_for_auto_class()  # so that its code is saved with it
    else:
        kind = type(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        kind = kind if model is None else _told_apart(kind, model)
    config: PretrainedConfig = kind.from_pretrained(folder)
    if name is not None:
        auto_class(config).register(kind, _generating(model, name), exist_ok=True)
    return config


def let_build(model: PreTrainedModel) -> None:
    """Let the auto class build what a model in memory is, if it was loaded with code of its own. Errors:
    ModelError if its config is transformers' own, from which another model is built."""
    if not type(model).__module__.startswith(OWN):
        return
    if not has_own_code(model.config):
        raise ModelError(
            f"the model in memory has a class of its own, {type(model).__name__}, and a config of "
            f"transformers; give its name instead, with {argument('trust_remote_code', 'True')}"
        )
    auto_class(model.config).register(type(model.config), type(model), exist_ok=True)


def _class(folder: Path, reference: Any, parent: type) -> Any:
    """The class that an entry of `auto_map` names. Errors: ModelError if it is no subclass of `parent`."""
    found = own_code.class_of(folder, str(reference))
    if not isinstance(found, type) or not issubclass(found, parent):
        raise ModelError(
            f"{folder} names {reference} in auto_map, which is no {parent.__name__}; correct its config.json"
        )
    return found


@cache
def _generating(model: Any, name: str) -> type[PreTrainedModel]:
    """A model's class as an auto class builds it: its code is saved with it, and it has `generate`."""
    model.register_for_auto_class(name)
    found: type[PreTrainedModel] = add_generation_mixin_to_remote_model(model)
    return found


@cache
def _told_apart(kind: Any, model: type) -> Any:
    """A config class of transformers as one of the model's own code, so that no other model of that config
    class is built by this code."""
    return type(kind.__name__, (kind,), {"__module__": model.__module__})
