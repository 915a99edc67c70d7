"""Channel scales that move the difficulty of rounding from inputs to weights, or from some columns to others.

Multiplying a column of every linear that reads a channel by s and the channel by 1 / s changes only what is
rounded. An input channel much larger than the rest costs its whole token precision (SmoothQuant). A column
that reads large inputs deserves finer steps than its group gives it (AWQ). The strength is one exponent,
which is searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENTS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS, RATE = 200, 0.03  # of the fit, by Adam on the logarithm of the factors
WIDEST = 2.0**12  # largest factor, and its inverse the smallest; beyond it half precision loses the norm


def smoothquant(input_top: Tensor, weight_top: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel's weights: input_top^alpha / weight_top^(1 - alpha), with geometric
    mean one.

    Channels whose inputs or weights are all zero keep a factor of one. input_top, weight_top: largest
    absolute value of each channel, float32, of any one shape.

    Source: Xiao et al. 2022, arXiv:2211.10438, equation 4.
    """
    alive = (input_top > 0) & (weight_top > 0)
    raw = torch.where(
        alive, input_top.clamp_min(1e-12) ** alpha / weight_top.clamp_min(1e-12) ** (1 - alpha), 1.0
    )
    return _centred(raw, alive)


def awq(input_size: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel's weights: input_size^alpha, with geometric mean one.

    input_size is the typical size of each channel.

    Source: Lin et al. 2023, arXiv:2306.00978, equation 5.
    """
    alive = input_size > 0
    return _centred(torch.where(alive, input_size.clamp_min(1e-12) ** alpha, 1.0), alive)


def fitted(
    X_TC: Tensor,
    W_RC: Tensor,
    unit_C: Tensor,
    start_U: Tensor,
    *,
    input_largest: int | None,
    weight_largest: int,
    group_size: int,
) -> Tensor:
    """Return the factor [U] of the units' weights with the least expected rounding error, by gradient descent
    from `start_U`.

    Rounding x to multiples of a step d adds noise of variance d^2 / 12. Steps are absmax / largest, for each
    token of the inputs X (if `input_largest` is None, inputs are not rounded) and for each group of a row of
    W. Then the expected squared error of X W^T is 1 / 12 of

        mean_t max_c (x_tc / s_c)^2 sum_c s_c^2 |w_c|^2 / largest_x^2
          + sum_rb max_c (w_rc s_c)^2 sum_c E x_c^2 / s_c^2 / largest_w^2

    where c in the second term runs over the columns of group b. unit_C: the unit of each column. To weight
    tokens unequally, scale the rows of X.
    """
    log_U = start_U.clamp_min(1e-12).log()
    noise = _Noise(X_TC, W_RC, group_size, input_largest, weight_largest)
    optimizer = torch.optim.Adam([log_U], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss, slope_C = noise.at((2 * log_U).exp()[unit_C])
        relative_C = 2 * slope_C / loss.clamp_min(torch.finfo(loss.dtype).tiny)
        log_U.grad = torch.zeros_like(log_U).index_add_(0, unit_C, relative_C)
        optimizer.step()
        schedule.step()
    found = log_U.exp()
    return _centred(found, torch.ones_like(found, dtype=torch.bool))


class _Noise:
    """The expected squared error of `fitted`. Its maxima depend on one column each, so its gradient is
    written out: autograd would go through the whole of X and W for them."""

    def __init__(
        self, X_TC: Tensor, W_RC: Tensor, group_size: int, input_largest: int | None, weight_largest: int
    ) -> None:
        self.size_C, self.weight_C = X_TC.square().mean(0), W_RC.square().sum(0)
        self.X, self.W = X_TC.square(), W_RC.square()
        self.group_size, self.input_largest, self.weight_largest = group_size, input_largest, weight_largest

    def at(self, square_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error for squared factors [C], and its derivative by the logarithm of each [C]."""
        loss, slope_C = self._of_weights(square_C)
        if self.input_largest is not None:
            more, slopes_C = self._of_inputs(square_C, self.input_largest)
            loss, slope_C = loss + more, slope_C + slopes_C
        return loss, slope_C

    def _of_weights(self, square_C: Tensor) -> tuple[Tensor, Tensor]:
        R, size = len(self.W), self.group_size
        top_RB, where_RB = (self.W * square_C).reshape(R, -1, size).max(-1)
        column_RB = where_RB + size * torch.arange(top_RB.shape[1], device=where_RB.device)
        cost_C = self.size_C / square_C
        cost_B, steps_B = cost_C.reshape(-1, size).sum(-1), top_RB.sum(0)
        top_C = torch.zeros_like(square_C).index_add_(0, column_RB.flatten(), top_RB.flatten())
        slope_C = top_C * cost_B.repeat_interleave(size) - steps_B.repeat_interleave(size) * cost_C
        return steps_B @ cost_B / self.weight_largest**2, slope_C / self.weight_largest**2

    def _of_inputs(self, square_C: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        top_T, column_T = (self.X / square_C).max(1)
        steps, taken_C = top_T.mean(), square_C * self.weight_C
        top_C = torch.zeros_like(square_C).index_add_(0, column_T, top_T / len(top_T))
        whole = taken_C.sum()
        return steps * whole / largest**2, (steps * taken_C - top_C * whole) / largest**2


def _centred(factor: Tensor, alive: Tensor) -> Tensor:
    if not bool(alive.any()):
        return torch.ones_like(factor)
    middle = factor[alive].log().mean().exp()
    return torch.where(alive, (factor / middle).clamp(1 / WIDEST, WIDEST), torch.ones_like(factor))
