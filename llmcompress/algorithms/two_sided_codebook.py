"""Codebooks of a linear whose codes and levels are chosen for all rows together.

As in `two_sided`, tr(F E H E^T) is minimised: H weighs the columns of the weight error E, F its rows. Codes
descend on it weight by weight, and levels are its least squares for fixed codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.algorithms.codebook import Codebooks, Palette, Snap, look_up, solve_levels
from llmcompress.algorithms.codebook_loops import PLAIN, CodebookLoops, gathered, places
from llmcompress.algorithms.two_sided import descend_together, diagonal, loss, weighed

ROUNDS = 3
PASSES = 2  # of the codes in each round


def descend_codes(
    W_RC: Tensor,
    H_CC: Tensor,
    F_RB: Tensor,
    palette: Palette,
    *,
    passes: int = PASSES,
    loops: CodebookLoops = PLAIN,
) -> Palette:
    """Return the palette with codes after passes that move each weight to its best level, with all else
    fixed. tr(F E H E^T) never rises. `F_RB` is in blocks, as `two_sided.add_blocks` leaves it."""
    grid, ones = Codebooks.of(palette.levels_GL, palette.rows), W_RC.new_ones(len(W_RC), 1)
    start = palette.index_RC + grid.offsets(len(W_RC))[:, None]
    found = descend_together(W_RC, H_CC, F_RB, start, ones, grid, passes=passes, loops=loops.columns)
    return replace(palette, index_RC=grid.codes[found])


def fit_levels_together(
    W_RC: Tensor, H_CC: Tensor, F_RB: Tensor, palette: Palette, *, steps: int = 16
) -> Tensor:
    """Return levels [G, L] that minimise tr(F E H E^T) for fixed codes.

    The levels returned need not ascend. The normal equations are solved by conjugate gradients from the given
    levels, preconditioned by their diagonal without the products of different weights; no step raises the
    objective, and levels that no weight takes do not change.
    """
    levels_GL, rows = palette.levels_GL, palette.rows
    place_RC = places(palette.index_RC, rows, levels_GL.shape[1])

    def pulled(values_RC: Tensor) -> Tensor:
        return gathered(weighed(F_RB, values_RC @ H_CC), place_RC, levels_GL.shape)

    own_RC = torch.outer(diagonal(F_RB), H_CC.diagonal())
    return solve_levels(
        levels_GL,
        pulled(W_RC - palette.weight()),
        gathered(own_RC, place_RC, levels_GL.shape),
        lambda ahead_GL: pulled(look_up(palette.index_RC, ahead_GL, rows)),
        steps,
        joint=True,
    )


def solve_together(
    W_RC: Tensor,
    H_CC: Tensor,
    F_RB: Tensor,
    palette: Palette,
    *,
    snap: Snap,
    rounds: int = ROUNDS,
    passes: int = PASSES,
    loops: CodebookLoops = PLAIN,
) -> Palette:
    """Return the best codebooks by tr(F E H E^T), from those of `codebook.solve_codebook`: the palette given,
    its codes after a descent, or those after any round of levels and codes. `snap` makes levels storable.

    Source: the objective of YAQA, Tseng et al. 2025, arXiv:2505.22988, on codebooks that are solved for too.
    """
    best = new = palette
    least = _lost(W_RC, H_CC, F_RB, palette)
    for number in range(rounds + 1):
        if number:
            levels, order = snap(fit_levels_together(W_RC, H_CC, F_RB, new)).sort(dim=1, stable=True)
            new = Palette(look_up(new.index_RC, order.argsort(dim=1), new.rows), levels, new.rows)
        new = descend_codes(W_RC, H_CC, F_RB, new, passes=passes, loops=loops)
        lost = _lost(W_RC, H_CC, F_RB, new)
        if lost < least:
            best, least = new, lost
    return best


def _lost(W_RC: Tensor, H_CC: Tensor, F_RB: Tensor, palette: Palette) -> float:
    return float(loss(W_RC - palette.weight(), H_CC, F_RB))
