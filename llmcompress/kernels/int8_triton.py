# mypy: ignore-errors
"""The Triton kernels of `int8_dispatch.py`, which documents and launches them."""

import triton
import triton.language as tl


@triton.jit
def code_of(x, scale, largest):
    """Return x / scale rounded to the nearest integer, half to even, in -largest..largest, as float32."""
    code = tl.minimum(tl.maximum(tl.div_rn(x, scale), -largest), largest)
    return (code + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds the fraction away


@triton.jit
def quantize_tokens(
    x_TC,
    step,
    codes,
    scale_T,
    T,
    C,
    largest,
    tiny,
    STATIC: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Each program quantises one token."""
    t = tl.program_id(0).to(tl.int64)
    if STATIC:
        scale = tl.load(step)
    else:
        absmax = tl.zeros([WIDE], tl.float32)
        broken = tl.zeros([WIDE], tl.float32)  # becomes NaN if an x is not finite, which a maximum may hide
        for c in range(0, C, WIDE):
            at = c + tl.arange(0, WIDE)
            x = tl.load(x_TC + t * C + at, mask=at < C, other=0.0).to(tl.float32)
            absmax = tl.maximum(absmax, tl.abs(x))
            broken += x * 0.0
        scale = tl.maximum(tl.div_rn(tl.max(absmax, 0), largest), tiny) + tl.sum(broken, 0)
        tl.store(scale_T + t, scale)
    for c in range(0, C, WIDE):
        at = c + tl.arange(0, WIDE)
        x = tl.load(x_TC + t * C + at, mask=at < C, other=0.0).to(tl.float32)
        code = code_of(x, scale, largest).to(tl.int32)
        if SPLIT:
            high = (code + 128) >> 8
            tl.store(codes + (T + t) * C + at, (code - 256 * high).to(tl.int8), mask=at < C)
            code = high
        tl.store(codes + t * C + at, code.to(tl.int8), mask=at < C)


@triton.jit
def scaled(
    sums,
    scale_T,
    scale_R,
    bias_R,
    out_TR,
    T,
    R,
    PER_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Each program scales WIDE rows of one token."""
    t, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.load(sums + t * R + r, mask=r < R, other=0).to(tl.float32)
    if SPLIT:
        total = total * 256.0 + tl.load(sums + (T + t) * R + r, mask=r < R, other=0).to(tl.float32)
    out = total * tl.load(scale_T + t * PER_TOKEN) * tl.load(scale_R + r, mask=r < R, other=0.0)
    if BIAS:
        out += tl.load(bias_R + r, mask=r < R, other=0.0).to(tl.float32)
    tl.store(out_TR + t * R + r, out.to(out_TR.dtype.element_ty), mask=r < R)


@triton.jit
def few_tokens(
    codes_TC,
    scale_T,
    weight_RC,
    scale_R,
    bias_R,
    out_TR,
    T,
    R,
    C,
    PER_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program computes ROWS rows of all tokens, and reads the weights of these rows."""
    t, r = tl.arange(0, TOKENS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    high = tl.zeros([TOKENS, ROWS], tl.int32)
    low = tl.zeros([TOKENS, ROWS], tl.int32)
    weights, tokens = weight_RC + r.to(tl.int64)[:, None] * C, codes_TC + t[:, None] * C
    for start in range(0, C, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        w = tl.load(weights + c[None, :], mask=(r[:, None] < R) & (c[None, :] < C), other=0)
        inside = (t[:, None] < T) & (c[None, :] < C)
        high += tl.dot(tl.load(tokens + c[None, :], mask=inside, other=0), tl.trans(w), out_dtype=tl.int32)
        if SPLIT:
            low += tl.dot(
                tl.load(tokens + T * C + c[None, :], mask=inside, other=0), tl.trans(w), out_dtype=tl.int32
            )
    total = high.to(tl.float32)
    if SPLIT:
        total = total * 256.0 + low.to(tl.float32)
    scale = tl.load(scale_T + t * PER_TOKEN, mask=t < T, other=0.0)
    out = total * scale[:, None] * tl.load(scale_R + r, mask=r < R, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_TR + t[:, None] * R + r[None, :],
        out.to(out_TR.dtype.element_ty),
        mask=(t[:, None] < T) & (r[None, :] < R),
    )
