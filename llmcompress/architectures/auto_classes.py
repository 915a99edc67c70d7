"""Which auto class of transformers loads a model: a causal language model, or a wrapper around one.

A multimodal wrapper is loaded as what it is, with its towers and projectors, so that its processor fits the
result. The class that config.json names decides; some types have a text class and a wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PretrainedConfig

# each with the mapping from configs to the classes that it builds; the first that has a class decides
AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how most classes of causal language models end


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class that builds the model of a config; AutoModelForCausalLM where none does."""
    name = auto_class_name(config.model_type, config.architectures or [])
    return getattr(transformers, name or "AutoModelForCausalLM")


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
