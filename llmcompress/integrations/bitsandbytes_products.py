"""Products of few tokens by bitsandbytes' own linears on a CPU, from the packed weight by our kernel.

Importing llmcompress wraps the forwards of `Linear4bit` and `Linear8bitLt`, so that models in a native layout
decode faster. bitsandbytes converts the whole weight in each forward on CPUs without AVX512-BF16 (4 bits) or
without AVX512 (int8). Codes of tokens, sums and outputs of int8 are bitsandbytes' own, bit for bit. 4-bit
weights are those that bitsandbytes dequantises to float32, and sums are float32 too. What our kernel does not
take goes to bitsandbytes: many tokens, gradients, other devices, autocast, and 4-bit linears on CPUs with
AVX512-BF16, where bitsandbytes repacks the weight for a kernel of its own. torch.compile sees one operator.
LLMCOMPRESS_BITSANDBYTES=0 leaves bitsandbytes as it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmcompress.kernels import operators, packed_gemm

NESTED_GROUP = 256  # scales that share one nested scale, in the kernel as in bitsandbytes
# a linear -> where its weight was when a table was made of it, and that table
TABLES: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], packed_gemm.Table]] = WeakKeyDictionary()


def four_bit(module: Any, x: Tensor) -> Tensor | None:
    """The output [..., R] of a Linear4bit for x [..., C] in the type of x, or None where bitsandbytes has to
    compute it."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or module.support_avx512bf16_for_cpu:
        return None
    traced = operators.traced(x, module.bias) and module.weight.dtype == torch.uint8 and _available()
    if not traced and not packed_gemm.usable(x, module.bias):
        return None
    if len(state.shape) != 2 or x.shape[-1] != state.shape[1] or state.shape[1] % state.blocksize:
        return None
    if state.blocksize % packed_gemm.UNIT or not module.weight.is_cpu or state.absmax.device.type != "cpu":
        return None
    if not state.nested and state.absmax.dtype != torch.float32:
        return None
    if state.nested and state.state2.blocksize != NESTED_GROUP:
        return None
    module_dtype = module.compute_dtype if module.compute_type_is_set else None
    inputs = x if module_dtype is None else x.to(module_dtype)
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    if traced:
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else 3 * (None,)
        stored = module.weight, state.code, state.absmax, *nested, bias, state.blocksize
        out: Tensor = torch.ops.llmcompress.bitsandbytes_four_bit.default(inputs, state.shape[0], *stored)
        return out.to(x.dtype)
    return _table(module, state).linear(inputs, bias).to(x.dtype)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _available() -> bool:
    """Whether there is a kernel, which a compiler need not trace."""
    return packed_gemm.KERNEL.available


@operators.operator(
    "bitsandbytes_four_bit",
    "Tensor weight, Tensor levels, Tensor absmax, Tensor? nested_absmax, Tensor? nested_levels, "
    "Tensor? offset, Tensor? bias, int group_size",
)
def _four_bit(
    x: Tensor,
    rows: int,
    weight: Tensor,
    levels: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_levels: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """Multiply x [..., C] by the weight of a Linear4bit by our kernel, for many tokens a piece of the weight
    at a time."""
    nested = None
    if nested_absmax is not None and nested_levels is not None and offset is not None:
        nested = nested_absmax, nested_levels.float(), offset.float().reshape(1)
    sizes = rows, x.shape[-1], group_size
    table = packed_gemm.table_of(weight, levels.float().contiguous(), absmax, *sizes, nested)
    return table.linear(x, bias)


def _table(module: Any, state: Any) -> packed_gemm.Table:
    """The weight of a Linear4bit as the kernel takes it, kept while it is where it was."""
    data, absmax = module.weight.data, state.absmax
    place = data.data_ptr(), absmax.data_ptr(), state.blocksize
    before, table = TABLES.get(module, (None, None))
    if table is not None and before == place:
        return table
    nested: tuple[Tensor, ...] = ()
    if state.nested:
        nested = (state.state2.absmax, state.state2.code.float(), state.offset.float().reshape(1))
    R, C = state.shape
    made = packed_gemm.Table(
        data.reshape(-1).view(torch.uint8),
        state.code.float().contiguous(),
        absmax,
        R,
        C,
        state.blocksize,
        *nested,
    )
    TABLES[module] = place, made
    return made


def int8(module: Any, x: Tensor) -> Tensor | None:
    """The output [..., R] of a Linear8bitLt for x [..., C] in the type of x, or None where bitsandbytes has
    to compute it, as it does with inputs that reach the threshold."""
    state = module.state
    traced = operators.traced(x, module.bias) and not module.training and _available()
    few = packed_gemm.FEW_INTEGERS
    if state.has_fp16_weights or not (traced or packed_gemm.usable(x, module.bias, few)):
        return None
    if module.weight.CB is not None:
        module.init_8bit_state()
    codes, scale = state.CB, state.SCB
    if (
        codes is None
        or scale is None
        or not (codes.is_cpu and codes.dtype == torch.int8 and codes.is_contiguous())
    ):
        return None
    bias = None if module.bias is None else module.bias.to(x.dtype)
    if traced:
        product = torch.ops.llmcompress.bitsandbytes_int8.default
        out: Tensor = product(x, codes.shape[0], codes, scale, bias, float(state.threshold))
        return out
    return _few_int8(x, codes, scale, bias, state.threshold)


def _few_int8(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float
) -> Tensor | None:
    """The product by our kernel, or None if inputs reach the threshold."""
    half = x.reshape(-1, x.shape[-1]).to(torch.float16)  # bitsandbytes takes inputs through it
    if threshold > 0 and bool((half.abs() >= threshold).any()):
        return None
    out = packed_gemm.integers_product(half.float(), codes, scale.float(), bias, rounding="llm_int8")
    return out.to(x.dtype).reshape(*x.shape[:-1], len(codes))


@operators.operator("bitsandbytes_int8", "Tensor codes, Tensor scale, Tensor? bias, float threshold")
def _int8(
    x: Tensor, rows: int, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """Multiply x [..., C] by the codes of a Linear8bitLt: few tokens by our kernel, all else by
    bitsandbytes."""
    if packed_gemm.usable(x, bias, packed_gemm.FEW_INTEGERS):
        out = _few_int8(x, codes, scale, bias, threshold)
        if out is not None:
            return out
    bitsandbytes: Any = import_module("bitsandbytes")
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = codes, scale, threshold, False
    state.is_training = False  # else inputs would not be rounded
    found: Tensor = bitsandbytes.matmul(x, codes, bias=bias, state=state)
    return found
