"""Steps of an integer linear in few GPU kernels.

The kernels are in `int8_triton.py`; the plain forms are in `formats/integer.py` and
`formats/integer_linear.py`. For many tokens the product of int8 by int8 is bitsandbytes' kernel. The steps
before it (absmax, division, rounding) are one kernel here and those after it (scaling of the sums) are
another, where plain torch launches six and three. For few tokens, as in decoding, the product and the scaling
are one kernel: two in all. Codes equal those of the plain forms bit for bit; outputs differ in the last bits
of float32. Two things were tried on a GPU and left out because they were slower: rounding the tokens in the
kernel of the product, and reading int4 weights from their packed bytes there. T tokens, C columns (in), R
rows (out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.activation_quantization import LARGEST
from llmcompress.kernels.triton_device import TritonKernels, launch, power

FEW = 32  # tokens up to which `few_tokens` is used and not bitsandbytes' product
TINY = float(torch.finfo(torch.float32).tiny)
WIDE = 1024  # columns or rows that a program takes at a time in kernels that read no weights


def _attempt(device: torch.device) -> None:
    codes, scale = quantize_tokens(torch.ones(FEW, 256, device=device), 8)
    for rows in (16, 2**14):
        scale_R = torch.ones(rows, device=device)
        few_tokens(codes, scale, codes.new_ones(rows, 256), scale_R, None, torch.float32, 8)


KERNELS = TritonKernels("int8_triton", _attempt, "integer linears use slower torch operations")


def usable(x: Tensor) -> bool:
    """Whether these kernels take `x`: it is on a GPU that Triton compiles for, and torch.compile is not
    tracing."""
    return x.is_cuda and not torch.compiler.is_compiling() and KERNELS.compiles(x.device)


def quantize_tokens(x_TC: Tensor, bits: int, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the same as integer.quantize_tokens, but 16-bit codes as the two int8 codes of integer.split, [2
    T, C]."""
    (T, C), x_TC = x_TC.shape, x_TC.contiguous()
    codes = torch.empty(2 * T if bits == 16 else T, C, dtype=torch.int8, device=x_TC.device)
    scale_T = torch.empty(T, 1, dtype=torch.float32, device=x_TC.device) if step is None else step
    launch(
        KERNELS.module.quantize_tokens,
        (T,),
        x_TC,
        scale_T,
        codes,
        scale_T,
        T,
        C,
        float(LARGEST[bits]),
        TINY,
        STATIC=step is not None,
        SPLIT=bits == 16,
        WIDE=min(WIDE, power(C)),
        num_warps=4,
    )
    return codes, scale_T


def scaled(
    sums: Tensor, scale: Tensor, scale_R: Tensor, bias: Tensor | None, dtype: torch.dtype, bits: int
) -> Tensor:
    """Return the same as integer_linear.scaled.

    sums are int32 [T, R]; with 16 bits [2 T, R], those of the higher codes first.
    """
    T, R = len(sums) // (2 if bits == 16 else 1), sums.shape[1]
    out_TR = torch.empty(T, R, dtype=dtype, device=sums.device)
    wide = min(WIDE, power(R))
    launch(
        KERNELS.module.scaled,
        (T, -(-R // wide)),
        sums.contiguous(),
        scale,
        scale_R,
        scale_R if bias is None else bias,
        out_TR,
        T,
        R,
        PER_TOKEN=int(scale.numel() > 1),
        SPLIT=bits == 16,
        BIAS=bias is not None,
        WIDE=wide,
        num_warps=4,
    )
    return out_TR


def few_tokens(
    codes: Tensor,
    scale: Tensor,
    matrix_RC: Tensor,
    scale_R: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
) -> Tensor:
    """Return the scaled product [T, R] of the weight's codes and the codes of at most FEW tokens, as from
    `quantize_tokens`."""
    (R, C), T = matrix_RC.shape, len(codes) // (2 if bits == 16 else 1)
    out_TR = torch.empty(T, R, dtype=dtype, device=codes.device)
    tile, add = tiles(R), scale_R if bias is None else bias
    launch(
        KERNELS.module.few_tokens,
        (-(-R // tile["ROWS"]),),
        codes,
        scale,
        matrix_RC,
        scale_R,
        add,
        out_TR,
        T,
        R,
        C,
        PER_TOKEN=int(scale.numel() > 1),
        SPLIT=bits == 16,
        BIAS=bias is not None,
        TOKENS=max(16, power(T)),
        **tile,
    )
    return out_TR


def tiles(rows: int) -> dict[str, int]:
    """Return the launch settings of `few_tokens`: rows and columns of a tile, warps, and the number of
    prefetched tiles."""
    return {
        "ROWS": 16 if rows <= 8192 else 32,
        "COLUMNS": 256,
        "num_warps": 4,
        "num_stages": 6 if rows <= 8192 else 4,
    }
