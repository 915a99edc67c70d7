"""A linear most of whose weights may be zero: the values that stay and a bit for every place, and the module
that runs it.

A share of the weights stays (`unstructured`), or n of every m neighbours in a row (`2:4`). How many there are
follows from that and from the shape, whatever the rows have each, so a loader knows the shapes before it
reads. On the disk a weight of 16 bits at half its values takes 9. `weight` is one row of values, which no
plain linear has, so that a stock loader refuses it.

There is no speed in it: the zeros are filled in once (`prepare`) and multiplied like any others, and the
dense weight is kept beside the values, which is MORE memory than a plain linear takes. What torch has for 2:4
on a GPU, cuSPARSELt's product, was slower than the dense one for every shape that evaluation/speed.py tried
on an H100, so it is not taken. R rows (out), C columns (in).
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
    """What stays of a linear, and the type of its values: `keep` of the weights, or n of every m in a row
    (`pattern` "n:m").

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
        """What a report calls it: `sparse 2:4`."""
        return f"sparse {self.pattern}"

    def kept(self, columns: int) -> int:
        """Weights that stay in a row of so many, in the mean of the rows."""
        if self.keep is not None:
            return round(self.keep * columns)
        n, m = map(int, self.pattern.split(":"))
        return columns // m * n + min(n, columns % m)

    def choice(self, columns: int) -> Keep:
        """What `methods.sparse` is asked to keep of rows of so many: n of m, or a share that is a whole
        number of each row."""
        if self.keep is not None:
            return self.kept(columns) / columns
        n, m = map(int, self.pattern.split(":"))
        return n, m

    def allows(self, mask_RC: Tensor) -> bool:
        """Whether a mask has as many ones as it must, and n of m nowhere more than n."""
        R, C = mask_RC.shape
        if int(mask_RC.sum()) != R * self.kept(C):
            return False
        if self.keep is not None:
            return True
        n, m = map(int, self.pattern.split(":"))
        return int(nn.functional.pad(mask_RC, (0, -C % m)).unflatten(1, (-1, m)).sum(-1).max()) <= n

    def bits(self, shape: tuple[int, int]) -> float:
        """Bits a weight on disk of a linear [R, C], zeros and their mask included."""
        return 8 * (DTYPES[self.dtype].itemsize * self.kept(shape[1]) + -(-shape[1] // 8)) / shape[1]

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why a linear [R, C] is not stored so, or None."""
        whole = self.kept(shape[1]) in (0, shape[1])
        return f"all or nothing of a row of {shape[1]} weights would stay" if whole else None

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type on the disk of every tensor of a linear [rows, columns], bias apart, by name."""
        return {
            "weight": ((rows * self.kept(columns),), DTYPES[self.dtype]),
            "weight_mask": ((rows, -(-columns // 8)), torch.uint8),
        }

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """What must hold of the stored tensors of a linear; the mask apart, which `read` counts."""
        return [finite(tensors["weight"], "values")]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> SparseWeight:
        """The inverse of `SparseWeight.tensors`, bit for bit. Errors: ModelError."""
        return read(tensors, self, len(tensors["weight_mask"]), columns)

    def inputs(self, input_scale: float | Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """How the kernel rounds what a linear reads: not at all."""
        return None


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """One linear: the values that stay, row by row, and where: mask_RC bool [R, C], True where a weight
    stays."""

    values: Tensor
    mask_RC: Tensor
    layout: SparseLayout

    @classmethod
    def of(cls, W_RC: Tensor, mask_RC: Tensor, layout: SparseLayout) -> SparseWeight:
        """What the mask leaves of W [R, C], rounded to the layout's type. Errors: ValueError for a mask of
        another kind."""
        if not layout.allows(mask_RC):
            raise ValueError(
                f"a mask of {int(mask_RC.sum())} in {tuple(mask_RC.shape)} is not what {layout} leaves"
            )
        return cls(W_RC[mask_RC].to(DTYPES[layout.dtype]).cpu(), mask_RC.cpu(), layout)

    @property
    def zeros(self) -> int:
        """How many weights went."""
        return self.mask_RC.numel() - self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one linear as they lie on the disk, and as the state dict of a SparseLinear names
        them."""
        return {"weight": self.values, "weight_mask": pack_mask(self.mask_RC)}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C]."""
        return fill(self.mask_RC, self.values).to(dtype)


def read(tensors: Mapping[str, Tensor], layout: SparseLayout, rows: int, columns: int) -> SparseWeight:
    """The inverse of `SparseWeight.tensors`, bit for bit. Errors: ModelError for what can't be a linear
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
    """A linear [in_features -> out_features] whose zeros are not stored; `dtype` is that of the model, and of
    the dense weight.

    Gradients go to the input and the bias; the weight has none. Without the dense weight, as when weights are
    offloaded, it is filled in at every forward.
    """

    scheme: SparseLayout
    weight_mask: Tensor
    dense: Tensor | None
    beside = "dense"

    @torch.no_grad()
    def prepare(self) -> None:
        """Fill in the dense weight and keep it, unless the values aren't there (meta)."""
        self.dense = None if self.weight.device.type == "meta" else self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, C]. Errors: ModelError where the stored tensors are nonsense."""
        return read(self.stored(), self.scheme, self.out_features, self.in_features).dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = self.dequantized(input.dtype) if self.dense is None else self.dense.to(input.dtype)
        return nn.functional.linear(input, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        before = self.dense
        super()._apply(fn, recurse)
        if before is not None and self.dense is not None:
            cast = self.dense.dtype != before.dtype  # filled in anew, for the values did not lose what it did
            self.dtype = self.dense.dtype
            if cast or self.dense.device != before.device:
                self.prepare()
        return self

    def extra_repr(self) -> str:
        """What the scheme is, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.name}, keep={self.scheme.keep}"


def linear(weight: SparseWeight, bias: Tensor | None, *, device: torch.device | str = "cpu") -> SparseLinear:
    """A live module, in eval mode and prepared, that holds copies of our values and mask."""
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
