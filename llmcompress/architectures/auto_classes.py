"""Which auto class of transformers loads a model: a causal language model, or a wrapper around one.

A multimodal wrapper is loaded as what it is, with its towers and projectors, so that its processor fits the
result. The class that config.json names decides; some types have a text class and a wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import PretrainedConfig

# each with the mapping from configs to the classes that it builds; the first that has a class decides
AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
OWN = "transformers_modules."  # where transformers imports code that a model brings along
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how most classes of causal language models end


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class that builds the model of a config; AutoModelForCausalLM where none does."""
    named = own_auto_class_name(getattr(config, "auto_map", None)) if has_own_code(config) else None
    name = named or auto_class_name(config.model_type, config.architectures or [])
    return getattr(transformers, name or "AutoModelForCausalLM")


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether the class of a config came with the model, so that nothing is known by its model_type."""
    return type(config).__module__.startswith(OWN)


def own_auto_class_name(auto_map: Any) -> str | None:
    """The name of the auto class for which a model brings a class of its own; None if it brings none."""
    named = auto_map if isinstance(auto_map, Mapping) else {}
    return next((name for name in AUTO_CLASSES if named.get(name)), None)


def needs_own_code(fields: Mapping[str, Any]) -> str | None:
    """The class, as `file.Class`, without which a config.json can't be loaded because transformers lacks its
    model_type; None if it has it, or if the model brings no class."""
    if str(fields.get("model_type")) in transformers.CONFIG_MAPPING:
        return None
    name = own_auto_class_name(fields.get("auto_map"))
    return None if name is None else str(fields["auto_map"][name])


def has_class(config: PretrainedConfig) -> bool:
    """Whether the auto class of a config has a class for it without any code of the model."""
    return type(config) in getattr(transformers, AUTO_CLASSES[auto_class(config).__name__])


def auto_class_name(model_type: str, architectures: Sequence[str]) -> str | None:
    """The name of the auto class that loads a model of these classes; without any, of its type. None if there
    is none."""
    if any(str(name).endswith(CAUSAL) for name in architectures):
        return "AutoModelForCausalLM"
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    config = transformers.CONFIG_MAPPING[model_type]
    for name, held in AUTO_CLASSES.items():
        mapping = getattr(transformers, held)
        if config in mapping and (not architectures or mapping[config].__name__ in architectures):
            return name
    return None
