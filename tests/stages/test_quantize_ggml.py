"""q4_0 and iq4_nl as formats of quantize: what is written and loaded, planned, resumed, mixed and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from llmcompress.errors import AcceptError, ModelError, RecipeError
from llmcompress.formats.ggml import GgmlLayout, GgmlLinear, GgmlWeight
from llmcompress.formats.schemes import GgmlScheme
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.stages.quantize.stage import Quantize
from tests.artefacts import (
    CPU,
    assert_same_in_memory,
    distance,
    live,
    load,
    measured,
    same_weights,
    weights_of,
)
from tests.bases import VOCABULARY, known, staged_recipe, write_text
from tests.models import pico
from tests.stages.test_codebook import small

pytestmark = pytest.mark.usefixtures("short_runs")

FORMATS = ("q4_0", "iq4_nl")
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def quantized(text: Path, base: Path, **settings: Any) -> Recipe:
    return staged_recipe(text, base, {"quantize": settings}, samples=4, length=24)


def modules(folder: Path) -> dict[str, GgmlLinear]:
    return {name: module for name, module in load(folder).named_modules() if isinstance(module, GgmlLinear)}


# What is written.


@every_format
def test_it_loads_as_what_was_measured_in_memory_too(format: str, text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    _, report, written = assert_same_in_memory(quantized(text, base, format=format), base, tmp_path)
    assert report.linears == written.linears
    assert {linear.format for linear in written.linears} == {format}
    assert {linear.bits for linear in written.linears} == {4.5}
    assert modules(tmp_path / "out").keys() == {linear.name for linear in written.linears}
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 1e-5
    assert distance(live(load(tmp_path / "out")), live(load(base))) > 1e-3, "it is the base"


@every_format
def test_the_numbers_on_disk_are_those_of_the_format(format: str, text: Path, tmp_path: Path) -> None:
    """Sixteen integers, a float16 scale for 32 columns, and nothing else."""
    run_recipe(quantized(text, small(tmp_path / "base"), format=format), tmp_path / "out")
    tensors = weights_of(tmp_path / "out")
    integers = set(range(-8, 8)) if format == "q4_0" else set(gguf.quants.IQ4_NL.kvalues)
    signs = set[float]()
    for name, module in modules(tmp_path / "out").items():
        R, C = module.out_features, module.in_features
        packed, scale_RG = tensors[f"{name}.weight"], tensors[f"{name}.weight_group_scale"]
        assert (packed.dtype, packed.shape) == (torch.uint8, (1, R, C // 2))
        assert (scale_RG.dtype, scale_RG.shape) == (torch.float16, (R, C // 32))
        ratio = module.dequantized(torch.float32) / scale_RG.float().repeat_interleave(32, 1)
        assert set(ratio.round().flatten().tolist()) <= integers and torch.equal(ratio, ratio.round())
        signs |= set(scale_RG.sign().flatten().tolist())
    assert signs == {-1.0, 1.0}


@every_format
@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_it_beats_the_nearest_codes(format: str, rounding: str, text: Path, tmp_path: Path) -> None:
    base, kl = small(tmp_path / "base"), dict[str, float]()
    for how in ("nearest", rounding):
        steps = {"steps": 8} if how == "learned" else {}
        report = run_recipe(quantized(text, base, format=format, rounding=how, **steps), tmp_path / how)
        kl[how] = known(report.fidelity.kl_nats_mean)
        assert distance(live(load(tmp_path / how)), measured(tmp_path / how)) < 1e-5
    assert kl[rounding] < 0.6 * kl["nearest"]


def test_nearest_codes_of_q4_0_are_those_that_llama_cpp_writes(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    run_recipe(quantized(text, base, format="q4_0", rounding="nearest"), tmp_path / "out")
    kind, plain = gguf.GGMLQuantizationType.Q4_0, weights_of(base)
    for name, module in modules(tmp_path / "out").items():
        theirs = gguf.quants.quantize(plain[f"{name}.weight"].float().numpy(), kind)
        expected = torch.from_numpy(gguf.quants.dequantize(theirs, kind))
        assert torch.equal(module.dequantized(torch.float32), expected)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"format": "q4_0", "head": "quantize", "embedding": "int8"}),
        ("gpt2", {"format": "iq4_nl"}),
        ("qwen3_moe", {"format": "w8a16", "overrides": {"ffn": {"format": "q4_0"}}}),
        ("llama", {"format": "iq4_nl", "smooth": {"method": "awq"}, "rotate": True}),
    ],
)
def test_a_plan_foretells_the_bytes(
    family: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base = small(tmp_path / "base", family)
    told = quantized(text, base, **settings)
    planned = plan_recipe(told).rows[1]
    report = run_recipe(told, tmp_path / "out")
    assert planned.parameters == report.base.parameters == report.compressed.parameters
    assert planned.size_bytes == sum(tensor.nbytes for tensor in weights_of(tmp_path / "out").values())
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 0.003
    assert known(planned.seconds) > 0 and settings["format"] in planned.stage


def test_it_stands_beside_other_formats_and_protected_linears_keep_their_dtype(
    text: Path, tmp_path: Path
) -> None:
    base = small(tmp_path / "base")
    settings = {
        "format": "q4_0",
        "protect": 0.3,
        "overrides": {
            "*.o_proj": {"format": "w8a16"},
            "*.up_proj": {"format": "nf4", "group_size": 32},
            "*.down_proj": {"format": "iq4_nl"},
        },
    }
    report = run_recipe(quantized(text, base, **settings), tmp_path / "out")
    found = {linear.name.rpartition(".")[2]: linear.format for linear in report.linears}
    told = {"o_proj": "w8a16", "up_proj": "nf4", "down_proj": "iq4_nl"}
    assert {name: told.get(name, "q4_0") for name in found} == found and len(set(found.values())) > 1
    spared = [entry.name for entry in report.kept if entry.why == "protect"]
    tensors = weights_of(tmp_path / "out")
    assert spared and all(tensors[f"{name}.weight"].dim() == 2 for name in spared)
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 0.02
    assert "30 % of the weights kept in their dtype" in Quantize.model_validate(settings).leaves


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    told = quantized(text, small(tmp_path / "base", num_hidden_layers=2), format="iq4_nl")
    run_recipe(told, tmp_path / "once")
    with pytest.raises(AcceptError):
        run_recipe(told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again")
    (partial_folder(tmp_path / "again") / "journal" / "quantize.00001.safetensors").unlink()
    report = run_recipe(told, tmp_path / "again", overwrite=True)
    assert any("interrupted" in note for note in report.stages[0].notes)
    assert same_weights(tmp_path / "once", tmp_path / "again")


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    report = run_recipe(quantized(text, small(tmp_path / "base"), format="q4_0"), tmp_path / "out")
    facts = report.stages[0].model_dump()
    assert (facts["format"], facts["bits"]) == ("q4_0", 4.5)
    assert not {"group_size", "double_quant", "entries"} & facts.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import llmcompress" in card and "bitsandbytes" not in card.split("```")[1]


# The module.


@every_format
def test_a_linear_multiplies_by_its_weight_in_every_dtype_and_passes_gradients(
    format: str, text: Path, tmp_path: Path
) -> None:
    run_recipe(quantized(text, small(tmp_path / "base", "qwen2"), format=format), tmp_path / "out")
    module = next(one for one in modules(tmp_path / "out").values() if one.bias is not None)
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        x = torch.randn(3, 5, module.in_features).to(dtype).requires_grad_()
        out: Tensor = module(x)
        expected = torch.nn.functional.linear(
            x.double(), module.dequantized(torch.float64), module.bias.double()
        )
        assert out.dtype == dtype
        assert distance(out.detach().double(), expected.detach()) < error
        out.sum().backward()
        wanted = module.dequantized(torch.float32).sum(0).expand(3, 5, -1)
        assert x.grad is not None and distance(x.grad.float(), wanted) < error
    moved = module.to(torch.bfloat16)
    assert (moved.weight.dtype, moved.weight_group_scale.dtype) == (torch.uint8, torch.float16)


def test_codes_without_the_scales_of_their_groups_are_no_weight() -> None:
    codes_RC = torch.zeros(4, 64, dtype=torch.uint8)
    for scale_RG in (torch.ones(4, 2), torch.ones(4, 1).half(), torch.ones(4, 3).half()):
        with pytest.raises(ValueError, match="can't have scales"):
            GgmlWeight(codes_RC, scale_RG, GgmlLayout("q4_0"))
    with pytest.raises(ValueError, match="no format 'q5_0'; use one of q4_0, iq4_nl"):
        GgmlLayout("q5_0")  # type: ignore[arg-type]


# Refused.


def test_rows_that_do_not_divide_are_kept_with_the_reason(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", intermediate_size=104)
    report = run_recipe(quantized(text, base, format="q4_0"), tmp_path / "out")
    (why,) = {entry.why for entry in report.kept if entry.name.endswith("down_proj")}
    assert why == "q4_0 rows of 104 weights don't divide into groups of 32"
    only = Quantize.model_validate({"format": "q4_0", "skip": ["*_proj"]})
    with pytest.raises(ModelError, match="no linear of this model can be quantised"):
        only.choose(DiskModel(base, CPU))


def test_an_override_takes_the_format_without_the_group_size_of_the_others() -> None:
    stage = Quantize.model_validate({"group_size": 128, "overrides": {"ffn": {"format": "q4_0"}}})
    model = pico("llama", vocab_size=VOCABULARY)
    chosen, _ = stage.choose(InMemoryModel(model.config, model.state_dict(), CPU))
    assert chosen["model.layers.0.mlp.up_proj"] == GgmlScheme(GgmlLayout("q4_0"))
    assert stage.weight_bits == (4.25, 4.5) and stage.needs_plugin


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            "format: q4_0, group_size: 64",
            "group_size is for 4-bit formats; q4_0 has groups of 32 and no others",
        ),
        ("format: iq4_nl, double_quant: true", "double_quant is for nf4 and fp4, not iq4_nl"),
        ("format: q4_0, activations: none", "activations is for w8a8, .*, not q4_0"),
        ("format: q4_0, entries: 16", "entries is for codebook, not q4_0"),
        ("format: q4_K", "format: .*q4_0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: [quantize: {{{settings}}}]")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_weights_beyond_the_type_of_scales_are_named(rounding: str, text: Path, tmp_path: Path) -> None:
    model = pico("llama", vocab_size=VOCABULARY, num_hidden_layers=1)
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").data[0, 0] = 1e9
    base = small(tmp_path / "base")
    model.save_pretrained(base)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: .*scales of q4_0 .*float16"):
        run_recipe(quantized(text, base, format="q4_0", rounding=rounding), tmp_path / "out")
