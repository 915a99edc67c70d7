"""The config.json of a model: read within bounds, its flags at their defaults, and the skeleton that
transformers builds of it.

A config is untrusted input. What it asks for is compared with bounds, and with what the weight files hold,
before anything of that size is made. transformers raises a different kind of error in each family; here each
of them becomes a ModelError of one line.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from llmcompress.architectures.auto_classes import auto_class, has_class, needs_own_code, own_auto_class_name
from llmcompress.architectures.families import family_of
from llmcompress.architectures.per_layer import mixed
from llmcompress.architectures.unfilled import Unfilled
from llmcompress.errors import CompressError, ModelError
from llmcompress.integrations.own_classes import own_config
from llmcompress.io import own_code
from llmcompress.io.checkpoint import Entry, read_json
from llmcompress.io.companion_files import MAP

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# 126 layers are the most so far
MOST: Mapping[str, int] = {**dict.fromkeys(LAYERS, 1 << 12), "num_labels": 1 << 16}
LARGEST = (1 << 31) - 1  # bound of any other whole number
LARGE = 1 << 22  # elements of a tensor that is not worth its memory for a moment
WEIGHTS = ("float64", "float32", "float16", "bfloat16")  # dtypes that weights are computed in
FLAGS: Mapping[
    str, Any
] = {  # flags that change what a forward returns or which code computes it, with their defaults
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "torchscript": False,
    "use_cache": True,
    "attn_implementation": None,
    "_attn_implementation": None,
    "experts_implementation": None,
    "_experts_implementation": None,
}
ELSEWHERE = {"transformers_weights": "file of weights", "fusion_config": "code", "distributed_config": "code"}
SMALL = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


def load_config(folder: Path) -> PretrainedConfig:
    """Load the config of a model within bounds, and let its auto class build the model: with the code beside
    it, if the user allows that. Errors: ModelError, which names the field if it is known."""
    fields = read_json(folder / "config.json")
    require_bounded(folder, fields)
    own = own_code.runs(folder) and isinstance(fields.get(MAP), Mapping)
    if not own and (named := needs_own_code(fields)) is not None:
        raise own_code.refusal(folder, named)
    config: PretrainedConfig
    try:
        if own:
            config = own_config(folder, fields[MAP])
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except CompressError:
        raise
    except Exception as error:  # each family raises its own errors; all of them say that the config is wrong
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise ModelError(
            f"{folder} has a config.json that does not load ({why}{_field(fields, why)}); take another base"
        ) from None
    require_sizes(folder, config)
    named = own_auto_class_name(fields.get(MAP))
    if not own and named is not None and not has_class(config):
        raise own_code.refusal(folder, fields[MAP][named])
    if not hasattr(
        config, "tie_word_embeddings"
    ):  # classes of models that have two matrices may leave it out
        config.tie_word_embeddings = False
    return config


def require_readable(folder: Path) -> None:
    """Refuse a small file beside the weights that transformers would read without bounds. Errors:
    ModelError."""
    for name in SMALL:
        if (folder / name).is_file():
            read_json(folder / name)


def require_bounded(folder: Path, fields: Mapping[str, Any]) -> None:
    """Refuse fields that ask for more than any model has, or for other code or files, before transformers
    reads them."""
    for name, value in fields.items():
        if callable(getattr(PretrainedConfig, name, None)):
            raise ModelError(
                f"{folder} has a config.json with a field {name}, which is no fact of a model; take the "
                "field out"
            )
        if name in ELSEWHERE and value is not None:
            raise ModelError(
                f"{folder} has a config.json that names other {ELSEWHERE[name]} in {name}; take the field out"
            )
    if fields.get("is_encoder_decoder") or fields.get("add_cross_attention"):
        raise ModelError(
            f"{folder} is a decoder that reads an encoder, and no causal language model; give one that "
            "stands alone"
        )
    if fields.get("is_causal") is False:
        raise ModelError(
            f"{folder} has is_causal: false in its config.json, so each token sees those after it; give a "
            "causal one"
        )
    asked = [("", fields)]
    while asked:
        path, values = asked.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                asked.append((f"{path}{name}.", value))
            elif isinstance(value, int) and abs(value) > MOST.get(name, LARGEST):
                raise ModelError(
                    f"{folder} has a config.json with {path}{name} {_short(value)}, which no model has; "
                    "correct it"
                )
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in WEIGHTS:
        raise ModelError(
            f"{folder} has a config.json with dtype {_short(dtype)}; correct it to one of "
            f"{', '.join(WEIGHTS)}"
        )


def require_sizes(folder: Path, config: PretrainedConfig) -> None:
    """Refuse sizes that are not counts. Errors: ModelError."""
    for name, value in _sizes(config).items():
        least = 1 if name in ("num_hidden_layers", "hidden_size", "vocab_size") else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(
                f"{folder} has a config.json with {name} {_short(value)}, which is no size; correct it"
            )


def require_stored(folder: Path, config: PretrainedConfig, tensors: Mapping[str, Entry]) -> None:
    """Refuse a config that asks for more than the files of a plain model hold, whatever its family. Errors:
    ModelError."""
    widest = max((size for entry in tensors.values() for size in entry.shape), default=0)
    for name, value in _sizes(config).items():
        many = name == "num_hidden_layers" or "experts" in name  # each layer or expert has tensors of its own
        most = max(len(tensors), 0 if name == "num_hidden_layers" else widest) if many else widest
        if isinstance(value, int) and value > most:
            held = f"{len(tensors)} tensors" if many else f"no tensor with more than {widest} rows or columns"
            raise ModelError(
                f"{folder} does not fit its config.json: {name} is {value}, and the files hold {held}; "
                "fetch it again"
            )


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    """The fields that count something, by name: those of the table of families, or what all decoders have."""
    if mixed(config):
        return {}
    anatomy, text = family_of(config), config.get_text_config(decoder=True)
    names = ["num_hidden_layers", *(anatomy.sizes.values() if anatomy else ("hidden_size", "vocab_size"))]
    return {name: value for name in names if (value := getattr(text, name, None)) is not None}


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a config without weights: parameters on the meta device, real buffers, every flag at
    its default.

    Errors: ModelError if transformers can't build a model of the config.
    """
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta(), Unfilled():
            model: PreTrainedModel = auto_class(config).from_config(defaults(config), dtype=dtype).eval()
    except CompressError:
        raise
    except Exception as error:  # families raise errors of any kind
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        named = _field(config.to_dict(), why)
        raise ModelError(
            f"transformers builds no model of this config.json ({why}{named}); correct it"
        ) from error
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Makes large parameters on the meta device at once. init_empty_weights moves a parameter there only when
    it is given to its module, and the experts of one layer can be larger than the memory.

    Parameters are made without values, those of experts also of zeros. Large buffers are of other values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros) and kwargs.get("device") is None:
            size = args[0] if args and isinstance(args[0], tuple | list) else kwargs.get("size", args)
            if math.prod(size) > LARGE and (func is torch.empty or len(size) > 2):
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def defaults(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config with every flag at its default: what a forward returns, and which code
    computes it."""
    found = copy.deepcopy(config)
    for name, value in FLAGS.items():
        if name in ("attn_implementation", "experts_implementation"):
            found.__dict__.pop(name, None)
        elif name.endswith("_implementation") or getattr(found, name, value) != value:
            setattr(found, name, value)
    return found


def without_flags(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json without the flags that differ from their defaults."""
    return {name: value for name, value in fields.items() if name not in FLAGS or value == FLAGS[name]}


def _field(fields: Mapping[str, Any], why: str) -> str:
    """Name the field that an error is about, if the error shows the field's value but not its name."""
    if any(len(name) > 3 and name in why for name in fields):
        return ""
    asked, found = list(fields.items()), list[str]()
    for name, value in asked:
        if isinstance(value, dict):
            asked.extend((f"{name}.{inner}", one) for inner, one in value.items())
        elif isinstance(value, str) and len(value) > 2 and value in why:
            found.append(f"{name} is {value}")
    return f"; {found[0]}"[:80] if found else ""


def _short(value: object) -> str:
    """Show a value of any size in a few characters."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"of {value.bit_length()} bits"
    return repr(value)[:40]
