"""What all formats share: modules whose parameters are the stored tensors, and how inputs are rounded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from llmcompress.formats.value_checks import Flaw, finite, require_sound

# the input of a linear -> the same input, rounded as the kernel rounds it
Inputs = Callable[[Tensor], Tensor]
Derived = TypeVar("Derived", bound=Tensor | nn.Module)
# types of values that are stored as floats
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# weight -> its device, address and version when a tensor or module was derived from it, and a weak reference
# to what was derived
DERIVED: Any = WeakTensorKeyDictionary()


class StoredLayout(Protocol):
    """The tensors on disk of a linear: the shape and type of each by name, and what must hold of their
    values."""

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and type of each tensor of a linear [rows, columns], without its bias."""

    def flaws(self, tensors: Mapping[str, Tensor]) -> list[Flaw]:
        """The checks of these tensors, without the bias."""


class StoredModule(nn.Module):
    """A module for a matrix [rows, columns] whose parameters are the tensors on disk; their memory is not
    initialised.

    `scheme.shapes` lists these tensors; a bias is added to them.
    """

    scheme: StoredLayout
    # True: the tensors keep the types of the layout. False: they have the model's type and are cast with it.
    exact = True

    def _store(
        self,
        scheme: StoredLayout,
        rows: int,
        columns: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register the parameters; called once, at construction."""
        self.scheme, self.rows, self.columns = scheme, rows, columns
        for name, (shape, stored) in scheme.shapes(rows, columns).items():
            empty = torch.empty(shape, dtype=stored if self.exact else dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def prepare(self) -> None:
        """Make and keep what the forward needs beside the stored tensors. Does nothing while these are not in
        memory (meta)."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [rows, columns]. Errors: ModelError if the stored tensors are damaged."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The tensors on disk by name, without the bias."""
        return {
            name: parameter.data for name, parameter in self.named_parameters(recurse=False) if name != "bias"
        }

    def require_sound(self, name: str) -> None:
        """Raise ModelError if values are damaged; the message calls the module `name`. Does nothing while
        they are not in memory (meta)."""
        if not any(parameter.is_meta for parameter in self.parameters(recurse=False)):
            bias = getattr(self, "bias", None)
            require_sound(
                name,
                [*self.scheme.flaws(self.stored()), *([] if bias is None else [finite(bias, "the bias")])],
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredModule:
        """Keep the types of the stored tensors when a model is cast: scales stay float32, codes stay
        integers."""
        exact = self.stored() if self.exact else {}
        cast(Any, super())._apply(fn, recurse)
        for name, data in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self


class StoredLinear(StoredModule, nn.Linear):
    """A linear [in_features -> out_features] whose parameters are those of a StoredModule; `dtype` is the
    type of the model and of the bias."""

    transposed = False  # whether it replaces transformers' Conv1D, which stores [C, R]
    beside: str | None = None  # the buffer that `prepare` fills, if it has one

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: StoredLayout,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # skips nn.Linear's, which allocates a float weight
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype or torch.float32
        self._store(scheme, out_features, in_features, device, dtype)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        if self.beside is not None:
            self.register_buffer(self.beside, None, persistent=False)
        cast(Any, self).register_load_state_dict_post_hook(_prepare_anew)

    def prepare(self) -> None:
        """Check the stored tensors, which are all that the forward needs. Errors: ModelError if they are
        damaged."""
        self.require_sound(f"a linear of {self.out_features} x {self.in_features}")

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, C]. Errors: ModelError if the stored tensors are damaged."""
        weight = cast(Any, self.scheme).read(self.stored(), self.in_features)
        return cast(Tensor, weight.dequantize(dtype))

    def beside_weight(self, make: Callable[[], Derived]) -> Derived:
        """Return what `make` derives from the weight, computed once for all linears that share this
        weight."""
        weight = self.weight
        now = weight.device, weight.data_ptr(), weight._version
        before, held = DERIVED.get(weight, (None, lambda: None))
        if before == now and (found := held()) is not None:
            return cast(Derived, found)
        made = make()
        DERIVED[weight] = now, weakref.ref(made)
        return made


def _prepare_anew(module: StoredLinear, _: object) -> None:
    module.prepare()


Module = TypeVar("Module", bound=StoredLinear)


def hold(
    module: Module, tensors: Mapping[str, Tensor], bias: Tensor | None, device: torch.device | str
) -> Module:
    """Register copies of the stored tensors in an empty module, prepare it, and return it in eval mode."""
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor.to(device, copy=True), requires_grad=False))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().to(device, copy=True), requires_grad=False)
    module.prepare()
    return module.eval()


@dataclass(frozen=True)
class Format:
    """What the rest of the package needs to know of one of our weight formats; each format file defines one
    as FORMAT.

    A layout is the entry of config.json that describes a linear. A weight is such a linear [R, C] in memory:
    its codes, scales and other tensors.
    """

    names: tuple[str, ...]  # values of `format` in config.json; empty: every name that no other format has
    layout: type[Any]
    weight: type[Any]
    mark: str  # name of a tensor that only linears of this format have beside `weight`
    module: type[StoredLinear]  # the module that runs it
    # tensors, layout, rows R, columns C -> weight
    read: Callable[[Mapping[str, Tensor], Any, int, int], Any]
    # weight -> the tensors on disk, by their names in the linear
    tensors: Callable[[Any], dict[str, Tensor]]
    linear: Callable[..., StoredLinear]  # weight, bias, device= -> a live module that holds copies
