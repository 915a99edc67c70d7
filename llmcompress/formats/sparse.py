"""A linear with many weights set to zero: the values that stay and a mask of one bit per weight, and the
module that runs it.

The layout keeps a share of the weights (`unstructured`) or n of every m neighbours in a row (`2:4`). The
number of values follows from the layout and the shape, whatever each row keeps, so a loader knows the shapes
before it reads. On disk, a 16-bit weight with half of its values takes 9 bits per weight. `weight` is one row
of values, which no plain linear has, so a stock loader refuses it.

It is not faster than a dense linear: the zeros are filled in once (`prepare`) and multiplied like any other
weight. The dense weight is kept beside the values, which takes MORE memory than a plain linear. torch's 2:4
product on a GPU (cuSPARSELt) was slower than the dense product for every shape that evaluation/speed.py tried
on an H100, so it is not used. R rows (out), C columns (in).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.algorithms.sparsegpt import Keep, fill, pack_mask, unpack_mask
from llmcompress.errors import ModelError
from llmcompress.formats.base import DTYPES, Format, StoredLinear, hold
from llmcompress.formats.value_checks import Flaw, finite, require_sound


@dataclass(frozen=True)
class SparseLayout:
    """Which weights of a linear are kept, and the type of their values: a share `keep`, or n of every m in a
    row (`pattern` "n:m").

    A last group of fewer than m columns keeps up to n. Errors: ValueError.
    """

    pattern: str
    dtype: str
    keep: float | None = None
    format: Literal["sparse"] = "sparse"

    def __post_init__(self) -> None:
        found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", str(self.pattern))
        if self.pattern != "unstructured" and not (found and int(found[1]) < int(found[2])):
            raise ValueError(f"no pattern {self.pattern!r}; use unstructured or n:m, as 2:4")
        share = isinstance(self.keep, float) and 0 < self.keep < 1
        if share != (self.pattern == "unstructured") or (self.keep is not None and not share):
            raise ValueError(
                f"keep is a share between 0 and 1 of unstructured weights alone, not {self.keep!r} of "
                f"{self.pattern}"
            )
        if self.format != "sparse" or self.dtype not in DTYPES:
            raise ValueError(f"no format {self.format!r} of {self.dtype!r}; values are {', '.join(DTYPES)}")

    @property
    def name(self) -> str:
        """The name in reports: `sparse 2:4`."""
        return f"sparse {self.pattern}"

    def kept(self, columns: int) -> int:
        """The mean number of weights that stay in a row of `columns`."""
        if self.keep is not None:
            return round(self.keep * columns)
        n, m = map(int, self.pattern.split(":"))
        return columns // m * n + min(n, columns % m)

    def choice(self, columns: int) -> Keep:
        """The `keep` argument of `algorithms.sparsegpt`: n of m, or a share that is a whole number of weights
        per row in the mean."""
        if self.keep is not None:
            return self.kept(columns) / columns
        n, m = map(int, self.pattern.split(":"))
        return n, m

    def allows(self, mask_RC: Tensor) -> bool:
        """Whether a mask keeps the required number of weights, and at most n in each m."""
        R, C = mask_RC.shape
        if int(mask_RC.sum()) != R * self.kept(C):
            return False
        if self.keep is not None:
            return True
        n, m = map(int, self.pattern.split(":"))
        return int(nn.functional.pad(mask_RC, (0, -C % m)).unflatten(1, (-1, m)).sum(-1).max()) <= n

    def bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight on disk of a linear [R, C], zeros and mask included."""
        return 8 * (DTYPES[self.dtype].itemsize * self.kept(shape[1]) + -(-shape[1] // 8)) / shape[1]

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Return why a linear [R, C] is not stored in this format, or None."""
        whole = self.kept(shape[1]) in (0, shape[1])
        return f"all or none of the {shape[1]} weights of a row would stay" if whole else None

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type on disk of every tensor of a linear [rows, columns], without its bias, by name."""
        return {
            "weight": ((rows * self.kept(columns),), DTYPES[self.dtype]),
            "weight_mask": ((rows, -(-columns // 8)), torch.uint8),
        }

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of a linear's stored tensors, except the mask, which `read` checks by counting."""
        return [finite(tensors["weight"], "values")]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> SparseWeight:
        """The inverse of `SparseWeight.tensors`, bit for bit. Errors: ModelError."""
        return read(tensors, self, len(tensors["weight_mask"]), columns)

    def inputs(self, input_scale: float | Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """How the kernel rounds the inputs of a linear: it does not round them."""
        return None


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """One linear: the values that stay, row by row, and mask_RC bool [R, C], True where a weight stays."""

    values: Tensor
    mask_RC: Tensor
    layout: SparseLayout

    @classmethod
    def of(cls, W_RC: Tensor, mask_RC: Tensor, layout: SparseLayout) -> SparseWeight:
        """Keep the weights of W [R, C] under the mask, rounded to the layout's type. Errors: ValueError if
        the mask does not fit the layout."""
        if not layout.allows(mask_RC):
            raise ValueError(
                f"a mask of {int(mask_RC.sum())} in {tuple(mask_RC.shape)} is not what {layout} leaves"
            )
        return cls(W_RC[mask_RC].to(DTYPES[layout.dtype]).cpu(), mask_RC.cpu(), layout)

    @property
    def zeros(self) -> int:
        """The number of weights that are zero."""
        return self.mask_RC.numel() - self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as they are stored on disk and named in the state dict of a
        SparseLinear."""
        return {"weight": self.values, "weight_mask": pack_mask(self.mask_RC)}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C]."""
        return fill(self.mask_RC, self.values).to(dtype)


def read(tensors: Mapping[str, Tensor], layout: SparseLayout, rows: int, columns: int) -> SparseWeight:
    """The inverse of `SparseWeight.tensors`, bit for bit. Errors: ModelError if the tensors can't be a linear
    [rows, columns]."""
    seen = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if name != "bias"}
    if seen != layout.shapes(rows, columns):
        raise ModelError(
            f"a linear of {rows} x {columns} in {layout} has {layout.shapes(rows, columns)}, not {seen}"
        )
    require_sound(f"a linear of {rows} x {columns}", layout.flaws(tensors))
    mask_RC = unpack_mask(tensors["weight_mask"], columns)
    if not layout.allows(mask_RC):
        raise ModelError(
            f"the mask of a linear of {rows} x {columns} is not {layout.pattern}; it is damaged, fetch it "
            "again"
        )
    return SparseWeight(tensors["weight"], mask_RC, layout)


class SparseLinear(StoredLinear):
    """A linear [in_features -> out_features] whose zeros are not stored; `dtype` is that of the model and of
    the dense weight.

    Gradients go to the input and the bias; the weight has none. Without the dense weight, for example when
    weights are offloaded, every forward fills it in.
    """

    scheme: SparseLayout
    weight_mask: Tensor
    dense: Tensor | None
    beside = "dense"

    @torch.no_grad()
    def prepare(self) -> None:
        """Fill in the dense weight and keep it, unless the values are not in memory (meta)."""
        self.dense = None if self.weight.device.type == "meta" else self.dequantized(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = self.dequantized(input.dtype) if self.dense is None else self.dense.to(input.dtype)
        return nn.functional.linear(input, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        before = self.dense
        super()._apply(fn, recurse)
        if before is not None and self.dense is not None:
            cast = self.dense.dtype != before.dtype  # refill from the values, which keep their precision
            self.dtype = self.dense.dtype
            if cast or self.dense.device != before.device:
                self.prepare()
        return self

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.name}, keep={self.scheme.keep}"


def linear(weight: SparseWeight, bias: Tensor | None, *, device: torch.device | str = "cpu") -> SparseLinear:
    """Return a live module, prepared and in eval mode, that holds copies of our values and mask."""
    (R, C), dtype = weight.mask_RC.shape, DTYPES[weight.layout.dtype]
    module = SparseLinear(C, R, weight.layout, bias=bias is not None, dtype=dtype, device="meta")
    return hold(module, weight.tensors(), bias, device)


FORMAT = Format(
    names=("sparse",),
    layout=SparseLayout,
    weight=SparseWeight,
    mark="weight_mask",
    module=SparseLinear,
    read=read,
    tensors=SparseWeight.tensors,
    linear=linear,
)
