"""Linears in parts: what lies on the disk, what they multiply out to, and the module that runs them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.formats import low_rank
from llmcompress.formats.low_rank import FactoredLayout, FactoredLinear, FactoredWeight, read
from llmcompress.formats.registry import layouts_of, parts_of, tensors_of
from tests.models import noise

R, C = 24, 37
LAYOUTS = (FactoredLayout("shared"), FactoredLayout("shared", 5), FactoredLayout("basis", 6))
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
by_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def weight(layout: FactoredLayout, rows: int = R, columns: int = C, seed: int = 0) -> FactoredWeight:
    """Random parts, float32."""
    whole = noise(rows, columns, seed=seed) if layout.format == "shared" else None
    left = noise(rows, layout.rank, seed=seed + 1) if layout.rank else None
    right = noise(layout.rank, columns, seed=seed + 2) if layout.rank else None
    return FactoredWeight(layout, whole, left, right)


def dense(tensors: dict[str, Tensor], layout: FactoredLayout) -> Tensor:
    """The weight [R, C] that stored tensors stand for, as the table of the layouts has it, in float64."""
    part = {name: tensor.double() for name, tensor in tensors.items()}
    if layout.format == "basis":
        return part["weight"][0] @ part["weight_right"]
    difference = part["weight_left"] @ part["weight_right"] if layout.rank else 0
    return part["weight"][0] + difference


def live(
    layout: FactoredLayout, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[FactoredLinear, Tensor]:
    """A module and the weight that it stands for, float64."""
    made = weight(layout).to(dtype)
    module = low_rank.linear(made, noise(R, seed=9).to(dtype) if bias else None)
    return module, dense(made.tensors(), layout)


# layouts


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (FactoredLayout("shared"), {"weight": (1, R, C)}),
        (FactoredLayout("shared", 5), {"weight": (1, R, C), "weight_left": (R, 5), "weight_right": (5, C)}),
        (FactoredLayout("basis", 6), {"weight": (1, R, 6), "weight_right": (6, C)}),
    ],
)
def test_what_lies_on_the_disk_is_the_parts_and_the_weight_has_an_axis_of_one(
    layout: FactoredLayout, shapes: dict[str, tuple[int, ...]]
) -> None:
    assert {name: shape for name, (shape, _) in layout.shapes(R, C).items()} == shapes
    assert {name: tuple(tensor.shape) for name, tensor in weight(layout).tensors().items()} == shapes
    common = shapes[layout.common]
    every = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert layout.parameters((R, C)) == every
    assert layout.parameters((R, C), common=False) == every - torch.Size(common).numel()
    assert common in ((1, R, C), (6, C)), "the whole matrix, or the basis, and never what is a layer's own"


def test_what_is_shared_without_a_difference_costs_the_others_nothing() -> None:
    assert FactoredLayout("shared").parameters((R, C), common=False) == 0
    assert FactoredLayout("shared", 5).parameters((R, C), common=False) == 5 * (R + C)
    assert FactoredLayout("basis", 6).parameters((R, C), common=False) == 6 * R


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "tied"},
        {"format": "shared", "rank": -1},
        {"format": "basis"},
        {"format": "basis", "rank": 0},
        {"format": "basis", "rank": 2.0},
        {"format": "shared", "rank": True},
        {"format": "shared", "rank": "4"},
        {"format": "shared", "rank": None},
    ],
)
def test_a_layout_that_can_not_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no format|the rank of"):
        FactoredLayout(**fields)
    with pytest.raises(ModelError, match="that this llmcompress doesn't know") as told:
        layouts_of([{**fields, "linears": ["a"]}])
    assert "\n" not in str(told.value)


@by_layout
def test_a_rank_above_that_of_the_weight_is_refused(layout: FactoredLayout) -> None:
    assert layout.refusal((R, C)) is None and layout.refusal((layout.rank or 1, C)) is None
    if layout.rank:
        assert f"a rank of {layout.rank} is no less than" in str(layout.refusal((layout.rank - 1, C)))


def test_names_say_the_rank_where_there_is_one() -> None:
    assert [layout.name for layout in LAYOUTS] == ["shared", "shared of rank 5", "basis of rank 6"]


# weights


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(0, 9),
    format=st.sampled_from(["shared", "basis"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_a_linear_comes_back_from_its_tensors_bit_for_bit(
    rows: int, columns: int, rank: int, format: Any, dtype: torch.dtype, seed: int
) -> None:
    layout = FactoredLayout(format, max(rank, 1) if format == "basis" else rank)
    made = weight(layout, rows, columns, seed).to(dtype)
    tensors = made.tensors()
    for again in (
        layout.read(tensors, columns),
        read({**tensors, "bias": noise(rows)}, layout, rows, columns),
    ):
        assert again.layout == layout and again.tensors().keys() == tensors.keys()
        for name, tensor in again.tensors().items():
            assert torch.equal(tensor, tensors[name]) and tensor.dtype == dtype
        torch.testing.assert_close(again.dequantize().double(), dense(tensors, layout), rtol=1e-5, atol=1e-5)
        assert torch.equal(again.dequantize(dtype), made.dequantize().to(dtype))
    assert (
        parts_of("a.b", {f"a.b.{name}": tensor for name, tensor in tensors_of(made).items()}).keys()
        == tensors.keys()
    )


def test_a_matrix_that_is_only_shared_is_that_matrix() -> None:
    made = weight(LAYOUTS[0])
    assert made.whole_RC is not None and torch.equal(made.dequantize(), made.whole_RC)


@by_layout
def test_parts_are_rounded_to_a_type_each_by_itself(layout: FactoredLayout) -> None:
    exact, half = weight(layout), weight(layout).to(torch.bfloat16)
    for name, tensor in half.tensors().items():
        assert torch.equal(tensor, exact.tensors()[name].to(torch.bfloat16)) and tensor.is_contiguous()


@by_layout
def test_tensors_that_are_no_such_linear_are_refused_in_one_line(layout: FactoredLayout) -> None:
    good = weight(layout).tensors()
    wrong: list[dict[str, Tensor]] = [
        {**good, "weight": good["weight"][0]},
        {**good, "weight": good["weight"][:, 1:]},
        {**good, "weight": good["weight"].to(torch.int8)},
        {**good, "weight_mask": torch.ones(3)},
        {name: tensor for name, tensor in good.items() if name != "weight"}
        | {"weight_left": torch.ones(R, 5)},
    ]
    for part in good.keys() - {"weight"}:
        wrong.append({name: tensor for name, tensor in good.items() if name != part})
        wrong.append({**good, part: good[part].T})
        wrong.append({**good, part: good[part].to(torch.int64)})
    for tensors in wrong:
        with pytest.raises(ModelError, match=f"a linear of {R} x {C} in Factored") as told:
            read(tensors, layout, R, C)
        assert "\n" not in str(told.value)
    for other in LAYOUTS:
        if other != layout:
            with pytest.raises(ModelError, match="in Factored"):
                read(good, other, R, C)


# the module


@by_layout
@pytest.mark.parametrize("bias", [True, False])
def test_a_module_computes_what_the_dense_weight_does(layout: FactoredLayout, bias: bool) -> None:
    module, W_RC = live(layout, bias=bias)
    plain = nn.functional.linear(noise(2, 5, C).double(), W_RC, noise(R, seed=9).double() if bias else None)
    found = module(noise(2, 5, C))
    assert found.dtype == torch.float32 and not module.training
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-4)
    assert torch.equal(module.dequantized(torch.float32), weight(layout).dequantize())


@by_layout
@by_type
def test_in_half_precision_it_is_as_near_as_the_type_allows(
    layout: FactoredLayout, dtype: torch.dtype
) -> None:
    module, W_RC = live(layout, dtype)
    x = noise(16, C).to(dtype)
    plain = nn.functional.linear(x.double(), W_RC, noise(R, seed=9).to(dtype).double())
    found = module(x)
    assert found.dtype == dtype and {tensor.dtype for tensor in module.parameters()} == {dtype}
    assert float((found.double() - plain).norm() / plain.norm()) < 3 * torch.finfo(dtype).eps


@by_layout
def test_the_output_is_in_the_type_of_the_input_whatever_that_of_the_parts(layout: FactoredLayout) -> None:
    module, W_RC = live(layout, torch.bfloat16)
    x = noise(3, C)
    plain = nn.functional.linear(x.double(), W_RC, noise(R, seed=9).bfloat16().double())
    torch.testing.assert_close(module(x).double(), plain, rtol=1e-5, atol=1e-4)
    exact, _ = live(layout)
    assert exact(x.bfloat16()).dtype == torch.bfloat16 and exact(x[:0]).shape == (0, R)


@by_layout
def test_gradients_go_to_the_input_and_to_parts_that_are_told_to_learn(layout: FactoredLayout) -> None:
    module, W_RC = live(layout)
    x, upstream = noise(4, C).requires_grad_(), noise(4, R, seed=3)
    module(x).backward(upstream)
    assert x.grad is not None and not any(tensor.requires_grad for tensor in module.parameters())
    torch.testing.assert_close(x.grad.double(), upstream.double() @ W_RC, rtol=1e-5, atol=1e-4)
    names = list(layout.shapes(R, C))
    parts = [getattr(module, name).requires_grad_() for name in names]
    found = torch.autograd.grad(module(x.detach()), parts, upstream)
    exact = {name: part.detach().double().requires_grad_() for name, part in zip(names, parts, strict=True)}
    expected = torch.autograd.grad(
        x.detach().double() @ dense(exact, layout).T, [*exact.values()], upstream.double()
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


@by_layout
def test_parts_are_cast_and_moved_with_the_model(layout: FactoredLayout) -> None:
    module, _ = live(layout)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    nn.Sequential(module).to(torch.bfloat16)
    assert before.keys() == {*layout.shapes(R, C), "bias"}
    assert all(torch.equal(module.state_dict()[name], tensor.bfloat16()) for name, tensor in before.items())
    assert all(tensor.is_meta for tensor in module.to("meta").parameters())


@by_layout
def test_a_state_dict_is_the_tensors_of_the_disk_and_loads_again(layout: FactoredLayout) -> None:
    made, bias_R = weight(layout, seed=5), noise(R)
    module = FactoredLinear(C, R, layout, bias=True)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items() if name != "bias"} == {
        name: shape for name, (shape, _) in layout.shapes(R, C).items()
    }
    module.load_state_dict({**made.tensors(), "bias": bias_R})
    twin = copy.deepcopy(module)
    assert torch.equal(module(torch.eye(C)), low_rank.linear(made, bias_R)(torch.eye(C)))
    module.load_state_dict({**weight(layout, seed=8).tensors(), "bias": bias_R})
    assert torch.equal(twin.dequantized(torch.float32), made.dequantize())
    assert torch.equal(module.dequantized(torch.float32), weight(layout, seed=8).dequantize())
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({**weight(layout, R, C + 1).tensors(), "bias": bias_R})


@by_layout
def test_a_module_holds_copies_and_gives_out_none_of_its_own(layout: FactoredLayout) -> None:
    made = weight(layout)
    module = low_rank.linear(made, None)
    expected = module(torch.eye(C)).clone()
    for tensor in made.tensors().values():
        tensor.zero_()
    module.dequantized(torch.float32).zero_()
    assert torch.equal(module(torch.eye(C)), expected) and bool(expected.any())


def test_modules_of_several_layers_can_have_one_part() -> None:
    for layout in LAYOUTS:
        first, second = live(layout)[0], low_rank.linear(weight(layout, seed=7), None)
        setattr(second, layout.common, getattr(first, layout.common))
        pair = nn.Sequential(first, second)
        assert len(list(pair.parameters())) == 2 * len(layout.shapes(R, C))  # one bias, and one part less
        own = second.state_dict() | {layout.common: first.state_dict()[layout.common]}
        torch.testing.assert_close(second(torch.eye(C)).T.double(), dense(own, layout), rtol=1e-5, atol=1e-4)


def test_a_module_tells_what_it_is() -> None:
    assert "basis of rank 6" in str(live(LAYOUTS[2])[0]) and f"in_features={C}" in str(live(LAYOUTS[2])[0])


@by_layout
def test_a_damaged_module_is_refused_where_its_weight_is_asked_for(layout: FactoredLayout) -> None:
    module, _ = live(layout)
    module.weight = nn.Parameter(module.weight.data[:, :-1], requires_grad=False)
    with pytest.raises(ModelError, match=f"a linear of {R} x {C} in Factored"):
        module.dequantized(torch.float32)
