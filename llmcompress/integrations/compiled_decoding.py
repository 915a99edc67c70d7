"""`generate` with a static cache and a compiled step of decoding.

transformers compiles the forward of one token if the cache is static, the device is a GPU, and the quantizer
of the model allows it. A CPU has to be asked for by a private field, and bitsandbytes' quantizers do not
allow it. Our products are operators that a compiler calls as they are, so here it is allowed.

`accelerate` leaves a mark on a model, and nothing else changes: once llmcompress is imported, `generate`
(`registration`) gives each call of a marked model a static cache and compiles its step. The model's own
generation config stays as it is, and so does what `save_pretrained` writes.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import CompileConfig, GenerationMixin, PreTrainedModel, StaticCache

from llmcompress.errors import ModelError, argument
from llmcompress.integrations.kv_cache import FIELD as CODED_CACHE

MARK = "llmcompress_decoding"  # the same as registration.DECODING_MARK
ONE_TOKEN_EACH = ("greedy_search", "sample")  # the modes of `generate` whose steps transformers compiles
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Decoding:
    """What a mark says: how many tokens the static cache holds at least, prompt and output together; None for
    as many as the longest call so far needed."""

    max_length: int | None = None


def accelerate(model: Model, max_length: int | None = None) -> Model:
    """Make `generate` of a model decode with a static cache and a compiled step, on a CPU too.

    The first call of `generate` compiles the step, which takes from seconds to minutes; later ones use it.
    Prompts are read as before. A call that asks for another cache, for `use_cache=False`, for beams or for an
    assistant runs as before too, and `disable_compile=True` leaves out the compiler for a call.

    Args:
        model: a causal language model of a family that transformers compiles, plain or quantised. It is
            changed in place: it gets a mark, which is not saved.
        max_length: how many tokens the cache holds, prompt and output together. Calls within it share one
            compiled step, or a few where layers have sliding windows; a longer one makes the cache longer.
            Without it the cache has the length of the longest call so far, and the step is compiled again
            when it grows.

    Returns:
        The same model.

    Raises:
        ModelError: the model can't decode so: it doesn't generate, its family has no static cache or keeps a
            state of its own, its config stores the cache as codes, its weights are offloaded, there is no C++
            compiler, or `max_length` is not a positive whole number.

    Source: https://huggingface.co/docs/transformers/llm_optims#static-kv-cache-and-torchcompile
    """
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ModelError(
            f"{argument('max_length')} is {str(max_length)[:40]}; give a whole number of tokens, 1 or more"
        )
    _require_static_cache(model)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if (
        "disk" in places
        or ("cpu" in places and len(places) > 1)
        or any(parameter.is_meta for parameter in model.parameters())
    ):
        raise ModelError("weights of the model are offloaded, which can't be compiled; load it in memory")
    _require_compiler(model)
    setattr(model, MARK, Decoding(max_length))
    return model


def _require_static_cache(model: Any) -> None:
    """Refuse what does not decode with a static cache. Errors: ModelError."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise ModelError(f"a {type(model).__name__} has no generate of its own; give a causal language model")
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ModelError(f"a {kind} model has an encoder; give a causal language model")
    if getattr(model.config, CODED_CACHE, None) is not None:
        raise ModelError(
            f"the config of this model stores its cache as codes ({CODED_CACHE}), which a static cache does "
            f"not; set config.{CODED_CACHE} to None to decode with a static cache"
        )
    generates: Any = type(model)
    if generates._is_stateful or not generates._supports_default_dynamic_cache():
        raise ModelError(f"a {kind} model keeps a state of its own, not a static cache; leave it as it is")
    if not generates._can_compile_fullgraph:
        raise ModelError(f"transformers can't compile {kind} models with a static cache; leave it as it is")
    if not StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1).is_compileable:
        raise ModelError(f"the static cache of this {kind} model can't be compiled; leave it as it is")


def _require_compiler(model: PreTrainedModel) -> None:
    """Refuse a model on a CPU where torch.compile finds no C++ compiler. Errors: ModelError."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ModelError(
            f"torch.compile needs a C++ compiler, and there is no {compiler}; install one, or name it in CXX"
        )


def ask_for_static(model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any) -> None:
    """Ask for a static cache in the generation config of one call, unless the call wants another one.

    `model` has a mark, `generation_config` is the call's own copy, and `mode` is how the call chooses tokens.
    """
    if (
        mode.value not in ONE_TOKEN_EACH
        or model_kwargs.get("past_key_values") is not None
        or generation_config.cache_implementation not in (None, "static")
        or generation_config.use_cache is False
    ):
        return
    generation_config.cache_implementation = "static"
    mark: Decoding = getattr(model, MARK)
    if mark.max_length is not None:
        generation_config.max_cache_len = max(mark.max_length, generation_config.max_cache_len or 0)
    if generation_config.compile_config is None:
        # the other mode captures CUDA graphs
        form = "default" if model.device.type == "cpu" else "reduce-overhead"
        generation_config.compile_config = CompileConfig(mode=form)


def compiles(generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the steps of a call of a model with a mark are compiled, whatever its quantizer and device."""
    return (
        generation_config.cache_implementation == "static"
        and not generation_config.disable_compile
        and isinstance(model_kwargs.get("past_key_values"), StaticCache)
    )
