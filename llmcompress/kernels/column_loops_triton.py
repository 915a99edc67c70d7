# mypy: ignore-errors
"""The Triton kernels of `column_loops_gpu.py`, which documents and launches them."""

import triton
import triton.language as tl


@triton.jit
def level_of(x, middles, count, HALVINGS: tl.constexpr):
    """Return the number of the `count` ascending midpoints that are below x, by binary search."""
    found = tl.zeros(x.shape, tl.int32)
    for halving in tl.static_range(HALVINGS):
        half = 1 << (HALVINGS - 1 - halving)
        at = found + (half - 1)
        middle = tl.load(middles + at, mask=at < count, other=float("inf"))
        found += tl.where(x > middle, half, 0)
    return found


@triton.jit
def search(
    weight,
    h_C,
    levels,
    middles,
    count,
    ratios,
    tried,
    scales,
    groups,
    of_row,
    size,
    HALVINGS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Each program finds the scales of GROUPS groups of `size` weights, `of_row` of which make a row."""
    g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    w_at, h_at, wide = weight + g[:, None] * size, h_C + (g % of_row)[:, None] * size, tl.arange(0, WIDE)
    top = tl.zeros([GROUPS], tl.float32)
    for start in range(0, size, WIDE):
        c = (start + wide)[None, :]
        w = tl.load(w_at + c, mask=(g[:, None] < groups) & (c < size), other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(w), 1))
    top = tl.where(top > 0, top, 1.0)
    best, least = top, tl.full([GROUPS], float("inf"), tl.float32)
    for attempt in range(tried):
        scale = top * tl.load(ratios + attempt)
        error = tl.zeros([GROUPS], tl.float32)
        for start in range(0, size, WIDE):
            c = (start + wide)[None, :]
            inside = (g[:, None] < groups) & (c < size)
            w, h = tl.load(w_at + c, mask=inside, other=0.0), tl.load(h_at + c, mask=inside, other=0.0)
            spread = tl.broadcast_to(scale[:, None], w.shape)
            level = tl.load(levels + level_of(tl.div_rn(w, spread), middles, count, HALVINGS))
            lost = w - level * spread
            error += tl.sum(lost * lost * h, 1)
        better = error < least
        best, least = tl.where(better, scale, best), tl.where(better, error, least)
    tl.store(scales + g, best, mask=g < groups)


@triton.jit
def fix_columns(
    near,
    square,
    stride,
    old,
    scale,
    levels,
    middles,
    count,
    index,
    step,
    width,
    R,
    MOVE: tl.constexpr,
    HALVINGS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program fixes the columns of a block one by one, for ROWS rows; matrices are [columns, R].

    A column's steps are kept, and what they push onto a later column is summed when its turn comes. `square`
    is the block of the inverse factor, and a step the error over its diagonal; with MOVE it is the block of
    the second moments, and a step the difference to the `old` weight.
    """
    r, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside, steps = r < R, tl.zeros([WIDTH, ROWS], tl.float32)
    for c in range(width):
        at = c * R + r
        by = tl.load(square + (c * stride + b if MOVE else b * stride + c), mask=b < c, other=0.0)
        x = tl.load(near + at, mask=inside, other=0.0) - tl.sum(by[:, None] * steps, 0)
        s = tl.load(scale + at, mask=inside, other=1.0)
        diagonal = tl.zeros([ROWS], tl.float32) + tl.load(square + c * stride + c)
        pivot = tl.where(diagonal > 0, diagonal, 1.0)
        if MOVE:
            before = tl.load(old + at, mask=inside, other=0.0)
            x = before + tl.div_rn(x, pivot)
        found = level_of(tl.div_rn(x, s), middles, count, HALVINGS)
        value = tl.load(levels + found) * s
        if MOVE:
            moved = tl.where(diagonal > 0, value - before, 0.0)
            tl.store(index + at, found.to(tl.int64), mask=inside & (diagonal > 0))
        else:
            moved = tl.div_rn(x - value, pivot)
            tl.store(index + at, found.to(tl.int64), mask=inside)
        tl.store(step + at, moved, mask=inside)
        steps = tl.where(b[:, None] == c, moved[None, :], steps)
