"""What the weight of a linear is made of while it learns: scales and codes, levels and indices, or parts of a
product.

Each is a parametrisation of torch's: parameters that learn, and the weight that they make. Scales, levels and
norms are rounded in every step to what will be stored, so that what is measured is what is written. Parts of
products learn in float32, as plain matrices do, and are rounded once at the end. R rows (outputs), C columns
(inputs), G groups of a row or codebooks, L levels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcompress.algorithms.activation_quantization import straight_through
from llmcompress.algorithms.codebook import look_up
from llmcompress.formats import bitsandbytes_layout, registry
from llmcompress.formats.codebook import CodebookWeight
from llmcompress.formats.low_rank import FactoredWeight


class WeightParametrization(nn.Module):
    """How a weight is made of parameters.

    `codes`: whether it also has codes that stay. `transposed`: whether it is stored as [C, R].
    """

    codes: ClassVar[bool]
    parts: tuple[str, ...]  # names of the stored tensors, in the order of the parameters

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed

    def forward(self, *parameters: Tensor) -> Tensor:
        """The weight as the linear stores it."""
        weight_RC = self.made(*parameters)
        return weight_RC.T if self.transposed else weight_RC

    @abstractmethod
    def made(self, *parameters: Tensor) -> Tensor:
        """The weight [R, C]."""

    @abstractmethod
    def right_inverse(self, weight: Tensor) -> Tensor | Sequence[Tensor]:
        """The parameters at the start."""

    @abstractmethod
    def stored(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> registry.StoredWeight:
        """The stored form of the weight that these parameters make, in a model of that dtype."""


class ScaledCodes(WeightParametrization):
    """4-bit codes that stay, with scales that learn: the scale of each group is a factor [R, G] times its
    initial value."""

    codes = True
    parts = ("weight_absmax",)

    def __init__(self, packed: bitsandbytes_layout.Packed, transposed: bool) -> None:
        super().__init__(transposed)
        R, G = packed.absmax_RG.shape
        levels = bitsandbytes_layout.grid(packed.format)[packed.codes_RC.int()].reshape(
            R, G, packed.group_size
        )
        self.register_buffer("levels_RGB", levels, persistent=False)
        self.register_buffer("absmax_RG", packed.absmax_RG, persistent=False)
        self.packed = packed

    def scale(self, factor_RG: Tensor) -> Tensor:
        """The scales [R, G] as they will be read back, with the gradient of the factor."""
        absmax_RG = cast(Tensor, self.absmax_RG)
        scale_RG = absmax_RG * factor_RG
        # these scales are in 8 bits already and would move if rounded again
        if not self.packed.double_quant or torch.equal(scale_RG, absmax_RG):
            return scale_RG
        return as_stored(scale_RG, lambda x: bitsandbytes_layout.double_quantize(x).decode())

    def made(self, *parameters: Tensor) -> Tensor:
        (factor_RG,) = parameters
        return (cast(Tensor, self.levels_RGB) * self.scale(factor_RG)[..., None]).flatten(1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.ones_like(cast(Tensor, self.absmax_RG))

    def stored(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> registry.StoredWeight:
        absmax_RG = cast(Tensor, self.absmax_RG)
        scale_RG = (absmax_RG * parameters[0].to(absmax_RG)).cpu()
        if torch.equal(scale_RG, self.packed.absmax_RG.cpu()):
            return self.packed
        nested = bitsandbytes_layout.double_quantize(scale_RG) if self.packed.double_quant else None
        return replace(self.packed, absmax_RG=nested.decode() if nested else scale_RG, nested=nested)


class CodebookLevels(WeightParametrization):
    """Indices that stay, with levels that learn: each moves by a multiple [G, L] of its codebook's root mean
    square, at first by none."""

    codes = True
    parts = ("weight_levels",)

    def __init__(self, weight: CodebookWeight, transposed: bool) -> None:
        super().__init__(transposed)
        self.weight = weight
        levels_GL = weight.levels_GL.float()
        sizes = {
            "codes_RC": weight.codes_RC.int(),
            "levels_GL": levels_GL,
            "size_G1": levels_GL.square().mean(1, True).sqrt(),
        }
        for name, tensor in sizes.items():
            self.register_buffer(name, tensor, persistent=False)

    def moved(self, by_GL: Tensor) -> Tensor:
        """The levels as they will be read back, with the gradient of `by_GL`."""
        levels_GL = cast(Tensor, self.levels_GL) + by_GL * cast(Tensor, self.size_G1)
        return as_stored(levels_GL, self.weight.layout.snap)

    def made(self, *parameters: Tensor) -> Tensor:
        codes_RC = cast(Tensor, self.codes_RC)
        return look_up(codes_RC, self.moved(parameters[0]), self.weight.layout.sharing(len(codes_RC)))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(cast(Tensor, self.levels_GL))

    def stored(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> registry.StoredWeight:
        levels_GL = (
            self.moved(parameters[0].to(cast(Tensor, self.levels_GL))).cpu().to(self.weight.levels_GL.dtype)
        )
        return replace(self.weight, levels_GL=levels_GL)


class FactoredParts(WeightParametrization):
    """A matrix that layers share, with or without a low-rank difference left @ right; or a product left @
    right alone."""

    codes = False

    def __init__(self, weight: FactoredWeight, transposed: bool) -> None:
        super().__init__(transposed)
        self.weight, self.parts = weight, tuple(weight.tensors())

    def made(self, *parameters: Tensor) -> Tensor:
        found = dict(zip(self.parts, parameters, strict=True))
        if self.weight.layout.format == "basis":
            return found["weight"] @ found["weight_right"]
        return found["weight"] + (found["weight_left"] @ found["weight_right"] if len(found) > 1 else 0)

    def right_inverse(self, weight: Tensor) -> Tensor | Sequence[Tensor]:
        parts = self._split(self.weight.tensors())
        own = [part.to(weight, copy=True) for part in parts]  # the stored tensors stay as they are
        return own if len(own) > 1 else own[0]

    def stored(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> registry.StoredWeight:
        found = dict(zip(self.parts, parameters, strict=True))
        if self.weight.layout.format == "basis":
            made = FactoredWeight(self.weight.layout, left_RK=found["weight"], right_KC=found["weight_right"])
        else:
            left, right = found.get("weight_left"), found.get("weight_right")
            made = FactoredWeight(self.weight.layout, found["weight"], left, right)
        return made.to(dtype)

    def _split(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[part][0] if part == "weight" else tensors[part] for part in self.parts]


class StoredRounding(nn.Module):
    """Rounds a parameter to the dtype in which it will be stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """The parameter as it will be read back."""
        return as_stored(x, lambda exact: exact.to(self.dtype).to(exact.dtype))


def as_stored(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the value of `rounded(x)` with the gradient of `x`."""
    return straight_through(x, rounded(x.detach()))


def parametrization_of(weight: registry.StoredWeight, transposed: bool) -> WeightParametrization | None:
    """The parametrisation with which a weight can learn beside its codes, or None if nothing in it can
    learn."""
    if isinstance(weight, bitsandbytes_layout.Packed):
        return ScaledCodes(weight, transposed)
    if isinstance(weight, CodebookWeight):
        return CodebookLevels(weight, transposed)
    return FactoredParts(weight, transposed) if isinstance(weight, FactoredWeight) else None


def attach(linear: nn.Module, making: WeightParametrization, device: torch.device) -> None:
    """Make the weight of a linear from parameters from now on."""
    parametrize.register_parametrization(linear, "weight", making.to(device), unsafe=True)


def parameters_of(name: str, making: WeightParametrization) -> dict[str, str]:
    """The names of the parameters that make the weight of the linear `name`, by the tensors that are
    stored."""
    place = f"{name}.parametrizations.weight.original"
    return {part: f"{place}{i if len(making.parts) > 1 else ''}" for i, part in enumerate(making.parts)}
