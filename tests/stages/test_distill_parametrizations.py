"""What weights are made of while they learn: the same weight at the start, and at the end what is written is
what was used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.algorithms.codebook import kmeans, nearest
from llmcompress.errors import ModelError
from llmcompress.formats import base, bitsandbytes_layout, registry
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.integer import Int8Weight
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.stages.distill.parametrizations import (
    CodebookLevels,
    FactoredParts,
    ScaledCodes,
    StoredRounding,
    WeightParametrization,
    attach,
    parameters_of,
    parametrization_of,
)
from llmcompress.stages.distill.student import Student, Train, whole
from tests.artefacts import CPU
from tests.models import noise, pico
from tests.stages.test_distill_student import IDS, live, logits, move, state, turned, weight_of

pytestmark = pytest.mark.usefixtures("short_runs")

R, C = 32, 128
LAYOUTS = (FactoredLayout("shared"), FactoredLayout("shared", 5), FactoredLayout("basis", 6))
BOOKS = (
    CodebookLayout(16, 1, "float16"),
    CodebookLayout(4, 8, "float32"),
    CodebookLayout(256, None, "bfloat16"),
)
DTYPES = (torch.float32, torch.bfloat16)


def packed(double_quant: bool) -> bitsandbytes_layout.Packed:
    return bitsandbytes_layout.quantize_nearest(noise(R, C), "nf4", 64, double_quant)


def clustered(W_RC: Tensor, layout: CodebookLayout) -> CodebookWeight:
    """Of the levels of k-means."""
    rows = layout.sharing(len(W_RC))
    levels = layout.snap(kmeans(W_RC, torch.ones(W_RC.shape[1]), layout.entries, rows))
    codes = nearest(W_RC, levels, rows).to(torch.uint8)
    return CodebookWeight(codes, levels.to(base.DTYPES[layout.dtype]), layout)


def parts(layout: FactoredLayout, dtype: torch.dtype = torch.float32, seed: int = 0) -> FactoredWeight:
    whole = noise(R, C, seed=seed) if layout.format == "shared" else None
    left, right = (
        (noise(R, layout.rank, seed=seed + 1), noise(layout.rank, C, seed=seed + 2))
        if layout.rank
        else (None, None)
    )
    return FactoredWeight(layout, whole, left, right).to(dtype)


WEIGHTS: dict[str, Callable[[], registry.StoredWeight]] = {
    "nf4": lambda: packed(False),
    "nf4, scales in 8 bits": lambda: packed(True),
    **{layout.name: partial(clustered, noise(R, C), layout) for layout in BOOKS},
    **{layout.name: partial(parts, layout) for layout in LAYOUTS},
}
by_weight = pytest.mark.parametrize("what", WEIGHTS)
by_way = pytest.mark.parametrize("transposed", [False, True])


def module_of(weight: registry.StoredWeight, transposed: bool) -> tuple[nn.Module, WeightParametrization]:
    """A linear, or a Conv1D, whose weight is made of parts."""
    W_RC = registry.dequantize(weight)
    module: nn.Module = Conv1D(R, C) if transposed else nn.Linear(C, R)
    cast(Any, module).weight = nn.Parameter(W_RC.T.contiguous() if transposed else W_RC.clone())
    making = parametrization_of(weight, transposed)
    assert making is not None
    attach(module, making, CPU)
    return module, making


def made(module: nn.Module) -> Tensor:
    """The weight [R, C] that it computes with."""
    return turned(module, cast(Tensor, module.weight)).detach()


def values(module: nn.Module, making: WeightParametrization) -> list[Tensor]:
    return [module.get_parameter(name.removeprefix(".")).data for name in parameters_of("", making).values()]


def shift(module: nn.Module, making: WeightParametrization, size: float = 0.1) -> None:
    for number, tensor in enumerate(values(module, making)):
        tensor.add_(size * noise(*tensor.shape, seed=number))


# makings


@by_weight
@by_way
def test_the_weight_that_is_made_is_the_stored_one_at_the_start(what: str, transposed: bool) -> None:
    weight = WEIGHTS[what]()
    module, making = module_of(weight, transposed)
    assert torch.equal(made(module), registry.dequantize(weight))
    assert cast(Tensor, module.weight).shape == ((C, R) if transposed else (R, C))
    names = {name.removeprefix(".") for name in parameters_of("", making).values()}
    assert names | {"bias"} == {name for name, _ in module.named_parameters()}


@by_weight
@by_way
def test_what_did_not_learn_is_written_as_it_was(what: str, transposed: bool) -> None:
    weight = WEIGHTS[what]()
    module, making = module_of(weight, transposed)
    found = registry.tensors_of(making.stored(values(module, making), torch.float32))
    assert found.keys() == registry.tensors_of(weight).keys()
    for name, tensor in registry.tensors_of(weight).items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@by_weight
@by_way
def test_what_has_learned_is_written_as_it_was_used(what: str, transposed: bool) -> None:
    (module, making), before = module_of(WEIGHTS[what](), transposed), WEIGHTS[what]()
    shift(module, making)
    after = making.stored(values(module, making), torch.float32)
    assert torch.equal(registry.dequantize(after), made(module))
    assert not torch.equal(made(module), registry.dequantize(before))
    old, new = registry.tensors_of(before), registry.tensors_of(after)
    assert new.keys() == old.keys() and all(new[name].dtype == tensor.dtype for name, tensor in old.items())
    # a text
    assert all(new[name].shape == tensor.shape for name, tensor in old.items() if "quant_state" not in name)
    if making.codes:
        assert torch.equal(new["weight"], old["weight"]), "codes stay"
    for part in ["weight.absmax"] if isinstance(before, bitsandbytes_layout.Packed) else making.parts:
        assert not torch.equal(new[part], old[part])


@by_weight
@by_way
def test_the_stored_weight_does_not_see_what_is_learned(what: str, transposed: bool) -> None:
    weight = WEIGHTS[what]()
    before = {name: tensor.clone() for name, tensor in registry.tensors_of(weight).items()}
    module, making = module_of(weight, transposed)
    shift(module, making)
    assert all(torch.equal(registry.tensors_of(weight)[name], tensor) for name, tensor in before.items())


@by_weight
@by_way
def test_the_module_computes_with_the_weight_that_is_made(what: str, transposed: bool) -> None:
    module, making = module_of(WEIGHTS[what](), transposed)
    shift(module, making)
    x, bias = noise(3, C), cast(Tensor, module.bias)
    torch.testing.assert_close(module(x), x @ made(module).T + bias, rtol=1e-4, atol=1e-4)


@by_weight
@by_way
def test_every_parameter_has_the_gradient_of_a_plain_weight(what: str, transposed: bool) -> None:
    """By differences in the one direction: the change of a weighted sum of the weight, for levels and scales
    as if exact."""
    module, making = module_of(WEIGHTS[what](), transposed)
    upstream = noise(R, C, seed=5)
    (turned(module, cast(Tensor, module.weight)) * upstream).sum().backward()
    for number, name in enumerate(parameters_of("", making).values()):
        parameter = module.get_parameter(name.removeprefix("."))
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        direction = noise(*parameter.shape, seed=number + 20)
        sums = []
        for sign in (1, -1):
            moved = [tensor.double() for tensor in values(module, making)]
            moved[number] = moved[number] + sign * 1e-3 * direction
            sums.append(float((exactly(making, moved) * upstream).sum()))
        expected = (sums[0] - sums[1]) / 2e-3
        size = float(parameter.grad.norm() * direction.norm())
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, abs=1e-4 * size), name


def moved_levels(weight: CodebookWeight, by_GL: Tensor) -> Tensor:
    """Each level moved by so many root mean squares of its codebook."""
    return torch.stack(
        [
            own + by * own.norm() / len(own) ** 0.5
            for own, by in zip(weight.levels_GL.to(by_GL), by_GL, strict=True)
        ]
    )


def exactly(making: WeightParametrization, parameters: list[Tensor]) -> Tensor:
    """The weight [R, C] of parameters that nothing rounds, by loops over rows."""
    if isinstance(making, ScaledCodes):
        levels_RC = bitsandbytes_layout.grid("nf4").double()[making.packed.codes_RC.int()]
        scale_RG = making.packed.absmax_RG.double() * parameters[0]
        return levels_RC * scale_RG.repeat_interleave(making.packed.group_size, 1)
    if isinstance(making, CodebookLevels):
        rows = making.weight.layout.sharing(R)
        levels_GL = moved_levels(making.weight, parameters[0])
        return torch.stack([levels_GL[r // rows][making.weight.codes_RC[r].int()] for r in range(R)])
    assert isinstance(making, FactoredParts)
    if making.weight.layout.format == "basis":
        return parameters[0] @ parameters[1]
    return parameters[0] + parameters[1] @ parameters[2] if len(parameters) > 1 else parameters[0]


def test_levels_are_used_as_they_will_be_stored() -> None:
    for layout in BOOKS:
        weight = clustered(noise(R, C), layout)
        module, making = module_of(weight, False)
        shift(module, making, 1e-2)
        exact = moved_levels(weight, values(module, making)[0])
        used, unrounded = made(module), exactly(making, values(module, making))
        dtype = base.DTYPES[layout.dtype]
        assert torch.equal(used.to(dtype).float(), used), "of the type in which levels lie on the disk"
        torch.testing.assert_close(used, unrounded, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert layout.dtype == "float32" or not bool(torch.isin(used, exact.flatten()).all())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_parts_of_a_model_in_half_precision_are_written_rounded(layout: FactoredLayout) -> None:
    weight = parts(layout, torch.bfloat16)
    module, making = module_of(weight, False)
    assert {tensor.dtype for tensor in values(module, making)} == {torch.float32}
    same = making.stored(values(module, making), torch.bfloat16)
    assert all(
        torch.equal(tensor, weight.tensors()[name]) for name, tensor in registry.tensors_of(same).items()
    )
    shift(module, making)
    written = making.stored(values(module, making), torch.bfloat16)
    for tensor, value in zip(registry.tensors_of(written).values(), values(module, making), strict=True):
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor.reshape(value.shape), value.bfloat16())
    exact, found = (
        exactly(making, [value.bfloat16().double() for value in values(module, making)]),
        registry.dequantize(written),
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    assert float((found - made(module)).norm() / made(module).norm()) < 0.01


def test_a_weight_of_which_nothing_could_learn_has_no_making() -> None:
    assert parametrization_of(Int8Weight(torch.ones(R, C, dtype=torch.int8), torch.ones(R)), False) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_parameter_has_the_value_of_one_and_the_gradient_of_the_other(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(64)
    norm.weight.data = noise(64)
    parametrize.register_parametrization(norm, "weight", StoredRounding(dtype))
    assert torch.equal(norm.weight, noise(64).to(dtype).float()) and norm.weight.dtype == torch.float32
    norm.weight.square().sum().backward()
    exact = norm.get_parameter("parametrizations.weight.original")
    assert torch.equal(exact, noise(64)) and exact.grad is not None
    assert torch.equal(exact.grad, 2 * noise(64).to(dtype).float())


# a student whose layers share

SHARED = {
    "llama": ("mlp.up_proj", "self_attn.o_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
}
LAYERS = 3


def tied(
    family: str, layout: FactoredLayout | CodebookLayout, dtype: torch.dtype = torch.float32, **config: Any
) -> InMemoryModel:
    """A pico model whose layers have some parts of linears in common, all with the first."""
    names = {"gpt2": "n_layer"}
    model = cast(Any, pico(family, **{names.get(family, "num_hidden_layers"): LAYERS, **config})).to(dtype)
    plain, weights = live(model), dict(model.state_dict())
    quantized: dict[str, registry.StoredWeight] = {}
    ties: dict[str, str] = {}
    for linear in SHARED[family]:
        for index in range(LAYERS):
            first, name = (f"{plain.layer_name(number)}.{linear}" for number in (0, index))
            module = plain.model.get_submodule(name)
            W_RC = turned(module, weights[f"{first}.weight"]).float().contiguous()
            if isinstance(layout, CodebookLayout):
                weight: registry.StoredWeight = quantized[first] if index else clustered(W_RC, layout)
                common = list(registry.tensors_of(weight))
            else:
                weight, common = factors(W_RC, layout, index).to(dtype), [layout.common]
            quantized[name] = weight
            ties |= {f"{name}.{part}": f"{first}.{part}" for part in common if index}
    weights |= {
        f"{name}.weight": turned(plain.model.get_submodule(name), registry.dequantize(weight))
        for name, weight in quantized.items()
    }
    return InMemoryModel(
        model.config, weights, CPU, quantized=quantized, layouts=dict.fromkeys(quantized, layout), ties=ties
    )


def factors(W_RC: Tensor, layout: FactoredLayout, seed: int) -> FactoredWeight:
    """The same common part whatever the seed, and others of the layer's own."""
    rows, columns = W_RC.shape
    if layout.format == "basis":
        left, right = noise(rows, layout.rank, seed=seed), noise(layout.rank, columns, seed=99)
        return FactoredWeight(layout, left_RK=left / layout.rank, right_KC=right / columns**0.5)
    if not layout.rank:
        return FactoredWeight(layout, W_RC)
    right = noise(layout.rank, columns, seed=seed + 50) / columns**0.5
    return FactoredWeight(layout, W_RC, noise(rows, layout.rank, seed=seed) / layout.rank, right)


def again(resident: InMemoryModel, learned: dict[str, Tensor]) -> PreTrainedModel:
    """The model that a checkpoint with these tensors in place of its own is, each linear plain and by
    itself."""
    found = dict(resident.source)
    found |= {
        name: t
        for name, t in learned.items()
        if name.rpartition(".")[0] not in resident.layouts or "bias" in name
    }
    for name, layout in resident.layouts.items():
        if f"{name}.weight" in learned:
            weight = registry.read(
                registry.parts_of(name, learned), layout, dict(resident.linear_maps())[name]
            )
            found[f"{name}.weight"] = turned(resident.model.get_submodule(name), registry.dequantize(weight))
    if resident.config.tie_word_embeddings:
        found[f"{resident.anatomy.head}.weight"] = found[f"{resident.anatomy.embedding}.weight"]
    return whole(InMemoryModel(resident.config, found, CPU))


FAMILIES_AND_LAYOUTS = [(family, layout) for family in SHARED for layout in LAYOUTS]


@pytest.mark.parametrize(("family", "layout"), FAMILIES_AND_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_layers_share_is_one_parameter_and_the_function_is_that_of_the_model(
    family: str, layout: FactoredLayout, dtype: torch.dtype
) -> None:
    resident = tied(family, layout, dtype)
    student = Student(resident, "all", rank=4, seed=0)
    assert set(student.makings) == set(resident.layouts) and len(student.same) == len(resident.ties) == 4
    for target, source in resident.ties.items():
        one, other = (parameter(student, name) for name in (target, source))
        assert one is other and one.requires_grad
    plain = whole(resident)
    assert torch.equal(logits(student.model), logits(plain))
    known = dict(student.model.named_parameters())
    assert not student.same.keys() & known.keys() and set(student.same.values()) <= known.keys()
    assert set(student.same) <= set(student.model._keys_to_ignore_on_save or [])
    assert set(student.learning) == set(known), "all of it learns, and each once"


def parameter(student: Student, stored_name: str) -> nn.Parameter:
    """What a stored tensor is in the student."""
    linear, _, part = stored_name.rpartition(".")
    return student.model.get_parameter(parameters_of(linear, student.makings[linear])[part])


@pytest.mark.parametrize(("family", "layout"), FAMILIES_AND_LAYOUTS)
def test_the_gradient_of_what_is_shared_is_the_sum_over_its_layers(
    family: str, layout: FactoredLayout
) -> None:
    resident = tied(family, layout)
    student = Student(resident, "all", rank=4, seed=0)
    move(student, 0.03)
    upstream = noise(*IDS.shape, student.model.config.vocab_size)
    (student.model(IDS).logits * upstream).sum().backward()
    plain = again(resident, student.learned(state(student))).double().requires_grad_()
    (plain(IDS).logits * upstream.double()).sum().backward()
    for linear in SHARED[family]:
        names = [f"{resident.layer_name(index)}.{linear}" for index in range(LAYERS)]
        by_layer = []
        for name in names:
            module = plain.get_submodule(name)
            grad_RC = turned(module, cast(Tensor, cast(Tensor, module.weight).grad))
            if layout.format == "basis":  # the basis is multiplied by each layer's coefficients
                grad_RC = parameter(student, f"{name}.weight").detach().double().T @ grad_RC
            by_layer.append(grad_RC)
        expected, found = torch.stack(by_layer).sum(0), parameter(student, f"{names[0]}.{layout.common}").grad
        assert found is not None and found.shape == expected.shape
        assert float((found - expected).norm() / expected.norm()) < 1e-4
        assert float((found - by_layer[0]).norm() / expected.norm()) > 0.1, "one layer alone"


@pytest.mark.parametrize(("family", "layout"), FAMILIES_AND_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_learned_is_the_student_and_the_same_in_all_layers(
    family: str, layout: FactoredLayout, dtype: torch.dtype
) -> None:
    resident = tied(family, layout, dtype)
    student = Student(resident, "all", rank=4, seed=0)
    before = logits(student.model)
    move(student, 0.03)
    learned = student.learned(state(student))
    for target, source in resident.ties.items():
        assert torch.equal(learned[target], learned[source])
    plain = {
        name
        for name in resident.source
        if name.rpartition(".")[0] not in resident.layouts or name.endswith("bias")
    }
    head = {f"{resident.anatomy.head}.weight"} if resident.config.tie_word_embeddings else set()
    shapes = dict(resident.linear_maps())
    made_of = {
        f"{name}.{part}" for name, layout in resident.layouts.items() for part in layout.shapes(*shapes[name])
    }
    assert set(learned) == plain - head | made_of and {tensor.dtype for tensor in learned.values()} == {dtype}
    found, expected = logits(again(resident, with_head(resident, learned))), logits(student.model)
    # plain weights and parts learn exactly and are written rounded
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (
        float((found - expected).norm() / expected.norm())
        < tolerance
        < float((before - expected).norm() / expected.norm())
    )


def with_head(resident: InMemoryModel, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head is the embedding."""
    if not resident.config.tie_word_embeddings:
        return learned
    return learned | {f"{resident.anatomy.head}.weight": learned[f"{resident.anatomy.embedding}.weight"]}


@pytest.mark.parametrize("layout", [*LAYOUTS, BOOKS[1]], ids=lambda layout: layout.name)
def test_the_resident_does_not_see_what_a_student_learns(layout: FactoredLayout | CodebookLayout) -> None:
    resident = tied("llama", layout)
    student = Student(resident, "all", rank=4, seed=0)
    move(student)
    for name, weight in tied("llama", layout).quantized.items():
        for part, tensor in registry.tensors_of(weight).items():
            assert torch.equal(registry.tensors_of(resident.quantized[name])[part], tensor), f"{name}.{part}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_training_norms_leaves_what_is_shared_alone(layout: FactoredLayout) -> None:
    resident = tied("llama", layout)
    student = Student(resident, "norms", rank=4, seed=0)
    assert student.learning and all("norm" in name for name in student.learning)
    move(student)
    learned = student.learned(state(student))
    assert set(learned) == {name for name in resident.source if "norm" in name}
    assert torch.equal(logits(again(resident, learned)), logits(student.model))
    for name, weight in resident.quantized.items():
        assert torch.equal(weight_of(student, name), registry.dequantize(weight))


def test_parts_of_products_are_no_scales() -> None:
    with pytest.raises(ModelError, match="here are none; use all, norms or lora"):
        Student(tied("llama", LAYOUTS[1]), "scales", rank=4, seed=0)


@pytest.mark.parametrize("train", ["scales", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", BOOKS[:2], ids=lambda layout: layout.name)
def test_levels_that_layers_share_learn_as_one(train: Train, family: str, layout: CodebookLayout) -> None:
    resident = tied(family, layout)
    student = Student(resident, train, rank=4, seed=0)
    assert torch.equal(logits(student.model), logits(whole(resident)))
    assert (
        all(isinstance(making, CodebookLevels) for making in student.makings.values())
        and len(student.makings) == 2 * LAYERS
    )
    levels = [f"{name}.weight_levels" for name in resident.layouts]
    assert len({id(parameter(student, name)) for name in levels}) == 2 and len(student.same) == 2 * (
        LAYERS - 1
    )
    learning = set(student.learning)
    assert all(parameter(student, name).requires_grad for name in levels)
    assert train == "all" or not any(
        name.endswith(("lm_head.weight", "wte.weight", "q_proj.weight")) for name in learning
    )
    before = tied(family, layout).quantized
    move(student, 0.02)
    learned = student.learned(state(student))
    for target, source in resident.ties.items():
        assert torch.equal(learned[target], learned[source])
    for name, weight in before.items():
        assert torch.equal(learned[f"{name}.weight"], registry.tensors_of(weight)["weight"]), "codes stay"
        assert not torch.equal(learned[f"{name}.weight_levels"], registry.tensors_of(weight)["weight_levels"])
    assert torch.equal(
        logits(again(resident, with_head(resident, learned) if train == "all" else learned)),
        logits(student.model),
    )
