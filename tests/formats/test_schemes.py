"""Each coding against plain arithmetic: what is stored is read back, and stands for levels times the scales
it snapped to."""

from __future__ import annotations

import itertools

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.algorithms.codebook import kmeans, solve_codebook
from llmcompress.algorithms.hessian import Factors, Moments
from llmcompress.algorithms.overflow import Overflow
from llmcompress.algorithms.quantize_weight import RoundedWeight, output_error
from llmcompress.formats import registry
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.ggml import GgmlLayout, GgmlWeight
from llmcompress.formats.integer import ACTIVATIONS, FORMATS, Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.integer_linear import linear, stock
from llmcompress.formats.schemes import FourBitScheme, GgmlScheme, Int8Scheme, IntegerScheme, QuantScheme
from tests.models import noise

GridScheme = FourBitScheme | GgmlScheme | Int8Scheme | IntegerScheme
CPU = torch.device("cpu")
R, C = 64, 192
FOUR_BIT: list[GridScheme] = [
    FourBitScheme("nf4", 64, False, torch.float32),
    FourBitScheme("nf4", 32, True, torch.float32),
    FourBitScheme("fp4", 64, True, torch.float32),
    FourBitScheme("fp4", 32, False, torch.float32),
]
INTEGER: list[GridScheme] = [
    IntegerScheme(IntegerLayout(format, activations, None if format.startswith("w8") else layer))
    for format, activations, layer in itertools.product(FORMATS, ACTIVATIONS, (32, 64))
    if not format.startswith("w8") or layer == 64
]
GGML: list[GridScheme] = [GgmlScheme(GgmlLayout("q4_0")), GgmlScheme(GgmlLayout("iq4_nl"))]
CODINGS: list[GridScheme] = [*FOUR_BIT, *GGML, Int8Scheme(0.0), Int8Scheme(3.0), *INTEGER]


def name_of(coding: GridScheme) -> str:
    if isinstance(coding, FourBitScheme):
        return f"{coding.format}-{coding.group_size}{'-double' if coding.double_quant else ''}"
    if isinstance(coding, GgmlScheme):
        return coding.format
    return (
        f"int8-{coding.threshold}"
        if isinstance(coding, Int8Scheme)
        else f"{coding.format}-{coding.scheme.activations}"
    )


every_coding = pytest.mark.parametrize("coding", CODINGS, ids=name_of)


def input_scale(coding: GridScheme) -> float | None:
    """What the inputs are divided by, where that is stored: 3 standard deviations of noise fit."""
    return coding.static_scale(3.0)


def spread(scale_RG: Tensor) -> Tensor:
    """One scale a weight, float64 [R, C]."""
    return scale_RG.double().repeat_interleave(C // scale_RG.shape[1], dim=1)


def drawn(coding: GridScheme) -> RoundedWeight:
    """Any levels under any scales that the coding may be asked to store: within a factor of 10, of both signs
    if it says so."""
    generator = torch.Generator().manual_seed(1)
    index_RC = torch.randint(len(coding.grid.levels), (R, C), generator=generator)
    scale_RG = torch.rand((R, C // coding.columns((R, C))), generator=generator) * 0.9 + 0.1
    sign = (
        torch.rand(scale_RG.shape, generator=generator) < 0.5
        if coding.signs[0]
        else torch.zeros_like(scale_RG) > 0
    )
    return RoundedWeight(index_RC, torch.where(sign, -scale_RG, scale_RG))


@every_coding
def test_what_is_stored_reads_back_as_levels_times_the_snapped_scales(coding: GridScheme) -> None:
    rounded = drawn(coding)
    written = coding.store(rounded, input_scale(coding))
    again = coding.read(registry.tensors_of(written), C)
    expected = coding.grid.levels.double()[rounded.index_RC] * spread(coding.snap(rounded.scale_RG))
    for found in (registry.dequantize(written), registry.dequantize(again)):
        assert found.dtype == torch.float32 and found.shape == (R, C)
        # 4 bits: the one product in float32; integers: code * (scale / largest) in place of (code / largest)
        # * scale
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-7 if coding in (*FOUR_BIT, *GGML) else 3e-7, atol=1e-12
        )
    tensors, second = registry.tensors_of(written), registry.tensors_of(again)
    assert tensors.keys() == second.keys() and all(
        torch.equal(tensors[name], second[name]) for name in tensors
    )


@every_coding
def test_a_linear_is_found_among_the_tensors_of_a_checkpoint(coding: GridScheme) -> None:
    written = coding.nearest(noise(R, C), input_scale(coding))
    name, tensors = "model.layers.0.mlp.up_proj", registry.tensors_of(written)
    checkpoint = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    checkpoint |= {f"{name}.bias": noise(R), "model.norm.weight": noise(C), f"{name}_two.weight": noise(R, C)}
    assert registry.quantized_linears(checkpoint) == [name]
    parts = registry.parts_of(name, checkpoint)
    assert parts.keys() == tensors.keys()
    assert torch.equal(registry.dequantize(coding.read(parts, C)), registry.dequantize(written))


@every_coding
def test_snapped_scales_are_near_those_asked_for(coding: GridScheme) -> None:
    """Multipliers: half of one, of which the largest of a row has at least ten; 8 bits: half a level;
    float16: half a bit of eleven; else exactly."""
    scale_RG = drawn(coding).scale_RG
    error = (coding.snap(scale_RG) - scale_RG).abs()
    if isinstance(coding, FourBitScheme):
        bound_RG = torch.full_like(scale_RG, 0.02 if coding.double_quant else 0.0)
    elif isinstance(coding, GgmlScheme):
        bound_RG = scale_RG.abs() / 2**11
    else:
        share = 1 / 20 if isinstance(coding, IntegerScheme) and coding.scheme.group_size else 0.0
        bound_RG = (share + 1e-6) * scale_RG.amax(1, keepdim=True).expand_as(scale_RG)
    assert bool((error <= bound_RG).all())


@pytest.mark.parametrize("coding", [Int8Scheme(0.0), *INTEGER], ids=name_of)
def test_nearest_puts_every_weight_on_the_nearest_level_of_its_row_or_block(coding: GridScheme) -> None:
    W_RC = noise(R, C, seed=2)
    W_RC[3], W_RC[5, 64:128] = 0.0, 0.0  # a dead row, and a dead layer of another
    found = registry.dequantize(coding.nearest(W_RC, input_scale(coding))).double()
    top_RG = W_RC.reshape(R, -1, coding.columns((R, C))).abs().amax(-1)
    scale_RC = spread(coding.snap(torch.where(top_RG > 0, top_RG, torch.ones_like(top_RG))))
    # stock takes it through float16
    W = W_RC.half().double() if isinstance(coding, Int8Scheme) else W_RC.double()
    scale_RC = (
        spread(W.abs().amax(1, keepdim=True).clamp_min(1e-9)) if isinstance(coding, Int8Scheme) else scale_RC
    )
    best = torch.full_like(W, float("inf"))
    for level in coding.grid.levels.double():
        best = torch.minimum(best, (W - level * scale_RC).abs())
    step = 1 / (127 if len(coding.grid.levels) == 255 else 7)
    # a tie may fall either way in float32, and LLM.int8 divides in float16
    slack = (0.1 if isinstance(coding, Int8Scheme) else 1e-4) * step * scale_RC
    assert bool(((found - W).abs() <= best + slack).all())
    assert not found[3].any() and not found[5, 64:128].any()


@every_coding
def test_the_bits_are_those_of_the_tensors_but_for_one_scale_a_row(coding: GridScheme) -> None:
    tensors = registry.tensors_of(coding.nearest(noise(R, C), input_scale(coding)))
    per_row = {"SCB", "weight_format", "weight_scale", "input_scale"}
    fixed = ("quant_map", "bitsandbytes", "nested_quant_map")  # the same whatever the size of the linear
    size = sum(
        t.nbytes
        for name, t in tensors.items()
        if name not in per_row and not any(part in name for part in fixed)
    )
    assert 8 * size / (R * C) == pytest.approx(coding.bits, rel=1e-3)


@pytest.mark.parametrize("coding", INTEGER, ids=name_of)
def test_inputs_are_rounded_as_the_linear_rounds_them(coding: IntegerScheme) -> None:
    weight = coding.nearest(noise(R, C), input_scale(coding))
    assert isinstance(weight, IntegerWeight)
    x = noise(5, 7, C, seed=3)
    inputs = coding.inputs(None if weight.input_scale is None else float(weight.input_scale))
    assert (inputs is None) == (coding.scheme.activations == "none") == (coding.input_largest is None)
    read = inputs(x) if inputs else x
    assert inputs is None or not torch.equal(read, x)
    expected = functional.linear(read.double(), weight.dequantize().double())
    with torch.no_grad():
        torch.testing.assert_close(
            linear(weight, None)(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("threshold", [0.0, 2.5, 3.0])
def test_int8_inputs_are_rounded_as_the_stock_kernel_rounds_them(threshold: float) -> None:
    """On inputs that float16 holds exactly; the sums and the columns that are not rounded are float16
    there."""
    coding = Int8Scheme(threshold)
    weight, x = coding.nearest(noise(R, C)), noise(40, C, seed=3).half().float()
    assert isinstance(weight, Int8Weight)
    inputs = coding.inputs()
    assert inputs is not None
    read = inputs(x)
    W = weight.dequantize()
    rounding = float((functional.linear(read - x, W)).norm() / functional.linear(x, W).norm())
    with torch.no_grad():
        found = stock(weight, None, threshold=threshold)(x).float()
    expected = functional.linear(read, W)
    assert float((found - expected).norm() / expected.norm()) < 6e-4 < rounding


def test_an_input_that_was_never_seen_gets_a_scale_that_can_be_stored() -> None:
    coding = IntegerScheme(IntegerLayout("w8a8", "static"))
    written = coding.nearest(noise(R, C), 0.0)
    again = coding.read(registry.tensors_of(written), C)
    assert isinstance(again, IntegerWeight) and again.input_scale is not None and float(again.input_scale) > 0


def test_a_scale_for_all_inputs_is_there_for_static_activations_alone() -> None:
    for coding in CODINGS:
        static = isinstance(coding, IntegerScheme) and coding.scheme.activations == "static"
        assert (coding.static_scale(1.0) is not None) == static
        if isinstance(coding, IntegerScheme) and static:
            assert coding.static_scale(2.0) == pytest.approx(
                2.0 / {"a8": 127, "a4": 7, "16": 32639}[coding.format[-2:]]
            )


def test_the_steps_of_weights_and_inputs_are_those_of_the_formats() -> None:
    def steps(coding: GridScheme) -> tuple[int | None, int]:
        return coding.input_largest, coding.weight_largest

    assert (
        steps(Int8Scheme(0.0)) == (127, 127)
        and steps(FourBitScheme("nf4", 64, False, torch.float32))[0] is None
    )
    assert [
        steps(IntegerScheme(IntegerLayout(format, "dynamic", layer)))
        for format, layer in zip(FORMATS, (None, 64, 64, None, 64), strict=True)
    ] == [
        (127, 127),
        (127, 7),
        (7, 7),
        (32639, 127),
        (32639, 7),
    ]


@pytest.mark.parametrize("coding", [*FOUR_BIT, *GGML, *INTEGER], ids=name_of)
def test_a_linear_whose_rows_do_not_divide_into_blocks_is_refused(coding: GridScheme) -> None:
    assert coding.refusal((64, 192)) is None
    if isinstance(coding, IntegerScheme) and coding.scheme.group_size is None:
        assert coding.refusal((64, 200)) is None
    else:
        assert f"{coding.format} rows of 200 weights don't divide into groups of" in str(
            coding.refusal((64, 200))
        )


def test_rows_out_matter_to_the_four_bit_kernels_alone() -> None:
    for coding in CODINGS:
        assert (coding.refusal((48, 192)) is not None) == isinstance(coding, FourBitScheme)
    assert Int8Scheme(0.0).refusal((7, 13)) is None


# llama.cpp's formats.


def blocks(stored: GgmlWeight) -> np.ndarray:
    """The bytes of a linear as llama.cpp has them: a float16 per group, then 16 bytes with its first
    16 codes in the low halves."""
    codes = stored.codes_RC.numpy().reshape(-1, 2, 16)
    scale = stored.scale_RG.numpy().reshape(-1, 1).view(np.uint8)
    return np.concatenate([scale, codes[:, 0] | codes[:, 1] << 4], axis=1).reshape(len(stored.codes_RC), -1)


@pytest.mark.parametrize("coding", GGML, ids=name_of)
def test_a_weight_is_what_the_gguf_package_reads_bit_for_bit(coding: GgmlScheme) -> None:
    for stored in (coding.store(drawn(coding)), coding.nearest(noise(R, C))):
        assert isinstance(stored, GgmlWeight)
        kind = gguf.GGMLQuantizationType[coding.format.upper()]
        assert torch.equal(
            torch.from_numpy(gguf.quants.dequantize(blocks(stored), kind)), stored.dequantize()
        )


def test_nearest_codes_of_q4_0_are_those_of_llama_cpp_bit_for_bit() -> None:
    W_RC = noise(R, 4096, seed=5)
    W_RC[3, :64] = 0
    W_RC[4, :32] = torch.arange(32) / 2 - 8  # halves
    stored = GgmlScheme(GgmlLayout("q4_0")).nearest(W_RC)
    assert isinstance(stored, GgmlWeight)
    expected = gguf.quants.quantize(W_RC.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(blocks(stored), expected)


def test_nearest_codes_of_iq4_nl_are_nearest_and_the_largest_weight_is_on_the_outermost_level() -> None:
    scheme, W_RC = GgmlScheme(GgmlLayout("iq4_nl")), noise(R, C)
    W_RC[3, :64] = 0
    stored = scheme.nearest(W_RC)
    assert isinstance(stored, GgmlWeight)
    groups = W_RC.reshape(-1, 32)
    largest = groups.abs().argmax(1, keepdim=True)
    codes = stored.codes_RC.reshape(-1, 32).gather(1, largest)
    assert not codes[groups.any(1)].any()
    scale_RC = stored.scale_RG.double().repeat_interleave(32, 1)
    values = torch.tensor(gguf.quants.IQ4_NL.kvalues).double()
    best_RC = (W_RC[..., None] - values * scale_RC[..., None]).abs().amin(-1)
    found_RC = (stored.dequantize() - W_RC).abs().double()
    # codes are taken before the scale is rounded
    assert bool((found_RC <= best_RC + 127 * scale_RC.abs() / 2**10).all())
    assert not stored.dequantize()[3, :64].any()


@pytest.mark.parametrize("coding", GGML, ids=name_of)
def test_scales_that_float16_does_not_hold_are_kept_finite_or_refused(coding: GgmlScheme) -> None:
    scale_RG = torch.tensor([[1e-12, -1e-12, 1e9, -1e9]])
    least, largest = 2.0**-24 * coding.unit, 65504.0 * coding.unit
    assert coding.snap(scale_RG).tolist() == [[least, -least, largest, -largest]]
    for act in (coding.nearest, lambda W_RC: coding.solve(W_RC, Factors(moments()))):
        with pytest.raises(Overflow, match=f"scales of {coding.format}"):
            act(noise(R, C) * 1e9)


@pytest.mark.parametrize("coding", GGML, ids=name_of)
def test_solved_groups_of_zeros_stay_next_to_zero(coding: GgmlScheme) -> None:
    """IQ4_NL has no level of zero, so such a group needs a scale next to it."""
    W_RC = noise(R, C)
    W_RC[:4], W_RC[8:12, 64:96] = 0, 0
    found = coding.solve(W_RC, Factors(moments())).weight(CPU)
    assert float(found[:4].abs().max()) < 1e-4 * float(W_RC.abs().max())
    other = W_RC.clone()
    other[8:12, 64:96] = noise(4, 32)
    rest = slice(12, None)
    assert torch.equal(found[rest], coding.solve(other, Factors(moments())).weight(CPU)[rest])
    assert float((found - W_RC).norm() / W_RC.norm()) < 0.12


@pytest.mark.parametrize("coding", GGML, ids=name_of)
def test_solved_codes_and_scales_lose_less_than_half_of_what_nearest_ones_do(coding: GgmlScheme) -> None:
    W_RC, seen = noise(R, C), Moments(C, CPU)
    seen.add(noise(500, C, seed=4) @ noise(C, C, seed=6) / 4)
    solved = coding.solve(W_RC, Factors(seen)).weight(CPU)
    nearest = registry.dequantize(coding.nearest(W_RC))
    assert output_error(W_RC, solved, seen.H_CC) ** 2 < output_error(W_RC, nearest, seen.H_CC) ** 2 / 2


# Codebooks, which have no scales.


def moments() -> Moments:
    found = Moments(C, CPU)
    found.add(noise(500, C, seed=4))
    return found


@pytest.mark.parametrize("entries", [4, 8, 16])
def test_a_codebook_is_solved_for_as_the_algorithm_does_and_read_back(entries: int) -> None:
    layout = CodebookLayout(entries, 1, "float16")
    scheme, W_RC, seen = CodebookScheme(layout), noise(R, C), moments()
    solution = scheme.solve(W_RC, Factors(seen))
    expected = solve_codebook(W_RC, seen.H_CC, entries, 1, snap=layout.snap).weight()
    assert torch.equal(solution.weight(CPU), expected)
    tensors = registry.tensors_of(solution.stored)
    assert torch.equal(registry.dequantize(scheme.read(tensors, C)), expected)
    assert 8 * sum(part.nbytes for part in tensors.values()) == R * C * scheme.bits_of((R, C))
    assert scheme.bits == entries.bit_length() - 1
    assert scheme.inputs() is None and scheme.static_scale(1.0) is None


def test_the_nearest_levels_of_a_codebook_are_those_of_k_means_on_the_weights_alone() -> None:
    scheme, W_RC = CodebookScheme(CodebookLayout(8, 1, "bfloat16")), noise(R, C)
    stored = scheme.nearest(W_RC)
    assert isinstance(stored, CodebookWeight)
    assert torch.equal(stored.levels_GL, kmeans(W_RC, torch.ones(C), 8, 1).bfloat16())
    best = (W_RC[..., None] - stored.levels_GL.float()[:, None]).abs().amin(-1)
    assert torch.equal((registry.dequantize(stored) - W_RC).abs(), best)
    wide = CodebookScheme(CodebookLayout(8, 1, "float16"))
    with pytest.raises(Overflow, match="float16"):
        wide.nearest(W_RC * 1e6)


@pytest.mark.parametrize(
    "scheme", [*FOUR_BIT, *GGML, *INTEGER, CodebookScheme(CodebookLayout(8, 1, "float16"))]
)
def test_a_solution_is_made_again_from_the_parts_that_a_process_sends(scheme: QuantScheme) -> None:
    own = scheme.solve(noise(R, C), Factors(moments()), scheme.static_scale(3.0))
    other = scheme.received(own.parts(), C, scheme.static_scale(3.0))
    assert torch.equal(other.weight(CPU), own.weight(CPU))
    one, two = registry.tensors_of(own.stored), registry.tensors_of(other.stored)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
