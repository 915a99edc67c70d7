"""Several formats in one model: overrides by name and by axis, and the linears that `protect` spares."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.algorithms.hessian import Moments
from llmcompress.errors import AcceptError, ModelError, RecipeError
from llmcompress.formats.schemes import FourBitScheme, Int8Scheme, IntegerScheme
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.quantize.sensitivity import costs, most_hurt, spared
from llmcompress.stages.quantize.stage import Quantize
from tests.artefacts import CPU, TOKENS, distance, live, load, measured
from tests.bases import byte_tokenizer, known, save_base, small_recipe, write_text
from tests.models import pico

pytestmark = pytest.mark.usefixtures("short_runs")

# name -> family, settings, the format of each linear by the end of its name. gpt2 has Conv1D and biases, phi3
# fused parts.
MIXTURES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "nf4 and int8": (
        "llama",
        {"overrides": {"*.down_proj": {"format": "int8"}}},
        {"down_proj": "w8a8", "_proj": "nf4"},
    ),
    "w4a8 and fp4": (
        "gpt2",
        {
            "format": "w4a8",
            "smooth": {},
            "overrides": {"ffn": {"format": "fp4", "double_quant": True, "group_size": 32}},
        },
        {"c_fc": "fp4", "mlp.c_proj": "fp4", "attn.c_proj": "w4a8", "c_attn": "w4a8"},
    ),
    "static and not": (
        "phi3",
        {
            "format": "w8a8",
            "activations": "static",
            "overrides": {
                "kv": {"activations": "dynamic"},
                "*.o_proj": {"format": "w4a16", "group_size": 32},
            },
        },
        {"o_proj": "w4a16", "_proj": "w8a8"},
    ),
    "learned": (
        "llama",
        {
            "rounding": "learned",
            "steps": 4,
            "overrides": {"kv": {"format": "w8a8"}, "*.o_proj": {"format": "w4a4"}},
        },
        {"o_proj": "w4a4", "q_proj": "w8a8", "k_proj": "w8a8", "v_proj": "w8a8", "_proj": "nf4"},
    ),
}
NATIVE = {"overrides": {"ffn": {"group_size": 32}, "*.q_proj": {"format": "fp4", "double_quant": True}}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    for name, (family, settings, _) in MIXTURES.items():
        base = (
            folder / family
            if (folder / family).exists()
            else save_base(folder / family, family, num_hidden_layers=1)
        )
        run_recipe(small_recipe(text, base, **settings), folder / name.replace(" ", "-"))
    return {name: folder / name.replace(" ", "-") for name in MIXTURES}


def expected(linear: str, formats: dict[str, str]) -> str:
    return next(format for end, format in formats.items() if linear.endswith(end))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_each_linear_has_the_format_that_its_override_says(name: str, mixtures: dict[str, Path]) -> None:
    report = Report.of(mixtures[name])
    assert report.linears and all(x.format == expected(x.name, MIXTURES[name][2]) for x in report.linears)
    assert len({linear.format for linear in report.linears}) > 1 or name == "static and not"
    model = load(mixtures[name])
    for linear in report.linears:
        kind = "FourBitLinear" if linear.format in ("nf4", "fp4") else "IntegerLinear"
        assert type(model.get_submodule(linear.name)).__name__ == kind
    checkpoint = Checkpoint.open(mixtures[name], base=False)
    assert report.compressed.parameters == checkpoint.parameters == report.base.parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_computes_what_was_measured(name: str, mixtures: dict[str, Path]) -> None:
    near = 0.02 if name == "learned" or "4" in name else 3e-3  # the stock 4-bit kernel computes in bfloat16
    assert distance(live(load(mixtures[name])), measured(mixtures[name])) < near


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_saved_again_bit_for_bit(name: str, mixtures: dict[str, Path], tmp_path: Path) -> None:
    model = load(mixtures[name])
    live(model)  # the stock kernel reorders its own copy of the codes
    model.save_pretrained(tmp_path)
    once, again = (load_file(folder / "model.safetensors") for folder in (mixtures[name], tmp_path))
    assert once.keys() == again.keys()
    assert all(
        torch.equal(tensor, again[part]) and tensor.dtype == again[part].dtype
        for part, tensor in once.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4 and int8", "w4a8 and fp4"])
def test_a_model_in_memory_becomes_the_same_mixture(name: str, mixtures: dict[str, Path], text: Path) -> None:
    family, settings, _ = MIXTURES[name]
    base, written = mixtures[name].parent / family, Report.of(mixtures[name])
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval())
    result, report = apply_recipe(small_recipe(text, base, **settings), model, byte_tokenizer())
    assert report.linears == written.linears and report.kept == written.kept
    assert report.compressed.size_bytes is not None and written.compressed.size_bytes is not None
    # the header of the file
    assert abs(report.compressed.size_bytes - written.compressed.size_bytes) < 10_000
    assert distance(live(result), live(load(mixtures[name]))) < 1e-6


PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["tokens"]).logits}, sys.argv[3])
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""


@pytest.mark.slow
def test_several_blocks_and_4_bit_formats_load_without_the_plug_in(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base", num_hidden_layers=1), tmp_path / "out"
    report = run_recipe(small_recipe(text, base, **NATIVE), out)
    assert {linear.format for linear in report.linears} == {"nf4", "fp4"}
    assert len({linear.bits for linear in report.linears}) == 3
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    )
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    arguments = [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "tokens"), str(tmp_path / "seen")]
    subprocess.run(arguments, check=True, timeout=600)
    assert distance(load_file(tmp_path / "seen")["logits"], measured(out)) < 0.02


def test_of_two_overrides_the_last_holds_and_it_starts_from_the_stage() -> None:
    stage = Quantize.model_validate(
        {
            "group_size": 32,
            "overrides": {
                "ffn": {"double_quant": True},
                "*.up_proj": {"format": "w4a8"},
                "*.1.*": {"group_size": 128},
            },
        }
    )
    chosen, _ = stage.choose(InMemoryModel(pico("llama").config, pico("llama").state_dict(), CPU))
    inner = "model.layers.0."
    assert chosen[f"{inner}self_attn.q_proj"] == FourBitScheme("nf4", 32, False, torch.float32)
    assert chosen[f"{inner}mlp.gate_proj"] == FourBitScheme("nf4", 32, True, torch.float32)
    up = chosen[f"{inner}mlp.up_proj"]
    assert isinstance(up, IntegerScheme) and up.scheme.group_size == 64, (
        "another format starts from its own defaults"
    )
    assert "model.layers.1.mlp.gate_proj" not in chosen, "rows of 64 don't divide into groups of 128"
    assert chosen["model.layers.1.self_attn.o_proj"] == FourBitScheme("nf4", 128, False, torch.float32)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (
            {"*.down": {"format": "int8"}},
            r'overrides "\*.down" matches no linear of this model; .*axes vocab, hidden',
        ),
        ({"hiden": {"format": "int8"}}, 'overrides "hiden" matches no linear'),
        (
            {"ffn": {"format": "int8", "threshold": 6.0}},
            "threshold: 6 of .*mlp.* is for models that are int8 throughout",
        ),
    ],
)
def test_an_override_that_can_not_be_is_refused_before_anything_is_read(
    overrides: dict[str, Any], why: str
) -> None:
    model = pico("llama")
    with pytest.raises(ModelError, match=why):
        Quantize.model_validate({"overrides": overrides}).choose(
            InMemoryModel(model.config, model.state_dict(), CPU)
        )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "overrides: {ffn: {format: int8, group_size: 64}}",
            "overrides.ffn: group_size is for 4-bit formats; int8 has one scale per row",
        ),
        (
            "format: int8, overrides: {ffn: {group_size: 64}}",
            "overrides.ffn: group_size is for 4-bit formats",
        ),
        (
            "overrides: {ffn: {groupsize: 64}}",
            "overrides.ffn.groupsize: unknown key; did you mean group_size?",
        ),
        ("overrides: {ffn: {rounding: nearest}}", "overrides.ffn.rounding: unknown key"),
        ("protect: 1.0", "protect: .*less than 1"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: [quantize: {{{text}}}]")
    assert "\n" not in str(caught.value)


# What is spared.


def test_a_linear_that_is_spared_keeps_its_bytes_in_our_layout_and_its_dtype_elsewhere() -> None:
    for format, wide in (("w8a8", "w8a16"), ("w4a8", "w4a16"), ("w4a4", "w4a16")):
        coding = Quantize.model_validate({"format": format}).coding(torch.float32)
        found = spared(coding)
        assert isinstance(found, IntegerScheme) and found.format == wide and found.bits == coding.bits
    assert spared(FourBitScheme("nf4", 64, False, torch.float32)) is None and spared(Int8Scheme(0.0)) is None
    assert (
        spared(Quantize.model_validate({"format": "w8a8", "activations": "none"}).coding(torch.float32))
        is None
    )


def test_the_most_hurt_are_those_that_cost_most_a_weight_and_fit() -> None:
    sizes = {"a": 10, "b": 40, "c": 25, "d": 25}
    nats = {"a": 1.0, "b": 8.0, "c": 3.0, "d": -1.0}  # a weight: 0.1, 0.2, 0.12, less than nothing
    assert most_hurt(nats, sizes, 0.0) == []
    assert most_hurt(nats, sizes, 0.10) == ["a"]
    assert most_hurt(nats, sizes, 0.65) == ["b", "c"]
    assert most_hurt(nats, sizes, 0.99) == ["b", "c", "a"], "what costs nothing is not spared"


def test_the_cost_of_a_linear_is_the_error_of_its_block_in_the_metric() -> None:
    model = pico("llama", num_hidden_layers=1)
    coding = Quantize.model_validate({"format": "w4a4"}).coding(torch.float32)
    sequences = torch.randint(0, 160, (4, 24), generator=torch.Generator().manual_seed(0))
    for layer in walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences):
        fisher = Moments(64, CPU)
        fisher.add(torch.randn(500, 64, generator=torch.Generator().manual_seed(1)))
        found = costs(layer, {"mlp.down_proj": coding, "self_attn.q_proj": coding}, fisher.H_CC)
        assert not layer.rounds, "a rounding of the search was left behind"
        aims = layer.outputs(layer.inputs)
        inputs = coding.inputs()
        assert inputs is not None
        lost = {}
        for linear in found:
            W_RC, whole = layer.weight(linear), []
            for read in (inputs, cast(Any, spared(coding)).inputs()):
                layer.rounds[linear] = read
                layer.set_weight(linear, coding.nearest(W_RC).dequantize(torch.float32))  # type: ignore[union-attr]
                errors = torch.cat(layer.outputs(layer.inputs)) - torch.cat(aims)
                whole.append(float((errors @ fisher.H_CC * errors).sum(-1).mean() / 2))
                layer.set_weight(linear, W_RC)
            layer.rounds.clear()
            lost[linear] = whole[0] - whole[1]
        assert found == pytest.approx(lost, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "w8a8"])
def test_what_is_protected_is_said_and_costs_less(format: str, text: Path, tmp_path: Path) -> None:
    base, reports = save_base(tmp_path / "base"), {}
    for protect in (0.0, 0.3):
        settings = {"protect": protect} if protect else {}
        out = tmp_path / str(protect)
        reports[protect] = run_recipe(small_recipe(text, base, format=format, smooth={}, **settings), out)
        assert distance(live(load(out)), measured(out)) < 0.03
    bare, spare = reports[0.0], reports[0.3]
    assert known(spare.fidelity.kl_nats_mean) < known(bare.fidelity.kl_nats_mean)
    kept = [entry.name for entry in spare.stages[0].kept if entry.why == "protect"]
    wide = [linear.name for linear in spare.linears if linear.format == "w8a16"]
    assert bool(kept) == (format == "int8") and bool(wide) == (format == "w8a8")
    shapes = dict(InMemoryModel(pico("llama").config, pico("llama").state_dict(), CPU).linear_maps())
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items() if name != "lm_head"}
    assert sum(sizes[name] for name in (*kept, *wide)) <= 0.3 * sum(sizes.values())
    if format == "w8a8":
        assert spare.compressed.parameters == bare.compressed.parameters
        assert abs(known(spare.compressed.size_bytes) - known(bare.compressed.size_bytes)) < 100


@pytest.mark.slow
def test_an_interrupted_run_with_protection_goes_on_and_gives_the_same_bytes(
    text: Path, tmp_path: Path
) -> None:
    base, settings = save_base(tmp_path / "base"), {"format": "w8a8", "smooth": {}, "protect": 0.2}
    run_recipe(small_recipe(text, base, **settings), tmp_path / "once")
    strict = small_recipe(text, base, **settings).model_copy(update={"accept": Accept(kl_nats=1e-12)})
    with pytest.raises(AcceptError):
        run_recipe(strict, tmp_path / "again")
    journal = partial_folder(tmp_path / "again") / "journal"
    for lost in (
        ("quantize.00001",),
        ("quantize.00000", "quantize.00001", "protected.00000", "smooth.00001"),
    ):
        shutil.copytree(journal.parent, partial_folder(tmp_path / lost[-1]))
        for name in lost:
            (partial_folder(tmp_path / lost[-1]) / "journal" / f"{name}.safetensors").unlink()
        run_recipe(small_recipe(text, base, **settings), tmp_path / lost[-1])
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / lost[-1] / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), file
