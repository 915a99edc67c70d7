"""Live linears of bitsandbytes: the stock modules, and the 4-bit module that keeps our exact scales.

Importing this file imports bitsandbytes, which takes more than a second, so it is imported where modules are
built. What lies on the disk is `bitsandbytes_layout`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout  # before bitsandbytes: it is then imported quietly

# isort: split
from bitsandbytes.nn.modules import Int8Params as Int8Params
from bitsandbytes.nn.modules import Linear4bit as StockLinear4bit
from bitsandbytes.nn.modules import Linear8bitLt as Linear8bitLt
from bitsandbytes.nn.modules import Params4bit

LINEARS = (StockLinear4bit, Linear8bitLt)  # the modules that transformers builds for bitsandbytes' layouts


class Linear4bit(StockLinear4bit):
    """bitsandbytes' linear, but it keeps its exact scales and passes gradients to its input.

    On CPUs with AVX512-BF16, the first forward without gradients repacks a stock module in place and rounds
    its scales to bfloat16. A later `state_dict()` returns the rounded scales and leaves the module computing
    with scrambled ones (measured: relative error 1.5). Here `kept` holds all tensors of the layout except the
    codes, and the state dict is built from them. The kernel for repacked weights also has no gradient, and a
    stock module silently passes none back. Here a forward that needs one uses the dequantised weight.
    """

    kept: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] to [..., R] in the type of x."""
        repacked = getattr(cast(Any, self.weight).quant_state, "packing_format_for_cpu", False)
        if repacked and torch.is_grad_enabled() and x.requires_grad:
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(
                x.to(dtype), bitsandbytes_layout.dequantize(packed_of(self), dtype), bias
            ).to(x.dtype)
        return cast(Tensor, super().forward(x))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in bitsandbytes_layout.tensors(packed_of(self)).items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


def linear(
    packed: bitsandbytes_layout.Packed,
    bias: Tensor | None,
    *,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Linear4bit:
    """Return a live module, in eval mode, that holds our codes and runs on the kernels. It computes in
    packed.dtype unless `compute_dtype` is given."""
    R, C = packed.codes_RC.shape
    module: Linear4bit = cast(Any, Linear4bit)(
        C,
        R,
        bias=bias is not None,
        compute_dtype=compute_dtype or packed.dtype,
        compress_statistics=packed.double_quant,
        quant_type=packed.format,
        device="meta",  # no float weight is allocated
    )
    stored = {
        name: tensor.to(device, copy=True) for name, tensor in bitsandbytes_layout.tensors(packed).items()
    }
    data = stored.pop("weight")
    module.kept = stored
    module.weight = Params4bit.from_prequantized(data, dict(stored), device=device, module=module)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().to(device, copy=True), requires_grad=False)
    return module.eval()


def packed_of(module: StockLinear4bit) -> bitsandbytes_layout.Packed:
    """The codes and exact scales of a live 4-bit linear, even after a forward on a CPU repacked it.

    Errors: ModelError for a repacked module that `linear` didn't make: its exact scales are lost.
    """
    data, state = module.weight.data, cast(Any, module.weight).quant_state
    kept: dict[str, Tensor] | None = getattr(module, "kept", None)
    if scales_lost(module):
        raise ModelError(
            "a forward on a CPU rounded the scales of this 4-bit model; load it again to read or save it"
        )
    if getattr(state, "packing_format_for_cpu", False):
        state = copy.copy(state)  # the inverse modifies it
        # else the inverse quantises the rounded scales again; they are not used
        state.original_nested = False
        data, state = bitsandbytes_layout.stock()._convert_weight_packed_for_cpu_inverse(data, state)
    return (
        bitsandbytes_layout.unpack({"weight": data, **kept})
        if kept is not None
        else bitsandbytes_layout.read(data, state)
    )


def scales_lost(module: nn.Module) -> bool:
    """Whether a module is a stock 4-bit linear whose scales a forward on a CPU rounded.

    This stays true after `state_dict()` or `cuda()` turns the codes back. The scales are then bfloat16 and
    transposed or, if they were stored in 8 bits, quantised again, which no dtype shows.
    """
    if not isinstance(module, StockLinear4bit) or hasattr(module, "kept"):
        return False
    state = getattr(module.weight, "quant_state", None)
    return state is not None and "packing_format_for_cpu" in vars(state)
