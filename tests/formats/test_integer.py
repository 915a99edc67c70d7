"""Integer layouts and the integer linear against int64 and float64 arithmetic, and LLM.int8 against
bitsandbytes itself."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.errors import ModelError
from llmcompress.formats import integer
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.integer_linear import IntegerLinear, linear, weight_of
from llmcompress.formats.registry import layouts_of
from tests.models import noise, pico

stock: Any = functional  # typed in part only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = [
    IntegerLayout(format, activations, None if format.startswith("w8") else 8)
    for format, activations in itertools.product(integer.FORMATS, integer.ACTIVATIONS)
]
SHAPES = [(1, 1), (7, 3), (17, 33), (5, 127), (32, 64)]  # most divide by nothing
by_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda scheme: f"{scheme.format}-{scheme.activations}"
)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def own(scheme: IntegerLayout, R: int, C: int, *, unit: bool = False) -> IntegerWeight:
    """Random codes of the whole range; with `unit`, scales of one, so that every output is an integer."""
    g = torch.Generator().manual_seed(R * C)
    largest, step = integer.LARGEST[scheme.weight_bits], torch.tensor(1.0 if unit else 0.03)
    multiplier = None
    if scheme.group_size is not None:
        multiplier = torch.randint(1, 19, (R, -(-C // scheme.group_size)), generator=g, dtype=torch.uint8)
    return IntegerWeight(
        torch.randint(-largest, largest + 1, (R, C), generator=g, dtype=torch.int8),
        torch.ones(R) if unit else torch.rand(R, generator=g) * 0.01,
        scheme,
        multiplier,
        step if scheme.activations == "static" else None,
    )


def product(weight: IntegerWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    """What a linear should give, in float64, from the rounded tokens and the dequantised weight; float64 [T,
    R]."""
    columns = torch.arange(weight.codes_RC.shape[1])
    W = weight.codes_RC.double() * weight.scale_R.double()[:, None]
    if weight.multiplier_RG is not None and weight.scheme.group_size is not None:
        W = W * weight.multiplier_RG.double()[:, columns // weight.scheme.group_size]
    x_TC = x.double().reshape(-1, x.shape[-1])
    largest = {4: 7, 8: 127, 16: 32639}[weight.scheme.activation_bits]
    if weight.scheme.activations != "none":
        own_step = x_TC.float().abs().amax(1, keepdim=True) / largest
        step = own_step if weight.input_scale is None else weight.input_scale
        x_TC = (x_TC.float() / step).round().clamp(-largest, largest).nan_to_num().double() * step.double()
    return x_TC @ W.T + (0 if bias is None else bias.double())


@by_scheme
@pytest.mark.parametrize("shape", SHAPES)
def test_writing_and_reading_returns_the_same_linear(scheme: IntegerLayout, shape: tuple[int, int]) -> None:
    weight = own(scheme, *shape)
    again = integer.read(weight.tensors(), scheme, shape[1])
    for field in ("codes_RC", "scale_R", "multiplier_RG", "input_scale"):
        before, after = getattr(weight, field), getattr(again, field)
        assert (before is None and after is None) or (
            torch.equal(before, after) and before.shape == after.shape
        )
    assert {name: (tuple(t.shape), t.dtype) for name, t in weight.tensors().items()} == scheme.shapes(*shape)


def test_an_even_row_says_itself_how_long_it_is() -> None:
    weight = own(IntegerLayout("w4a8", group_size=8), 5, 24)
    assert torch.equal(integer.read(weight.tensors(), weight.scheme).codes_RC, weight.codes_RC)


@by_scheme
def test_no_plain_linear_has_the_shape_of_our_weight(scheme: IntegerLayout) -> None:
    for R, C in itertools.product(range(1, 40), range(2, 40)):
        (shape, _) = scheme.shapes(R, C)["weight"]
        assert shape not in {(R, C), (C, R)}


def test_the_layout_of_four_bits_is_code_plus_eight_with_the_even_column_high() -> None:
    codes = torch.tensor([[-7, 7, 0, 3, -1]], dtype=torch.int8)
    assert integer.pack(codes).tolist() == [[0x1F, 0x8B, 0x78]]  # the odd row ends with a zero


def test_code_times_multiplier_always_fits_eight_bits() -> None:
    weight = own(IntegerLayout("w4a4", group_size=8), 300, 16)
    exact = weight.codes_RC.long() * cast(Tensor, weight.multiplier_RG).long().repeat_interleave(8, 1)
    assert torch.equal(weight.expanded().long(), exact) and int(exact.abs().max()) == 126


@by_scheme
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantising_is_the_product_of_the_parts(scheme: IntegerLayout, shape: tuple[int, int]) -> None:
    weight = own(scheme, *shape)
    exact = product(
        replace(weight, scheme=IntegerLayout(scheme.format, "none", scheme.group_size), input_scale=None),
        None,
        torch.eye(shape[1]),
    )
    for dtype in DTYPES:
        assert torch.equal(weight.dequantize(dtype), exact.T.float().to(dtype))


@pytest.mark.parametrize(
    "damage", ["lost", "extra", "codes", "zero", "multiplier", "nan", "type", "shape", "step"]
)
def test_a_damaged_linear_is_refused(damage: str) -> None:
    scheme = IntegerLayout("w4a8", "static", 8)
    stored = {name: tensor.clone() for name, tensor in own(scheme, 4, 16).tensors().items()}
    if damage == "lost":
        del stored["weight_scale"]
    elif damage == "extra":
        stored["SCB"] = torch.ones(4)
    elif damage == "codes":
        stored["weight"][0, 0] = 0x08  # a code of -8
    elif damage in ("zero", "multiplier"):
        stored["weight_multiplier"][1, 1] = 0 if damage == "zero" else 19
    elif damage == "nan":
        stored["weight_scale"][2] = float("nan")
    elif damage == "type":
        stored["weight_scale"] = stored["weight_scale"].bfloat16()
    elif damage == "shape":
        stored["weight_multiplier"] = stored["weight_multiplier"][:, :1]
    else:
        stored["input_scale"][0] = 0
    with pytest.raises(
        ModelError, match="damaged" if damage in ("codes", "zero", "multiplier", "nan", "step") else "tensors"
    ):
        integer.read(stored, scheme)


def test_a_scheme_that_cannot_be_is_refused() -> None:
    for fields in (
        {"format": "w2a8"},
        {"format": "w8a8", "activations": "half"},
        {"format": "w8a8", "group_size": 32},
        {"format": "w4a8"},
    ):
        with pytest.raises(ValueError, match=r"w2a8|half|no group|needs a group"):
            IntegerLayout(**cast(Any, fields))


def test_a_row_whose_sum_may_not_fit_an_int32_is_refused() -> None:
    columns = integer.WIDEST + 1
    assert 127 * 127 * integer.WIDEST < 2**31 <= 127 * 127 * columns
    with pytest.raises(ValueError, match="at most"):
        IntegerWeight(torch.zeros(1, columns, dtype=torch.int8), torch.ones(1), IntegerLayout("w8a8"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_to_the_nearest_code_of_their_own_scale(bits: int, dtype: torch.dtype) -> None:
    x = noise(2, 9, 31).to(dtype)
    codes, scale = integer.quantize_tokens(x, bits)
    largest = 2 ** (bits - 1) - 1
    x_TC = x.double().reshape(18, 31)
    assert codes.dtype == torch.int8 and codes.shape == (18, 31) and scale.shape == (18, 1)
    assert torch.equal(codes.abs().amax(1), torch.full((18,), largest, dtype=torch.int8))
    assert bool(((codes * scale.double() - x_TC).abs() <= scale.double() * 0.50001).all())


def test_halves_are_rounded_to_even_and_a_stored_scale_clips() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert integer.quantize_tokens(x, 8)[0].tolist() == [[127, 0, 2, 2, 0, -2]]
    codes, scale = integer.quantize_tokens(x, 4, torch.tensor(1.0))
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2]] and scale.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_beyond_half_precision_stay_finite(dtype: torch.dtype) -> None:
    weight = own(IntegerLayout("w8a8"), 17, 33)
    x = (noise(4, 33) * 1e5).to(dtype)
    x[2] = 0
    with torch.no_grad():
        found = linear(weight, None)(x)
    exact = product(weight, None, x)
    assert found.dtype == dtype and bool(found.isfinite().all()) and bool((found[2] == 0).all())
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < (
        1e-6 if dtype == torch.float32 else 5e-3
    )


def test_tiny_rows_keep_codes_in_range_and_rows_that_are_not_finite_say_so() -> None:
    x = torch.tensor([[1e-45, -1e-45], [1e-38, 5e-39], [float("inf"), 1.0], [float("nan"), 1.0]])
    codes, scale = integer.quantize_tokens(x, 8)
    # or a division by it is not finite, and its code is whatever the machine makes of that
    assert bool((scale[:2] > 0).all())
    assert bool(((codes[:2] * scale[:2]).double() - x[:2].double()).abs().le(1.2e-38).all())
    with torch.no_grad():
        found = linear(
            IntegerWeight(torch.ones(3, 2, dtype=torch.int8), torch.ones(3), IntegerLayout("w8a8")), None
        )(x)
    assert bool(found[:2].isfinite().all()) and not bool(found[2:].isfinite().any())


@by_scheme
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_of_integers_is_exact(scheme: IntegerLayout, shape: tuple[int, int]) -> None:
    weight = own(scheme, *shape, unit=True)
    largest = integer.LARGEST[scheme.activation_bits]
    bound = min(largest, (2**24 // 127 - largest) // shape[1])
    for lead in ((0,), (1,), (3,), (2, 0), (2, 3, 2)):
        x = torch.randint(-bound, bound + 1, (*lead, shape[1]), generator=torch.Generator().manual_seed(1))
        x[..., 0] = largest  # so that the scale of every token is one
        with torch.no_grad():
            found = linear(weight, None)(x.float())
        # below 2**24, where float32 is exact
        assert torch.equal(found.long(), x @ weight.expanded().long().T)


@by_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_computes_the_dequantised_product(scheme: IntegerLayout, dtype: torch.dtype) -> None:
    weight, bias, x = own(scheme, 17, 133), noise(17, seed=3), noise(2, 5, 133, seed=4).to(dtype)
    module = linear(weight, bias)
    with torch.no_grad():
        found = module(x)
    exact = product(weight, bias, x).reshape(2, 5, 17)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < tolerance
    assert torch.equal(weight_of(module).codes_RC, weight.codes_RC)


def test_two_int8_codes_hold_every_16_bit_code() -> None:
    codes = torch.arange(-integer.LARGEST[16], integer.LARGEST[16] + 1, dtype=torch.int16)[None]
    high, low = integer.split(codes).long()
    assert torch.equal(integer.HIGH * high + low, codes[0].long())


@pytest.mark.slow(keep=1)
# torch 2.13's own compiler does what the warning is about
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@by_scheme
def test_a_linear_compiles_into_one_graph(scheme: IntegerLayout) -> None:
    module, x = linear(own(scheme, 17, 33), noise(17, seed=3)), noise(2, 5, 33, seed=4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(first).square().sum().backward()
    module(second).square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


@by_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_go_straight_through_the_rounding(scheme: IntegerLayout, dtype: torch.dtype) -> None:
    weight, bias, x = (
        own(scheme, 17, 33),
        noise(17, seed=3),
        noise(2, 5, 33, seed=4).to(dtype).requires_grad_(),
    )
    module, grad = linear(weight, bias), noise(2, 5, 17, seed=5).to(dtype)
    module.bias.requires_grad_()
    module(x).backward(grad)
    exact = grad.double() @ weight.dequantize(torch.float64)
    assert (
        float((cast(Tensor, x.grad).double() - exact).abs().max() / exact.abs().max())
        < torch.finfo(dtype).eps * 8
    )
    torch.testing.assert_close(cast(Tensor, module.bias.grad), grad.float().sum((0, 1)), rtol=0.01, atol=0.01)
    assert all(
        p.grad is None and not p.requires_grad for name, p in module.named_parameters() if name != "bias"
    )


def test_an_adapter_below_and_above_learns() -> None:
    module = linear(own(IntegerLayout("w4a8", group_size=8), 17, 33), None)
    below, above, x = nn.Linear(33, 33), nn.Linear(17, 3), noise(64, 33)
    optimiser = torch.optim.Adam([*below.parameters(), *above.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (above(module(below(x))) - x[:, :3]).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_a_new_module_allocates_integers_alone() -> None:
    module = IntegerLinear(64, 32, IntegerLayout("w4a8", group_size=16), bias=False)
    assert isinstance(module, nn.Linear)
    assert {name: p.numel() * p.element_size() for name, p in module.named_parameters()} == {
        "weight": 32 * 64 // 2,
        "weight_multiplier": 32 * 4,
        "weight_scale": 32 * 4,
    }


@by_scheme
def test_a_cast_model_keeps_exact_scales_and_the_bytes_of_the_disk(scheme: IntegerLayout) -> None:
    weight, x = own(scheme, 16, 24), noise(3, 24).bfloat16()
    module = linear(weight, noise(16))
    with torch.no_grad():
        before = module(x)
        after = copy.deepcopy(module).bfloat16()
        assert after.bias.dtype == torch.bfloat16
        torch.testing.assert_close(after(x), before, rtol=0.02, atol=0.02)  # of its bias
    state = after.state_dict()
    del state["bias"]
    assert state.keys() == weight.tensors().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weight.tensors().items())


def test_a_module_that_was_not_prepared_computes_the_same_and_keeps_nothing() -> None:
    module, x = linear(own(IntegerLayout("w4a4", group_size=8), 17, 33), None), noise(3, 33)
    with torch.no_grad():
        before = module(x)
        assert module.expanded is not None
        module.expanded = None
        assert torch.equal(module(x), before) and module.expanded is None


def test_loading_other_codes_into_a_module_expands_them_anew() -> None:
    one, other = (
        own(IntegerLayout("w4a8", group_size=8), 17, 33),
        own(IntegerLayout("w4a8", group_size=8), 17, 33),
    )
    other = replace(other, codes_RC=-other.codes_RC)
    module, empty, x = linear(one, None), IntegerLinear(33, 17, one.scheme, bias=False), noise(3, 33)
    for target in (module, empty):
        target.load_state_dict(linear(other, None).state_dict())
        with torch.no_grad():
            assert torch.equal(target(x), linear(other, None)(x)) and target.expanded is not None


# ---- LLM.int8


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_rounding_is_what_stock_bitsandbytes_keeps_of_a_checkpoint(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = cast(Any, pico("llama")).to(dtype)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[3] = 0
    model.save_pretrained(tmp_path)
    config = cast(Any, BitsAndBytesConfig)(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=dtype
    ).state_dict()
    names = [name.removesuffix(".SCB") for name in loaded if name.endswith(".SCB")]
    assert len(names) == 14
    for name in names:
        for part, tensor in integer.quantize_nearest(model.get_submodule(name).weight).tensors().items():
            assert (
                torch.equal(tensor, loaded[f"{name}.{part}"])
                and tensor.dtype == loaded[f"{name}.{part}"].dtype
            )


def test_dequantising_int8_is_bit_equal_to_bitsandbytes() -> None:
    weight = integer.quantize_nearest(noise(48, 100))
    assert torch.equal(weight.dequantize(), stock.int8_vectorwise_dequant(weight.codes_RC, weight.absmax_R))


def test_int8_tensors_read_back_and_nonsense_is_refused() -> None:
    weight = integer.quantize_nearest(noise(48, 100))
    again = integer.Int8Weight.read(weight.tensors())
    assert torch.equal(again.codes_RC, weight.codes_RC) and torch.equal(again.absmax_R, weight.absmax_R)
    for damage in (
        {"weight_format": torch.tensor(2)},
        {"SCB": torch.ones(47)},
        {"weight": torch.ones(48, 100)},
    ):
        with pytest.raises(ModelError, match="int8 linear"):
            integer.Int8Weight.read({**weight.tensors(), **damage})
    with pytest.raises(ModelError, match="SCB"):
        integer.Int8Weight.read({"weight": weight.codes_RC})
    with pytest.raises(ValueError, match="65504"):
        integer.quantize_nearest(noise(4, 4) * 1e6)


def test_plain_transformers_loads_our_int8_codes(tmp_path: Path) -> None:
    model, kept = pico("llama"), ["lm_head", "model.layers.1.mlp.down_proj"]
    state, expected = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in kept:
            # codes that no nearest rounding gives
            codes = integer.quantize_nearest(module.weight).codes_RC.roll(1, 1)
            expected[name] = integer.Int8Weight(codes, module.weight.detach().abs().amax(1) * 1.5)
            del state[f"{name}.weight"]
            state.update({f"{name}.{part}": tensor for part, tensor in expected[name].tensors().items()})
    config = {**model.config.to_dict(), "quantization_config": integer.int8_config(0.0, kept)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True))
    assert not any(info.values()), info
    seen = {name: m for name, m in loaded.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert seen.keys() == expected.keys()
    for name, module in seen.items():
        assert torch.equal(module.weight.data, expected[name].codes_RC) and torch.equal(
            module.weight.SCB, expected[name].absmax_R
        )
        assert module.state.threshold == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@by_scheme
def test_a_gpu_computes_what_a_cpu_does(scheme: IntegerLayout) -> None:
    for dtype, (R, C) in itertools.product(DTYPES, [(32, 64), (17, 33)]):
        module, x = linear(own(scheme, R, C), noise(R)), noise(5, C).to(dtype)
        with torch.no_grad():
            expected = module(x)
            torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), expected, rtol=0.02, atol=0.02)
            assert module.cuda()(x[:0].cuda()).shape == (0, R)


def test_a_config_of_before_groups_were_called_so_is_read() -> None:
    old = [
        {"format": "w4a8", "activations": "dynamic", "block": 32, "linears": ["a", "b"]},
        {"format": "nf4", "block": 64, "double_quant": True, "linears": ["c"]},
    ]
    found = layouts_of(old)
    assert found["a"] == found["b"] == IntegerLayout("w4a8", "dynamic", 32)
    assert found["c"] == FourBitLayout("nf4", 64, True)
