"""The transformers border: `from_pretrained` learns to load models whose linears we quantised, once this module is imported.

config.json says which linear has which scheme, by full name, so that one model can mix them; nothing is guessed from patterns.
Before the weights are read each named linear is replaced by the module that stores and runs its scheme, whose parameters are
the tensors of the file: loading, saving, offloading and sharding are transformers' own. What transformers would do quietly is
refused here: a name that is no linear, a tied weight, a tensor that the checkpoint lacks. Without the import, transformers
warns of an unknown method and loads a plain model, which fails at the shapes that `Scheme.shapes` chose for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.errors import ModelError
from llmcompress.four_bit import FourBit, FourBitLinear
from llmcompress.integer_linear import IntegerLinear, StoredLinear
from llmcompress.stored import Layout, layouts_of

METHOD = "llmcompress"


def quantization_config(schemes: Sequence[tuple[Layout, Sequence[str]]]) -> dict[str, Any]:
    """config.json's `quantization_config`: each scheme with the full names of its linears. Errors: ModelError."""
    return CompressedConfig([{**asdict(scheme), "linears": list(linears)} for scheme, linears in schemes]).to_dict()


class CompressedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model of ours: `schemes`, each with its `linears`. Errors: ModelError."""

    def __init__(self, schemes: Sequence[Mapping[str, Any]] = (), quant_method: str = METHOD, **unknown: Any) -> None:
        if unknown:
            raise ModelError(
                f"config.json's quantization_config has {sorted(unknown)}, which this llmcompress doesn't know: update it"
            )
        self.quant_method = cast(Any, quant_method)
        self.schemes = [dict(entry) for entry in schemes]
        self.assigned()

    def assigned(self) -> dict[str, Layout]:
        """The layout of each linear, by full name."""
        return layouts_of(self.schemes)


class Quantizer(HfQuantizer):
    """Loads, saves and dequantises what llmcompress wrote; it quantises nothing itself, which takes a recipe."""

    requires_calibration = True
    quantization_config: CompressedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **_: Any) -> None:
        for name, scheme in _resolved(model, self.quantization_config.assigned()).items():
            model.set_submodule(name, _empty_twin(model, name, scheme, dtype or torch.get_default_dtype()))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in _ours(model):
            parts = dict(module.named_parameters(recurse=False))
            # what the checkpoint lacks was made anew, without the mark
            missing = [f"{name}.{part}" for part, tensor in parts.items() if not hasattr(tensor, "_is_hf_initialized")]
            if missing:
                raise ModelError(f"the checkpoint lacks {', '.join(missing)}; it is damaged, take it again from its source")
            _check_types(name, module)
            for part, tensor in parts.items():  # the loader turns gradients on for scales
                tensor.requires_grad_(part == "bias" and tensor.requires_grad)
            module.prepare()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving a model makes its config's a name
        for name, module in list(_ours(model)):
            if any(parameter.device.type == "meta" for parameter in module.parameters()):
                raise ModelError(f"the weights of {name} are offloaded; load the model in memory to dequantise it")
            model.set_submodule(name, _plain(module, target or torch.float32))
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type that a tensor of the checkpoint is cast to; floats where codes belong are left, to be refused."""
        wanted = super().get_new_dtype(converter, param, dtype)
        return wanted if wanted is None or wanted.is_floating_point else None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element in memory: a byte of two codes is kept beside their expansion to two bytes, or a copy."""
        owner, _, part = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if part != "weight" or not isinstance(module, StoredLinear) or param.dtype != torch.uint8:
            return param.element_size()
        return 3 if isinstance(module, IntegerLinear) else 2

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the integers themselves can't."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _ours(model: PreTrainedModel) -> Iterator[tuple[str, StoredLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StoredLinear))


def _resolved(model: PreTrainedModel, assigned: Mapping[str, Layout]) -> dict[str, Layout]:
    """The names as they are in this model; without its head, a model has shorter names and lacks those outside it."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model or not all(name.startswith(prefix) or name == "lm_head" for name in assigned):
        return dict(assigned)
    return {name.removeprefix(prefix): scheme for name, scheme in assigned.items() if name.startswith(prefix)}


def _empty_twin(model: PreTrainedModel, name: str, scheme: Layout, dtype: torch.dtype) -> StoredLinear:
    """The module that takes the place of a plain linear, without memory. Errors: ModelError where it can't."""
    modules = dict(model.named_modules())
    module = modules.get(name)
    if type(module) is not nn.Linear and not isinstance(module, Conv1D):
        raise ModelError(
            f"config.json gives {name} a scheme, but this model has no such linear; the config is of another model"
        )
    ties: Mapping[str, str] = model.all_tied_weights_keys
    if f"{name}.weight" in {*ties.keys(), *ties.values()}:
        raise ModelError(
            f"config.json gives {name} a scheme, but its weight is tied to another; untie them (tie_word_embeddings)"
        )
    C, R = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
    bias = cast(Tensor | None, module.bias)
    stored: Any = FourBitLinear if isinstance(scheme, FourBit) else IntegerLinear
    twin: StoredLinear = stored(C, R, scheme, bias=bias is not None, dtype=dtype, device="meta")
    twin.transposed = isinstance(module, Conv1D)  # what it goes back to
    for marked in (twin, *twin.parameters()):  # or transformers draws random numbers into what will stay on the disk
        cast(Any, marked)._is_hf_initialized = True
    return twin


def _check_types(name: str, module: StoredLinear) -> None:
    """The loader compares shapes alone. Errors: ModelError."""
    expected = cast(Any, module).scheme.shapes(module.out_features, module.in_features)
    for part, tensor in module.stored().items():
        if tensor.dtype != expected[part][1]:
            raise ModelError(
                f"{name}.{part} is {tensor.dtype} in the checkpoint, not {expected[part][1]}; take it again from its source"
            )


def _plain(module: StoredLinear, dtype: torch.dtype) -> nn.Module:
    """The float linear of one of ours, a Conv1D where it was one."""
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


# Not by transformers' decorators, which refuse a second time: a reloaded module takes the place of its former self.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = CompressedConfig
AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer
