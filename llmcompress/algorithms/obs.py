"""Optimal brain surgeon for the units of an axis: removes the cheapest unit again and again, by second
moments.

`saliency.obs` gives the cost of one unit while all others stay. The removal of a unit makes those that
compensated for it more expensive, so all costs are updated after every removal; sorting by the scores does
not do this. Only weights and second moments are needed, no outputs. Let J = H^-1 on the columns that stay and
G = W^T W of the weights solved anew for them. Then removing the columns P costs tr(J_PP^-1 G_PP). With the
Cholesky factor J_PP = L L^T and

    v = L^-1 J_P:    n = L^-1 G_P: - 1/2 (L^-1 G_PP L^-T) v

J becomes J - v^T v and G becomes G - v^T n - n^T v: two low-rank updates. They are applied at once to the
blocks that costs are read from. To the full matrices they are applied in batches, by matrix products: 6 C^3
operations for all units, whatever their size. Everything is float64, since J shrinks by subtraction and
float32 is too coarse for that. The plain form is in the tests as the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.algorithms.saliency import alive, block_costs, members, on_units


@dataclass(frozen=True)
class Removal:
    """The order in which units are removed, int64 [N], and the loss after each removal, float64 [N].

    `units` is the number of units of the axis (N <= units).
    """

    order: Tensor
    losses: Tensor
    units: int

    def kept(self, count: int) -> Tensor:
        """Return the `count` units that stay, int64, ascending. Raises ValueError if the removal did not go
        that far."""
        stays = torch.ones(self.units, dtype=torch.bool, device=self.order.device)
        stays[self.order[: self._gone(count)]] = False
        return torch.nonzero(stays).flatten()

    def loss(self, count: int) -> float:
        """Return the squared output error with `count` units kept and solved for. Raises ValueError as `kept`
        does."""
        gone = self._gone(count)
        return float(self.losses[gone - 1]) if gone else 0.0

    def _gone(self, count: int) -> int:
        gone = self.units - count
        if not 0 <= gone <= len(self.order):
            raise ValueError(
                f"{count} units can't be kept: between {self.units - len(self.order)} and {self.units} are "
                "known"
            )
        return gone


def remove(
    W_RC: Tensor,
    H_CC: Tensor,
    unit_C: Tensor,
    units: int,
    *,
    least: int = 0,
    damp: float = 0.01,
    width: int = 64,
) -> Removal:
    """Remove the cheapest unit until `least` are left, solving anew for all other columns each time.

    W_RC reads the axis, H_CC are the second moments of its inputs, and `unit_C` is the unit of each column.
    Columns of unit -1 are never removed but can make up for others. Losses are tr(E (H + damping) E^T), which
    `repair` attains. Of units with equal cost the first is removed.

    Source: ZipLM, Kurtic et al. 2023, arXiv:2302.04089, Algorithm 1; SlimGPT, Ling et al. 2024,
    arXiv:2412.18110. Differs: W^T W is updated in place of W, and both matrices in batches of `width`
    columns, so there is no need to remove several units at a time.
    """
    table, U_CC = members(unit_C, units), inverse_factor(H_CC.double(), damp)
    W = (W_RC * alive(H_CC)).double()
    left = _Left(U_CC.T @ U_CC, W.T @ W, table, width)
    gone = torch.zeros(units, dtype=torch.bool, device=W.device)
    order: list[int] = []
    costs: list[float] = []
    for _ in range(units - least):
        cost_U = block_costs(left.J_UKK, left.G_UKK).masked_fill(gone, torch.inf)
        unit = int(cost_U.argmin())
        left.eliminate(table[unit][table[unit] >= 0])
        gone[unit] = True
        order.append(unit)
        costs.append(float(cost_U[unit]))
    losses = torch.tensor(costs, dtype=torch.float64, device=W.device).cumsum(0)
    return Removal(torch.tensor(order, dtype=torch.int64, device=W.device), losses, units)


class _Left:
    """J and G of the columns that are left. Their blocks on the units are always up to date; updates of the
    rest are delayed."""

    def __init__(self, J_CC: Tensor, G_CC: Tensor, table: Tensor, width: int) -> None:
        self.table, self.width = table, width
        self.J_CC, self.G_CC = J_CC, G_CC
        self.J_UKK, self.G_UKK = on_units(J_CC, table), on_units(G_CC, table)
        self.v_NC = self.n_NC = J_CC[:0]  # the updates not yet applied to J and G

    def eliminate(self, P: Tensor) -> None:
        """Remove the columns P and solve all other columns for the loss."""
        v, n = self._change(P)
        # [P, units, K]; index -1 is the padded zero
        v_UK, n_UK = (pad(v, (0, 1))[:, self.table], pad(n, (0, 1))[:, self.table])
        change = torch.einsum("puk,pul->ukl", v_UK, n_UK)
        self.J_UKK = self.J_UKK - torch.einsum("puk,pul->ukl", v_UK, v_UK)
        self.G_UKK = self.G_UKK - change - change.mT
        self.v_NC, self.n_NC = torch.cat([self.v_NC, v]), torch.cat([self.n_NC, n])
        if len(self.v_NC) >= self.width:
            self.J_CC.addmm_(self.v_NC.T, self.v_NC, alpha=-1)
            self.G_CC.addmm_(self.v_NC.T, self.n_NC, alpha=-1).addmm_(self.n_NC.T, self.v_NC, alpha=-1)
            self.v_NC = self.n_NC = self.v_NC[:0]

    def _change(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and n [P, C] for the columns P."""
        v_NP, n_NP = self.v_NC[:, P], self.n_NC[:, P]
        J_PC = self.J_CC[P] - v_NP.T @ self.v_NC
        G_PC = self.G_CC[P] - v_NP.T @ self.n_NC - n_NP.T @ self.v_NC
        lower = torch.linalg.cholesky(J_PC[:, P])
        v, g = torch.linalg.solve_triangular(lower, torch.stack([J_PC, G_PC]), upper=False)
        inner = torch.linalg.solve_triangular(lower.T, g[:, P], upper=True, left=False)
        return v, g - inner @ v / 2
