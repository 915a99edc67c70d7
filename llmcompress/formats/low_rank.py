"""A linear whose weight is a matrix that layers share, a product of low rank, or the sum of both, and the
module that runs it.

`shared`: the weight is one matrix for several layers, to which each may add its own low-rank difference, left
@ right. `basis`: the weight is left @ right, and several layers may share `right`, the basis. Which tensors
are the same is recorded in config.json's `ties`, by name. A shared tensor exists once on disk and once in
memory, and is multiplied once for each layer that uses it. `weight` has a first axis of size 1, which no
plain linear has, so a stock loader refuses it. R rows (out), C columns (in), K the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.formats.base import Format, StoredLinear, hold
from llmcompress.formats.value_checks import Flaw, finite, require_sound


@dataclass(frozen=True)
class FactoredLayout:
    """The parts of a linear: `shared` with a difference of rank `rank` (0: none), or a `basis` of that rank.

    The parts are float weights in the type of the model. Errors: ValueError.
    """

    format: Literal["shared", "basis"]
    rank: int = 0

    def __post_init__(self) -> None:
        if self.format not in ("shared", "basis"):
            raise ValueError(f"no format {self.format!r}; use shared or basis")
        least = 1 if self.format == "basis" else 0
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < least:
            raise ValueError(f"the rank of {self.format} is a whole number from {least}, not {self.rank!r}")

    @property
    def name(self) -> str:
        """The name in reports: `basis of rank 64`."""
        return f"{self.format} of rank {self.rank}" if self.rank else self.format

    @property
    def common(self) -> str:
        """The name of the tensor that layers can share."""
        return "weight" if self.format == "shared" else "weight_right"

    def parameters(self, shape: tuple[int, int], *, common: bool = True) -> int:
        """The number of parameters stored for a linear [R, C], with or without the tensor that layers can
        share."""
        parts = self.shapes(*shape)
        return sum(torch.Size(of).numel() for name, (of, _) in parts.items() if common or name != self.common)

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] is not stored in this format, or None."""
        full = min(shape)
        return (
            f"a rank of {self.rank} is no less than that of {shape[0]} x {shape[1]} weights"
            if self.rank > full
            else None
        )

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of every tensor of a linear [rows, columns], without its bias, by name; any float type is
        allowed."""
        dtype = torch.float32
        if self.format == "basis":
            return {"weight": ((1, rows, self.rank), dtype), "weight_right": ((self.rank, columns), dtype)}
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": ((1, rows, columns), dtype)}
        if self.rank:
            found |= {
                "weight_left": ((rows, self.rank), dtype),
                "weight_right": ((self.rank, columns), dtype),
            }
        return found

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of a linear's stored tensors."""
        return [
            finite(tensors[name], f"`{name}`")
            for name in ("weight", "weight_left", "weight_right")
            if name in tensors
        ]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> FactoredWeight:
        """The inverse of `FactoredWeight.tensors`, bit for bit. Errors: ModelError."""
        return read(tensors, self, tensors["weight"].shape[1] if tensors["weight"].dim() == 3 else 0, columns)

    def inputs(self, input_scale: float | Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """How the kernel rounds the inputs of a linear: it does not round them."""
        return None


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """One linear in parts: whole [R, C] of `shared`, left [R, K] and right [K, C] of a basis or of a
    difference."""

    layout: FactoredLayout
    whole_RC: Tensor | None = None
    left_RK: Tensor | None = None
    right_KC: Tensor | None = None

    def to(self, dtype: torch.dtype) -> FactoredWeight:
        """The same linear with its parts rounded to a type, on the CPU."""
        parts = (self.whole_RC, self.left_RK, self.right_KC)
        return FactoredWeight(
            self.layout,
            *(None if part is None else part.detach().to(dtype).cpu().contiguous() for part in parts),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as they are stored on disk and named in the state dict of a
        FactoredLinear."""
        if self.layout.format == "basis":
            parts = {"weight": self.left_RK, "weight_right": self.right_KC}
        else:
            parts = {"weight": self.whole_RC, "weight_left": self.left_RK, "weight_right": self.right_KC}
        found = {name: part for name, part in parts.items() if part is not None}
        return found | {"weight": found["weight"][None]}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C], multiplied in float32."""
        made = torch.zeros(()) if self.whole_RC is None else self.whole_RC.float()
        if self.left_RK is not None and self.right_KC is not None:
            made = made + self.left_RK.float() @ self.right_KC.float()
        return made.to(dtype)


def read(tensors: Mapping[str, Tensor], layout: FactoredLayout, rows: int, columns: int) -> FactoredWeight:
    """The inverse of `FactoredWeight.tensors`, bit for bit. Errors: ModelError if the tensors can't be a
    linear [rows, columns]."""
    seen = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "bias"}
    expected = {name: shape for name, (shape, _) in layout.shapes(rows, columns).items()}
    if seen != expected or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ModelError(f"a linear of {rows} x {columns} in {layout} has floats of {expected}, not {seen}")
    require_sound(f"a linear of {rows} x {columns}", layout.flaws(tensors))
    right = tensors.get("weight_right")
    if layout.format == "basis":
        return FactoredWeight(layout, left_RK=tensors["weight"][0], right_KC=right)
    return FactoredWeight(layout, tensors["weight"][0], tensors.get("weight_left"), right)


class FactoredLinear(StoredLinear):
    """A linear [in_features -> out_features] made of parts; `dtype` is that of the model and of the bias.

    The parts are cast with the model, as the weights of a plain linear are, and can be trained
    (`requires_grad_`).
    """

    scheme: FactoredLayout
    exact = False
    weight_left: Tensor
    weight_right: Tensor

    def prepare(self) -> None:
        """Do nothing: the forward reads the stored tensors as they are."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, C]. Errors: ModelError if the stored tensors are damaged."""
        weight = read(self.stored(), self.scheme, self.out_features, self.in_features)
        return weight.dequantize(dtype).clone()  # a copy, because other layers share the original

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        dtype, linear = input.dtype, nn.functional.linear
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.scheme.format == "basis":
            return linear(linear(input, self.weight_right.to(dtype)), self.weight[0].to(dtype), bias)
        out = linear(input, self.weight[0].to(dtype), bias)
        if not self.scheme.rank:
            return out
        return out + linear(linear(input, self.weight_right.to(dtype)), self.weight_left.to(dtype))

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.name}"


def linear(
    weight: FactoredWeight, bias: Tensor | None, *, device: torch.device | str = "cpu"
) -> FactoredLinear:
    """Return a live module, in eval mode, that holds copies of our parts."""
    tensors = weight.tensors()
    R, C = (
        tensors["weight"].shape[1],
        (tensors["weight"] if weight.right_KC is None else weight.right_KC).shape[-1],
    )
    module = FactoredLinear(
        C, R, weight.layout, bias=bias is not None, dtype=tensors["weight"].dtype, device="meta"
    )
    return hold(module, tensors, bias, device)


FORMAT = Format(
    names=("shared", "basis"),
    layout=FactoredLayout,
    weight=FactoredWeight,
    mark="weight_right",
    module=FactoredLinear,
    read=read,
    tensors=FactoredWeight.tensors,
    linear=linear,
)
