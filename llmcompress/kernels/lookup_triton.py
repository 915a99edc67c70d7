# mypy: ignore-errors
"""The Triton kernel of `lookup_dispatch.py`, which documents and launches it."""

import triton
import triton.language as tl


@triton.jit
def few_tokens(
    x_TC,
    packed_RB,
    levels_GL,
    scale_RG,
    row_scale_R,
    bias_R,
    out_TR,
    T,
    R,
    C,
    B,
    sharing,
    group_size,
    groups,
    BITS: tl.constexpr,
    LOOKED_UP: tl.constexpr,
    SCALED: tl.constexpr,
    ROW_SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Each program computes ROWS rows of all tokens, and reads the codes of these rows once.

    A unit is the fewest codes that fill whole bytes; of a tile of UNITS units all first codes are multiplied,
    then all second ones, so that codes need not be put in the order of the columns.
    """
    SIZE: tl.constexpr = 3 if BITS == 3 else 1
    COUNT: tl.constexpr = 8 * SIZE // BITS
    t, r = tl.arange(0, TOKENS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(r, R - 1)
    packed, table = (
        packed_RB + near.to(tl.int64)[:, None] * B,
        levels_GL + (near // sharing)[:, None] * 2**BITS,
    )
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, B // SIZE, UNITS):
        u = start + tl.arange(0, UNITS)
        inside = u < B // SIZE
        word = tl.zeros([ROWS, UNITS], tl.int32)
        for place in tl.static_range(SIZE):
            byte = tl.load(packed + u[None, :] * SIZE + place, mask=inside[None, :], other=0)
            word = (word << 8) | byte.to(tl.int32)
        if SCALED:
            g = start * COUNT // group_size + tl.arange(0, GROUPS)
            scale = tl.load(
                scale_RG + near.to(tl.int64)[:, None] * groups + g[None, :], mask=g[None, :] < groups, other=0
            )
            scale = tl.reshape(
                tl.broadcast_to(scale.to(tl.float32)[:, :, None], [ROWS, GROUPS, UNITS // GROUPS]),
                [ROWS, UNITS],
            )
        for place in tl.static_range(COUNT):
            code = (word >> (8 * SIZE - BITS * (place + 1))) & (2**BITS - 1)
            w = tl.load(table + code).to(tl.float32) if LOOKED_UP else word.to(tl.float32)
            if SCALED:
                w = w * scale
            c = u * COUNT + place
            x = tl.load(
                x_TC + t.to(tl.int64)[:, None] * C + c[None, :],
                mask=(t[:, None] < T) & (c[None, :] < C),
                other=0.0,
            )
            total += tl.dot(x, tl.trans(w.to(x.dtype)), input_precision="ieee")
    if ROW_SCALED:
        total = total * tl.load(row_scale_R + near)[None, :]
    if BIAS:
        total += tl.load(bias_R + near).to(tl.float32)[None, :]
    tl.store(
        out_TR + t.to(tl.int64)[:, None] * R + r[None, :],
        total.to(out_TR.dtype.element_ty),
        mask=(t[:, None] < T) & (r[None, :] < R),
    )
