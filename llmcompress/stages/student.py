"""The student of a distillation: a model whole in memory, which of its weights learn, and what they are once they have.

`all` and `norms` learn as they are. `lora` adds a low-rank difference to each linear (PEFT), which is merged when training is
over. `scales` is for a model in 4 bits: the codes stay, the scale of each block learns as a factor of what it was, and so do
norms and biases; `all` is that and the weights that were kept. Scales that are stored in 8 bits and norms in half precision
are rounded in every step as they will be stored. R rows (out), C columns (in), G blocks of a row.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress import native, stored
from llmcompress.errors import CompressError, ModelError
from llmcompress.residency import Resident

Train = Literal["all", "norms", "scales", "lora"]
FACTOR = "parametrizations.weight.original"  # where torch keeps what a parametrised weight is made of


def whole(resident: Resident, ready: Callable[[nn.Module], None] = lambda block: None) -> PreTrainedModel:
    """The model with all its weights at once, in the working precision: another one, whose changes `resident` does not see.

    `ready` is given each block before the next one is read.
    """
    model = copy.deepcopy(resident.model)
    for index in range(len(resident.layers)):
        with resident.block(index) as module:
            block = model.get_submodule(resident.block_name(index))
            for name, parameter in module.named_parameters():
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(parameter.data.clone(), requires_grad=False)
                block.get_submodule(owner)._parameters[leaf] = value
        ready(block)
    model.tie_weights()
    return model


def still(model: nn.Module) -> None:
    """Turn off what makes a model in training another function than in use: all dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class _Scaled(nn.Module):
    """A weight whose levels stay: each block's are multiplied by a scale, a factor [R, G] times what it was."""

    def __init__(self, packed: native.Packed, transposed: bool) -> None:
        super().__init__()
        R, G = packed.absmax_RG.shape
        levels = native.grid(packed.format)[packed.codes_RC.int()].reshape(R, G, packed.block)
        self.register_buffer("levels_RGB", levels, persistent=False)
        self.register_buffer("absmax_RG", packed.absmax_RG, persistent=False)
        self.double_quant, self.transposed = packed.double_quant, transposed

    def scale(self, factor_RG: Tensor) -> Tensor:
        """The scales [R, G] as they will be read back, with the gradient of the factor."""
        absmax_RG = cast(Tensor, self.absmax_RG)
        scale_RG = absmax_RG * factor_RG
        if not self.double_quant or torch.equal(scale_RG, absmax_RG):  # in 8 bits already: rounded again they would move
            return scale_RG
        return _as_stored(scale_RG, lambda x: native.double_quantize(x).decode())

    def forward(self, factor_RG: Tensor) -> Tensor:
        weight_RC = (cast(Tensor, self.levels_RGB) * self.scale(factor_RG)[..., None]).flatten(1)
        return weight_RC.T if self.transposed else weight_RC

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What the weight is made of to begin with."""
        return torch.ones_like(cast(Tensor, self.absmax_RG))


class _Rounded(nn.Module):
    """A parameter that is rounded to the type in which it will be stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return _as_stored(x, lambda exact: exact.to(self.dtype).to(exact.dtype))


def _as_stored(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The value of one, the gradient of the other."""
    return rounded(x.detach()) + (x - x.detach())  # in this order the value is exact


class Student:
    """A model in training: `model` itself, and `trained`, what a Trainer is to be given of it."""

    def __init__(self, resident: Resident, train: Train, rank: int, seed: int) -> None:
        self.model, self.train, self.dtype = whole(resident), train, resident.weight_dtype
        self.trained: nn.Module = self.model
        self.packed: dict[str, native.Packed] = {}
        still(self.model)
        if train == "lora":
            self._adapt(resident, rank, seed)
        else:
            every = ((name, resident.codes(name)) for name in resident.matrices())
            coded = {name: codes for name, codes in every if codes is not None}
            for name, parameter in self.model.named_parameters():
                free = name.removesuffix(".weight") not in coded
                always = _of_norm(name, parameter) or (train == "scales" and name.endswith(".bias"))
                parameter.requires_grad_(free and (train == "all" or always))
            if train != "norms":
                self._scale(coded, resident.device)
            if coded:
                self._round()
        if train == "scales" and not self.packed:
            raise ModelError("train: scales is for scales of nf4 and fp4 blocks, and here are none; use all, norms or lora")
        self.learning = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if not self.learning:
            raise ModelError(f"train: {train} finds nothing in this model that could learn; use all or lora")
        if self.model.config.tie_word_embeddings:  # or transformers warns that a checkpoint has no head
            self.model._keys_to_ignore_on_save = [f"{resident.anatomy.head}.weight"]

    def _adapt(self, resident: Resident, rank: int, seed: int) -> None:
        try:
            import peft
        except ImportError:
            raise CompressError("train: lora needs the package peft; pip install peft, or use train: all") from None
        inside = [name for name, _ in resident.linear_maps() if name.startswith(f"{resident.anatomy.layers}.")]
        transposed = isinstance(self.model.get_submodule(inside[0]), Conv1D)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=inside, fan_in_fan_out=transposed)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # peft asks by the old name
            torch.manual_seed(seed)
            self.trained = peft.get_peft_model(self.model, settings)

    def _scale(self, coded: Mapping[str, stored.Stored], device: torch.device) -> None:
        """Let the scales of those in 4 bits learn."""
        self.packed = {name: codes for name, codes in coded.items() if isinstance(codes, native.Packed)}
        for name, packed in self.packed.items():
            linear = self.model.get_submodule(name)
            scaled = _Scaled(packed, isinstance(linear, Conv1D)).to(device)
            parametrize.register_parametrization(linear, "weight", scaled, unsafe=True)
            linear.get_parameter(FACTOR).requires_grad_()

    def _round(self) -> None:
        """Have the gains and biases that learn be rounded in every step as they will be stored."""
        for name, parameter in list(self.model.named_parameters()):
            if parameter.requires_grad and parameter.dim() == 1 and self.dtype.itemsize < 4:
                owner, _, leaf = name.rpartition(".")
                parametrize.register_parametrization(self.model.get_submodule(owner), leaf, _Rounded(self.dtype))

    def learned(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that training changed, under the names that they have in a checkpoint, given all trained ones by name."""
        if self.train == "lora":
            return self._merged()
        found = {}
        for name in self.learning:
            if name.removesuffix(f".{FACTOR}") not in self.packed:
                found[name.replace(".parametrizations", "").removesuffix(".original")] = state[name].to(self.dtype).cpu()
        for name, packed in self.packed.items():
            scaled = cast(Any, self.model.get_submodule(name)).parametrizations.weight[0]
            with torch.no_grad():
                scale_RG = (scaled.absmax_RG * state[f"{name}.{FACTOR}"].to(scaled.absmax_RG)).cpu()
            if not torch.equal(scale_RG, packed.absmax_RG.cpu()):
                nested = native.double_quantize(scale_RG) if packed.double_quant else None
                packed = replace(packed, absmax_RG=nested.decode() if nested else scale_RG, nested=nested)
            found |= {f"{name}.{part}": tensor for part, tensor in stored.tensors_of(packed).items()}
        return found

    def _merged(self) -> dict[str, Tensor]:
        """The weights of the linears with their differences."""
        adapted = {name for name, module in self.model.named_modules() if hasattr(module, "lora_A")}
        cast(Any, self.trained).merge_and_unload()
        return {f"{name}.weight": self.model.get_parameter(f"{name}.weight").data.to(self.dtype).cpu() for name in adapted}


def _of_norm(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 1 and name.endswith("weight")
