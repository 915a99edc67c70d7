"""A linear that multiplies integers: the module of our integer formats.

Its parameters have the names, shapes and bytes on disk, so loading and saving need no conversion. A forward
rounds the tokens, multiplies int8 by int8 into int32 and scales the sums in float32. The result is the
product of the dequantised factors, up to float32 rounding. Unlike Linear8bitLt, it never goes through
float16. Few tokens are multiplied by kernels of ours: on a CPU from the packed weight (packed_gemm.py), on a
GPU by int8_dispatch.py, or by lookup_dispatch.py where inputs are not rounded. For many the kernel is torch's
on a CPU with AVX512 and bitsandbytes' on a GPU. Elsewhere the same integers are summed in float32, which is
exact below 2^24: on other CPUs piece by piece, about as fast as a float weight (bitsandbytes converts the
whole weight in each forward), and on a GPU where C % 4. int4 weights are expanded to int8 once (`prepare`)
and kept beside the packed ones: 1.5 bytes per weight in memory for 0.5 on disk. A module that was not
prepared, for example because its weights are offloaded, expands them in every forward and keeps nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcompress.formats import bitsandbytes_layout, integer
from llmcompress.formats.base import Format, StoredLinear, hold
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.kernels import int8_dispatch, lookup_dispatch, operators, packed_gemm

logger = logging.getLogger(__name__)
# other CPUs multiply int8 one by one, which is slower than floats
KERNEL = torch.backends.cpu.get_cpu_capability() == "AVX512"
LEVELS = torch.arange(-8.0, 8.0)  # of 4-bit codes
FEW = 16  # up to this many tokens, the weight is not dequantised as a whole
PIECE = 2**20  # weights converted to float at a time where there is no kernel: 4 MB, which stay in a cache


class IntegerLinear(StoredLinear):
    """A linear that multiplies integers as `scheme` says.

    Gradients pass straight through the rounding of the activations to the input and the bias; the weight has
    none.
    """

    scheme: IntegerLayout
    weight_scale: Tensor
    weight_multiplier: Tensor
    input_scale: Tensor
    expanded: Tensor | None
    beside = "expanded"

    @torch.no_grad()
    def prepare(self) -> None:
        """Expand a 4-bit weight and keep it. Does nothing for 8 bits, or while the weight is not in memory
        (meta)."""
        self.expanded = None
        if self.scheme.group_size is not None and self.weight.device.type != "meta":
            self.expanded = self.beside_weight(self._expand)

    def _expand(self) -> Tensor:
        codes = integer.unpack(self.weight, self.in_features)
        return integer.expand(codes, self.weight_multiplier, self.scheme.group_size)

    def matrix(self) -> Tensor:
        """The integers that are multiplied, int8 [R, C]; do not write to it."""
        if self.scheme.group_size is None:
            return self.weight[0]
        return self.expanded if self.expanded is not None else self._expand()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, C]. Errors: ModelError if the stored tensors are damaged."""
        return weight_of(self).dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C] to [..., R] in the type of `input`."""
        scheme, traced = self.scheme, operators.traced(input, self.bias)
        step = self.input_scale if scheme.activations == "static" else None
        multiplier_RG = None if scheme.group_size is None else self.weight_multiplier
        stored = self.weight, self.weight_scale, multiplier_RG, step, self.expanded, self.bias
        size, rounded, bits = scheme.group_size or 0, scheme.activations != "none", scheme.activation_bits
        if traced:
            product = torch.ops.llmcompress.integer_linear.default
            out: Tensor = product(input, self.out_features, *stored, size, rounded, bits)
            return out
        if not (torch.is_grad_enabled() and (input.requires_grad or _trained(self.bias))):
            return integer_linear(input, self.out_features, *stored, size, rounded, bits)
        matrix = self.matrix()
        if not rounded:
            return _unrounded(input, matrix, self.weight_scale, self.bias)
        if not input.requires_grad:
            return _product(input, matrix, self.weight_scale, step, bits, self.bias, input.dtype)
        out = _StraightThrough.apply(input, matrix, self.weight_scale, step, bits)  # type: ignore[no-untyped-call]
        return (out if self.bias is None else out + self.bias).to(input.dtype)

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return (
            f"{super().extra_repr()}, {self.scheme.format}, activations={self.scheme.activations}, "
            f"group_size={self.scheme.group_size}"
        )


@operators.operator(
    "integer_linear",
    "Tensor weight, Tensor scale, Tensor? multiplier, Tensor? step, Tensor? expanded, Tensor? bias, "
    "int group_size, bool rounded, int bits",
)
def integer_linear(
    x: Tensor,
    rows: int,
    weight: Tensor,
    scale_R: Tensor,
    multiplier_RG: Tensor | None,
    step: Tensor | None,
    expanded: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rounded: bool,
    bits: int,
) -> Tensor:
    """Multiply x [..., C] by the stored tensors of an IntegerLinear, without a gradient: few tokens on a CPU
    by our kernel. A group size of 0 says that there is one scale per row."""
    C = x.shape[-1]
    few = packed_gemm.FEW_INTEGERS if not group_size and rounded else packed_gemm.FEW
    usable = packed_gemm.usable(x, bias, few) and (not group_size or packed_gemm.takes_groups(group_size, C))
    if usable and _here(weight, scale_R, multiplier_RG, step, bias):
        x_TC = packed_gemm.tokens(x)
        if multiplier_RG is None and rounded:
            rounding: packed_gemm.Rounding = "dynamic" if step is None else "static"
            out_TR = packed_gemm.integers_product(
                x_TC, weight[0], scale_R, bias, bits=bits, rounding=rounding, step=step
            )
        elif multiplier_RG is None:
            out_TR = packed_gemm.floats_product(x_TC, weight[0], scale_R, bias)
        elif rounded:
            out_TR = packed_gemm.nibbles_product(
                x_TC, weight, multiplier_RG, scale_R, group_size, bias, bits=bits, step=step
            )
        else:
            sizes = rows, C, group_size
            table = packed_gemm.table_of(weight, LEVELS, multiplier_RG, *sizes, row_scale=scale_R)
            out_TR = table.product(x_TC, bias)
        return out_TR.to(x.dtype).reshape(*x.shape[:-1], rows)
    if not rounded and _looked_up(x, bias, group_size):
        return _few(x, weight, scale_R, multiplier_RG, bias, group_size)
    if multiplier_RG is None:
        matrix_RC = weight[0]
    elif expanded is not None:
        matrix_RC = expanded
    else:
        matrix_RC = integer.expand(integer.unpack(weight, C), multiplier_RG, group_size)
    if rounded:
        return _product(x, matrix_RC, scale_R, step, bits, bias, x.dtype)
    return _unrounded(x, matrix_RC, scale_R, bias)


def _looked_up(x: Tensor, bias: Tensor | None, group_size: int) -> bool:
    """Whether the GPU kernel for unrounded inputs takes these."""
    fits = not group_size or lookup_dispatch.takes_groups(group_size, x.shape[-1])
    return fits and lookup_dispatch.usable(x, bias)


def _few(
    x: Tensor,
    weight: Tensor,
    scale_R: Tensor,
    multiplier_RG: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """The product of few unrounded tokens on a GPU."""
    x_TC = x.reshape(-1, x.shape[-1])
    if multiplier_RG is None:
        out_TR = lookup_dispatch.few_tokens(x_TC, weight[0], None, 8, row_scale_R=scale_R, bias=bias)
    else:
        out_TR = lookup_dispatch.few_tokens(
            x_TC,
            weight,
            lookup_dispatch.on(x.device, LEVELS)[None],
            4,
            scale_RG=multiplier_RG,
            group_size=group_size,
            row_scale_R=scale_R,
            bias=bias,
        )
    return out_TR.reshape(*x.shape[:-1], len(scale_R))


def _here(*tensors: Tensor | None) -> bool:
    """Whether all tensors are contiguous and on the CPU."""
    return all(one is None or (one.is_cpu and one.is_contiguous()) for one in tensors)


def _trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _unrounded(x: Tensor, matrix_RC: Tensor, scale_R: Tensor, bias: Tensor | None) -> Tensor:
    """The product with unrounded inputs. For few tokens on a CPU the weight is not dequantised as a whole,
    which takes 25 times as long."""
    few = 0 < x[..., 0].numel() <= FEW and x.is_cpu
    if few and not (torch.is_grad_enabled() and x.requires_grad):
        x_TC = x.reshape(-1, x.shape[-1])
        # under torch.compile, the compiler avoids converting the whole weight to float
        whole = torch.compiler.is_compiling()
        out = (x_TC.float() @ matrix_RC.float().t() if whole else float_sums(x_TC, matrix_RC)).mul_(scale_R)
        out = out if bias is None else out + bias
        return out.to(x.dtype).reshape(*x.shape[:-1], len(matrix_RC))
    weight = (matrix_RC.float() * scale_R[:, None]).to(x.dtype)
    return nn.functional.linear(x, weight, bias if bias is None else bias.to(x.dtype))


def scaled(
    sums_TR: Tensor, scale: Tensor, scale_R: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the outputs [T, R], computed in float32 from the sums of products of codes."""
    out = (sums_TR * scale).mul_(scale_R)
    if bias is not None:
        out = out + bias
    return out if out.dtype == dtype else out.to(dtype)


def _product(
    x: Tensor,
    matrix_RC: Tensor,
    scale_R: Tensor,
    step: Tensor | None,
    bits: int,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Round the tokens of x [..., C], multiply integers and scale; returns [..., R]."""
    shape = (*x.shape[:-1], matrix_RC.shape[0])
    if x.numel() == 0:  # the CUDA kernels refuse it
        return x.new_zeros(shape, dtype=dtype)
    if int8_dispatch.usable(x):
        x_TC = x.reshape(-1, x.shape[-1])
        codes_TC, scale = int8_dispatch.quantize_tokens(x_TC, bits, step)
        if len(x_TC) <= int8_dispatch.FEW:
            return int8_dispatch.few_tokens(codes_TC, scale, matrix_RC, scale_R, bias, dtype, bits).reshape(
                shape
            )
        sums_TR = bitsandbytes_layout.stock().int8_linear_matmul(codes_TC, matrix_RC)
        return int8_dispatch.scaled(sums_TR, scale, scale_R, bias, dtype, bits).reshape(shape)
    multiply, whole = bitsandbytes_layout.stock().int8_linear_matmul, None
    if x.is_cpu and not torch.compiler.is_compiling():
        multiply, whole = (
            (integer_sums, None) if KERNEL else (float_sums, torch.float32 if bits <= 8 else None)
        )
        if not KERNEL:
            _warn_of_float_sums()
    codes_TC, scale = integer.quantize_tokens(x, bits, step, whole)
    if bits == 16:  # one product of the split codes, with twice the tokens
        high_TR, low_TR = multiply(integer.split(codes_TC), matrix_RC).float().chunk(2)
        sums_TR = high_TR.mul_(integer.HIGH).add_(low_TR)
    else:
        sums_TR = multiply(codes_TC, matrix_RC)
    return scaled(sums_TR, scale, scale_R, bias, dtype).reshape(shape)


@functools.cache
def _warn_of_float_sums() -> None:
    """Log once that this CPU has no kernel for int8 products."""
    logger.warning(
        "integer linears are summed in float32, about as fast as float ones: this CPU has no AVX512"
    )


def integer_sums(codes_TC: Tensor, matrix_RC: Tensor) -> Tensor:
    """Sums of products of int8 codes, int32 [T, R]. bitsandbytes calls the same function on a CPU with
    AVX512; this skips its overhead."""
    return torch._int_mm(codes_TC, matrix_RC.t())


def float_sums(codes_TC: Tensor, matrix_RC: Tensor) -> Tensor:
    """The same sums in float32, exact below 2^24, for codes of any type or for unrounded inputs.

    The weight is converted to float one piece at a time.
    """
    codes_TC, (R, C) = codes_TC.float(), matrix_RC.shape
    rows = max(1, PIECE // C)
    if rows >= R:
        return codes_TC @ matrix_RC.float().t()
    piece_RC, sums_RT = codes_TC.new_empty(rows, C), codes_TC.new_empty(R, len(codes_TC))
    for start in range(0, R, rows):
        part_RC = matrix_RC[start : start + rows]
        torch.mm(piece_RC[: len(part_RC)].copy_(part_RC), codes_TC.t(), out=sums_RT[start : start + rows])
    return sums_RT.t().contiguous()


class _StraightThrough(torch.autograd.Function):
    """The product; the backward pass treats the activations as not rounded."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix_RC: Tensor, scale_R: Tensor, step: Tensor | None, bits: int
    ) -> Tensor:
        ctx.save_for_backward(matrix_RC, scale_R)
        ctx.dtype = x.dtype
        return _product(x, matrix_RC, scale_R, step, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        matrix_RC, scale_R = ctx.saved_tensors
        # codes up to 127 are exact in bfloat16
        grad = (grads[0] * scale_R).to(ctx.dtype) @ matrix_RC.to(ctx.dtype)
        return grad, None, None, None, None


def linear(
    weight: IntegerWeight, bias: Tensor | None, *, device: torch.device | str = "cpu"
) -> IntegerLinear:
    """Return a live module, prepared and in eval mode, that holds copies of our codes and scales."""
    R, C = weight.codes_RC.shape
    return hold(
        IntegerLinear(C, R, weight.scheme, bias=bias is not None, device="meta"),
        weight.tensors(),
        bias,
        device,
    )


def weight_of(module: IntegerLinear) -> IntegerWeight:
    """The codes and scales of a live module. Errors: ModelError if they are damaged."""
    return integer.read(module.stored(), module.scheme, module.in_features)


def stock(
    weight: integer.Int8Weight, bias: Tensor | None, *, threshold: float, device: torch.device | str = "cpu"
) -> nn.Module:
    """Return a live Linear8bitLt, in eval mode, that holds copies of our codes, as transformers builds it for
    the native layout."""
    # imported here, because it imports bitsandbytes
    from llmcompress.formats import bitsandbytes_linear

    R, C = weight.codes_RC.shape
    module: Any = bitsandbytes_linear.Linear8bitLt(
        C, R, bias=bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    codes = weight.codes_RC.to(device, copy=True)
    module.weight = bitsandbytes_linear.Int8Params(
        codes,
        requires_grad=False,
        has_fp16_weights=False,
        CB=codes,
        SCB=weight.absmax_R.to(device, copy=True),
    )
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().to(device, copy=True), requires_grad=False)
    return cast(nn.Module, module.eval())


def _read(tensors: Mapping[str, Tensor], layout: IntegerLayout, rows: int, columns: int) -> IntegerWeight:
    return integer.read(tensors, layout, columns)


FORMAT = Format(
    names=(),
    layout=IntegerLayout,
    weight=IntegerWeight,
    mark="weight_scale",
    module=IntegerLinear,
    read=_read,
    tensors=IntegerWeight.tensors,
    linear=linear,
)
