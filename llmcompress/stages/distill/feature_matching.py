"""What a student is to match of its teacher besides predictions: hidden states, and where attention goes.

A layer of the student is held against the last of the teacher's layers that it stands for. Where widths
differ, one linear takes the student's hidden states to the teacher's width: it begins at the least squares of
some sequences, learns with the student and is dropped when training is over. D the student's width, E the
teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.algorithms.distillation_losses import HiddenKind, attention_kl, hidden_loss, layer_map
from llmcompress.errors import ModelError
from llmcompress.stages.distill.teacher import TeacherOutput

RCOND = 1e-5  # of the largest singular value: less is what float32 makes of nothing
PROJECTION = "distill_projection"  # what it is called in the student, so that it is saved and resumed with it


@dataclass(frozen=True)
class Matching:
    """`layers`: for each of the student's, the teacher's layer that it is to match; `heads`: the one that it
    was itself."""

    layers: Sequence[int]
    heads: Sequence[int]
    kind: HiddenKind
    hidden: float  # weights in the loss
    attention: float
    unscored: int = 0  # positions at the start of a sequence that do not count

    @classmethod
    def of(
        cls,
        student: int,
        teacher: int,
        origin: Sequence[int],
        kind: HiddenKind,
        hidden: float,
        attention: float,
        unscored: int = 0,
    ) -> Matching:
        """For so many layers of each; `origin` says which ones the student's were, where they are the
        teacher's own."""
        known = len(origin) == student and max(origin) < teacher
        if not known and student > teacher:
            raise ModelError(
                f"a student of {student} layers can't match the {teacher} of its teacher; leave hidden and "
                "attention"
            )
        gone = set(range(teacher)) - set(origin) if known else None
        layers = layer_map(student, teacher, gone)
        return cls(layers, tuple(origin) if known else layers, kind, hidden, attention, unscored)

    @property
    def asked(self) -> dict[str, bool]:
        """What a forward pass must say."""
        return {"output_attentions": True} if self.attention else {}

    def loss(self, student: TeacherOutput, teacher: TeacherOutput, projection: nn.Linear | None) -> Tensor:
        """The weighted sum of both losses, each the mean over layers; mse is a share of the teacher's mean
        square."""
        parts, skip = [], self.unscored
        if self.hidden:
            W_ED = None if projection is None else projection.weight
            for mine, yours in zip(
                student.hidden_BLD[1:], (teacher.hidden_BLD[n + 1] for n in self.layers), strict=True
            ):
                mine, yours = mine[:, skip:], yours[:, skip:]
                size = yours.detach().float().square().mean() if self.kind == "mse" else 1.0
                parts.append(self.hidden * hidden_loss(self.kind, mine, yours, W_ED) / size)
        if self.attention:
            for mine, yours in zip(
                student.attention_BHLL, (teacher.attention_BHLL[n] for n in self.heads), strict=True
            ):
                parts.append(self.attention * attention_kl(mine[:, :, skip:], yours[:, :, skip:]))
        return torch.stack(parts).sum() / len(self.layers)


def projection_of(student: Tensor, teacher: Tensor) -> nn.Linear | None:
    """The linear that takes hidden states [..., D] to others [..., E] with the least squared error; None
    where D is E."""
    D, E = student.shape[-1], teacher.shape[-1]
    if D == E:
        return None
    linear = nn.Linear(D, E, bias=False, device=student.device)
    x_TD, y_TE = (states.flatten(0, -2).double().cpu() for states in (student, teacher))
    found_DE = torch.linalg.lstsq(x_TD, y_TE, rcond=RCOND).solution
    linear.weight.data.copy_(found_DE.T)
    return linear
