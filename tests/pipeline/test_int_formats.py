"""int8 and the integer formats from recipe to artefact: what loads, that it computes what was measured, and
what is refused."""

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
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress  # noqa: F401  (teaches from_pretrained our formats)
from llmcompress.algorithms.activation_quantization import round_but_outliers
from llmcompress.errors import AcceptError, RecipeError
from llmcompress.formats import registry
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from tests.artefacts import CPU, TOKENS, distance, live, load, measured, weights_of
from tests.bases import byte_tokenizer, known, save_base, small_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

# name -> family, settings. The families: llama as most are; gpt2 has Conv1D and biases, phi3 fused parts,
# qwen2 biases.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("llama", {"format": "int8"}),
    "int8 outliers": ("qwen2", {"format": "int8", "threshold": 2.5, "rounding": "nearest"}),
    "int8 conv1d": ("gpt2", {"format": "int8", "smooth": {}}),
    "w8a8": ("llama", {"format": "w8a8"}),
    "w8a8 static": ("phi3", {"format": "w8a8", "activations": "static", "smooth": {}, "rounding": "nearest"}),
    "w8a8 none": ("qwen2", {"format": "w8a8", "activations": "none", "rounding": "nearest"}),
    "w8a8 none, rotated experts": ("qwen3_moe", {"format": "w8a8", "activations": "none", "rotate": True}),
    "w4a8": ("gpt2", {"format": "w4a8", "smooth": {}}),
    "w4a8 static": (
        "qwen2",
        {"format": "w4a8", "activations": "static", "range": "percentile", "group_size": 32},
    ),
    "w4a4": ("qwen2", {"format": "w4a4", "group_size": 32, "smooth": {"method": "awq"}}),
    "w4a4 learned": ("llama", {"format": "w4a4", "rounding": "learned", "steps": 4, "activations": "static"}),
    "w8a16": ("llama", {"format": "w8a16"}),
    "w8a16 static": ("phi3", {"format": "w8a16", "activations": "static", "range": "minmax"}),
    "w4a16": ("gpt2", {"format": "w4a16", "group_size": 32}),
    "w4a4 none": ("phi3", {"format": "w4a4", "activations": "none"}),
}
INT8 = [name for name in RECIPES if name.startswith("int8")]
OURS = [name for name in RECIPES if name not in INT8]
BITS = {"int8": 8.0, "w8a8": 8.0, "w4a8": 4 + 8 / 64, "w4a4": 4 + 8 / 64, "w8a16": 8.0, "w4a16": 4 + 8 / 64}
# An activation that lies at a half falls on one side or the other by the order of sums: it moves the logits
# by some 1e-4 with 8 bits and more with 4. The stock int8 kernel takes its inputs through float16, so that
# one code in thirty does.
NEAR = {
    name: 0.03 if name in INT8 else 1e-5 if "none" in name else 0.02 if "w4a4" in name else 3e-3
    for name in RECIPES
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """The artefact of every recipe, on a base of one layer."""
    folder = tmp_path_factory.mktemp("formats")
    outs = {}
    for name, (family, settings) in RECIPES.items():
        base = (
            folder / family
            if (folder / family).exists()
            else save_base(folder / family, family, num_hidden_layers=1)
        )
        outs[name] = folder / name.replace(", ", "-").replace(" ", "-")
        run_recipe(small_recipe(text, base, **settings), outs[name])
    return outs


def base_of(name: str, everything: dict[str, Path]) -> Path:
    return everything[name].parent / RECIPES[name][0]


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The quantised linears of an artefact [R, C] by their names in the file."""
    tensors, resident = weights_of(folder), DiskModel(folder, CPU, quantized=True)
    linears = {
        keys[0].removesuffix(".weight"): target.removesuffix(".weight")
        for target, keys in resident.sources.items()
    }
    shapes = dict(resident.linear_maps())
    return {
        name: registry.dequantize(
            registry.read(
                registry.parts_of(name, tensors), resident.layouts.get(linears[name]), shapes[linears[name]]
            )
        )
        for name in registry.quantized_linears(tensors)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_an_artefact_loads_and_computes_what_was_measured(name: str, everything: dict[str, Path]) -> None:
    model = load(everything[name])
    kinds = {
        type(model.get_submodule(linear.name)).__name__ for linear in Report.of(everything[name]).linears
    }
    assert kinds == {"Linear8bitLt" if name in INT8 else "IntegerLinear"}
    found = live(model)
    assert distance(found, measured(everything[name])) < NEAR[name]
    base = torch.cat(list(logits(DiskModel(base_of(name, everything), CPU), TOKENS)))
    assert distance(found, base) > 1e-3, "it is the base"


LOADER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens, told = load_file(sys.argv[1])["tokens"], {}
for folder in sys.argv[2:]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        told[folder] = f"{type(error).__name__}: {error}"
        continue
    told[folder] = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, folder + ".seen")
assert not any(name.startswith("llmcompress") for name in sys.modules)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def elsewhere(everything: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each artefact is to a process that never imports llmcompress: an error, or what loading it has to
    tell."""
    scratch = tmp_path_factory.mktemp("elsewhere")
    save_file({"tokens": TOKENS}, scratch / "tokens")
    arguments = [sys.executable, "-c", LOADER, str(scratch / "tokens"), *map(str, everything.values())]
    out = subprocess.run(
        arguments, check=True, cwd=scratch, timeout=600, capture_output=True, text=True
    ).stdout
    told = json.loads(out.splitlines()[-1])
    return {name: told[str(folder)] for name, folder in everything.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_plain_transformers_loads_int8(
    name: str, elsewhere: dict[str, Any], everything: dict[str, Path]
) -> None:
    assert elsewhere[name] == {}
    seen = load_file(f"{everything[name]}.seen")["logits"]
    assert torch.equal(seen, live(load(everything[name])))
    assert distance(seen, measured(everything[name])) < NEAR[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_plain_transformers_refuses_our_formats(name: str, elsewhere: dict[str, Any]) -> None:
    told = elsewhere[name]
    assert isinstance(told, str), f"it loaded, with {told}"
    assert told.startswith("RuntimeError") and "mismatched" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_saving_a_loaded_artefact_writes_the_same_bytes(
    name: str, everything: dict[str, Path], tmp_path: Path
) -> None:
    model = load(everything[name])
    live(model)  # what a forward does leaves no trace
    model.save_pretrained(tmp_path / "again")
    once, again = weights_of(everything[name]), weights_of(tmp_path / "again")
    assert once.keys() == again.keys()
    for part, tensor in once.items():
        assert tensor.dtype == again[part].dtype and tensor.shape == again[part].shape, part
        assert torch.equal(
            tensor.contiguous().view(torch.uint8), again[part].contiguous().view(torch.uint8)
        ), part
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (everything[name], tmp_path / "again")
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(live(load(tmp_path / "again")), live(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "w8a8 static", "w4a8", "w4a4"])
def test_a_model_in_memory_becomes_what_the_folder_is(
    name: str, everything: dict[str, Path], text: Path
) -> None:
    settings, base, written = RECIPES[name][1], base_of(name, everything), Report.of(everything[name])
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval())
    result, report = apply_recipe(small_recipe(text, base, **settings), model, byte_tokenizer())
    assert result is model
    assert report.linears == written.linears and report.kept == written.kept
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-3)
    assert report.compressed.parameters == written.compressed.parameters == written.base.parameters
    assert report.compressed.size_bytes is not None and written.compressed.size_bytes is not None
    # the header of the file
    assert abs(report.compressed.size_bytes - written.compressed.size_bytes) < 10_000
    loaded = load(everything[name])
    assert distance(live(model), live(loaded)) < 1e-6
    if name != "int8":
        ours, theirs = (
            {
                f"{n}.{part}": t
                for n, m in x.named_modules()
                if isinstance(m, IntegerLinear)
                for part, t in m.stored().items()
            }
            for x in (model, loaded)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_report_counts_bits_and_parameters(name: str, everything: dict[str, Path]) -> None:
    report, checkpoint = Report.of(everything[name]), Checkpoint.open(everything[name], base=False)
    settings = RECIPES[name][1]
    expected = 4 + 8 / 32 if settings.get("group_size") == 32 else BITS[settings["format"]]
    assert {(linear.format, linear.bits) for linear in report.linears} == {(settings["format"], expected)}
    base = Checkpoint.open(base_of(name, everything))
    assert report.compressed.parameters == checkpoint.parameters == base.parameters == report.base.parameters
    assert report.compressed.size_bytes == checkpoint.size_bytes
    weights = {linear: weight.numel() for linear, weight in dequantized(everything[name]).items()}
    on_disk = sum(
        entry.size_bytes
        for part, entry in checkpoint.tensors.items()
        if part.removesuffix(".weight") in weights or part.endswith(".weight_multiplier")
    )
    assert 8 * on_disk / sum(weights.values()) == pytest.approx(expected)
    assert all(linear.relative_error > 0 for linear in report.linears)


WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"format": "int8"}, 0.8),
        ({"format": "w8a8"}, 0.8),
        ({"format": "w8a8", "activations": "none"}, 0.2),
        ({"format": "w4a8", "activations": "static"}, 0.2),
        ({"format": "w4a4"}, 0.6),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_calibration_beats_nearest_at_the_same_bytes(
    settings: dict[str, Any], share: float, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", **WIDE)
    more = small_recipe(text).data.model_copy(update={"samples": 32, "evaluation_samples": 8})
    kl, sizes = {}, {}
    for rounding in ("nearest", "gptq"):
        recipe = small_recipe(text, base, rounding=rounding, **settings).model_copy(update={"data": more})
        report = run_recipe(recipe, tmp_path / rounding)
        kl[rounding], sizes[rounding] = known(report.fidelity.kl_nats_mean), report.compressed.size_bytes
    assert 0 < kl["gptq"] < share * kl["nearest"]
    assert sizes["gptq"] == sizes["nearest"]


# A run that was interrupted.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Path]:
    """A base of two layers, and its artefact with smoothing, done at once."""
    folder = tmp_path_factory.mktemp("whole")
    base = save_base(folder / "base", "qwen2")
    run_recipe(smoothed(text, base), folder / "out")
    return base, folder / "out"


@pytest.fixture(scope="module")
def refused(whole: tuple[Path, Path], text: Path) -> Path:
    """What a run leaves whose result was not accepted: the whole journal."""
    base, once = whole
    out = once.with_name("refused")
    with pytest.raises(AcceptError):
        run_recipe(smoothed(text, base).model_copy(update={"accept": Accept(kl_nats=1e-9)}), out)
    assert not out.exists()
    return partial_folder(out)


def smoothed(text: Path, base: Path) -> Recipe:
    return small_recipe(text, base, format="w4a8", smooth={}, activations="static")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "lost",
    [
        ("quantize.00001",),
        ("quantize.00001", "smooth.00001"),
        ("quantize.00000", "smooth.00000"),
        ("quantize.00000", "quantize.00001", "smooth.00001"),
    ],
    ids="+".join,
)
def test_an_interrupted_run_with_smoothing_goes_on_and_gives_the_same_bytes(
    lost: tuple[str, ...], whole: tuple[Path, Path], refused: Path, text: Path, tmp_path: Path
) -> None:
    (base, once), out = whole, tmp_path / "out"
    shutil.copytree(refused, partial_folder(out))
    files = {
        file.name.removesuffix(".safetensors"): file
        for file in (partial_folder(out) / "journal").glob("*.safetensors")
    }
    assert files.keys() == {"quantize.00000", "quantize.00001", "smooth.00000", "smooth.00001"}
    for name in lost:
        files[name].unlink()
    done = 2 - sum(name.startswith("quantize") for name in lost)
    report = run_recipe(smoothed(text, base), out)
    said = [note for note in report.stages[0].notes if "were done by an earlier run" in note]
    assert len(said) == (done > 0) and all(note.startswith(f"{done} layers") for note in said)
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (once / file).read_bytes(), file
    assert report.linears == Report.of(once).linears


# What is kept, under smoothing.


def crossed(before: Tensor, after: Tensor) -> Tensor:
    """What a norm was really divided by, float64."""
    return before.double() / after.double()


def test_what_skip_names_is_stored_with_the_scale_that_crossed(text: Path, tmp_path: Path) -> None:
    """A reader beside quantised ones, and a producer: both stay dense, and the scale went through both."""
    base, out = save_base(tmp_path / "base", "qwen2", num_hidden_layers=1), tmp_path / "out"
    skip = ["*.q_proj", "*.v_proj", "*.gate_proj", "*.up_proj"]
    run_recipe(small_recipe(text, base, format="w8a8", smooth={}, rounding="nearest", skip=skip), out)
    was, now, layer = weights_of(base), weights_of(out), "model.layers.0."
    by = crossed(was[f"{layer}input_layernorm.weight"], now[f"{layer}input_layernorm.weight"])
    assert float((by - 1).abs().max()) > 0.1, "nothing crossed"
    scales = crossed(was[f"{layer}self_attn.v_proj.bias"], now[f"{layer}self_attn.v_proj.bias"])
    expected = {
        "self_attn.q_proj.weight": was[f"{layer}self_attn.q_proj.weight"].double() * by,
        "self_attn.v_proj.weight": was[f"{layer}self_attn.v_proj.weight"].double() * by / scales[:, None],
    }
    for name, weight in expected.items():
        torch.testing.assert_close(now[f"{layer}{name}"].double(), weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(now[f"{layer}self_attn.q_proj.bias"], was[f"{layer}self_attn.q_proj.bias"])
    # both readers of the second norm are kept, so nothing crosses from it, but from up_proj to down_proj it
    # does
    for name in ("post_attention_layernorm", "mlp.gate_proj"):
        assert torch.equal(now[f"{layer}{name}.weight"], was[f"{layer}{name}.weight"])
    units = crossed(was[f"{layer}mlp.up_proj.weight"], now[f"{layer}mlp.up_proj.weight"])
    assert (
        float((units - units[:, :1]).abs().max()) < 1e-5 * float(units.max())
        and float((units - 1).abs().max()) > 0.1
    )
    down = dequantized(out)[f"{layer}mlp.down_proj"]
    wanted = was[f"{layer}mlp.down_proj.weight"].double() * units[:, 0]
    step = wanted.abs().amax(1, keepdim=True) / 127
    assert bool(((down - wanted).abs() <= 0.501 * step).all())
    assert distance(measured(out), torch.cat(list(logits(DiskModel(base, CPU), TOKENS)))) < 0.02
    assert distance(live(load(out)), measured(out)) < 3e-3


def test_readers_that_a_format_can_not_take_are_stored_with_the_scale_that_crossed(
    text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base", num_key_value_heads=1, num_hidden_layers=1), tmp_path / "out"
    # nf4: no 16 rows
    report = run_recipe(small_recipe(text, base, smooth={"method": "awq"}, rounding="nearest"), out)
    assert {kept.name.rpartition(".")[2] for kept in report.kept} == {"k_proj", "v_proj", "lm_head"}
    was, now, layer = weights_of(base), weights_of(out), "model.layers.0."
    by = crossed(was[f"{layer}input_layernorm.weight"], now[f"{layer}input_layernorm.weight"])
    assert float((by - 1).abs().max()) > 0.05, "nothing crossed"
    wanted = was[f"{layer}self_attn.k_proj.weight"].double() * by
    torch.testing.assert_close(now[f"{layer}self_attn.k_proj.weight"].double(), wanted, rtol=1e-5, atol=1e-8)
    base_logits = torch.cat(list(logits(DiskModel(base, CPU), TOKENS)))
    assert 1e-3 < distance(measured(out), base_logits) < 0.25
    assert "Linear4bit" in {type(module).__name__ for module in load(out).modules()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["w8a8", "int8", "nf4"])
def test_a_base_in_half_precision_keeps_its_dtype(
    dtype: torch.dtype, format: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "qwen2", num_hidden_layers=1)
    cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=dtype)).save_pretrained(base)
    report = run_recipe(
        small_recipe(text, base, format=format, smooth={}, rounding="nearest"), tmp_path / "out"
    )
    dense = {
        name: t.dtype
        for name, t in weights_of(tmp_path / "out").items()
        if "norm" in name or name.endswith("bias")
    }
    assert len(dense) > 5 and set(dense.values()) == {dtype}
    assert report.compressed.parameters == report.base.parameters
    assert report.fidelity.kl_nats_mean is not None and report.fidelity.kl_nats_mean < (
        0.1 if format == "nf4" else 2e-3
    )
    found = live(load(tmp_path / "out"))
    assert distance(found, measured(tmp_path / "out")) < 0.1 and bool(found.isfinite().all())


# Settings that mean nothing together.


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("format: int8, group_size: 64", "group_size is for 4-bit formats; int8 has one scale per row"),
        ("format: w8a8, group_size: 64", "group_size is for 4-bit formats; w8a8 has one scale per row"),
        ("format: nf4, threshold: 6.0", "threshold is for int8, not nf4"),
        ("format: w8a8, threshold: 6.0", "threshold is for int8, not w8a8"),
        ("format: int8, threshold: -1.0", "threshold: .*greater than or equal to 0, not -1.0"),
        ("format: w8a8, range: minmax", "range is for activations: static, not dynamic"),
        ("format: w8a8, activations: none, range: minmax", "range is for activations: static, not none"),
        ("format: nf4, activations: static", "activations is for w8a8, w4a8, w4a4, w8a16, w4a16, not nf4"),
        ("format: int8, activations: dynamic", "activations is for w8a8, w4a8, w4a4, w8a16, w4a16, not int8"),
        ("format: w4a8, double_quant: true", "double_quant is for nf4 and fp4, not w4a8"),
        ("format: w8a8, rounding: gptq, steps: 5", "steps is for rounding: learned, not gptq"),
        (
            "format: w8a8, activations: static, range: max",
            "range: .*'minmax', 'percentile' or 'mse', not 'max'",
        ),
        ("format: w8a4", "format: .*not 'w8a4'"),
        ("format: w8a8, activation: static", "activation: unknown key; did you mean activations?"),
    ],
)
def test_a_setting_that_means_nothing_here_is_refused_in_one_line(settings: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: [quantize: {{{settings}}}]")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("recipe: stages.0.quantize")


@pytest.mark.slow
def test_what_is_said_for_a_format_is_in_its_report(everything: dict[str, Path]) -> None:
    facts = Report.of(everything["w4a8 static"]).stages[0].model_dump()
    assert {
        "format": "w4a8",
        "activations": "static",
        "range": "percentile",
        "group_size": 32,
    }.items() <= facts.items()
    assert Report.of(everything["w4a8"]).stages[0].model_dump()["smooth"] == {
        "method": "smoothquant",
        "alpha": "auto",
    }


def test_outliers_that_reach_the_threshold_are_read_as_they_are() -> None:
    x = torch.tensor([[1.0, -7.0, 0.5], [0.25, 0.1, -0.9]])
    read = round_but_outliers(x, 6.0)
    assert torch.equal(read[:, 1], x[:, 1]) and not torch.equal(read[1, 0], x[1, 0])
    assert float((read - x).abs().max()) <= 0.5 / 127


@pytest.mark.slow
def test_the_tensors_of_each_format_are_those_of_its_loader(everything: dict[str, Path]) -> None:
    parts = {"int8": {"weight", "SCB", "weight_format"}, "w8a8": {"weight", "weight_scale"}}
    parts |= {
        "w8a8 static": {"weight", "weight_scale", "input_scale"},
        "w4a8": {"weight", "weight_scale", "weight_multiplier"},
    }
    for name, expected in parts.items():
        assert {part.rpartition(".")[2] for part in weights_of(everything[name])} - {"bias"} == expected
    config = json.loads((everything["int8"] / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] and config["llm_int8_threshold"] == 0.0
    config = json.loads((everything["int8 outliers"] / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] and config["llm_int8_threshold"] == 2.5
