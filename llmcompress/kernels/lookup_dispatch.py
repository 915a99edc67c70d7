"""Products of few tokens and weights that torch would dequantise as a whole, by one GPU kernel.

The kernel is in `lookup_triton.py`. It reads each code once in its packed form, as decoding needs it, where
plain torch writes the whole weight and reads it again. It takes codebooks, 4-bit codes with a scale per group
(q4_0, iq4_nl, int4) and int8 codes whose inputs are not rounded. nf4 and fp4 are left to bitsandbytes, which
has kernels for few tokens that are tuned for each GPU. Levels are multiplied with the scale of their group in
float32 and rounded to the type of the input, sums are float32. Triton's interpreter ran it, and its compiler
took it for compute capability 8.0 and 9.0; it was not timed on a GPU yet. T tokens, C columns (in), R rows
(out), B bytes of a row, G groups of a row, L levels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llmcompress.kernels.triton_device import TritonKernels, launch, power

FEW = 32  # tokens up to which the kernel is used
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 64  # units of codes that a program takes at a time


def _attempt(device: torch.device) -> None:
    levels = torch.arange(16.0, device=device)[None]
    packed = torch.zeros(16, 128, dtype=torch.uint8, device=device)
    for dtype in DTYPES:
        x_TC = torch.ones(FEW, 256, dtype=dtype, device=device)
        few_tokens(x_TC, packed, levels, 4, scale_RG=torch.ones(16, 4, device=device), group_size=64)


KERNELS = TritonKernels("lookup_triton", _attempt, "weights of few bits are dequantised in each forward")


def usable(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the kernel multiplies inputs [..., C]: at most FEW tokens in a float type, on a GPU that Triton
    compiles for, where no gradient is asked for and neither torch.compile nor autocast decides what is
    run."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and 0 < x.numel() <= FEW * x.shape[-1]
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cuda")
        and KERNELS.compiles(x.device)
    )


@functools.cache
def on(device: torch.device, levels: Tensor) -> Tensor:
    """Return levels that never change, on a device; they are copied there once."""
    return levels.to(device)


def takes_groups(group_size: int, columns: int) -> bool:
    """Whether the kernel takes groups of this size."""
    return group_size >= columns or (group_size >= 32 and group_size == power(group_size))


def few_tokens(
    x_TC: Tensor,
    packed_RB: Tensor,
    levels_GL: Tensor | None,
    bits: int,
    *,
    sharing: int | None = None,
    scale_RG: Tensor | None = None,
    group_size: int = 0,
    row_scale_R: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x W^T + bias, [T, R] in the type of x, for at most FEW tokens.

    Args:
        x_TC: [T, C] in float32, bfloat16 or float16.
        packed_RB: codes of 2, 3, 4 or 8 bits as `codebook.pack` packs them, uint8 [R, B]; or int8 [R, C].
        levels_GL: the values of codes, [codebooks, 2^bits] in any float type; None for int8, whose codes are
            the values.
        bits: bits of a code.
        sharing: adjacent rows that share a codebook; None if all do.
        scale_RG: the scales of groups, by which values are multiplied, in any float type or uint8.
        group_size: columns of a group: a power of two, or all of a row.
        row_scale_R: float32 [R], by which outputs are multiplied before the bias.
        bias: [R] in any float type.

    Raises:
        ValueError: the shapes don't fit each other.
    """
    (T, C), (R, B) = x_TC.shape, packed_RB.shape
    size = 3 if bits == 3 else 1
    count, tile, G = 8 * size // bits, _tile(bits), 1
    fits = bits in (2, 3, 4, 8) and size * -(-C // count) == B and T <= FEW
    if levels_GL is None:
        fits = fits and packed_RB.dtype == torch.int8
    else:
        shape = (-(-R // (sharing or R)), 2**bits)
        fits = fits and packed_RB.dtype == torch.uint8 and levels_GL.shape == shape
    if scale_RG is None or group_size >= C:
        group_size = TILE * count * power(C)  # one group, whatever the tile
    else:
        G = -(-C // group_size)
        fits = fits and takes_groups(group_size, C)
    if not fits or (scale_RG is not None and scale_RG.shape != (R, G)):
        raise ValueError(
            f"{T} tokens of {C} columns don't fit codes {tuple(packed_RB.shape)} of {bits} bits in "
            f"{packed_RB.dtype}, with levels {_shape(levels_GL)} and scales {_shape(scale_RG)}"
        )
    x_TC, out_TR = x_TC.contiguous(), torch.empty(T, R, dtype=x_TC.dtype, device=x_TC.device)
    tensors = (levels_GL, scale_RG, row_scale_R, bias)
    launch(
        KERNELS.module.few_tokens,
        (-(-R // tile["ROWS"]),),
        x_TC,
        packed_RB.contiguous(),
        *(out_TR if tensor is None else tensor.contiguous() for tensor in tensors),
        out_TR,
        T,
        R,
        C,
        B,
        sharing or R,
        group_size,
        G,
        BITS=bits,
        LOOKED_UP=levels_GL is not None,
        SCALED=scale_RG is not None,
        ROW_SCALED=row_scale_R is not None,
        BIAS=bias is not None,
        GROUPS=max(1, tile["UNITS"] * count // group_size),
        TOKENS=max(16, power(T)),
        **tile,
    )
    return out_TR


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _tile(bits: int) -> dict[str, int]:
    """Return the launch settings: rows and units of a tile, warps, and the number of prefetched tiles."""
    return {"ROWS": 16, "UNITS": 32 if bits < 4 else TILE, "num_warps": 4, "num_stages": 4}
