"""The student of a distillation: a model whole in memory, which of its weights learn, and their values after
training.

`all` and `norms` train the weights as they are. `lora` adds a low-rank difference to each linear (PEFT),
which is merged after training. `scales` is for a model in 4 bits or with codebooks, whose codes stay. The
scale of each group learns as a factor of its initial value; the levels of a codebook, norms and biases learn
as they are. For such a model, `all` trains these and the weights that were kept. Scales that are stored in 8
bits, levels, and norms in half precision are rounded in every step as they will be stored. A weight that
layers share is one parameter for all of them. `parametrizations` says how weights are made of parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from llmcompress.errors import CompressError, ModelError
from llmcompress.formats import registry
from llmcompress.integrations.transformers_compat import Conv1D
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.stored_matrices import widen
from llmcompress.stages.distill.parametrizations import (
    StoredRounding,
    WeightParametrization,
    attach,
    parameters_of,
    parametrization_of,
)

Train = Literal["all", "norms", "scales", "lora"]


def whole(
    resident: LayerwiseModel, ready: Callable[[nn.Module], None] = lambda layer: None
) -> PreTrainedModel:
    """Return the model with all its weights at once, in the working precision. It is a copy: `resident` does
    not see its changes.

    `ready` is given each layer before the next one is read.
    """
    model = copy.deepcopy(resident.model)
    for name in resident.stored:
        widen(model.get_submodule(name), resident.dtype)
    for index in range(len(resident.layers)):
        with resident.layer(index) as module:
            layer = model.get_submodule(resident.layer_name(index))
            for name, parameter in module.named_parameters():
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(parameter.data.clone(), requires_grad=False)
                layer.get_submodule(owner)._parameters[leaf] = value
        ready(layer)
    model.tie_weights()
    return model


def freeze(model: nn.Module) -> None:
    """Turn off all dropout, so that a model computes the same function in training as in use."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class Student:
    """A model in training: `model` itself, and `trained`, the form of it that a Trainer is given."""

    def __init__(self, resident: LayerwiseModel, train: Train, rank: int, seed: int) -> None:
        self.model, self.train, self.dtype_of = whole(resident), train, resident.dtype_of
        self.trained: nn.Module = self.model
        self.makings: dict[str, WeightParametrization] = {}  # by linear, for weights that are not plain
        self.same: dict[str, str] = {}  # shared parameter -> the parameter that it is
        freeze(self.model)
        if train == "lora":
            self._adapt(resident, rank, seed)
        else:
            every = ((name, resident.codes(name)) for name in resident.matrices())
            coded = {name: codes for name, codes in every if codes is not None}
            for name, parameter in self.model.named_parameters():
                free = name.removesuffix(".weight") not in coded
                always = _of_norm(name, parameter) or (train == "scales" and name.endswith(".bias"))
                parameter.requires_grad_(free and (train == "all" or always))
            self._make(coded, resident)
            if coded:
                self._round()
        if train == "scales" and not any(making.codes for making in self.makings.values()):
            raise ModelError(
                "train: scales is for scales of nf4 and fp4 and levels of codebooks, and here are none; use "
                "all, norms or lora"
            )
        self.learning = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if not self.learning:
            raise ModelError(f"train: {train} finds nothing in this model that could learn; use all or lora")
        tied = {f"{resident.anatomy.head}.weight"} if self.model.config.tie_word_embeddings else set[str]()
        if tied | self.same.keys():  # otherwise transformers warns that a checkpoint lacks them
            self.model._keys_to_ignore_on_save = sorted(tied | self.same.keys())

    def _adapt(self, resident: LayerwiseModel, rank: int, seed: int) -> None:
        try:
            import peft
        except ImportError:
            raise CompressError(
                "train: lora needs the package peft; pip install peft, or use train: all"
            ) from None
        inside = [
            name for name, _ in resident.linear_maps() if name.startswith(f"{resident.anatomy.layers}.")
        ]
        transposed = isinstance(self.model.get_submodule(inside[0]), Conv1D)
        settings = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=inside, fan_in_fan_out=transposed
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft uses the old name
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
            torch.manual_seed(seed)
            self.trained = peft.get_peft_model(self.model, settings)

    def _make(self, coded: Mapping[str, registry.StoredWeight], resident: LayerwiseModel) -> None:
        """Parametrise coded weights, and let their parameters learn where `train` says so. A weight that
        layers share is one parameter."""
        for name, codes in coded.items():
            module = self.model.get_submodule(name)
            if (making := parametrization_of(codes, isinstance(module, Conv1D))) is not None:
                self.makings[name] = making
                attach(module, making, resident.device)
        for target, source in resident.ties.items():
            linear, other = (name.rpartition(".")[0] for name in (target, source))
            part = target.rpartition(".")[2]
            if linear in self.makings and part in self.makings[linear].parts:
                own, others = (parameters_of(name, self.makings[name])[part] for name in (linear, other))
                owner, _, leaf = own.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, self.model.get_parameter(others))
                self.same[own] = others
        for name, making in self.makings.items():
            for parameter in parameters_of(name, making).values():
                self.model.get_parameter(parameter).requires_grad_(
                    self.train == "all" or (making.codes and self.train == "scales")
                )

    def _round(self) -> None:
        """Round the gains and biases that learn in every step, as they will be stored."""
        for name, parameter in list(self.model.named_parameters()):
            dtype = self.dtype_of(name)
            if parameter.requires_grad and parameter.dim() == 1 and dtype.itemsize < 4:
                owner, _, leaf = name.rpartition(".")
                parametrize.register_parametrization(
                    self.model.get_submodule(owner), leaf, StoredRounding(dtype)
                )

    def learned(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that training changed, by their names in a checkpoint. `state` holds all trained
        tensors by name."""
        if self.train == "lora":
            return self._merged()
        made_of = {name: parameters_of(name, making) for name, making in self.makings.items()}
        parameters = {parameter for parts in made_of.values() for parameter in parts.values()}
        found = {}
        for name in self.learning:
            if name not in parameters:
                plain = name.replace(".parametrizations", "").removesuffix(".original")
                found[plain] = state[name].to(self.dtype_of(plain)).cpu()
        for name, parts in made_of.items():
            own = [self.same.get(parameter, parameter) for parameter in parts.values()]
            if set(own) & set(self.learning):
                with torch.no_grad():
                    dtype = self.dtype_of(f"{name}.weight")
                    weight = self.makings[name].stored([state[parameter] for parameter in own], dtype)
                found |= {f"{name}.{part}": tensor for part, tensor in registry.tensors_of(weight).items()}
        return found

    def _merged(self) -> dict[str, Tensor]:
        """The weights of the linears with their differences merged."""
        adapted = {name for name, module in self.model.named_modules() if hasattr(module, "lora_A")}
        cast(Any, self.trained).merge_and_unload()
        merged = {f"{name}.weight": self.model.get_parameter(f"{name}.weight").data for name in adapted}
        return {name: weight.to(self.dtype_of(name)).cpu() for name, weight in merged.items()}


def _of_norm(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 1 and name.endswith("weight")
