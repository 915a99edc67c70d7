"""Which layers do the same work, by cheap scores, and the weight that several layers can share, by gradient
descent.

Two layers can be similar in their weights (cosine) or in their outputs on the same text (CKA, which is
invariant to a change of basis). Scores are cheap and may be wrong; the caller measures what sharing really
costs. The shared weight is not a mean, since the neurons of two layers do not correspond. It starts as the
weight of one layer and is then trained on the task of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

RATE = 0.05  # first step, relative to the root mean square of a tensor
Loss = Callable[[Mapping[str, Tensor], int], Tensor]  # (tensors by name, step) -> scalar


def cosines(weights: Sequence[Tensor]) -> Tensor:
    """Return the cosine between every two of N weights of one shape, each flattened: [N, N]."""
    flat = torch.stack([weight.flatten().float() for weight in weights])
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    likeness_NN: Tensor = flat @ flat.T
    return likeness_NN


def cka(outputs: Sequence[Tensor]) -> Tensor:
    """Return the linear centred kernel alignment between every two of N outputs [T, D] on the same tokens:
    [N, N], in 0..1.

    It is |Y_i^T Y_j|^2 / (|Y_i^T Y_i| |Y_j^T Y_j|) in Frobenius norms, with centred outputs: 1 if they differ
    only by a rotation and a scale.

    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3.
    """
    centred = [Y_TD.float() - Y_TD.float().mean(0) for Y_TD in outputs]
    shared = torch.tensor([[float((A.T @ B).square().sum()) for B in centred] for A in centred])
    own = shared.diagonal().clamp_min(torch.finfo(shared.dtype).tiny).sqrt()
    likeness_NN: Tensor = shared / own[:, None] / own
    return likeness_NN


def agglomerate(likeness_NN: Tensor, count: int) -> list[list[int]]:
    """Partition N items into `count` clusters by agglomerative clustering with average linkage.

    The two clusters with the highest mean similarity of their pairs are merged until `count` are left.
    """
    groups = [[index] for index in range(len(likeness_NN))]
    while len(groups) > count:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
        a, b = max(pairs, key=lambda pair: float(likeness_NN[groups[pair[0]]][:, groups[pair[1]]].mean()))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)


def adjacent(things: int, count: int) -> list[list[int]]:
    """Partition N items into `count` runs of neighbours, of sizes as equal as possible."""
    bounds = [round(group * things / count) for group in range(count + 1)]
    return [list(range(start, stop)) for start, stop in pairwise(bounds)]


def descend(start: Mapping[str, Tensor], loss: Loss, *, steps: int, rate: float = RATE) -> dict[str, Tensor]:
    """Return the tensors after `steps` of Adam on `loss`, from `start`, under a cosine schedule.

    The learning rate of a tensor is `rate` times its root mean square; for a tensor of zeros, times the mean
    of all.
    """
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    sizes = {name: float(tensor.square().mean().sqrt()) for name, tensor in start.items()}
    mean = sum(sizes.values()) / max(1, len(sizes))
    groups = [{"params": [tensor], "lr": rate * (sizes[name] or mean)} for name, tensor in tensors.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss(tensors, step).backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}
