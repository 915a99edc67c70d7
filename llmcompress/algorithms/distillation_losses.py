"""Distillation losses between a student and its teacher: on predictions, hidden states and attention.

With a vocabulary of 128 thousand tokens, the logits of 4096 tokens take 2 GB in float32, and plain autograd
holds five tensors of that size. Here the logits are computed from hidden states in chunks of c tokens. The
logits of a chunk are compared and turned into gradients at once. Memory holds 7 to 13 buffers [c, V], the
gradients [T, D] and, for a trainable head, [V, D], but never [T, V]. No product is computed twice. Products
are in the dtype of the hidden states, as in the model; what follows, and every sum over chunks, is in float32
or float64.

Throughout, p is the teacher and q the student; T tokens, V vocabulary, D hidden width, K most likely tokens,
B texts of L positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, normalize

from llmcompress.algorithms.logit_chunks import positions_at_once

Skewed = Literal["jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"]
Kind = Literal["forward_kl", "reverse_kl", "total_variation", "cross_entropy", Skewed]
HiddenKind = Literal["mse", "cosine"]
SKEW = {"jensen_shannon": 0.5, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.1}  # default of `skew`
IGNORED = -100  # the label of a position that does not count
# nats; lower log-probabilities are clamped to this, so that logits of -inf on both sides do no harm
FLOOR = -1e4
CHUNK = 128  # tokens per chunk, at most; fewer where `logit_chunks` allows fewer


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Scores:
    """Logits that are not computed yet: s = scale * (hidden W^T + bias), or cap * tanh(s / cap) with a soft
    cap."""

    hidden_TD: Tensor  # the head's input, after the final norm; without a weight the product itself, [T, V]
    weight_VD: Tensor | None = None  # cast to the dtype of the hidden states
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def shape(self) -> tuple[int, int]:
        """Return (T, V)."""
        return len(self.hidden_TD), self.hidden_TD.shape[1] if self.weight_VD is None else len(self.weight_VD)

    def detached(self) -> Scores:
        """Return the same scores without gradients and in one dtype."""
        weight, bias = (
            None if x is None else x.detach().to(self.hidden_TD.dtype) for x in (self.weight_VD, self.bias_V)
        )
        return replace(self, hidden_TD=self.hidden_TD.detach(), weight_VD=weight, bias_V=bias)

    def product(self, index_T: Tensor) -> Tensor:
        """Return hidden W^T + bias of the tokens `index_T`: a new tensor [T, V] in float32 or float64."""
        rows = self.hidden_TD[index_T]
        return (rows if self.weight_VD is None else linear(rows, self.weight_VD, self.bias_V)).to(_wide(rows))

    def logits(self, product_TV: Tensor) -> Tensor:
        """Return the logits [T, V] of a product: scaled, and capped if there is a soft cap."""
        s_TV = product_TV if self.scale == 1 else self.scale * product_TV
        return s_TV if self.cap is None else self.cap * torch.tanh(s_TV / self.cap)


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's K most likely tokens (int64) and their log-probabilities; the last of the K + 1 entries is
    that of all other tokens together."""

    index_TK: Tensor
    log_p_TK1: Tensor
    temperature: float = 1.0  # of the softmax that they were taken from


def _log_probs(z_TV: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(z_TV if temperature == 1 else z_TV / temperature, -1).clamp_min(FLOOR)


def _classes(log_p_TV: Tensor, index_TK: Tensor) -> Tensor:
    """Return the log-probabilities of K tokens and, as the last of K + 1 entries, of all other tokens
    together."""
    others_T1 = log_p_TV.scatter(1, index_TK, FLOOR).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_TV.gather(1, index_TK), others_T1], 1)


def top_k(teacher: Scores | Tensor, k: int, *, temperature: float = 1.0, chunk: int = CHUNK) -> TopK:
    """Return the k most likely tokens of softmax(logits / temperature) at each position, computed in chunks
    of at most `chunk` positions."""
    scores, parts = (teacher if isinstance(teacher, Scores) else Scores(teacher)).detached(), []
    every_T = torch.arange(scores.shape()[0], device=scores.hidden_TD.device)
    chunk = min(chunk, positions_at_once(scores.shape()[1], every_T.device))
    with torch.no_grad(), torch.autocast(every_T.device.type, enabled=False):
        for index_T in every_T.split(chunk):
            log_p_TV = _log_probs(scores.logits(scores.product(index_T)), temperature)
            index_TK = log_p_TV.topk(k).indices
            parts.append((index_TK, _classes(log_p_TV, index_TK)))
    index_TK, log_p_TK1 = (torch.cat(part) for part in zip(*parts, strict=True))
    return TopK(index_TK, log_p_TK1, temperature)


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """KL(p, q) [T]; probabilities below 1e-38 count as 1e-38."""
    tiny = torch.finfo(p_TV.dtype).tiny
    return (p_TV * (p_TV.clamp_min(tiny).log() - q_TV.clamp_min(tiny).log())).sum(-1)


def _divergence(kind: Kind, skew: float, log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """Return the divergence [T]. It is exactly 0 where p and q are the same numbers."""
    if kind == "forward_kl":
        return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    if kind == "reverse_kl":
        return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    p_TV, q_TV = log_p_TV.exp(), log_q_TV.exp()
    if kind == "total_variation":
        return (p_TV - q_TV).abs().sum(-1) / 2
    m_TV = q_TV.lerp(p_TV, 1 - skew if kind == "skewed_reverse_kl" else skew)
    if kind == "jensen_shannon":
        return skew * _kl(p_TV, m_TV) + (1 - skew) * _kl(q_TV, m_TV)
    return _kl(p_TV if kind == "skewed_forward_kl" else q_TV, m_TV)


@dataclass(frozen=True, eq=False)
class _Task:
    """Everything that a token loss needs besides the student."""

    kind: Kind
    skew: float
    temperature: float
    label_share: float
    teacher: Scores | TopK | None
    labels_T: Tensor | None
    weight_T: Tensor  # mean 1 over the tokens that count, so that gradients fit float16
    chunks: Sequence[Tensor]  # indices of the tokens that count

    def losses(self, z_TV: Tensor, index_T: Tensor) -> Tensor:
        """Return the loss of each of the tokens `index_T`, [T], given the student's logits."""
        loss_T, known = z_TV.new_zeros(len(z_TV)), self.teacher
        if known is not None and self.label_share < 1:
            log_q = _log_probs(z_TV, self.temperature)
            if isinstance(known, TopK):
                log_p, log_q = (
                    known.log_p_TK1[index_T].clamp_min(FLOOR),
                    _classes(log_q, known.index_TK[index_T]),
                )
            else:
                log_p = _log_probs(known.logits(known.product(index_T)), self.temperature)
            factor = self.temperature ** (1 if self.kind == "total_variation" else 2) * (1 - self.label_share)
            loss_T = factor * _divergence(self.kind, self.skew, log_p.to(log_q), log_q)
        if self.labels_T is not None and self.label_share > 0:
            log_q = _log_probs(z_TV, 1.0).gather(1, self.labels_T[index_T, None])
            loss_T = loss_T - self.label_share * log_q[:, 0]
        return loss_T

    def run(
        self, student: Scores, wanted: Collection[bool], times: Tensor | float = 1.0
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the sum of losses and its gradients multiplied by `times`.

        Gradients are with respect to hidden [T, D], weight [V, D] and bias [V], in this order; one that is
        not `wanted` is None.
        """
        hidden_TD, weight_VD, bias_V = student.hidden_TD, student.weight_VD, student.bias_V
        total, (to_hidden, to_weight, to_bias) = self.weight_T.new_zeros(()), wanted
        dH_TD = torch.zeros_like(hidden_TD) if to_hidden else None
        dW_VD = (
            torch.zeros_like(weight_VD, dtype=total.dtype) if to_weight and weight_VD is not None else None
        )
        db_V = torch.zeros_like(bias_V, dtype=total.dtype) if to_bias and bias_V is not None else None
        for index_T in self.chunks:
            s_TV = student.product(index_T).requires_grad_(any(wanted))
            with torch.set_grad_enabled(any(wanted)):
                loss = self.losses(student.logits(s_TV), index_T) @ self.weight_T[index_T]
            total += loss.detach()
            if not any(wanted):
                continue
            wide_TV = torch.autograd.grad(loss, s_TV)[0].mul_(times)
            ds_TV = wide_TV.to(hidden_TD.dtype)
            if dH_TD is not None:
                dH_TD[index_T] = ds_TV if weight_VD is None else ds_TV @ weight_VD
            if dW_VD is not None:
                dW_VD += ds_TV.T @ hidden_TD[index_T]
            if db_V is not None:
                db_V += wide_TV.sum(0)
            del loss, s_TV, wide_TV, ds_TV  # free them before the next chunk allocates its own
        return total, [dH_TD, dW_VD, db_V]


class _TokenLoss(torch.autograd.Function):
    """The mean loss as an autograd function.

    Gradients are computed in the forward pass and scaled in the backward pass. For plain logits the gradient
    is computed in the backward pass only, since it is large.
    """

    @staticmethod
    def forward(ctx: Any, task: _Task, student: Scores, *inputs: Tensor | None) -> Any:
        later = student.weight_VD is None
        total, found = task.run(student, [False] * 3 if later else ctx.needs_input_grad[2:])
        ctx.again = partial(task.run, student, (True, False, False)) if later else None
        ctx.tokens = max(1, sum(map(len, task.chunks)))
        ctx.save_for_backward(*(inputs[:1] if later else found))
        return total / ctx.tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, share = ctx.saved_tensors, grad / ctx.tokens
        found = ctx.again(share)[1] if ctx.again else [None if x is None else x * share for x in saved]
        return None, None, *found  # autograd rounds to the dtype of the inputs


def token_loss(
    kind: Kind,
    student: Scores | Tensor,
    teacher: Scores | Tensor | TopK | None,
    *,
    labels_T: Tensor | None = None,
    weight_T: Tensor | None = None,
    label_share: float = 0.0,
    temperature: float = 1.0,
    skew: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Return the mean over tokens of the loss between the student's predictions q and the teacher's p, in
    nats: a scalar with gradient.

        forward_kl         KL(p, q)
                           Hinton et al. 2015, arXiv:1503.02531
        reverse_kl         KL(q, p)
                           MiniLLM, Gu et al. 2023, arXiv:2306.08543
        jensen_shannon     b KL(p, b p + (1 - b) q) + (1 - b) KL(q, b p + (1 - b) q)
                           GKD, Agarwal et al. 2023, arXiv:2306.13649
        skewed_forward_kl  KL(p, a p + (1 - a) q)
                           DistiLLM, Ko et al. 2024, arXiv:2402.03898
        skewed_reverse_kl  KL(q, (1 - a) p + a q)
                           DistiLLM
        total_variation    sum |p - q| / 2, a number in [0, 1]
                           f-distill, Wen et al. 2023, arXiv:2307.15190
        cross_entropy      -log q(label), without a teacher

    `student` and `teacher` are Scores or plain logits [T, V]. Under a TopK teacher every divergence is over K
    + 1 classes, the last of which is all other tokens; it is never more than the divergence over the full
    vocabulary. `skew` is b in (0, 1) or a in [0, 1). jensen_shannon tends to b KL(p, q) as b tends to 0, and
    to (1 - b) KL(q, p) as b tends to 1.

    Logits are divided by `temperature` t. The loss is multiplied by t^2, total variation by t, so that
    gradients keep their size. A share `label_share` of the loss is cross_entropy, at temperature 1.
    `labels_T` are the tokens to predict at each position. Positions that are labelled `IGNORED` or have
    `weight_T` 0 are not read at all. Without tokens the loss is 0. Raises ValueError if arguments do not fit
    together.
    """
    given = student if isinstance(student, Scores) else Scores(student)
    known = Scores(teacher) if isinstance(teacher, Tensor) else teacher
    scores, known = given.detached(), known.detached() if isinstance(known, Scores) else known
    skew, label_share = (
        SKEW.get(kind, 0.0) if skew is None else skew,
        1.0 if kind == "cross_entropy" else label_share,
    )
    for misfit, what in (
        (kind not in get_args(Kind), f"{kind} is none of {', '.join(get_args(Kind))}"),
        (known is None and label_share < 1, f"{kind} needs a teacher"),
        (labels_T is None and label_share > 0, "cross entropy needs labels"),
        (
            not 0 <= skew < 1 or (skew == 0 and kind == "jensen_shannon"),
            f"{kind} does not take a skew of {skew}",
        ),
        (
            isinstance(known, Scores) and known.shape() != given.shape(),
            "student and teacher differ in tokens or vocabulary",
        ),
        (
            isinstance(known, TopK) and known.temperature != temperature,
            f"the top k were not taken at {temperature=}",
        ),
        (
            isinstance(known, TopK) and len(known.index_TK) != given.shape()[0],
            "student and teacher differ in tokens",
        ),
    ):
        if misfit:
            raise ValueError(what)
    weights_T = torch.ones_like(scores.hidden_TD[:, 0]) if weight_T is None else weight_T
    weights_T = (weights_T if labels_T is None else weights_T * (labels_T != IGNORED)).to(
        _wide(scores.hidden_TD)
    )
    index_T = weights_T.nonzero()[:, 0]
    chunk = min(chunk, positions_at_once(scores.shape()[1], index_T.device))
    weights_T, chunks = weights_T / weights_T[index_T].mean(), index_T.split(chunk)
    task = _Task(kind, skew, temperature, label_share, known, labels_T, weights_T, chunks)
    head = given if torch.is_grad_enabled() else scores
    with torch.autocast(index_T.device.type, enabled=False):
        return _TokenLoss.apply(task, scores, head.hidden_TD, head.weight_VD, head.bias_V)  # type: ignore[no-any-return, no-untyped-call]


def _counted(weight_BL: Tensor | None, *states: Tensor) -> tuple[Tensor, ...]:
    """Select the positions that count.

    Returns their weights, which sum to 1, [T], and each of the states there, [T, ...], in at least float32.
    """
    weight_BL = states[0].new_ones(states[0].shape[:2]) if weight_BL is None else weight_BL
    here_BL, dtype = weight_BL > 0, _wide(states[0])
    weight_T, *found = (x[here_BL].to(dtype) for x in (weight_BL, *states))
    return weight_T / weight_T.sum(), *found


def hidden_loss(
    kind: HiddenKind,
    student_BLD: Tensor,
    teacher_BLE: Tensor,
    W_ED: Tensor | None = None,
    weight_BL: Tensor | None = None,
) -> Tensor:
    """Return the mean over positions of the mean squared difference of hidden states, or of 1 - their cosine.

    `W_ED` is the weight of a linear that maps the student's width to the teacher's. Positions with
    `weight_BL` 0 are not read. Raises ValueError if widths differ.

    Source: TinyBERT, Jiao et al. 2019, arXiv:1909.10351, equation 8; DistilBERT, Sanh et al. 2019,
    arXiv:1910.01108.
    """
    weight_T, student_TE, teacher_TE = _counted(weight_BL, student_BLD, teacher_BLE.detach())
    student_TE = student_TE if W_ED is None else linear(student_TE, W_ED.to(student_TE.dtype))
    if student_TE.shape != teacher_TE.shape:
        raise ValueError(
            f"hidden states of {student_TE.shape[1]} and {teacher_TE.shape[1]} columns: give W_ED"
        )
    if kind == "cosine":  # |u - v|^2 = 2 - 2 cos for unit vectors, and exactly 0 where u = v
        student_TE, teacher_TE = normalize(student_TE, dim=-1), normalize(teacher_TE, dim=-1)
    apart_T = (student_TE - teacher_TE).square().sum(-1)
    return apart_T @ weight_T / (2 if kind == "cosine" else student_TE.shape[1])


def attention_kl(student_BHLK: Tensor, teacher_BGLK: Tensor, weight_BL: Tensor | None = None) -> Tensor:
    """Return the mean over heads and positions of KL(teacher, student) between attention probabilities over K
    keys, in nats.

    If the numbers of heads, H and G, differ, each side is first averaged over its heads. Probabilities below
    1e-38 count as 1e-38.

    Source: MiniLM, Wang et al. 2020, arXiv:2002.10957.
    """
    weight_T, q_THK, p_TGK = _counted(
        weight_BL, student_BHLK.transpose(1, 2), teacher_BGLK.detach().transpose(1, 2)
    )
    if q_THK.shape[1] != p_TGK.shape[1]:
        q_THK, p_TGK = q_THK.mean(1, keepdim=True), p_TGK.mean(1, keepdim=True)
    return _kl(p_TGK, q_THK).mean(1) @ weight_T


def layer_map(
    student_layers: int, teacher_layers: int, gone: Collection[int] | None = None
) -> tuple[int, ...]:
    """Return the teacher layer whose output each student layer is to match: the last of the layers that it
    replaces.

    If the teacher's removed layers `gone` are given, a student layer replaces its own teacher layer and the
    removed layers after it. Otherwise each replaces an equal share of the teacher's layers. Attention is
    matched to the kept layer itself. Raises ValueError for numbers that do not fit.
    """
    ends = [i * teacher_layers // student_layers for i in range(1, student_layers + 1)]
    if gone is not None:
        ends = [*sorted(set(range(teacher_layers)) - set(gone))[1:], teacher_layers]
    if not 1 <= student_layers <= teacher_layers or len(ends) != student_layers:
        raise ValueError(
            f"{student_layers} layers are not what is left of {teacher_layers} without {gone or 'some'}"
        )
    return tuple(end - 1 for end in ends)
