"""Losses against their definitions in float64, what they cost in memory, and what they leave unread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from llmcompress.algorithms.distillation_losses import (
    IGNORED,
    SKEW,
    HiddenKind,
    Kind,
    Scores,
    Skewed,
    attention_kl,
    hidden_loss,
    layer_map,
    token_loss,
    top_k,
)

SKEWED: tuple[Kind, ...] = get_args(Skewed)
DIVERGENCES: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "total_variation", *SKEWED)
T, V, D = 7, 11, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(seed: int, tokens: int = T, width: int = D, **options: Any) -> Scores:
    """Scores whose logits are a few nats apart, float64."""
    return Scores(
        normal(tokens, width, seed=seed), normal(V, width, seed=seed + 1), normal(V, seed=seed + 2), **options
    )


def logits(scores: Scores) -> Tensor:
    """As a model makes them, all at once."""
    assert scores.weight_VD is not None and scores.bias_V is not None
    s_TV = (scores.hidden_TD @ scores.weight_VD.T + scores.bias_V) * scores.scale
    made: Tensor = s_TV if scores.cap is None else scores.cap * torch.tanh(s_TV / scores.cap)
    return made


def kl(p: Tensor, q: Tensor) -> Tensor:
    terms: Tensor = torch.special.xlogy(p, p / q)
    return terms.sum(-1)


def plain(
    kind: Kind, student_TV: Tensor, teacher_TV: Tensor, t: float = 1.0, skew: float | None = None
) -> Tensor:
    """The loss of each token [T] as its paper writes it, with plain autograd."""
    p, q = torch.softmax(teacher_TV / t, -1), torch.softmax(student_TV / t, -1)
    a = SKEW.get(kind, 0.0) if skew is None else skew
    b = a
    of: dict[str, Callable[[], Tensor]] = {
        "forward_kl": lambda: t**2 * kl(p, q),
        "reverse_kl": lambda: t**2 * kl(q, p),
        "jensen_shannon": lambda: (
            t**2 * (b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q))
        ),
        "skewed_forward_kl": lambda: t**2 * kl(p, a * p + (1 - a) * q),
        "skewed_reverse_kl": lambda: t**2 * kl(q, (1 - a) * p + a * q),
        "total_variation": lambda: t * (p - q).abs().sum(-1) / 2,
    }
    return of[kind]()


def half(scores: Scores, dtype: torch.dtype) -> Scores:
    weight, bias = (None if x is None else x.to(dtype) for x in (scores.weight_VD, scores.bias_V))
    return replace(scores, hidden_TD=scores.hidden_TD.to(dtype), weight_VD=weight, bias_V=bias)


def learning(scores: Scores) -> Scores:
    """The same with gradients, as leaves."""
    weight, bias = (
        None if x is None else x.clone().requires_grad_() for x in (scores.weight_VD, scores.bias_V)
    )
    return replace(scores, hidden_TD=scores.hidden_TD.clone().requires_grad_(), weight_VD=weight, bias_V=bias)


def gradients(loss: Tensor, scores: Scores) -> tuple[Tensor, ...]:
    leaves = [x for x in (scores.hidden_TD, scores.weight_VD, scores.bias_V) if x is not None]
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("t", [1.0, 2.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_is_what_its_paper_says(kind: Kind, t: float, seed: int) -> None:
    student, teacher = head(seed), head(seed + 10, width=3)
    expected = plain(kind, logits(student), logits(teacher), t).mean()
    torch.testing.assert_close(token_loss(kind, student, teacher, temperature=t, chunk=3), expected)
    torch.testing.assert_close(token_loss(kind, logits(student), logits(teacher), temperature=t), expected)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_the_plain_divergences_are_torchs(kind: Kind) -> None:
    p, q = (torch.log_softmax(normal(T, V, seed=seed), -1) for seed in (1, 2))
    first, second = (q, p) if kind == "forward_kl" else (p, q)
    torch.testing.assert_close(
        token_loss(kind, q, p), kl_div(first, second, log_target=True, reduction="batchmean")
    )


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", SKEWED)
def test_a_skew_is_that_of_the_paper(kind: Kind, skew: float) -> None:
    student, teacher = normal(T, V, seed=1), normal(T, V, seed=2)
    torch.testing.assert_close(
        token_loss(kind, student, teacher, skew=skew), plain(kind, student, teacher, skew=skew).mean()
    )


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"cap": 2.0}, {"scale": 1.7, "cap": 3.0}], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_gradient_is_that_of_plain_autograd(kind: Kind, options: dict[str, Any]) -> None:
    student, teacher = learning(head(0, **options)), head(10, **options)
    labels, weight_T = (
        torch.tensor([1, 4, IGNORED, 0, 10, 3, 3]),
        torch.tensor([1, 2, 9, 0.5, 0, 1, 4], dtype=torch.float64),
    )
    settings = {"temperature": 1.5, "label_share": 0.3, "labels_T": labels, "weight_T": weight_T}
    counted = weight_T * (labels != IGNORED)
    told = cross_entropy(logits(student), labels.clamp_min(0), reduction="none")
    each_T = 0.7 * plain(kind, logits(student), logits(teacher), 1.5) + 0.3 * told
    expected = (each_T * counted).sum() / counted.sum()
    found = token_loss(kind, student, teacher, chunk=2, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(3 * found, student), gradients(3 * expected, student))


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(kind: Kind, top: bool) -> None:
    known = Scores(normal(3, 2), normal(5, 2, seed=1), cap=4.0)
    teacher = top_k(known, 2, temperature=2.0) if top else known
    labels = torch.tensor([1, 0, 4])

    def of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scores = Scores(hidden, weight, bias, scale=0.7, cap=3.0)
        return token_loss(kind, scores, teacher, temperature=2.0, labels_T=labels, label_share=0.25, chunk=2)

    def of_logits(student: Tensor) -> Tensor:
        return token_loss(kind, student, teacher, temperature=2.0, chunk=2)

    inputs = [normal(*shape, seed=2 + i).requires_grad_() for i, shape in enumerate(((3, 2), (5, 2), (5,)))]
    assert torch.autograd.gradcheck(of_hidden, inputs)
    assert torch.autograd.gradcheck(of_logits, (normal(3, 5, seed=6).requires_grad_(),))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from((*DIVERGENCES, "cross_entropy")),
    tokens=st.integers(1, 9),
    chunk=st.integers(1, 10),
    share=st.sampled_from([0.0, 0.4]),
    known=st.sampled_from([None, 1, 4]),
    masked=st.integers(0, 8),
)
def test_chunks_of_any_size_give_the_same_loss_and_gradients(
    kind: Kind, tokens: int, chunk: int, share: float, known: int | None, masked: int
) -> None:
    student, full = learning(head(1, tokens=tokens)), head(4, tokens=tokens)
    teacher = None if kind == "cross_entropy" else full if known is None else top_k(full, known, chunk=chunk)
    labels = torch.arange(tokens) % V
    labels[:masked] = IGNORED
    options = {"labels_T": labels, "label_share": share}
    whole = token_loss(kind, student, teacher, chunk=1000, **options)  # type: ignore[arg-type]
    parts = token_loss(kind, student, teacher, chunk=chunk, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients(parts, student), gradients(whole, student))


def test_the_cross_entropy_is_torchs() -> None:
    student, labels = learning(head(0)), torch.tensor([1, 4, IGNORED, 0, 10, 3, IGNORED])
    expected = cross_entropy(logits(student), labels)
    found = token_loss("cross_entropy", student, None, labels_T=labels, temperature=7.0, chunk=2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, student), gradients(expected, student))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_predicts_as_its_teacher_has_no_loss_and_nowhere_to_go(
    kind: Kind, dtype: torch.dtype
) -> None:
    same = half(head(3, scale=2.0, cap=9.0), dtype)
    at_once = same.logits(same.product(torch.arange(T)))
    small = 1e-14 if dtype == torch.float64 else 2e-6
    for student, teacher in (
        (learning(same), same),
        (Scores(at_once.clone().requires_grad_()), Scores(at_once)),
    ):
        loss = token_loss(kind, student, teacher, temperature=1.3, chunk=2)
        assert loss.item() == 0
        assert all(bool((x.abs() < small).all()) for x in gradients(loss, student))


@pytest.mark.parametrize("kind", ["skewed_forward_kl", "skewed_reverse_kl"])
def test_without_skew_the_skewed_divergences_are_the_plain_ones(kind: Kind) -> None:
    student, teacher = normal(T, V, seed=1).requires_grad_(), normal(T, V, seed=2)
    found, expected = (
        token_loss(kind, student, teacher, skew=0),
        token_loss(cast(Any, kind.removeprefix("skewed_")), student, teacher),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student), torch.autograd.grad(expected, student))


@pytest.mark.parametrize(("end", "limit"), [(0, "forward_kl"), (1, "reverse_kl")])
def test_towards_its_ends_jensen_shannon_is_a_vanishing_share_of_a_kl(end: int, limit: Kind) -> None:
    student, teacher, small = normal(T, V, seed=1), normal(T, V, seed=2), 1e-7
    found = token_loss("jensen_shannon", student, teacher, skew=abs(end - small)) / small
    torch.testing.assert_close(found, token_loss(limit, student, teacher), rtol=1e-5, atol=0)


def test_jensen_shannon_at_a_half_is_symmetric_and_at_most_ln_2() -> None:
    student, teacher = 30 * normal(T, V, seed=1), 30 * normal(T, V, seed=2)
    there, back = (token_loss("jensen_shannon", *pair) for pair in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(there, back)
    assert 0.1 < there <= math.log(2)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_the_centred_logits() -> None:
    """Equation 4 of arXiv:1503.02531, times t^2: the temperature does not change the size of the gradient."""
    student, teacher = normal(1, V, seed=1).requires_grad_(), normal(1, V, seed=2)
    centred = (student - student.mean() - teacher + teacher.mean()).detach() / V
    for kind in ("forward_kl", "reverse_kl"):
        (found,) = torch.autograd.grad(token_loss(kind, student, teacher, temperature=1e4), student)
        torch.testing.assert_close(found, centred, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_higher_temperature_keeps_the_size_of_the_gradient(kind: Kind) -> None:
    student, teacher = normal(T, V, seed=1).requires_grad_(), normal(T, V, seed=2)
    sizes = [
        float(torch.autograd.grad(token_loss(kind, student, teacher, temperature=t), student)[0].norm())
        for t in (1e2, 1e4)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def poisoned(like: Scores, at: Sequence[int]) -> Scores:
    hidden_TD = like.hidden_TD.clone()
    hidden_TD[list(at)] = torch.nan
    return replace(like, hidden_TD=hidden_TD)


@pytest.mark.parametrize("how", ["labels", "weights", "both"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_tokens_that_do_not_count_are_not_even_read(kind: Kind, how: str) -> None:
    left, kept = ([1, 4], [0, 2, 3, 5, 6]), [0, 2, 3, 5, 6]
    labels = torch.arange(T)
    weight_T = torch.ones(T)
    if how != "weights":
        labels[left[0] if how == "labels" else left[0][:1]] = IGNORED
    if how != "labels":
        weight_T[left[0] if how == "weights" else left[0][1:]] = 0
    student, teacher = learning(poisoned(head(0), left[0])), poisoned(head(5), left[0])
    loss = token_loss(kind, student, teacher, labels_T=labels, weight_T=weight_T, chunk=2)
    short, known = (replace(x, hidden_TD=x.hidden_TD[kept]) for x in (learning(head(0)), head(5)))
    expected = token_loss(kind, short, known)
    torch.testing.assert_close(loss, expected)
    hidden, *others = gradients(loss, student)
    reference, *rest = gradients(expected, replace(short))
    torch.testing.assert_close(others, rest)
    torch.testing.assert_close(hidden[kept], reference)
    assert not hidden[left[0]].any()


def test_weights_count_relative_to_each_other_and_may_be_masks() -> None:
    student, teacher = head(0), head(5)
    each_T = plain("forward_kl", logits(student), logits(teacher))
    weight_T = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    expected = each_T[weight_T.bool()].mean()
    for weights in (weight_T, weight_T.bool(), 1e-20 * weight_T, 1e20 * weight_T.double()):
        torch.testing.assert_close(
            token_loss("forward_kl", student, teacher, weight_T=weights, chunk=2), expected
        )


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_token_that_counts_the_loss_is_nothing(tokens: int) -> None:
    student, teacher = learning(head(0, tokens=tokens)), head(5, tokens=tokens)
    for model in (student, normal(tokens, V).requires_grad_()):
        loss = token_loss("forward_kl", model, teacher, labels_T=torch.full((tokens,), IGNORED))
        assert loss.item() == 0
        found = gradients(loss, model) if isinstance(model, Scores) else torch.autograd.grad(loss, model)
        assert not any(x.any() for x in found)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bfloat16_is_rounded_where_the_model_rounds_it_and_nowhere_else(kind: Kind) -> None:
    student, teacher = (half(head(seed), torch.bfloat16) for seed in (0, 5))
    q, p = (
        torch.nn.functional.linear(x.hidden_TD, cast(Tensor, x.weight_VD), x.bias_V).double()
        for x in (student, teacher)
    )
    expected = plain(kind, q, p).mean()
    found = token_loss(kind, student, teacher, chunk=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    learner, exact = learning(student), learning(half(student, torch.float64))
    of_loss = gradients(token_loss(kind, learner, teacher, chunk=2), learner)
    assert all(x.dtype == torch.bfloat16 for x in of_loss)
    of_exact = gradients(plain(kind, logits(exact), logits(half(teacher, torch.float64))).mean(), exact)
    for x, y in zip(of_loss, of_exact, strict=True):
        assert float((x.double() - y).norm() / y.norm()) < 0.02


def test_gradients_of_many_chunks_are_added_up_in_float32() -> None:
    """In bfloat16 a sum stops to grow at 256 times what is added."""
    hidden, zero = torch.ones(600, 2, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16)
    student = learning(Scores(hidden, zero, zero[:, 0]))
    loss = token_loss("cross_entropy", student, None, labels_T=torch.zeros(600, dtype=torch.long), chunk=1)
    _, of_weight, of_bias = gradients(loss, student)
    torch.testing.assert_close(of_bias.double(), torch.tensor([-0.75, 0.25, 0.25, 0.25], dtype=torch.float64))
    torch.testing.assert_close(of_weight, of_bias[:, None].expand(4, 2))


@pytest.mark.parametrize("plain_logits", [True, False])
def test_small_gradients_survive_float16_when_the_loss_is_scaled(plain_logits: bool) -> None:
    rows = (normal(4096, V) if plain_logits else torch.ones(4096, 1)).half().requires_grad_()
    student = rows if plain_logits else Scores(rows, normal(V, 1).half())
    teacher = rows.detach() if plain_logits else Scores(rows.detach(), normal(V, 1).half())
    moved = (
        teacher + 0.01
        if isinstance(teacher, Tensor)
        else replace(teacher, weight_VD=normal(V, 1, seed=1).half())
    )
    (found,) = torch.autograd.grad(token_loss("reverse_kl", student, moved) * 65536, rows)
    wide = rows.detach().double().requires_grad_()
    other = wide if plain_logits else Scores(wide, normal(V, 1).half().double())
    (expected,) = torch.autograd.grad(token_loss("reverse_kl", other, moved) * 65536, wide)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=1e-4)


def test_a_head_in_float32_reads_and_learns_from_hidden_states_in_bfloat16_under_autocast_or_not() -> None:
    full, teacher = half(head(0), torch.float32), half(head(5), torch.float32)
    mixed, known = (replace(x, hidden_TD=x.hidden_TD.bfloat16()) for x in (full, teacher))
    mixed = learning(mixed)
    found, exact, top = (
        token_loss("forward_kl", mixed, known),
        token_loss("forward_kl", full, teacher),
        top_k(teacher, 2),
    )
    assert [x.dtype for x in gradients(found, mixed)] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_loss("forward_kl", mixed, known), found)
        assert torch.equal(token_loss("forward_kl", full, teacher), exact), "autocast rounded the product"
        assert torch.equal(top_k(teacher, 2).log_p_TK1, top.log_p_TK1), "autocast rounded the product"


def test_the_likeliest_tokens_are_those_of_the_whole_distribution() -> None:
    scores = head(2, cap=5.0)
    log_p_TV = torch.log_softmax(logits(scores) / 2, -1)
    values, index = log_p_TV.topk(4)
    for teacher in (scores, logits(scores)):
        found = top_k(teacher, 4, temperature=2.0, chunk=3)
        assert torch.equal(found.index_TK, index) and found.temperature == 2
        torch.testing.assert_close(found.log_p_TK1[:, :-1], values)
        torch.testing.assert_close(found.log_p_TK1[:, -1], torch.log1p(-values.exp().sum(-1)))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_from_few_tokens_and_a_rest_the_divergence_is_that_of_the_classes(kind: Kind) -> None:
    student, teacher, k = normal(T, V, seed=1), normal(T, V, seed=2), 3
    index = teacher.topk(k).indices
    p, q = (torch.softmax(x / 2, -1).gather(1, index) for x in (teacher, student))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], 1).log() for x in (p, q))
    found = token_loss(kind, student, top_k(teacher, k, temperature=2.0), temperature=2.0, chunk=2)
    torch.testing.assert_close(found, plain(kind, q, p).mean() * (2 if kind == "total_variation" else 4))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_all_tokens_are_the_whole_distribution(kind: Kind) -> None:
    student, teacher = learning(head(0)), head(5)
    full, found = token_loss(kind, student, teacher), token_loss(kind, student, top_k(teacher, V))
    torch.testing.assert_close(found, full)
    torch.testing.assert_close(gradients(found, student), gradients(full, student))
    nothing_left = top_k(teacher, V)
    nothing_left.log_p_TK1[:, -1] = -torch.inf
    torch.testing.assert_close(token_loss(kind, student, nothing_left), full)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(DIVERGENCES),
    seed=st.integers(0, 999),
    k=st.integers(1, V - 1),
    spread=st.sampled_from([0.1, 1.0, 5.0, 40.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_what_is_put_together_in_a_rest_can_only_lessen_a_divergence(
    kind: Kind, seed: int, k: int, spread: float, dtype: torch.dtype
) -> None:
    student, teacher = (spread * normal(T, V, seed=seed + i).to(dtype) for i in (0, 1000))
    less, more = (
        float(token_loss(kind, student, known)) for known in (top_k(teacher, k), top_k(teacher, k + 1))
    )
    full = float(token_loss(kind, student, teacher))
    small = 1e-5 if dtype == torch.float32 else 1e-12
    assert -small <= less <= more + small * (1 + more) and more <= full + small * (1 + full)


@pytest.mark.parametrize("k", [None, 1, V])
@pytest.mark.parametrize("kind", [*DIVERGENCES, "cross_entropy"])
def test_any_logits_have_a_finite_loss_and_gradient(kind: Kind, k: int | None) -> None:
    """Tokens that both models forbid by a logit of -inf included."""
    for decade, masked, skew in itertools.product(
        (-30, -2, 0, 1, 2, 3, 30), (0, V // 2, V - 1), (0.0, 1e-3, 0.5)
    ):
        student, teacher = (10.0**decade * normal(T, V, seed=seed).float() for seed in (1, 2))
        student[:, :masked] = teacher[:, :masked] = -torch.inf
        known = None if kind == "cross_entropy" else teacher if k is None else top_k(teacher, k)
        options: dict[str, Any] = {
            "skew": max(skew, 1e-9 if kind == "jensen_shannon" else 0),
            "label_share": 0.5,
        }
        loss = token_loss(kind, student.requires_grad_(), known, labels_T=torch.full((T,), V - 1), **options)
        (found,) = torch.autograd.grad(loss, student)
        assert -1e-5 < loss.item() < math.inf, options
        assert bool(torch.isfinite(found).all()) and bool((found[:, :masked] == 0).all()), (
            decade,
            masked,
            options,
        )


class Largest(TorchDispatchMode):
    """What the operations under it make: the size of the largest tensor, and the storages of size `large` or
    more."""

    def __init__(self, large: int, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.large = 0, large
        self.storages: set[int] = set()
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, list | tuple) else (made,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
                if x.numel() >= self.large:
                    self.storages.add(x.untyped_storage().data_ptr())
        return made


MANY, WORDS, CHUNK = 40, 300, 5


@pytest.mark.parametrize("teacher", ["scores", "top"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_more_than_a_chunk_of_logits_is_ever_made(kind: Kind, dtype: torch.dtype, teacher: str) -> None:
    rows, weight, other = (normal(n, 6, seed=i).to(dtype) for i, n in enumerate((MANY, WORDS, WORDS)))
    student, known = learning(Scores(rows, weight, cap=5.0)), Scores(rows.clone(), other, cap=5.0)
    labels = torch.arange(MANY)
    with Largest(MANY * WORDS, ()) as made:
        top = top_k(known, 3, chunk=CHUNK)
        given = known if teacher == "scores" else top
        loss = token_loss(kind, student, given, labels_T=labels, label_share=0.5, chunk=CHUNK)
        loss.backward()
    assert made.elements <= WORDS * 6, (
        f"a tensor of {made.elements} elements, where the head's gradient has {WORDS * 6}"
    )
    with Largest(MANY * WORDS, ()) as made:
        plain(
            kind, student.logits(student.product(torch.arange(MANY))), normal(MANY, WORDS)
        ).mean().backward()
    assert made.elements >= MANY * WORDS, "what measures sees no large tensor either"


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_of_plain_logits_only_their_gradient_is_as_large(kind: Kind) -> None:
    student, teacher = normal(MANY, WORDS).requires_grad_(), normal(MANY, WORDS, seed=1)
    with Largest(MANY * WORDS, (student, teacher)) as made:
        (3 * token_loss(kind, student, teacher, chunk=CHUNK)).backward()
    assert made.elements == MANY * WORDS and len(made.storages) == 1


def test_without_gradient_none_is_computed() -> None:
    student, teacher = (
        learning(Scores(normal(MANY, 6), normal(WORDS, 6))),
        Scores(normal(MANY, 6), normal(WORDS, 6, seed=1)),
    )
    given = [x for y in (student, teacher) for x in (y.hidden_TD, y.weight_VD) if x is not None]
    with Largest(WORDS * 6, given) as made, torch.no_grad():
        loss = token_loss("forward_kl", student, teacher, chunk=CHUNK)
    assert not loss.requires_grad and not made.storages
    fixed = replace(student, hidden_TD=student.hidden_TD.detach(), weight_VD=student.weight_VD.detach())  # type: ignore[union-attr]
    assert not token_loss("forward_kl", fixed, teacher).requires_grad


@pytest.mark.parametrize("frozen", ["hidden_TD", "weight_VD", "bias_V"])
def test_what_does_not_learn_gets_no_gradient(frozen: str) -> None:
    student, teacher = learning(head(0)), learning(head(5))
    expected = gradients(token_loss("forward_kl", student, teacher), student)
    part = replace(student, **{frozen: getattr(student, frozen).detach()})
    token_loss("forward_kl", part, teacher).backward()
    assert getattr(part, frozen).grad is None and teacher.hidden_TD.grad is None
    for name, y in zip(("hidden_TD", "weight_VD", "bias_V"), expected, strict=True):
        assert name == frozen or torch.equal(getattr(part, name).grad, y)


@pytest.mark.parametrize("of", ["scores", "logits"])
def test_the_way_back_may_be_gone_twice_but_not_differentiated(of: str) -> None:
    scores = learning(head(0))
    student, leaf = (
        (scores, scores.hidden_TD) if of == "scores" else (leaf := normal(T, V).requires_grad_(), leaf)
    )
    loss = token_loss("reverse_kl", student, head(5))
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(5 * loss, leaf, retain_graph=True)
    torch.testing.assert_close(again, 5 * first)
    (found,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.sum().backward()


def test_logits_that_were_changed_since_have_no_gradient() -> None:
    student = normal(T, V).requires_grad_() * 1
    loss = token_loss("forward_kl", student, normal(T, V, seed=1))
    student.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_on_chunks_brings_the_student_to_its_teacher() -> None:
    teacher = half(head(5, tokens=64), torch.float32)
    student = learning(replace(half(head(0, tokens=64), torch.float32), hidden_TD=teacher.hidden_TD))
    assert student.weight_VD is not None and student.bias_V is not None
    optimizer, seen = torch.optim.Adam([student.weight_VD, student.bias_V], 0.1), []
    for _ in range(200):
        optimizer.zero_grad()
        loss = token_loss("forward_kl", student, teacher, chunk=16)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 1e-3 * seen[0]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("forward_kl", {"teacher": None}, "forward_kl needs a teacher"),
        ("cross_entropy", {}, "cross entropy needs labels"),
        ("forward_kl", {"label_share": 0.5}, "cross entropy needs labels"),
        ("jensen_shannon", {"skew": 0.0}, "jensen_shannon does not take a skew of 0"),
        ("jensen_shannon", {"skew": 1.0}, "jensen_shannon does not take a skew of 1"),
        ("skewed_forward_kl", {"skew": -0.1}, "skewed_forward_kl does not take a skew of -0.1"),
        ("forward_kl", {"teacher": normal(T, V + 1)}, "differ in tokens or vocabulary"),
        ("forward_kl", {"teacher": normal(T + 1, V)}, "differ in tokens or vocabulary"),
        ("forward_kl", {"teacher": top_k(normal(T, V), 2, temperature=2.0)}, "not taken at temperature=1"),
        ("forward_kl", {"teacher": top_k(normal(T + 1, V), 2)}, "differ in tokens"),
        ("kl", {}, "kl is none of forward_kl, "),
    ],
)
def test_what_does_not_fit_together_is_refused(kind: Kind, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_loss(kind, normal(T, V), **{"teacher": normal(T, V, seed=1), **arguments})


B, L, E = 2, 4, 3
HIDDEN: tuple[HiddenKind, ...] = get_args(HiddenKind)
STATES = normal(B, L, D, seed=1), normal(B, L, E, seed=2), normal(E, D, seed=3)
MASK = torch.tensor([[1, 0.5, 0, 2], [0, 1, 3, 1]], dtype=torch.float64)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_hidden_losses_are_the_mean_square_and_the_cosine(projected: bool, masked: bool) -> None:
    student, teacher, W_ED = STATES
    W_ED, teacher = (
        (W_ED, teacher) if projected else (torch.eye(D, dtype=torch.float64), normal(B, L, D, seed=4))
    )
    weight_BL = MASK if masked else torch.ones(B, L, dtype=torch.float64)
    there = student @ W_ED.T
    each = {
        "mse": (there - teacher).square().mean(-1),
        "cosine": 1 - cosine_similarity(there, teacher, dim=-1),
    }
    for kind in HIDDEN:
        found = hidden_loss(
            kind, student, teacher, W_ED if projected else None, weight_BL if masked else None
        )
        torch.testing.assert_close(found, (each[kind] * weight_BL).sum() / weight_BL.sum())


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_projection_learns_with_the_student(kind: HiddenKind) -> None:
    student, teacher, W_ED = (x.clone().requires_grad_() for x in STATES)
    assert torch.autograd.gradcheck(lambda x, W: hidden_loss(kind, x, teacher, W, MASK), (student, W_ED))
    hidden_loss(kind, student, teacher, W_ED, MASK).backward()
    assert teacher.grad is None and student.grad is not None and not student.grad[MASK == 0].any()


@pytest.mark.parametrize("kind", HIDDEN)
def test_equal_hidden_states_have_no_loss_whatever_is_masked(kind: HiddenKind) -> None:
    student = STATES[0].bfloat16()
    student[MASK == 0] = torch.nan
    student.requires_grad_()
    loss = hidden_loss(kind, student, student.detach().float(), weight_BL=MASK)
    assert loss.item() == 0 and loss.dtype == torch.float32
    (found,) = torch.autograd.grad(loss, student)
    assert not found.any()
    assert hidden_loss(kind, student, student, weight_BL=torch.zeros(B, L)).item() == 0


def test_hidden_states_of_different_widths_need_a_projection() -> None:
    with pytest.raises(ValueError, match="of 5 and 3 columns"):
        hidden_loss("mse", STATES[0], STATES[1])


def attention(heads: int, seed: int) -> Tensor:
    """Causal probabilities [B, H, L, L]."""
    scores = 2 * normal(B, heads, L, L, seed=seed)
    return torch.softmax(scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf), -1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(3, 3), (2, 3), (1, 4)])
def test_attention_is_compared_row_by_row(heads: tuple[int, int], masked: bool) -> None:
    student, teacher = attention(heads[0], 1), attention(heads[1], 2)
    first, second = (
        (student, teacher) if heads[0] == heads[1] else (x.mean(1, keepdim=True) for x in (student, teacher))
    )
    rows = torch.stack([kl(second[..., i, : i + 1], first[..., i, : i + 1]) for i in range(L)], -1).mean(1)
    expected = (rows * MASK).sum() / MASK.sum() if masked else rows.mean()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    found = attention_kl(student, teacher, MASK if masked else None)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert teacher.grad is None and student.grad is not None and bool(student.grad.any())


def test_equal_attention_has_no_loss_and_zeros_no_gradient_that_is_not_finite() -> None:
    probabilities = attention(3, 1).float().requires_grad_()
    assert attention_kl(probabilities, probabilities).item() == 0
    (found,) = torch.autograd.grad(attention_kl(probabilities, attention(3, 2)), probabilities)
    assert bool(torch.isfinite(found).all()) and not found[..., 0, 1:].any()


@pytest.mark.parametrize(
    ("student", "teacher", "gone", "expected"),
    [
        (4, 4, None, (0, 1, 2, 3)),
        (4, 4, (), (0, 1, 2, 3)),
        (4, 12, None, (2, 5, 8, 11)),
        (3, 4, None, (0, 1, 3)),
        (1, 9, None, (8,)),
        (5, 8, {2, 5, 6}, (0, 2, 3, 6, 7)),
        (3, 5, [0, 4], (1, 2, 4)),
        (1, 3, (0, 2), (2,)),
    ],
)
def test_a_layer_follows_the_last_of_those_that_it_stands_for(
    student: int, teacher: int, gone: Sequence[int] | None, expected: tuple[int, ...]
) -> None:
    assert layer_map(student, teacher, gone) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "gone"), [(5, 4, None), (0, 4, None), (3, 4, ()), (2, 4, (1, 7)), (0, 2, (0, 1))]
)
def test_numbers_of_layers_that_do_not_fit_are_refused(
    student: int, teacher: int, gone: tuple[int, ...] | None
) -> None:
    with pytest.raises(ValueError, match=f"{student} layers are not what is left of {teacher} without"):
        layer_map(student, teacher, gone)


@given(teacher=st.integers(1, 60), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_layers_are_followed_in_order_and_the_last_by_the_last(teacher: int, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, teacher - 1), max_size=teacher - 1))
    for found in (layer_map(teacher - len(gone), teacher, gone), layer_map(teacher - len(gone), teacher)):
        assert list(found) == sorted(set(found)) and found[-1] == teacher - 1
