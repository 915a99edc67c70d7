"""Matching: which layer is held against which, by how much they are apart, and the linear between unequal
widths."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.algorithms.distillation_losses import HiddenKind
from llmcompress.errors import ModelError
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.stages.distill.feature_matching import Matching, projection_of
from llmcompress.stages.distill.student import whole
from llmcompress.stages.distill.teacher import TeacherOutput, forward_arguments, output_of
from tests.artefacts import CPU
from tests.models import noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS: tuple[HiddenKind, ...] = ("mse", "cosine")
WEIGHTS = [("mse", 1.0, 0.0), ("cosine", 1.0, 0.0), ("mse", 0.0, 1.0), ("cosine", 0.5, 2.0)]


def spoken(model: PreTrainedModel) -> TeacherOutput:
    """All that a model says of some text, with gradient."""
    model.set_attn_implementation("eager")
    return output_of(model, model(**forward_arguments(IDS, output_attentions=True)))


def base(**config: Any) -> PreTrainedModel:
    return pico("llama", num_hidden_layers=4, **config)


def cut(model: PreTrainedModel, *kept: int) -> PreTrainedModel:
    """The model with these layers alone."""
    found = cast(Any, whole(InMemoryModel(model.config, dict(model.state_dict()), CPU)))
    found.model.layers = nn.ModuleList(found.model.layers[index] for index in kept)
    found.config.num_hidden_layers = len(kept)
    for index, layer in enumerate(found.model.layers):
        layer.self_attn.layer_idx = index
    return cast(PreTrainedModel, found)


def made(hidden: int = 0, seed: int = 0, layers: int = 2, heads: int = 3, **like: Any) -> TeacherOutput:
    """Hidden states and attention maps drawn at random."""
    states = tuple(noise(2, 5, hidden or 8, seed=seed + n) for n in range(layers + 1))
    maps = tuple((3 * noise(2, heads, 5, 5, seed=seed + 50 + n)).softmax(-1) for n in range(layers))
    return TeacherOutput(cast(Any, None), states, maps)


# which layers


@pytest.mark.parametrize(
    ("student", "teacher", "origin", "layers", "heads"),
    [
        (4, 4, (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),  # nothing was cut
        (4, 4, (), (0, 1, 2, 3), (0, 1, 2, 3)),
        (3, 6, (0, 2, 5), (1, 4, 5), (0, 2, 5)),  # a layer stands for itself and for those cut behind it
        (4, 6, (0, 1, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5)),
        (2, 6, (1, 2), (1, 5), (1, 2)),  # for what was cut before the first none stands
        (1, 6, (3,), (5,), (3,)),
        (3, 6, (), (1, 3, 5), (1, 3, 5)),  # another model: each for an even share
        (4, 6, (), (0, 2, 3, 5), (0, 2, 3, 5)),
        (1, 6, (), (5,), (5,)),
        (3, 5, (), (0, 2, 4), (0, 2, 4)),
        (3, 6, (0, 1), (1, 3, 5), (1, 3, 5)),  # an origin of another number of layers says nothing
        (3, 4, (0, 2, 5), (0, 1, 3), (0, 1, 3)),  # nor one of layers that this teacher does not have
    ],
)
def test_each_layer_is_held_against_the_last_that_it_stands_for(
    student: int, teacher: int, origin: tuple[int, ...], layers: tuple[int, ...], heads: tuple[int, ...]
) -> None:
    found = Matching.of(student, teacher, origin, "mse", 1.0, 0.5)
    assert (tuple(found.layers), tuple(found.heads)) == (layers, heads)
    assert (found.kind, found.hidden, found.attention) == ("mse", 1.0, 0.5)
    assert found.layers[-1] == teacher - 1  # the last is after the norm in both


@pytest.mark.parametrize("origin", [(), (0, 1), (0, 1, 2, 3, 4, 5)])
def test_a_deeper_student_is_refused(origin: tuple[int, ...]) -> None:
    with pytest.raises(
        ModelError, match="6 layers can't match the 4 of its teacher; leave hidden and attention"
    ) as told:
        Matching.of(6, 4, origin, "mse", 1.0, 0.0)
    assert "\n" not in str(told.value)


def test_maps_are_asked_for_where_they_are_matched() -> None:
    assert Matching.of(2, 2, (), "mse", 1.0, 0.0).asked == {}
    assert Matching.of(2, 2, (), "mse", 0.0, 0.1).asked == {"output_attentions": True}


# how far apart


@pytest.mark.parametrize(("kind", "hidden", "attention"), WEIGHTS)
def test_a_model_matches_itself_exactly(kind: HiddenKind, hidden: float, attention: float) -> None:
    student, teacher = spoken(base()), spoken(base())
    matching = Matching.of(4, 4, (0, 1, 2, 3), kind, hidden, attention)
    loss = matching.loss(student, teacher, None)
    assert float(loss.detach()) == 0 and loss.dim() == 0
    other = spoken(base(rms_norm_eps=0.5))
    assert float(matching.loss(other, teacher, None).detach()) > 1e-3


@pytest.mark.parametrize(("kind", "hidden", "attention"), WEIGHTS)
def test_a_model_whose_layers_were_cut_is_apart_where_they_are_missing(
    kind: HiddenKind, hidden: float, attention: float
) -> None:
    whole_one = base()
    student = cut(whole_one, 0, 1, 3)
    matching = Matching.of(3, 4, (0, 1, 3), kind, hidden, attention)
    own, taught = spoken(student), spoken(whole_one)
    assert matching.layers == (0, 2, 3) and torch.equal(own.hidden_BLD[2], taught.hidden_BLD[2])
    assert float(matching.loss(own, taught, None).detach()) > 0
    maps = Matching.of(3, 4, (0, 1, 3), "mse", 0.0, 1.0)
    same = [
        torch.equal(own.attention_BHLL[n], taught.attention_BHLL[head]) for n, head in enumerate(maps.heads)
    ]
    assert same == [True, True, False]  # before the cut all is as it was


def reference(
    matching: Matching, student: TeacherOutput, teacher: TeacherOutput, W_ED: Tensor | None
) -> float:
    """The loss, number by number, in float64."""
    total = 0.0
    for n, yours in enumerate(matching.layers):
        if matching.hidden:
            s = student.hidden_BLD[n + 1].detach().double().flatten(0, -2)
            t = teacher.hidden_BLD[yours + 1].double().flatten(0, -2)
            s = s if W_ED is None else s @ W_ED.detach().double().T
            if matching.kind == "mse":
                value = float(((s - t) ** 2).mean() / (t**2).mean())
            else:
                value = 1 - sum(
                    float(a @ b / (a.norm() * b.norm())) for a, b in zip(s, t, strict=True)
                ) / len(s)
            total += matching.hidden * value
    for n, yours in enumerate(matching.heads):
        if matching.attention:
            q, p = student.attention_BHLL[n].detach().double(), teacher.attention_BHLL[yours].double()
            if q.shape[1] != p.shape[1]:
                q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
            B, H, L, _ = p.shape
            for b, h, i, j in np.ndindex(*p.shape):
                if float(p[b, h, i, j]):
                    total += (
                        matching.attention
                        * float(p[b, h, i, j])
                        * math.log(p[b, h, i, j] / q[b, h, i, j])
                        / (B * H * L)
                    )
    return total / len(matching.layers)


@pytest.mark.parametrize(("kind", "hidden", "attention"), WEIGHTS)
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("heads", [3, 6])
def test_the_loss_is_that_of_its_definition(
    kind: HiddenKind, hidden: float, attention: float, layers: int, heads: int
) -> None:
    student, teacher = made(seed=1), made(seed=2, layers=layers, heads=heads)
    matching = Matching.of(2, layers, (), kind, hidden, attention)
    found = matching.loss(student, teacher, None)
    assert float(found) == pytest.approx(reference(matching, student, teacher, None), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_unequal_widths_goes_through_the_projection(kind: HiddenKind) -> None:
    student, teacher = made(hidden=6, seed=1), made(hidden=8, seed=2)
    projection = nn.Linear(6, 8, bias=False)
    matching = Matching.of(2, 2, (), kind, 1.0, 0.0)
    found = matching.loss(student, teacher, projection)
    assert float(found.detach()) == pytest.approx(
        reference(matching, student, teacher, projection.weight), rel=1e-5
    )
    with pytest.raises(ValueError, match="give W_ED"):
        matching.loss(student, teacher, None)


def test_mse_is_a_share_of_what_the_teacher_has() -> None:
    student, teacher = made(seed=1), made(seed=2)
    large = [
        TeacherOutput(one.scores, tuple(100 * h for h in one.hidden_BLD), one.attention_BHLL)
        for one in (student, teacher)
    ]
    matching = Matching.of(2, 2, (), "mse", 1.0, 0.0)
    assert float(matching.loss(large[0], large[1], None)) == pytest.approx(
        float(matching.loss(student, teacher, None)), rel=1e-5
    )
    nothing = TeacherOutput(student.scores, tuple(torch.zeros_like(h) for h in student.hidden_BLD), ())
    assert float(matching.loss(nothing, teacher, None)) == pytest.approx(1.0)


def test_what_enters_the_first_layer_is_not_matched() -> None:
    student, teacher = made(seed=1), made(seed=2)
    matching = Matching.of(2, 2, (), "mse", 1.0, 0.0)
    other = TeacherOutput(
        student.scores, (noise(2, 5, 8, seed=9), *student.hidden_BLD[1:]), student.attention_BHLL
    )
    assert torch.equal(matching.loss(other, teacher, None), matching.loss(student, teacher, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_in_half_precision_are_compared_in_full(dtype: torch.dtype) -> None:
    student, teacher = (
        TeacherOutput(
            one.scores,
            tuple(h.to(dtype) for h in one.hidden_BLD),
            tuple(a.to(dtype) for a in one.attention_BHLL),
        )
        for one in (made(hidden=6, seed=1), made(hidden=8, seed=2))
    )
    matching, projection = Matching.of(2, 2, (), "mse", 1.0, 1.0), nn.Linear(6, 8, bias=False)
    found = matching.loss(student, teacher, projection).detach()
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(reference(matching, student, teacher, projection.weight), rel=1e-3)


@pytest.mark.parametrize(("kind", "hidden", "attention"), WEIGHTS)
def test_the_gradient_reaches_the_student_and_not_the_teacher(
    kind: HiddenKind, hidden: float, attention: float
) -> None:
    student, teacher = base().requires_grad_(), base(rms_norm_eps=0.5).requires_grad_()
    Matching.of(4, 4, (), kind, hidden, attention).loss(spoken(student), spoken(teacher), None).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert "model.layers.0.self_attn.q_proj.weight" in reached and "lm_head.weight" not in reached
    assert ("model.layers.3.mlp.down_proj.weight" in reached) == bool(hidden)
    assert all(p.grad is None or not p.grad.any() for p in teacher.parameters())


# the projection


@pytest.mark.parametrize(("D", "E"), [(6, 8), (8, 6), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projection_is_the_least_squares_one(D: int, E: int, dtype: torch.dtype) -> None:
    x, y = noise(3, 20, D, seed=1).to(dtype), noise(3, 20, E, seed=2).to(dtype)
    found = cast(nn.Linear, projection_of(x, y))
    assert found.bias is None and found.weight.shape == (E, D)
    assert found.weight.dtype is torch.float32 and found.weight.requires_grad
    x_ND, y_NE = (t.double().flatten(0, 1).numpy() for t in (x, y))
    assert torch.allclose(
        found.weight, torch.from_numpy(np.linalg.lstsq(x_ND, y_NE, rcond=None)[0].T).float(), atol=1e-5
    )
    by_torch = torch.linalg.lstsq(x.double().flatten(0, 1), y.double().flatten(0, 1)).solution.T
    assert torch.allclose(found.weight, by_torch.float(), atol=1e-6)


def test_a_projection_that_is_known_is_found() -> None:
    x, W_ED = noise(4, 30, 6, seed=1), noise(9, 6, seed=2)
    found = cast(nn.Linear, projection_of(x, x @ W_ED.T))
    assert torch.allclose(found.weight, W_ED, atol=1e-5)
    states = (
        TeacherOutput(cast(Any, None), (x, x, x)),
        TeacherOutput(cast(Any, None), (x, x @ W_ED.T, x @ W_ED.T)),
    )
    assert float(Matching.of(2, 2, (), "mse", 1.0, 0.0).loss(*states, found).detach()) < 1e-10


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_a_student_fresh_from_its_config_has_a_projection_of_plain_size(family: str) -> None:
    like, teacher = pico(family).config, pico("llama", hidden_size=128)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = AutoModelForCausalLM.from_config(
            like
        ).eval()  # states after its norms sum to zero, but for rounding
    text = torch.randint(3, 160, (4, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, taught = (output_of(model, model(**forward_arguments(text))) for model in (student, teacher))
        projection = projection_of(own.hidden_BLD[-1], taught.hidden_BLD[-1])
        assert float(cast(nn.Linear, projection).weight.abs().max()) < 10
        # a share of the teacher's
        assert float(Matching.of(2, 2, (), "mse", 1.0, 0.0).loss(own, taught, projection)) < 1


@pytest.mark.parametrize("D", [4, 30])
def test_states_that_leave_directions_open_give_a_finite_projection(D: int) -> None:
    x = noise(1, 10, 2, seed=1) @ noise(2, D, seed=2)  # of rank 2, and of fewer tokens than columns
    y = noise(1, 10, 40, seed=3)
    found = cast(nn.Linear, projection_of(x, y))
    expected = np.linalg.lstsq(x[0].double().numpy(), y[0].double().numpy(), rcond=1e-6)[0]
    assert bool(found.weight.isfinite().all())
    assert torch.allclose(
        x @ found.weight.T, torch.from_numpy(x[0].double().numpy() @ expected).float(), atol=1e-4
    )


def test_equal_widths_need_no_projection() -> None:
    assert projection_of(noise(2, 5, 8), noise(2, 5, 8, seed=1)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_projection_and_the_states_behind_it(kind: HiddenKind) -> None:
    student, teacher = pico("llama"), pico("llama", hidden_size=128)
    own, taught = spoken(student.requires_grad_()), spoken(teacher)
    projection = cast(nn.Linear, projection_of(own.hidden_BLD[-1].detach(), taught.hidden_BLD[-1].detach()))
    assert projection.weight.shape == (128, 64)
    matching = Matching.of(2, 2, (), kind, 1.0, 0.0)
    loss = matching.loss(own, taught, projection)
    loss.backward()
    assert cast(Tensor, projection.weight.grad).any()
    assert cast(Tensor, student.get_parameter("model.layers.0.mlp.up_proj.weight").grad).any()
    parameters = [*student.parameters(), *projection.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)
    optimizer.step()
    with torch.no_grad():
        assert float(matching.loss(spoken(student), taught, projection)) < float(loss.detach())
