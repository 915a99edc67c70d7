"""The student: whole it is the same function, what learns is what was said, and what is written is what it
computed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.per_layer import build_layers
from llmcompress.architectures.resize import changed, resized
from llmcompress.architectures.rotation import Rotation
from llmcompress.errors import CompressError, ModelError
from llmcompress.formats import bitsandbytes_layout, registry
from llmcompress.formats.integer import Int8Weight
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel, MetaModel
from llmcompress.modeling.sequential import logits as streamed
from llmcompress.stages.distill.parametrizations import ScaledCodes
from llmcompress.stages.distill.student import Student, Train, freeze, whole
from tests.artefacts import CPU
from tests.bases import save_base
from tests.models import FAMILIES, VARIANTS, noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
EVERY: tuple[tuple[str, dict[str, Any]], ...] = (*((family, {}) for family in FAMILIES), *VARIANTS)
# plain linears, Conv1D, biases everywhere, experts that stay plain
CODED = ("llama", "gpt2", "opt", "qwen3_moe")
FORMATS: tuple[tuple[bitsandbytes_layout.FourBitFormat, bool], ...] = (
    ("nf4", False),
    ("nf4", True),
    ("fp4", False),
    ("fp4", True),
)
CODINGS = [("llama", *coding) for coding in FORMATS] + [
    (family, *coding) for family in CODED[1:] for coding in FORMATS[:2]
]

FACTOR = "parametrizations.weight.original"  # where torch keeps what a parametrised weight is made of


def packed_of(student: Student) -> dict[str, bitsandbytes_layout.Packed]:
    """The codes whose scales learn, by linear."""
    return {
        name: making.packed for name, making in student.makings.items() if isinstance(making, ScaledCodes)
    }


def live(model: PreTrainedModel) -> InMemoryModel:
    return InMemoryModel(model.config, dict(model.state_dict()), CPU)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return cast(Tensor, model(IDS).logits)


def turned(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as rows of outputs, whichever way the module has it; and back."""
    return weight.T if isinstance(module, Conv1D) else weight


def coded(
    family: str,
    format: bitsandbytes_layout.FourBitFormat = "nf4",
    double_quant: bool = False,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.0,
    outside: bool = False,
    **config: Any,
) -> InMemoryModel:
    """A pico model with 4-bit codes of the linears of its layers (and its head, if `outside`), its scales
    spread by factors."""
    model = cast(PreTrainedModel, cast(Any, pico(family, **config)).to(dtype))
    plain, weights, packed = live(model), dict(model.state_dict()), {}
    for name, shape in plain.linear_maps():
        if (outside or name.startswith(plain.anatomy.layers)) and bitsandbytes_layout.refusal(
            shape, format, 64
        ) is None:
            module = plain.model.get_submodule(name)
            found = bitsandbytes_layout.quantize_nearest(
                turned(module, weights[f"{name}.weight"]).contiguous(), format, 64, False
            )
            absmax = found.absmax_RG * (spread * noise(*found.absmax_RG.shape)).exp()
            nested = bitsandbytes_layout.double_quantize(absmax) if double_quant else None
            absmax = nested.decode() if nested else absmax
            packed[name] = bitsandbytes_layout.Packed(found.codes_RC, absmax, format, 64, dtype, nested)
            weights[f"{name}.weight"] = turned(
                module, bitsandbytes_layout.dequantize(packed[name], torch.float32)
            )
    return InMemoryModel(model.config, weights, CPU, quantized=packed)


def state(student: Student) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in student.model.named_parameters()}


@torch.no_grad()
def move(student: Student, size: float = 0.1) -> None:
    """Change all that learns."""
    for number, name in enumerate(student.learning):
        parameter = student.model.get_parameter(name)
        parameter.add_(size * noise(*parameter.shape, seed=number))


def again(resident: InMemoryModel, learned: dict[str, Tensor]) -> PreTrainedModel:
    """The model that a checkpoint with these tensors in place of its own is."""
    plain = {
        name: tensor
        for name, tensor in learned.items()
        if name in resident.source and tensor.is_floating_point()
    }
    found = dict(resident.source) | plain
    for name in registry.quantized_linears(learned):
        weight = registry.dequantize(registry.read(registry.parts_of(name, learned)))
        found[f"{name}.weight"] = turned(resident.model.get_submodule(name), weight)
    if resident.config.tie_word_embeddings:
        found[f"{resident.anatomy.head}.weight"] = found[f"{resident.anatomy.embedding}.weight"]
    return whole(InMemoryModel(resident.config, found, CPU))


@torch.no_grad()
def narrowed(family: str, widths: dict[str, list[int]]) -> tuple[PreTrainedModel, InMemoryModel]:
    """A random model whose layers have widths of their own."""
    plain = MetaModel(
        pico(family, num_hidden_layers=len(next(iter(widths.values())))).config, CPU, torch.float32
    )
    config = changed(plain.config, resized(plain.config, plain.anatomy, widths))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    anatomy = anatomy_of(config)
    build_layers(model, cast(nn.ModuleList, model.get_submodule(anatomy.layers)), anatomy)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(noise(*parameter.shape, seed=number) * 0.1 + (parameter.dim() == 1))
    return model.eval(), live(model)


# whole


@pytest.mark.parametrize(("family", "config"), EVERY)
def test_a_whole_model_is_the_very_function(family: str, config: dict[str, Any]) -> None:
    model = pico(family, **config)
    found = whole(live(model))
    assert type(found) is type(model) and not found.training
    assert torch.equal(logits(found), logits(model))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in found.parameters())
    tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_the_resident_does_not_see_what_becomes_of_a_whole_model(family: str) -> None:
    model = pico(family)
    resident, before = live(model), logits(model)
    for _ in range(2):
        found = whole(resident)
        assert torch.equal(logits(found), before)
        for parameter in found.parameters():
            parameter.data.fill_(7.0)
        for buffer in found.buffers():
            buffer.zero_()
    assert all(parameter.is_meta for parameter in resident.layers.parameters())
    assert torch.equal(logits(model), before) and torch.equal(next(streamed(resident, IDS)), before)


@pytest.mark.parametrize("widths", [{"ffn": [192, 320]}, {"kv": [2, 0, 1], "ffn": [320, 320, 0]}])
def test_a_whole_model_of_uneven_layers_is_the_very_function(widths: dict[str, list[int]]) -> None:
    model, resident = narrowed("qwen3", widths)
    assert torch.equal(logits(whole(resident)), logits(model))


def test_a_whole_model_of_a_rotated_one_is_the_rotated_one() -> None:
    model = pico("llama")
    resident = live(model)
    resident.turn(Rotation(resident.anatomy, resident.config, seed=0))
    found = whole(resident)
    name = f"{resident.anatomy.embedding}.weight"
    assert not torch.equal(found.get_parameter(name), model.get_parameter(name))
    assert torch.allclose(logits(found), logits(model), atol=1e-4)
    assert torch.equal(logits(found), next(streamed(resident, IDS)))


def test_a_whole_model_reads_what_its_kernels_make_of_inputs() -> None:
    model = pico("llama")
    resident = live(model)
    for name in ("model.layers.1.mlp.down_proj", "lm_head"):
        resident.round_inputs(name, lambda x: (x * 4).round() / 4)
    found = logits(whole(resident))
    assert torch.equal(found, next(streamed(resident, IDS))) and not torch.equal(found, logits(model))


def test_a_folder_in_half_precision_is_whole_in_the_working_precision(tmp_path: Path) -> None:
    pico("llama", vocab_size=256).bfloat16().save_pretrained(save_base(tmp_path / "base"))
    resident = DiskModel(tmp_path / "base", CPU)
    found = whole(resident)
    assert resident.weight_dtype is torch.bfloat16 and {p.dtype for p in found.parameters()} == {
        torch.float32
    }
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    assert torch.equal(logits(found), logits(expected))


def test_each_block_is_made_ready_before_the_next_is_read() -> None:
    model, seen = pico("llama", num_hidden_layers=3), list[nn.Module]()
    resident = live(model)

    def ready(layer: nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in resident.layers.parameters())
        seen.append(layer)
        cast(Any, layer).mlp.down_proj.weight.data.zero_()

    found = whole(resident, ready)
    assert seen == list(cast(Any, found).model.layers)
    for layer in cast(Any, model).model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert torch.equal(logits(found), logits(model))


# still


@pytest.mark.parametrize("family", FAMILIES)
def test_a_still_model_in_training_is_the_model_in_use(family: str) -> None:
    said = pico(family).config.to_dict()
    dropping = {name: 0.5 for name, value in said.items() if "drop" in name and not isinstance(value, bool)}
    assert dropping
    model = pico(family, **dropping)
    expected, model = logits(model), model.train()
    assert not torch.equal(logits(model), expected)
    freeze(model)
    assert torch.equal(logits(model), expected) and model.training


# what learns


@pytest.mark.parametrize(("family", "config"), EVERY)
@pytest.mark.parametrize("train", ["all", "norms"])
def test_what_learns_is_what_was_said(family: str, config: dict[str, Any], train: Train) -> None:
    model = pico(family, **config)
    gains = {
        f"{n}.weight"
        for n, m in model.named_modules()
        if "Norm" in type(m).__name__ and len(list(m.parameters()))
    }
    if train == "norms" and not gains:
        with pytest.raises(ModelError, match="train: norms finds nothing"):
            Student(live(model), train, rank=16, seed=0)
        return
    student = Student(live(model), train, rank=16, seed=0)
    every = {name for name, _ in model.named_parameters()}
    assert set(student.learning) == (every if train == "all" else gains) and student.trained is student.model
    assert {name for name, p in student.model.named_parameters() if p.requires_grad} == set(student.learning)
    assert torch.equal(logits(student.model), logits(model))


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_student_drops_nothing_in_training(train: Train) -> None:
    model = pico("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    student = Student(live(model), train, rank=4, seed=0)
    assert torch.equal(logits(student.trained.train()), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["all", "norms"])
def test_what_was_learned_is_the_student(family: str, train: Train) -> None:
    resident = live(pico(family))
    student = Student(resident, train, rank=16, seed=0)
    before = logits(student.model)
    move(student)
    learned = student.learned(state(student))
    assert set(learned) == set(student.learning) <= set(resident.source)
    assert not torch.equal(logits(student.model), before)
    assert torch.equal(logits(again(resident, learned)), logits(student.model))


@pytest.mark.parametrize("train", ["all", "norms", "lora", "scales"])
def test_what_was_learned_has_the_type_that_the_model_is_stored_in(train: Train) -> None:
    resident = coded("llama", dtype=torch.bfloat16) if train == "scales" else live(pico("llama").bfloat16())
    student = Student(resident, train, rank=4, seed=0)
    assert {parameter.dtype for parameter in student.model.parameters()} == {torch.float32}
    move(student)
    learned = student.learned(state(student))
    plain = {
        name: tensor for name, tensor in learned.items() if name.rpartition(".")[0] not in packed_of(student)
    }
    assert plain and {t.dtype for name, t in plain.items() if ".weight." not in name} == {torch.bfloat16}
    for name in packed_of(student):
        assert (
            cast(bitsandbytes_layout.Packed, registry.read(registry.parts_of(name, learned))).dtype
            is torch.bfloat16
        )


@pytest.mark.parametrize("train", ["all", "norms", "scales", "lora"])
def test_all_that_learns_has_a_gradient_and_nothing_else(train: Train) -> None:
    student = Student(coded("opt") if train == "scales" else live(pico("opt")), train, rank=4, seed=0)
    move(student, 0.01)  # or one half of each pair of adapters has none
    student.trained(IDS).logits.square().sum().backward()
    unseen = {name for name in student.learning if name.endswith("k_proj.bias")}  # softmax does not see them
    for name, parameter in student.model.named_parameters():
        assert (parameter.grad is not None) == (name in student.learning), name
        assert parameter.grad is None or name in unseen or bool(parameter.grad.any()), name


@pytest.mark.parametrize("train", ["all", "scales", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_stays_tied(family: str, train: Train) -> None:
    resident = (
        coded(family, tie_word_embeddings=True)
        if train == "scales"
        else live(pico(family, tie_word_embeddings=True))
    )
    student = Student(resident, train, rank=4, seed=0)
    move(student)
    assert student.model.get_output_embeddings().weight is student.model.get_input_embeddings().weight
    found, head = logits(student.model), f"{resident.anatomy.head}.weight"
    learned = student.learned(state(student))
    assert head not in learned and (f"{resident.anatomy.embedding}.weight" in learned) == (train == "all")
    assert head in (student.model._keys_to_ignore_on_save or [])
    assert torch.allclose(logits(again(resident, learned)), found, atol=1e-4)


# scales


def weight_of(student: Student, name: str) -> Tensor:
    """The weight that a linear of the student computes with, rows of outputs."""
    module = student.model.get_submodule(name)
    return turned(module, cast(Tensor, module.weight)).detach()


@pytest.mark.parametrize(("family", "format", "double_quant"), CODINGS)
def test_factors_of_one_leave_the_weights_as_the_codes_say(
    family: str, format: bitsandbytes_layout.FourBitFormat, double_quant: bool
) -> None:
    resident = coded(family, format, double_quant, dtype=torch.bfloat16 if family == "opt" else torch.float32)
    student = Student(resident, "scales", rank=16, seed=0)
    assert set(packed_of(student)) == set(resident.quantized) and len(packed_of(student)) >= 8
    for name, packed in packed_of(student).items():
        assert torch.equal(weight_of(student, name), bitsandbytes_layout.dequantize(packed, torch.float32)), (
            name
        )
    assert torch.equal(logits(student.model), logits(whole(resident)))


@pytest.mark.parametrize(("format", "double_quant"), FORMATS)
def test_scales_that_did_not_learn_are_written_as_they_were(
    format: bitsandbytes_layout.FourBitFormat, double_quant: bool
) -> None:
    resident = coded("llama", format, double_quant)
    student = Student(resident, "scales", rank=16, seed=0)
    learned = student.learned(state(student))
    for name, packed in packed_of(student).items():
        found = registry.parts_of(name, learned)
        assert all(
            torch.equal(found[part], tensor) for part, tensor in registry.tensors_of(packed).items()
        ), name


@pytest.mark.parametrize("family", CODED)
def test_scales_norms_and_biases_learn_and_nothing_else(family: str) -> None:
    resident = coded(family)
    model = pico(family)
    gains = {f"{n}.weight" for n, m in model.named_modules() if "Norm" in type(m).__name__}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    student = Student(resident, "scales", rank=16, seed=0)
    assert set(student.learning) == gains | biases | {f"{name}.{FACTOR}" for name in resident.quantized}
    for name, packed in packed_of(student).items():
        assert student.model.get_parameter(f"{name}.{FACTOR}").shape == packed.absmax_RG.shape


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_gradient_of_a_factor_is_that_of_a_plain_model_summed_over_its_block(family: str) -> None:
    resident = coded(family)
    student = Student(resident, "scales", rank=16, seed=0)
    move(student)
    upstream = noise(*IDS.shape, student.model.config.vocab_size)
    (student.model(IDS).logits * upstream).sum().backward()
    plain = again(resident, student.learned(state(student))).double().requires_grad_()
    (plain(IDS).logits * upstream.double()).sum().backward()
    for name, packed in packed_of(student).items():
        module = plain.get_submodule(name)
        dW_RC = turned(module, cast(Tensor, cast(Tensor, module.weight).grad))
        levels_RC = bitsandbytes_layout.grid(packed.format).double()[packed.codes_RC.int()]
        expected_RG = (dW_RC * levels_RC).unflatten(1, (-1, packed.group_size)).sum(-1) * packed.absmax_RG
        found_RG = cast(Tensor, student.model.get_parameter(f"{name}.{FACTOR}").grad)
        assert float((found_RG - expected_RG).norm() / expected_RG.norm()) < 1e-4, name
    for name in (name for name in student.learning if not name.endswith(FACTOR)):
        found, expected = (cast(Tensor, model.get_parameter(name).grad) for model in (student.model, plain))
        assert torch.allclose(found, expected.float(), rtol=1e-3, atol=1e-3), name


def test_scales_in_eight_bits_have_the_gradient_of_exact_ones() -> None:
    resident = coded("llama", "nf4", double_quant=True)
    student = Student(resident, "scales", rank=16, seed=0)
    move(student)
    name, packed = next(iter(packed_of(student).items()))
    upstream = noise(*packed.codes_RC.shape)
    (cast(Tensor, student.model.get_submodule(name).weight) * upstream).sum().backward()
    levels_RC = bitsandbytes_layout.grid("nf4").double()[packed.codes_RC.int()]
    expected_RG = (upstream.double() * levels_RC).unflatten(1, (-1, packed.group_size)).sum(
        -1
    ) * packed.absmax_RG
    found_RG = cast(Tensor, student.model.get_parameter(f"{name}.{FACTOR}").grad)
    assert torch.allclose(found_RG, expected_RG.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "format", "double_quant"), CODINGS)
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_learned_scales_are_read_back_as_the_student_used_them(
    family: str, format: bitsandbytes_layout.FourBitFormat, double_quant: bool, spread: float
) -> None:
    resident = coded(family, format, double_quant, spread=spread)
    student = Student(resident, "scales", rank=16, seed=0)
    move(student)
    learned = student.learned(state(student))
    assert sorted(registry.quantized_linears(learned)) == sorted(packed_of(student))
    for name, before in packed_of(student).items():
        found = registry.read(registry.parts_of(name, learned))
        assert isinstance(found, bitsandbytes_layout.Packed) and torch.equal(found.codes_RC, before.codes_RC)
        assert (found.format, found.group_size, found.dtype) == (
            before.format,
            before.group_size,
            before.dtype,
        )
        exact_RG = before.absmax_RG * student.model.get_parameter(f"{name}.{FACTOR}").data
        expected_RG = bitsandbytes_layout.double_quantize(exact_RG).decode() if double_quant else exact_RG
        assert torch.equal(found.absmax_RG, expected_RG) and found.double_quant == double_quant
        assert torch.equal(bitsandbytes_layout.dequantize(found, torch.float32), weight_of(student, name)), (
            name
        )
    plain = {
        name
        for name in learned
        if not any(name.startswith(f"{linear}.weight") for linear in packed_of(student))
    }
    assert plain == {name for name in student.learning if not name.endswith(FACTOR)}
    assert torch.equal(logits(again(resident, learned)), logits(student.model))


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_factor_may_be_zero_or_turn_a_block_around(factor: float) -> None:
    resident = coded("llama")
    student = Student(resident, "scales", rank=16, seed=0)
    name, packed = next(iter(packed_of(student).items()))
    student.model.get_parameter(f"{name}.{FACTOR}").data[3, 0] = factor
    found = registry.read(registry.parts_of(name, student.learned(state(student))))
    expected = bitsandbytes_layout.dequantize(packed, torch.float32)
    expected[3, :64] *= factor
    assert torch.equal(registry.dequantize(found), expected) and torch.equal(
        weight_of(student, name), expected
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_biases_of_a_model_in_half_precision_are_computed_rounded(dtype: torch.dtype) -> None:
    resident = coded("opt", dtype=dtype)
    student = Student(resident, "scales", rank=16, seed=0)
    move(student, 1e-3)
    made, learned = {}, student.learned(state(student))
    for name in student.learning:
        plain = name.replace("parametrizations.", "").removesuffix(".original")
        if plain.rpartition(".")[0] not in packed_of(student) or plain.endswith("bias"):
            owner, _, leaf = plain.rpartition(".")
            computed = cast(Tensor, getattr(student.model.get_submodule(owner), leaf))
            exact = student.model.get_parameter(name)
            made[plain] = computed.detach()
            assert torch.equal(computed, exact.to(dtype).float()) and not torch.equal(computed, exact), name
            assert torch.equal(learned[plain], exact.to(dtype)) and learned[plain].dtype is dtype
            gradient = torch.autograd.grad(computed.sum(), exact)[0]
            assert torch.equal(gradient, torch.ones_like(gradient))
    assert {name.rpartition(".")[2] for name in made} == {"weight", "bias"} and len(made) >= 10
    assert torch.equal(logits(again(resident, learned)), logits(student.model))


def test_norms_of_a_model_in_full_precision_are_not_rounded() -> None:
    student = Student(coded("llama"), "scales", rank=16, seed=0)
    assert "model.norm.weight" in student.learning


def test_a_head_in_four_bits_learns_its_scales_too() -> None:
    resident = coded("llama", outside=True)
    assert "lm_head" in resident.quantized
    student = Student(resident, "scales", rank=16, seed=0)
    assert f"lm_head.{FACTOR}" in student.learning
    move(student)
    assert torch.equal(logits(again(resident, student.learned(state(student)))), logits(student.model))


def test_scales_that_learn_bring_a_student_nearer() -> None:
    target = logits(pico("llama"))
    student = Student(coded("llama", double_quant=True), "scales", rank=16, seed=0)
    optimizer = torch.optim.Adam([p for p in student.trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (student.trained(IDS).logits - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("what", ["plain", "int8"])
def test_scales_of_a_model_without_4_bit_linears_are_refused(what: str) -> None:
    model = pico("llama")
    resident = live(model)
    if what == "int8":
        name = "model.layers.0.mlp.up_proj"
        codes = torch.ones(320, 64, dtype=torch.int8)
        resident = InMemoryModel(
            model.config, model.state_dict(), CPU, quantized={name: Int8Weight(codes, torch.ones(320))}
        )
    with pytest.raises(ModelError, match="here are none; use all, norms or lora") as told:
        Student(resident, "scales", rank=16, seed=0)
    assert "\n" not in str(told.value)


def test_all_of_a_quantised_model_is_all_but_its_codes() -> None:
    model = pico("llama")
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach()
    packed = bitsandbytes_layout.quantize_nearest(weight, "nf4", 64, double_quant=False)
    state = dict(model.state_dict()) | {
        "model.layers.0.mlp.up_proj.weight": bitsandbytes_layout.dequantize(packed)
    }
    resident = InMemoryModel(model.config, state, CPU, quantized={"model.layers.0.mlp.up_proj": packed})
    student = Student(resident, "all", rank=16, seed=0)
    every = {name for name, _ in model.named_parameters()} - {"model.layers.0.mlp.up_proj.weight"}
    assert set(student.learning) == every | {f"model.layers.0.mlp.up_proj.{FACTOR}"}
    learned = student.learned({name: parameter.data for name, parameter in student.model.named_parameters()})
    assert torch.equal(
        learned["model.layers.0.mlp.up_proj.weight"], bitsandbytes_layout.tensors(packed)["weight"]
    )
    assert set(Student(resident, "norms", rank=16, seed=0).learning) == {
        name for name in every if "norm" in name
    }


# lora

ADAPTED = ("llama", "gpt2", "phi3", "opt", "qwen3_moe", "gemma2")


@pytest.mark.parametrize("family", ADAPTED)
def test_a_student_with_adapters_begins_as_the_model(family: str) -> None:
    model = pico(family)
    student = Student(live(model), "lora", rank=4, seed=0)
    assert torch.equal(logits(student.model), logits(model)) and torch.equal(
        logits(student.trained), logits(model)
    )
    assert student.learning and all("lora_" in name for name in student.learning)


@pytest.mark.parametrize("family", ADAPTED)
def test_merged_adapters_are_the_adapted_model(family: str) -> None:
    resident = live(pico(family))
    inside = {name for name, _ in resident.linear_maps() if name.startswith(resident.anatomy.layers)}
    student = Student(resident, "lora", rank=4, seed=0)
    before = logits(student.model)
    move(student, 0.05)
    adapted = logits(student.model)
    assert float((adapted - before).abs().max()) > 0.1
    learned = student.learned(state(student))
    assert set(learned) == {f"{name}.weight" for name in inside}
    assert {name: t.shape for name, t in learned.items()} == {
        name: resident.source[name].shape for name in learned
    }
    assert torch.allclose(logits(again(resident, learned)), adapted, atol=1e-4)


@pytest.mark.parametrize("widths", [{"ffn": [192, 320, 64]}, {"kv": [2, 0, 1], "ffn": [320, 320, 0]}])
def test_layers_of_uneven_widths_are_adapted_where_something_is_left(widths: dict[str, list[int]]) -> None:
    model, resident = narrowed("qwen3", widths)
    student = Student(resident, "lora", rank=4, seed=0)
    assert torch.equal(logits(student.model), logits(model))
    move(student, 0.05)
    adapted, learned = logits(student.model), student.learned(state(student))
    assert all(tensor.numel() for tensor in learned.values())
    assert torch.allclose(logits(again(resident, learned)), adapted, atol=1e-4)


def test_a_rank_above_the_width_is_taken() -> None:
    student = Student(live(pico("llama")), "lora", rank=200, seed=0)
    assert torch.equal(logits(student.model), logits(pico("llama")))


def test_the_same_seed_draws_the_same_adapters_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = [state(Student(live(pico("llama")), "lora", rank=4, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    drawn.append(state(Student(live(pico("llama")), "lora", rank=4, seed=1)))
    first = [name for name in drawn[0] if "lora_A" in name]
    for name in drawn[0]:
        assert torch.equal(drawn[0][name], drawn[1][name]) and torch.equal(drawn[0][name], drawn[3][name])
    assert first and not any(torch.equal(drawn[0][name], drawn[2][name]) for name in first)


def test_without_peft_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CompressError, match="pip install peft, or use train: all") as told:
        Student(live(pico("llama")), "lora", rank=4, seed=0)
    assert "\n" not in str(told.value)
    Student(live(pico("llama")), "all", rank=4, seed=0)  # which needs no peft
