"""Single weights pruned: what stays, that the rest makes up for it, and that folder, memory and plan
agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.sparsegpt import unpack_mask
from llmcompress.errors import AcceptError, ModelError, RecipeError
from llmcompress.formats.sparse import SparseLayout, SparseLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.linear_rewriting import Rewriting
from llmcompress.stages.sparsify.stage import Sparsify, stays
from tests.artefacts import CPU, distance, live, load, measured, same_weights
from tests.bases import byte_tokenizer, known, save_base, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

HALF = {"pattern": "unstructured", "keep": 0.5}
SCORES = ("sparsegpt", "wanda", "magnitude")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def recipe(text: Path, base: Path, *stages: dict[str, Any], samples: int = 8) -> Recipe:
    data = {"source": str(text), "samples": samples, "length": 48, "evaluation_samples": 4}
    return Recipe.model_validate({"base": str(base), "data": data, "stages": list(stages)})


def sparse(**settings: Any) -> dict[str, Any]:
    return {"sparsify": {"pattern": "2:4", **settings}}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_what_was_measured_and_saves_it_again(
    family: str, text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base", family), tmp_path / "out"
    report = run_recipe(recipe(text, base, sparse()), out)
    model = load(out)
    assert distance(live(model), measured(out)) < 1e-5
    assert {linear.name for linear in report.linears} == {
        n for n, m in model.named_modules() if isinstance(m, SparseLinear)
    }
    for linear in report.linears:
        module = cast(SparseLinear, model.get_submodule(linear.name))
        assert module.dense is not None
        assert int(module.dense.unflatten(1, (-1, 4)).ne(0).sum(-1).max()) == 2
        assert (linear.format, linear.bits) == ("sparse 2:4", 17) and 0 < linear.relative_error < 1
    checkpoint = Checkpoint.open(out, base=False)
    assert report.compressed.parameters == checkpoint.parameters < known(report.base.parameters)
    assert known(report.compressed.size_bytes) < known(report.base.size_bytes)
    model.save_pretrained(tmp_path / "again")
    assert same_weights(out, tmp_path / "again")


def test_what_wanda_and_magnitude_keep_is_as_it_was(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", num_hidden_layers=1)
    before, name = load_file(base / "model.safetensors"), "transformer.h.0.mlp.c_fc"
    W_RC = before[f"{name}.weight"].T
    largest = {"2": W_RC.abs().unflatten(1, (-1, 4)), "u": W_RC.abs()}
    for score in SCORES:
        for settings in ({"pattern": "2:4"}, HALF):
            kind = str(settings["pattern"])[0]
            out = tmp_path / f"{score}-{kind}"
            run_recipe(recipe(text, base, {"sparsify": {**settings, "score": score}}), out)
            tensors = load_file(out / "model.safetensors")
            mask_RC = unpack_mask(tensors[f"{name}.weight_mask"], W_RC.shape[1])
            assert torch.equal(tensors[f"{name}.weight"], W_RC[mask_RC]) == (score != "sparsegpt")
            alike = set(mask_RC.sum(1).tolist()) == {32}
            assert alike if score != "sparsegpt" or kind == "2" else not alike, (
                "of SparseGPT's shares rows compete"
            )
            assert int(mask_RC.sum()) == mask_RC.numel() // 2
            half = largest[kind].median(-1, keepdim=True).values  # the lower one of the two in the middle
            assert torch.equal(mask_RC, (largest[kind] > half).flatten(1)) == (score == "magnitude")
            moved = [
                key
                for key in before
                if ".bias" in key and "ln" not in key and not torch.equal(before[key], tensors[key])
            ]
            assert len(moved) == (0 if score == "magnitude" else 4), (
                "the classical baseline leaves biases alone"
            )


def test_zeros_of_the_base_go_for_free(text: Path, tmp_path: Path) -> None:
    """Two of every four weights are zero already; whatever the score, these are the ones to go."""
    model = pico("llama", vocab_size=256)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)).unflatten(
                1, (-1, 4)
            )
            parameter.data *= (noise >= noise.sort(-1).values[..., 2:3]).flatten(1)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for score in ("wanda", "magnitude", "sparsegpt"):
        report = run_recipe(recipe(text, tmp_path / "base", sparse(score=score)), tmp_path / score)
        assert known(report.fidelity.kl_nats_mean) < 1e-6
        assert distance(live(load(tmp_path / score)), live(load(tmp_path / "base"))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [sparse(), sparse(pattern="4:8"), {"sparsify": HALF}], ids=lambda s: s["sparsify"]["pattern"]
)
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(
    stage: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base, kl = save_base(tmp_path / "base"), []
    for score in SCORES:
        settings = {"sparsify": {**stage["sparsify"], "score": score}}
        kl.append(
            known(
                run_recipe(recipe(text, base, settings, samples=32), tmp_path / score).fidelity.kl_nats_mean
            )
        )
    assert 0 < kl[0] < kl[1] < kl[2]


def test_each_linear_is_solved_for_on_what_those_before_it_leave() -> None:
    """Against the second moments in the end, the error of a later linear is what the facts say."""
    model = pico("llama", num_hidden_layers=1)
    sequences = torch.randint(0, 160, (4, 24), generator=torch.Generator().manual_seed(0))
    stage = Sparsify.model_validate({"pattern": "2:4"})
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    layouts = {linear: SparseLayout("2:4", "float32") for linear in resident.anatomy.linears}
    for layer in walk(resident, sequences, reference=True):
        before = {linear: layer.weight(linear) for linear in layouts}
        tensors, facts = Rewriting("sparsify", "", stage._solve)._layer(resident, layer, layouts)
        seen: dict[str, Moments] = layer.moments()
        for entry in facts.linears:
            linear = entry.name.removeprefix(f"{layer.name}.")
            W_RC, S_RC, H_CC = before[linear], layer.weight(linear), seen[linear].H_CC
            lost, whole = ((x @ H_CC * x).sum() for x in (S_RC - W_RC, W_RC))
            assert entry.relative_error == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)
            parts = {part: tensors[f"{entry.name}.{part}"] for part in ("weight", "weight_mask")}
            assert torch.equal(layouts[linear].read(parts, W_RC.shape[1]).dequantize(), S_RC)


def test_more_kept_is_less_lost_and_more_bytes(text: Path, tmp_path: Path) -> None:
    base, reports = save_base(tmp_path / "base", num_hidden_layers=1), []
    for keep in (0.3, 0.5, 0.8):
        stage = {"sparsify": {"pattern": "unstructured", "keep": keep, "score": "wanda"}}
        reports.append(run_recipe(recipe(text, base, stage), tmp_path / str(keep)))
    for less, more in pairwise(reports):
        assert known(less.fidelity.kl_nats_mean) > known(more.fidelity.kl_nats_mean) > 0
        assert known(less.compressed.size_bytes) < known(more.compressed.size_bytes)
        assert known(less.compressed.parameters) < known(more.compressed.parameters)


@pytest.mark.parametrize(
    "layout",
    [SparseLayout("2:4", "float32"), SparseLayout("unstructured", "float32", 0.5)],
    ids=lambda x: x.pattern,
)
def test_a_zero_that_may_stay_stays(layout: SparseLayout) -> None:
    W_RC = torch.ones(3, 8)
    W_RC[:, 2:4] = 0
    W_RC[:, 6:] = 0
    assert torch.equal(stays(W_RC, layout), W_RC != 0)
    W_RC[1] = 0
    mask_RC = stays(W_RC, layout)
    assert layout.allows(mask_RC) and bool(mask_RC[W_RC != 0].all())


# What is written, resumed, held in memory and planned.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", [{"prune": {"axis": "ffn", "keep": 256}}, sparse()]),
        ("llama", [{"sparsify": {**HALF, "skip": ["*.q_proj"]}}]),
        ("gpt2", [sparse(score="wanda")]),
        ("phi3", [sparse(pattern="4:8", score="magnitude")]),
        ("qwen3_moe", [{"sparsify": {**HALF, "score": "wanda"}}]),
    ],
)
def test_a_model_in_memory_becomes_what_the_folder_holds(
    family: str, stages: list[dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    written = run_recipe(recipe(text, base, *stages), tmp_path / "out")
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval())
    result, report = apply_recipe(recipe(text, base, *stages), model, byte_tokenizer())
    assert report.linears == written.linears and report.kept == written.kept
    assert report.compressed.parameters == written.compressed.parameters
    assert report.compressed.size_bytes is not None and written.compressed.size_bytes is not None
    # the header of the file
    assert 0 <= written.compressed.size_bytes - report.compressed.size_bytes < 10_000
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-3)
    assert torch.equal(live(result), live(load(tmp_path / "out")))
    result.save_pretrained(tmp_path / "saved")
    once, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert once.keys() == again.keys() and all(
        torch.equal(tensor, again[name]) for name, tensor in once.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(family: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    wanted = recipe(text, base, sparse())
    run_recipe(wanted, tmp_path / "once")
    with pytest.raises(AcceptError):
        run_recipe(wanted.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again")
    for lost in (("00001",), ("00000",), ("00000", "00001")):
        out = tmp_path / f"without-{'-'.join(lost)}"
        shutil.copytree(partial_folder(tmp_path / "again"), partial_folder(out))
        for layer in lost:
            (partial_folder(out) / "journal" / f"sparsify.{layer}.safetensors").unlink()
        report = run_recipe(wanted, out)
        assert any("interrupted" in note for note in report.stages[0].notes) == (len(lost) < 2)
        for file in ("model.safetensors", "config.json"):
            assert (out / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_16_bits_keeps_its_type(dtype: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", num_hidden_layers=1)
    cast(
        PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    ).save_pretrained(base)
    report = run_recipe(recipe(text, base, sparse()), tmp_path / "out")
    assert {linear.bits for linear in report.linears} == {9.0}
    model = load(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype) and distance(live(model), measured(tmp_path / "out")) < 0.05
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}", "torch.uint8"}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", [sparse()]),
        ("llama", [{"prune": {"axis": "ffn", "keep": 192}}, {"sparsify": {**HALF, "score": "wanda"}}]),
        ("qwen3_moe", [sparse(pattern="4:8", score="magnitude")]),
        ("gpt2", [{"sparsify": {"pattern": "unstructured", "keep": 0.37, "skip": ["*.c_attn"]}}]),
    ],
)
def test_a_plan_foretells_the_parameters_and_bytes(
    family: str, stages: list[dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, num_hidden_layers=1)
    plan = plan_recipe(recipe(text, base, *stages))
    rows, notes = plan.rows, plan.notes
    report = run_recipe(recipe(text, base, *stages), tmp_path / "out")
    assert rows[-1].parameters == report.compressed.parameters
    assert 0 <= known(report.compressed.size_bytes) - rows[-1].size_bytes < 8000  # the header
    assert known(rows[-1].seconds) > 0 and known(rows[-1].peak_memory_bytes) > 0
    settings = stages[-1]["sparsify"]
    assert rows[-1].stage == f"sparsify ({settings['pattern']}, {settings.get('score', 'sparsegpt')})"
    assert f"{len(report.linears)} linears lose weights, {len(report.kept)} are kept" in " ".join(notes)


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    settings = {**HALF, "skip": ["*.k_proj"], "experts": "keep"}
    run_recipe(recipe(text, base, {"sparsify": settings}), tmp_path / "out")
    report = Report.of(tmp_path / "out")
    facts = report.stages[0].model_dump()
    assert (facts["name"], facts["pattern"], facts["keep"], facts["score"]) == (
        "sparsify",
        "unstructured",
        0.5,
        "sparsegpt",
    )
    assert facts["bits"] == 17.0 and {linear.format for linear in report.linears} == {"sparse unstructured"}
    why = {kept.name: kept.why for kept in report.kept}
    assert why["lm_head"] == "the head stays" and why["model.layers.0.self_attn.k_proj"] == "skip"
    assert why["model.layers.0.mlp.experts.gate_up_proj"] == "experts: keep"
    card = (tmp_path / "out" / "README.md").read_text()
    install = card.split("```")[1]
    assert "llmcompress" in install and "bitsandbytes" not in install and "import llmcompress" in card
    assert "neither time nor memory without a sparse kernel" in card
    assert "\n- sparse\n" in card.split("---")[1]


# What is refused.


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (
            '[sparsify: {pattern: "2:3"}]',
            "stages.0.sparsify.pattern: .*'unstructured', '2:4' or '4:8', not '2:3'",
        ),
        ('[sparsify: {patern: "2:4"}]', "stages.0.sparsify.patern: unknown key; did you mean pattern.$"),
        (
            '[sparsify: {pattern: "2:4", scor: wanda}]',
            "stages.0.sparsify.scor: unknown key; did you mean score.$",
        ),
        (
            '[sparsify: {pattern: "2:4", repair: true}]',
            "stages.0.sparsify.repair: unknown key; use one of pattern, keep, score, skip, experts$",
        ),
        (
            '[sparsify: {pattern: "2:4", score: obs}]',
            "stages.0.sparsify.score: .*'sparsegpt', 'wanda' or 'magnitude', not 'obs'",
        ),
        ("[prune: {axis: ffn, keep: 0.5, score: sparsegpt}]", "stages.0.prune.score: .* not 'sparsegpt'"),
        (
            '[sparsify: {pattern: "2:4", keep: 0.5}]',
            "stages.0.sparsify: keep is for pattern: unstructured; 2:4 says how many stay",
        ),
        ("[sparsify: {pattern: unstructured}]", "stages.0.sparsify: pattern: unstructured needs keep"),
        ("[sparsify: {pattern: unstructured, keep: 1}]", "stages.0.sparsify.keep: .*less than 1, not 1"),
        ("[sparsify: {pattern: unstructured, keep: half}]", "stages.0.sparsify.keep: .*not 'half'"),
        (
            '[sparsify: {pattern: "2:4", axis: ffn}]',
            "stages.0.sparsify.axis: unknown key",
        ),
        (
            '[sparsify: {pattern: "2:4"}, quantize]',
            "sparsify is the last stage: rounding would move its zeros",
        ),
        (
            '[sparsify: {pattern: "2:4"}, sparsify: {pattern: "4:8"}]',
            "sparsify is the last stage: its zeros are stored by",
        ),
        (
            '[sparsify: {pattern: "2:4"}, prune: {axis: ffn, keep: 0.5}]',
            "sparsify is the last stage: its zeros are",
        ),
        ('[quantize, sparsify: {pattern: "2:4"}]', "a quantised model can't be changed again"),
    ],
)
def test_a_wrong_stage_is_told_in_one_line(stages: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: {stages}")
    assert "\n" not in str(caught.value) and "<" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_pattern_without_quotes_is_what_it_looks_like(pattern: str) -> None:
    """YAML takes 2:4 for the number 124, in base 60."""
    bare, quoted = (
        Recipe.parse(f"stages:\n  - sparsify:\n      pattern: {text}") for text in (pattern, f"'{pattern}'")
    )
    assert bare == quoted and bare.digest == quoted.digest and Recipe.parse(bare.to_yaml()) == bare
    assert isinstance(bare.stages[0], Sparsify) and bare.stages[0].pattern == pattern


ALMOST_NONE = {"pattern": "unstructured", "keep": 0.001}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            sparse(skip=["*.nothing"]),
            r'skip "\*.nothing" matches no linear of this model; they have names like model.layers.0',
        ),
        ({"sparsify": ALMOST_NONE}, "no linear of this model can lose weights .*try another keep or skip"),
        (sparse(skip=["*"]), "no linear of this model can lose weights"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_read(
    settings: dict[str, Any], why: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    for act in cast(
        "list[Callable[[Recipe], Any]]", [plan_recipe, lambda given: run_recipe(given, tmp_path / "out")]
    ):
        with pytest.raises(ModelError, match=why) as caught:
            act(recipe(text, base, settings))
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_config_json_names_each_sparse_linear_once(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    report = run_recipe(
        recipe(text, base, {"sparsify": {"pattern": "unstructured", "keep": 0.4, "score": "wanda"}}),
        tmp_path / "out",
    )
    (scheme,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["schemes"]
    assert sorted(scheme.pop("linears")) == sorted(linear.name for linear in report.linears)
    assert scheme == {"format": "sparse", "pattern": "unstructured", "keep": 0.4, "dtype": "float32"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    values: dict[str, Tensor] = {name: t for name, t in tensors.items() if f"{name}_mask" in tensors}
    assert len(values) == len(report.linears) and all(tensor.dim() == 1 for tensor in values.values())
