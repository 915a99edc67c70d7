"""Whole runs on families that no table knows: what is written loads in a process of its own, and computes
what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, Qwen3_5ForConditionalGeneration

from llmcompress import DataSpec, compress, evaluate
from llmcompress.architectures.auto_classes import auto_class
from llmcompress.derivation import derive
from llmcompress.derivation.example_configs import example_config
from llmcompress.derivation.shrink import tiny_model
from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.model_config import load_config, skeleton
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.recipe.recipe import Accept
from llmcompress.report.schema import Report
from tests.bases import (
    VOCABULARY,
    byte_tokenizer,
    save_base,
    small_recipe,
    staged_recipe,
    write_text,
)
from tests.models import TOKENS_ENTER_LAYERS, tiny_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("short_runs")]

# by what their layers are made of: five types in each test, as each test starts a process
CLASSES = {
    "plain": ("smollm3", "olmo2", "granite", "gemma", "starcoder2"),
    "plain too": ("stablelm", "nemotron", "glm4", "exaone4", "arcee"),
    "older": ("bloom", "mpt", "gpt_neo", "biogpt", "xglm"),
    "parallel": ("phi", "gptj", "codegen", "cohere", "apertus"),
    "mixed attention": ("olmo3", "cohere2", "ministral", "gemma3_text", "gemma4_unified"),
    "latent attention": ("deepseek_v3", "deepseek_v2", "longcat_flash", "minicpm3", "kimi_linear"),
    "experts": ("mixtral", "gpt_oss", "glm4_moe", "granitemoe", "ernie4_5_moe"),
    "hybrid": ("jamba", "mamba2", "falcon_h1", "lfm2", "nemotron_h"),
    "wrapper": ("gemma3", "mistral3", "qwen3_vl", "llava", "internvl"),
    "wrapper too": ("smolvlm", "qwen2_5_vl", "qwen3_5", "idefics3", "paligemma"),
    "tokens in layers": TOKENS_ENTER_LAYERS,
    "handing on": ("gemma4_e2b", "gemma4_e4b", "gemma4_wrapper", "gemma3n"),
}
EIGHT_BITS = ("plain", "older", "parallel", "wrapper")

LOAD = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
KINDS = ("Linear4bit", "IntegerLinear", "CodebookLinear", "SparseLinear", "FactoredLinear")
found = {}
for name, folder, loader, plugin in json.loads(sys.argv[1]):
    if plugin:
        import llmcompress
    model, info = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True)
    assert plugin or "llmcompress" not in sys.modules
    kinds = [type(module).__name__ for module in model.modules()]
    if getattr(model, "hf_quantizer", None) is not None and not plugin:
        model.dequantize()  # bitsandbytes' kernel for CPUs multiplies in bfloat16
    with torch.no_grad():
        scores = model(torch.arange(3, 27)[None], use_cache=False).logits.float()
    torch.save(scores, folder + "/scores.pt")
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    found[name] = {"wrong": wrong, "coded": sum(kind in KINDS for kind in kinds)}
print(json.dumps(found))
"""


def small_config(model_type: str) -> PretrainedConfig:
    """A small config of a type, with a vocabulary for the tests' tokenizer."""
    tiny = tiny_config(model_type)
    text = tiny.get_text_config(decoder=True)
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(text, name):
            setattr(text, name, VOCABULARY)
    return tiny


def save_tiny(model_type: str, folder: Path) -> Path:
    """A random model of a type, with its tokenizer."""
    model = tiny_model(small_config(model_type), dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run_on(model_type: str, place: Path, **quantize: Any) -> tuple[Path, Path, Report]:
    """A base of a type, its artefact, and the report."""
    base, text = save_tiny(model_type, place / "base"), write_text(place / "text.txt")
    recipe = staged_recipe(text, base, {"quantize": quantize})
    out = place / "out"
    report = compress(str(base), recipe, str(out))
    assert isinstance(report, Report)
    return base, out, report


def loaded(outs: dict[str, Path], *, plugin: bool) -> dict[str, Any]:
    """What a process of its own finds when it loads artefacts; it leaves their logits in them."""
    named = [(name, str(out), auto_class(load_config(out)).__name__, plugin) for name, out in outs.items()]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(named)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(
    model_type: str,
    base: Path,
    out: Path,
    report: Report,
    found: dict[str, Any],
    *,
    rounds_inputs: bool = False,
) -> None:
    """The artefact has all its tensors, those that no stage changed bit for bit, and computes what a walk
    through it computes."""
    assert not found["wrong"], model_type
    assert found["coded"] == len(report.linears) > 0, model_type
    walk = DiskModel(out, torch.device("cpu"), quantized=True)
    expected = torch.cat([*logits(walk, torch.arange(3, 27)[None])])
    off_T = (torch.load(out / "scores.pt") - expected).abs().amax(-1).flatten() / expected.std()
    if rounds_inputs:  # an input between two integers may be rounded otherwise, and later ones follow
        assert off_T.median() < 1e-3 and off_T.max() < 0.3, model_type
    else:
        assert off_T.max() < 1e-3, model_type
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    same = [name for name in before if name in after and after[name].dtype == before[name].dtype]
    changed = [name for name in same if not torch.equal(before[name], after[name])]
    # biases make up for the error of codes, and scales cross from norms
    assert all(before[name].dim() == 1 for name in changed), model_type
    assert len(before) - len(same) == len(report.linears), model_type


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_four_bits_of_a_derived_family_load_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    made = {
        name: run_on(name, tmp_path / name, format="nf4", group_size=32, rounding="gptq", experts="keep")
        for name in CLASSES[kind]
    }
    found = loaded({name: out for name, (_, out, _) in made.items()}, plugin=False)
    for name, (base, out, report) in made.items():
        check(name, base, out, report, found[name])


# what their experts are like: stored [in, out] with biases, run on all tokens, in attention, without a gate
EXPERTS = {
    "tables": ("mixtral", "gpt_oss", "llama4_text", "jetmoe", "nemotron_h"),
    "with shared ones": ("deepseek_v3", "qwen2_moe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe"),
    "beside other layers": ("qwen3_next", "jamba", "lfm2_moe", "granitemoehybrid", "minimax"),
    "handing on": ("zaya", "hy_v4", "deepseek_v4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_of_a_derived_family_load_with_the_plug_in(kind: str, tmp_path: Path) -> None:
    exact = {"format": "w8a8", "activations": "none"}  # an input that is rounded may be rounded otherwise
    made = {name: run_on(name, tmp_path / name, **exact) for name in EXPERTS[kind]}
    check_experts({name: (out, report) for name, (_, out, report) in made.items()})


# cut along every axis that is proved of them, one after another
CUT = {
    "plain": ("smollm3", "glm4", "cohere", "gptj", "vaultgemma"),
    "hybrids and wrappers": ("qwen3_5", "falcon_h1", "gemma3", "mistral3", "olmo2"),
    "handing on": ("gemma4_e2b", "gemma4_e4b"),
    "experts": ("deepseek_v3", "glm4_moe", "mixtral", "gpt_oss", "nemotron_h"),
}
SHARES: dict[str, dict[str, Any]] = {
    "ffn": {"keep": 0.5, "multiple": 1},
    "kv": {"keep": 0.5},
    "q": {"keep": 0.5},
    "expert": {"keep": 4},
    "hidden": {"keep": 0.75, "multiple": 16, "score": "activation"},
}


SAME: list[list[dict[str, Any]]] = [
    [{"prune": {"axis": ["ffn", "kv"], "keep": 0.5, "multiple": 1}}],
    [{"prune": {"axis": "hidden", "keep": 48, "multiple": 16}}, {"prune": {"axis": "q", "keep": 2}}],
    [{"quantize": {"format": "w8a8", "rotate": True, "smooth": {"method": "smoothquant"}}}],
    [{"share": {"layers": "adjacent", "groups": 1, "steps": 2, "parts": ["attention", "ffn"]}}],
]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("stages", SAME)
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_family_of_the_table_gives_the_same_bytes_derived(
    family: str, stages: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, text = save_base(tmp_path / "base", family), write_text(tmp_path / "text.txt")
    recipe = staged_recipe(text, base, *stages)
    compress(str(base), recipe, str(tmp_path / "table"))
    monkeypatch.setattr(derive, "table_of", lambda config: None)
    assert DiskModel(base, torch.device("cpu")).anatomy.cuts
    compress(str(base), recipe, str(tmp_path / "derived"))
    table, derived = (load_file(tmp_path / name / "model.safetensors") for name in ("table", "derived"))
    assert table.keys() == derived.keys()
    assert [name for name in table if not torch.equal(table[name], derived[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", CUT)
def test_what_is_cut_of_a_derived_family_is_a_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    made = dict[str, tuple[Path, list[str], Report]]()
    for name in CUT[kind]:
        base, text = save_tiny(name, tmp_path / name / "base"), write_text(tmp_path / name / "text.txt")
        model = DiskModel(base, torch.device("cpu"))
        axes = [axis for axis in SHARES if any(size > 1 for size in widths(model, axis))]
        stages = [{"prune": {"axis": axis, **SHARES[axis]}} for axis in axes]
        report = compress(str(base), staged_recipe(text, base, *stages), str(tmp_path / name / "out"))
        assert isinstance(report, Report)
        made[name] = tmp_path / name / "out", axes, report
    found = loaded({name: out for name, (out, _, _) in made.items()}, plugin=False)
    for name, (out, axes, report) in made.items():
        assert axes and not found[name]["wrong"] and not found[name]["coded"], name
        walk = DiskModel(out, torch.device("cpu"), quantized=True)
        whole = DiskModel(tmp_path / name / "base", torch.device("cpu"))
        for axis in axes:
            pairs = zip(widths(walk, axis), widths(whole, axis), strict=True)
            assert all(left < size for left, size in pairs if size), name
        expected = torch.cat([*logits(walk, torch.arange(3, 27)[None])])
        assert (torch.load(out / "scores.pt") - expected).abs().max() < 1e-3 * expected.std(), name
        assert "quantization_config" not in json.loads((out / "config.json").read_text()), name
        assert report.compressed.parameters is not None and report.base.parameters is not None
        assert report.compressed.parameters < report.base.parameters, name


def widths(model: DiskModel, axis: str) -> tuple[int, ...]:
    """The units of an axis in each layer, 0 where it can't be cut."""
    along = [model.anatomy.of_layer(index).cut_along(axis) for index in range(len(model.layers))]
    return tuple(size if cut else 0 for size, cut in zip(model.widths_of(axis), along, strict=True))


REWRITES = {
    "codebook": {"entries": 8},
    "sparsify": {"pattern": "2:4"},
    "low_rank": {"layers_per_basis": 2, "keep": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", REWRITES)
def test_experts_of_every_stage_load_with_the_plug_in(stage: str, tmp_path: Path) -> None:
    made = dict[str, tuple[Path, Report]]()
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        base, text = save_tiny(name, tmp_path / name / "base"), write_text(tmp_path / name / "text.txt")
        recipe = staged_recipe(text, base, {stage: REWRITES[stage]})
        report = compress(str(base), recipe, str(tmp_path / name / "out"))
        assert isinstance(report, Report)
        made[name] = tmp_path / name / "out", report
    check_experts(made)


def check_experts(made: Mapping[str, tuple[Path, Report]]) -> None:
    """Artefacts of mixtures, given with their reports, load with the plug-in in a process of its own, and
    compute what a walk through them computes."""
    found = loaded({name: out for name, (out, _) in made.items()}, plugin=True)
    for name, (out, report) in made.items():
        assert not found[name]["wrong"] and found[name]["coded"] == len(report.linears), name
        assert any("_linears." in linear.name for linear in report.linears), name
        assert not any("three axes" in kept.why for kept in report.kept), name
        walk = DiskModel(out, torch.device("cpu"), quantized=True)
        expected = torch.cat([*logits(walk, torch.arange(3, 27)[None])])
        off = (torch.load(out / "scores.pt") - expected).abs().amax(-1) / expected.std()
        assert off.max() < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_eight_bits_of_a_derived_family_load_with_the_plug_in(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"format": "w8a8", "rounding": "gptq", "smooth": {}}
    made = {name: run_on(name, tmp_path / name, **settings) for name in CLASSES[kind]}
    found = loaded({name: out for name, (_, out, _) in made.items()}, plugin=True)
    for name, (base, out, report) in made.items():
        check(name, base, out, report, found[name], rounds_inputs=True)


@pytest.mark.slow
def test_eight_bits_of_layers_that_hand_on_load_with_the_plug_in(tmp_path: Path) -> None:
    exact: dict[str, Any] = {"format": "w8a8", "activations": "none", "smooth": {}}
    made = {name: run_on(name, tmp_path / name, **exact) for name in CLASSES["handing on"]}
    found = loaded({name: out for name, (_, out, _) in made.items()}, plugin=True)
    for name, (base, out, report) in made.items():
        check(name, base, out, report, found[name])


# stages that need no axes, as a recipe writes them
STAGES: dict[str, list[dict[str, Any]]] = {
    "codebook": [{"codebook": {"entries": 16}}],
    "sparsify": [{"sparsify": {"pattern": "2:4"}}],
    "low_rank": [{"low_rank": {"keep": 0.5}}],
    "heal": [{"low_rank": {"keep": 0.5}}, {"distill": {"steps": 2, "batch": 2}}],
    "learned": [{"quantize": {"format": "nf4", "group_size": 32, "rounding": "learned", "steps": 3}}],
    "protect": [{"quantize": {"format": "w8a8", "smooth": {}, "protect": 0.1}}],
    "embedding": [{"quantize": {"format": "w8a16", "embedding": "int8"}}],
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bloom", "deepseek_v3", "gemma3", "zamba2", "zaya"])
def test_every_stage_that_needs_no_axes_takes_a_derived_family(model_type: str, tmp_path: Path) -> None:
    base, text = save_tiny(model_type, tmp_path / "base"), write_text(tmp_path / "text.txt")
    for name, stages in STAGES.items():
        out = tmp_path / name
        report = compress(str(base), staged_recipe(text, base, *stages), str(out))
        assert isinstance(report, Report) and report.fidelity.kl_nats_mean is not None
        again = evaluate(out, against=base, data=DataSpec(source=str(text), length=48, evaluation_samples=8))
        assert again.kl_nats_mean == pytest.approx(report.fidelity.kl_nats_mean, rel=1e-3, abs=1e-7), name
        linears, floats = report.linears, torch.finfo(torch.float32).max
        assert linears and all(0 <= linear.relative_error < floats for linear in linears), name


@pytest.mark.slow
def test_a_model_whose_layers_see_the_tokens_is_healed(tmp_path: Path) -> None:
    outs, names = dict[str, Path](), ("gemma4_text", "zamba")
    for name in names:
        base, text = save_tiny(name, tmp_path / name), write_text(tmp_path / "text.txt")
        kl = []
        for healed, steps in ((False, []), (True, [{"distill": {"steps": 20, "batch": 4}}])):
            out = tmp_path / f"{name}-{healed}"
            report = compress(
                str(base), staged_recipe(text, base, {"low_rank": {"keep": 0.5}}, *steps), str(out)
            )
            assert isinstance(report, Report) and report.fidelity.kl_nats_mean is not None
            kl.append(report.fidelity.kl_nats_mean)
        assert kl[1] < kl[0], name
        outs[name] = out
    found = loaded(outs, plugin=True)
    for name, out in outs.items():
        assert not found[name]["wrong"], name
        walk = DiskModel(out, torch.device("cpu"), quantized=True)
        expected = torch.cat([*logits(walk, torch.arange(3, 27)[None])])
        assert (torch.load(out / "scores.pt") - expected).abs().max() < 1e-3 * expected.std(), name


@pytest.mark.slow
def test_rounding_is_learned_where_layers_read_keys_and_values_of_others(tmp_path: Path) -> None:
    learned: dict[str, Any] = {"format": "nf4", "group_size": 32, "rounding": "learned", "steps": 12}
    made = {name: run_on(name, tmp_path / name, **learned) for name in ("gemma4_e2b", "gemma3n")}
    found = loaded({name: out for name, (_, out, _) in made.items()}, plugin=False)
    for name, (base, out, report) in made.items():
        check(name, base, out, report, found[name])


@pytest.mark.slow
def test_a_run_that_goes_on_after_a_layer_that_hands_on_gives_the_same_bytes(tmp_path: Path) -> None:
    """Layers 4 and 5 hand on, and those after them read: each is once the first that is not done."""
    nf4 = {"format": "nf4", "group_size": 32, "rounding": "gptq"}
    base, out, _ = run_on("gemma4_e2b", tmp_path, **nf4)
    recipe = staged_recipe(tmp_path / "text.txt", base, {"quantize": nf4})
    strict = recipe.model_copy(update={"accept": Accept(kl_nats=1e-9)})
    for done in (3, 5, 8):
        again = tmp_path / f"again {done}"
        with pytest.raises(AcceptError):
            compress(str(base), strict, str(again))
        files = sorted((partial_folder(again) / "journal").glob("quantize.*.safetensors"))
        assert len(files) == 9
        for file in files[done:]:
            file.unlink()
        report = compress(str(base), recipe, str(again))
        assert isinstance(report, Report)
        assert any(f"{done} layers were done by an earlier run" in note for note in report.stages[0].notes)
        assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "gemma4_e2b",
        {"prune": {"axis": "layer", "keep": 5}},
        "hand on more than their states.*none can be",
    ),
    ("gemma4_e2b", {"share": {"layers": "auto", "groups": 2}}, "hand on more than their states.*share weigh"),
    ("gemma3n", {"distill": {"steps": 1}}, "can't read the last states of a gemma3n_text model"),
]


@pytest.mark.parametrize(("name", "stage", "why"), REFUSED)
def test_what_layers_that_hand_on_can_not_do_is_refused_before_the_run(
    name: str, stage: dict[str, Any], why: str, tmp_path: Path
) -> None:
    base, text = save_tiny(name, tmp_path / "base"), write_text(tmp_path / "text.txt")
    recipe, out = staged_recipe(text, base, stage), tmp_path / "out"
    for attempt in (lambda: plan_recipe(recipe), lambda: compress(str(base), recipe, str(out))):
        with pytest.raises(ModelError, match=why):
            attempt()
    assert not out.exists()


@pytest.mark.slow
def test_a_wrapper_keeps_its_towers_and_its_class(tmp_path: Path) -> None:
    base, out, report = run_on("gemma3", tmp_path, format="nf4", group_size=32, rounding="nearest")
    assert all(".language_model." in linear.name for linear in report.linears)
    assert any("vision_tower" in kept.name and kept.why == "outside the layers" for kept in report.kept)
    found = loaded({"gemma3": out}, plugin=False)
    check("gemma3", base, out, report, found["gemma3"])


def test_the_card_of_a_wrapper_loads_it_as_its_class(tmp_path: Path) -> None:
    _, out, report = run_on("llava", tmp_path, format="nf4", group_size=32, rounding="nearest")
    card = (out / "README.md").read_text()
    assert report.auto_class == "AutoModelForImageTextToText"
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in card
    assert "AutoModelForCausalLM" not in card
    assert Report.of(out).auto_class == report.auto_class


def test_experts_larger_than_the_memory_are_never_made() -> None:
    model = skeleton(example_config("deepseek_v3"), torch.float32)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2e12
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_multimodal_model_in_memory_stays_what_it_is(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = tiny_model(small_config("qwen3_5"), Qwen3_5ForConditionalGeneration, dtype=torch.float32)
    vision = {name: p.clone() for name, p in model.named_parameters() if ".visual." in name}
    recipe = small_recipe(text, format="w8a16", rounding="nearest")
    made, report = compress(model, recipe, tokenizer=byte_tokenizer())
    assert (
        type(made) is Qwen3_5ForConditionalGeneration and report.auto_class == "AutoModelForImageTextToText"
    )
    coded = [name for name, module in made.named_modules() if isinstance(module, IntegerLinear)]
    assert coded and all(".language_model." in name for name in coded)
    assert vision and all(torch.equal(made.get_parameter(name), tensor) for name, tensor in vision.items())


def test_what_a_stage_does_beyond_the_level_of_a_model_is_refused_with_what_is_known(tmp_path: Path) -> None:
    base, text = save_tiny("bloom", tmp_path / "base"), write_text(tmp_path / "text.txt")
    for stage, needs in (
        ({"prune": {"axis": "ffn", "keep": 0.5}}, "which axes its weights run along"),
        ({"quantize": {"format": "nf4", "rotate": True}}, "which axes its weights run along"),
        ({"tie": {}}, "which axes its weights run along"),
    ):
        with pytest.raises(ModelError, match=f"needs {needs}.*of a bloom model is only known where a scale"):
            plan_recipe(staged_recipe(text, base, stage), base=str(base))


def test_codes_for_modules_that_transformers_replaces_are_refused(tmp_path: Path) -> None:
    base, text = save_tiny("llama4_text", tmp_path / "base"), write_text(tmp_path / "text.txt")
    nf4 = {"format": "nf4", "group_size": 32}
    with pytest.raises(ModelError, match=r"transformers replaces model\.layers\.0\.feed_forward\.experts of"):
        plan_recipe(staged_recipe(text, base, {"quantize": {**nf4, "experts": "keep"}}))
    plan_recipe(staged_recipe(text, base, {"quantize": nf4}))
    plan_recipe(staged_recipe(text, base, {"quantize": {"format": "w8a16", "experts": "keep"}}))


def test_a_plan_of_a_derived_family_leaves_out_what_no_axis_says(tmp_path: Path) -> None:
    base, text = save_tiny("bloom", tmp_path / "base"), write_text(tmp_path / "text.txt")
    plan = plan_recipe(staged_recipe(text, base, {"quantize": {"format": "nf4", "group_size": 32}}))
    before, after = plan.rows
    assert plan.notes[0] == "of this bloom model is proved where a scale may cross from one weight to another"
    assert before.kv_cache_bytes_per_token is None and before.flops_per_token > 0
    assert after.size_bytes < before.size_bytes and after.parameters == before.parameters
