"""The transformers border: once this is imported, `from_pretrained` loads the linears in our formats.

config.json lists the linears of each scheme by full name, so one model can mix them, and the tensors that are
tied (`ties`); nothing is matched by pattern. Before the weights are read, each listed linear is replaced by
the module that stores and runs its scheme and whose parameters are the tensors of the file. Loading, saving,
offloading and sharding are transformers' own. An embedding can be among them, with a head tied to it, which
is then the same matrix. Cases that transformers would pass over silently are refused here: a name that is not
a linear, one of two tied weights, a tensor missing from the checkpoint. Without the import, transformers
warns of an unknown method and loads a plain model, which fails at the shapes that `IntegerLayout.shapes`
chose for that purpose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.architectures.families import anatomy_of, family_of
from llmcompress.architectures.per_layer import build_layers
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import ModelError
from llmcompress.formats.base import StoredLinear, StoredModule
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.integer_embedding import IntegerEmbedding, share
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.quantization_config import METHOD as METHOD
from llmcompress.formats.quantization_config import CompressedConfig as CompressedConfig
from llmcompress.formats.quantization_config import quantization_config as quantization_config
from llmcompress.formats.quantization_config import read_config as read_config
from llmcompress.formats.registry import AnyLayout, format_of
from llmcompress.formats.sparse import SparseLinear
from llmcompress.integrations.expert_linears import divide
from llmcompress.integrations.linear_modules import is_linear, shape_of
from llmcompress.integrations.plain_modules import known_ties, let_resize, make_plain, ours
from llmcompress.integrations.transformers_compat import Conv1D, HfQuantizer, ModuleUtilsMixin


class Quantizer(HfQuantizer):
    """Loads, saves and dequantises models that llmcompress wrote; to quantise one takes a recipe."""

    requires_calibration = True
    quantization_config: CompressedConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        if family_of(model.config) is not None:
            anatomy = anatomy_of(model.config)
            build_layers(model, _layers(model, anatomy), anatomy)
        assigned, dtype = (
            _resolved(model, self.quantization_config.assigned()),
            dtype or torch.get_default_dtype(),
        )
        _divide_experts(model, self.quantization_config.experts)
        done = _put_embeddings(model, assigned, dtype)
        modules, ties = dict(model.named_modules()), model.all_tied_weights_keys
        tied = {*ties.keys(), *ties.values()}
        for name in (name for name in assigned if name not in done):
            twin = _empty_twin(name, modules.get(name), assigned[name], dtype, tied)
            model.set_submodule(name, twin)
        declare_ties(model, known_ties(model, self.quantization_config.ties))
        let_resize(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in ours(model):
            parts = dict(module.named_parameters(recurse=False))
            # parameters that the checkpoint lacks were initialised again and have no mark
            missing = [
                f"{name}.{part}"
                for part, tensor in parts.items()
                if not hasattr(tensor, "_is_hf_initialized")
            ]
            if missing:
                require_together(
                    known_ties(model, self.quantization_config.ties), getattr(model, "hf_device_map", {})
                )
                raise ModelError(
                    f"the checkpoint lacks {', '.join(missing)}; it is damaged, take it again from its source"
                )
            _check_types(name, module)
            module.require_sound(name)
            for part, tensor in parts.items():  # the loader sets requires_grad on scales
                tensor.requires_grad_(part == "bias" and tensor.requires_grad)
            module.prepare()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # saving a model turns its config's dtype into a name
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        make_plain(model, [name for name, _ in ours(model)], target or torch.float32)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type that a tensor of the checkpoint is cast to; floats in place of codes are not cast, so that
        they are refused."""
        wanted = super().get_new_dtype(converter, param, dtype)
        return wanted if wanted is None or wanted.is_floating_point else None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element in memory: packed codes with their expansion to two bytes or with a copy, and
        sparse values with the dense weight."""
        owner, _, part = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if part == "weight" and isinstance(module, SparseLinear):
            return param.element_size() * (
                1 + module.in_features * module.out_features / max(1, param.numel())
            )
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
        """`generate` may compile the decoding of every format."""
        return True


def _divide_experts(model: PreTrainedModel, experts: Mapping[str, bool]) -> None:
    """Put a linear for each expert in the place of parameters, by full name. Errors: ModelError if the model
    lacks one."""
    known = dict(model.named_parameters())
    for name, transposed in experts.items():
        here = name if name in known else name.removeprefix(f"{model.base_model_prefix}.")
        if here not in known or known[here].dim() != 3:
            raise ModelError(
                f"config.json has linears for the experts of {name}, but this model has no such experts; the "
                "config is of another model"
            )
        divide(model, here, transposed=transposed)


def declare_ties(model: PreTrainedModel, ties: Mapping[str, str]) -> None:
    """Make loading, saving, moving and `tie_weights()` respect ties, given by the names in the model.

    Errors: ModelError if the model lacks one of the tensors, or if tied tensors differ in shape.
    """
    if not ties:
        return
    known = dict(model.named_parameters(remove_duplicate=False))
    for target, source in ties.items():
        if lost := [name for name in (target, source) if name not in known]:
            raise ModelError(
                f"config.json ties {target} to {source}, and the model has no {lost[0]}; the config is of "
                "another"
            )
        if known[target].shape != known[source].shape:
            raise ModelError(
                f"config.json ties {target} {tuple(known[target].shape)} to {source} "
                f"{tuple(known[source].shape)}; tied tensors have one shape"
            )
    # set on the model; its class keeps its own
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}
    model.all_tied_weights_keys.update(ties)
    cast(Any, model)._adjust_bias = partial(_adjust_bias, model)


def require_together(ties: Mapping[str, str], device_map: Mapping[str, Any]) -> None:
    """Raise ModelError if a device_map puts tied tensors on different devices."""

    def place(name: str) -> Any:
        return next(
            (device_map[key] for key in sorted(device_map, reverse=True) if f"{name}.".startswith(f"{key}.")),
            None,
        )

    for target, source in ties.items():
        if place(target) != place(source):
            raise ModelError(
                f"{target} and {source} are one tensor, and the device_map puts them on {place(target)} and "
                f"{place(source)}; give one that keeps layers together which share weights"
            )


def unite(model: PreTrainedModel, ties: Mapping[str, str]) -> None:
    """Make tied tensors of a model in memory one tensor, along with what modules keep beside them."""
    for target, source in ties.items():
        owner, _, part = target.rpartition(".")
        setattr(model.get_submodule(owner), part, model.get_parameter(source))
    for owner in {target.rpartition(".")[0] for target in ties}:
        module = model.get_submodule(owner)
        if isinstance(module, StoredModule):
            module.prepare()


def _adjust_bias(model: PreTrainedModel, module: nn.Module, source: Tensor) -> None:
    """Adjust the bias of a tied head as transformers does, but skip our modules, whose weight has its shape
    on disk."""
    if not isinstance(module, StoredModule):
        cast(Any, type(model))._adjust_bias(model, module, source)


def set_embedding(
    model: PreTrainedModel, name: str, embedding: IntegerEmbedding, head: str | None = None
) -> None:
    """Put an int8 embedding in its place and, if a head is tied to it, a head that multiplies by the same
    tensors.

    Their scales are tied as the weights are, and loading, saving, moving and `tie_weights()` respect that.
    Errors: ModelError for a tied head with a bias, which transformers would cut to the first axis of our
    weight.
    """
    if head is not None:
        if getattr(model.get_submodule(head), "bias", None) is not None:
            raise ModelError(f"{head} is tied to the embedding and has a bias; use embedding: keep")
        rows, columns = embedding.num_embeddings, embedding.embedding_dim
        twin = IntegerLinear(columns, rows, embedding.scheme, bias=False, device="meta").train(
            embedding.training
        )
        share(twin, embedding)
        model.set_submodule(head, _marked(twin))
        # set on the model; its class keeps its own
        ties = {f"{head}.{part}": f"{name}.{part}" for part in embedding.stored()}
        model._tied_weights_keys = {
            **(model._tied_weights_keys or {}),
            **ties,
        }
        model.all_tied_weights_keys.update(ties)
    model.set_submodule(name, embedding)
    for kind in {type(owner) for owner in model.modules() if isinstance(owner, PreTrainedModel)}:
        if kind.dtype is ModuleUtilsMixin.dtype:
            # saving writes it to config.json, and masks of a static cache have this type
            cast(Any, kind).dtype = property(_dtype)


def _put_embeddings(
    model: PreTrainedModel, assigned: Mapping[str, AnyLayout], dtype: torch.dtype
) -> set[str]:
    """Replace the embeddings that the config names and the heads tied to them; returns all names replaced."""
    modules, ties, done = dict(model.named_modules()), dict[str, str](model.all_tied_weights_keys), set[str]()
    for name, scheme in assigned.items():
        if not isinstance(plain := modules.get(name), nn.Embedding):
            continue
        if (
            not isinstance(scheme, IntegerLayout)
            or scheme.group_size is not None
            or scheme.activations == "static"
        ):
            raise ModelError(
                f"config.json gives the embedding {name} {scheme}; an embedding has int8 rows (w8a8)"
            )
        heads = [
            target.removesuffix(".weight") for target, source in ties.items() if source == f"{name}.weight"
        ]
        if wrong := [head for head in heads if assigned.get(head) != scheme]:
            raise ModelError(
                f"config.json gives {name} a scheme, and {wrong[0]}, tied to it, not the same; they are one "
                "matrix"
            )
        embedding = _marked(IntegerEmbedding(name, plain, scheme, dtype=dtype, device="meta"))
        set_embedding(model, name, embedding, heads[0] if heads else None)
        done |= {name, *heads}
    return done


def _layers(model: PreTrainedModel, anatomy: Anatomy) -> nn.ModuleList:
    """The layers of a model. Errors: ModelError for a class that has them at another path than the
    checkpoint."""
    path = (
        anatomy.layers.removeprefix(f"{model.base_model_prefix}.")
        if model.base_model is model
        else anatomy.layers
    )
    try:
        return cast(nn.ModuleList, model.get_submodule(path))
    except AttributeError:
        raise ModelError(
            f"{type(model).__name__} has no {path}, so transformers would load none of the checkpoint's "
            "weights into it; load the checkpoint by AutoModelForCausalLM or AutoModel"
        ) from None


def _marked(module: Any) -> Any:
    """Mark a module as initialised, so that transformers does not write random numbers into its
    parameters."""
    for marked in (module, *module.parameters()):
        marked._is_hf_initialized = True
    return module


def _resolved(model: PreTrainedModel, assigned: Mapping[str, AnyLayout]) -> dict[str, AnyLayout]:
    """The layouts by the names in this model. A model without its head has shorter names and lacks modules
    outside its base model."""
    if model.get_output_embeddings() is None:  # its head is of another kind, or it has none
        assigned = {name: scheme for name, scheme in assigned.items() if name != "lm_head"}
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model or not all(
        name.startswith(prefix) or name == "lm_head" for name in assigned
    ):
        return dict(assigned)
    return {name.removeprefix(prefix): scheme for name, scheme in assigned.items() if name.startswith(prefix)}


def _empty_twin(
    name: str, module: nn.Module | None, scheme: AnyLayout, dtype: torch.dtype, tied: Collection[str]
) -> StoredLinear:
    """Return what replaces a plain linear, the `module` of a name, without memory. `tied` are the names of
    tied parameters. Errors: ModelError if it can't be replaced."""
    if module is None or not is_linear(module):
        raise ModelError(
            f"config.json gives {name} a scheme, but this model has no such linear; the config is of "
            "another model"
        )
    if f"{name}.weight" in tied:
        raise ModelError(
            f"config.json gives {name} a scheme, but its weight is tied to another; untie them "
            "(tie_word_embeddings)"
        )
    R, C = shape_of(module)
    # a basis shared by several layers can have a higher rank than one of them
    if isinstance(scheme, FactoredLayout) and scheme.rank > R * C:
        raise ModelError(
            f"config.json gives {name} a rank of {scheme.rank} for {R} x {C} weights; the config is of "
            "another model"
        )
    bias = cast(Tensor | None, module.bias)
    twin: StoredLinear = format_of(scheme).module(
        C, R, scheme, bias=bias is not None, dtype=dtype, device="meta"
    )
    twin.transposed = isinstance(module, Conv1D)  # to become a Conv1D again
    return cast(StoredLinear, _marked(twin))


def _check_types(name: str, module: StoredModule) -> None:
    """Raise ModelError if a loaded tensor has the wrong type; the loader compares shapes only."""
    expected = module.scheme.shapes(module.rows, module.columns)
    for part, tensor in module.stored().items():
        if tensor.dtype != expected[part][1] and (module.exact or not tensor.is_floating_point()):
            raise ModelError(
                f"{name}.{part} is {tensor.dtype} in the checkpoint, not {expected[part][1]}; take it again "
                "from its source"
            )


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """The type of a model's activations. transformers uses the type of the first float parameter, which may
    be a scale here."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    found = embedding.like if isinstance(embedding, IntegerEmbedding) else None
    return (
        found.dtype if found is not None else cast(torch.dtype, cast(Any, ModuleUtilsMixin).dtype.fget(model))
    )
