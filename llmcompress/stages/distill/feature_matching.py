"""What a student matches of its teacher besides predictions: hidden states, and attention maps.

Each layer of the student is compared with the last of the teacher's layers that it stands for. If widths
differ, one linear maps the student's hidden states to the teacher's width. It starts at the least-squares
solution for some sequences, learns with the student and is dropped after training. D is the student's width,
E the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.algorithms.distillation_losses import HiddenKind, attention_kl, hidden_loss, layer_map
from llmcompress.errors import ModelError
from llmcompress.stages.distill.teacher import TeacherOutput

RCOND = 1e-5  # relative to the largest singular value; smaller ones are noise of float32
PROJECTION = "distill_projection"  # its name in the student, with which it is saved and resumed


@dataclass(frozen=True)
class Matching:
    """`layers`: for each of the student's layers, the teacher's layer that it is to match; `heads`: the
    teacher's layer that it was itself."""

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
        """Match `student` layers to `teacher` layers. If the student's layers are the teacher's own, `origin`
        says which ones they were."""
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
        """The extra arguments of a forward pass."""
        return {"output_attentions": True} if self.attention else {}

    def loss(self, student: TeacherOutput, teacher: TeacherOutput, projection: nn.Linear | None) -> Tensor:
        """The weighted sum of both losses, each the mean over layers. `mse` is relative to the teacher's mean
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
    """Return the linear that maps hidden states [..., D] to [..., E] with the least squared error; None if D
    is E."""
    D, E = student.shape[-1], teacher.shape[-1]
    if D == E:
        return None
    linear = nn.Linear(D, E, bias=False, device=student.device)
    x_TD, y_TE = (states.flatten(0, -2).double().cpu() for states in (student, teacher))
    found_DE = torch.linalg.lstsq(x_TD, y_TE, rcond=RCOND).solution
    linear.weight.data.copy_(found_DE.T)
    return linear
