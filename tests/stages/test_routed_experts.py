"""Experts of a mixture in the stages that rewrite linears: what is written, what it loads as, and how well
each expert is solved."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.algorithms.codebook import kmeans, nearest
from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.quantize_weight import output_error
from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.base import StoredLinear
from llmcompress.formats.codebook import CodebookLinear
from llmcompress.formats.low_rank import FactoredLinear
from llmcompress.formats.sparse import SparseLayout, SparseLinear, SparseWeight
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.resolve import calibration_data
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.stages import routed_experts
from llmcompress.stages.codebook.stage import Codebook
from llmcompress.stages.linear_rewriting import Rewriting
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.quantize.rounding import Rounding
from llmcompress.stages.quantize.solver import QuantizedLayer
from llmcompress.stages.quantize.stage import Quantize
from llmcompress.stages.routed_experts import (
    blended,
    completed,
    expert_turns,
    moments_bytes,
    starved_experts,
    steadied,
)
from llmcompress.stages.sparsify.stage import Sparsify
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
from tests.bases import byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.models import noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")

# stage, its settings, and the module that runs what it writes
STAGES: dict[str, tuple[dict[str, Any], type[StoredLinear]]] = {
    "codebook": ({"entries": 4}, CodebookLinear),
    "sparsify": ({"pattern": "unstructured", "keep": 0.5}, SparseLinear),
    "low_rank": ({"keep": 0.5}, FactoredLinear),
}
BOTH = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def small(folder: Path, **config: Any) -> Path:
    return save_base(folder, "qwen3_moe", **{"num_hidden_layers": 1, "moe_intermediate_size": 64, **config})


def recipe(text: Path, base: Path, *stages: Mapping[str, Any], samples: int = 8) -> Recipe:
    return staged_recipe(text, base, *map(dict, stages), samples=samples, length=24)


def told(name: str, **settings: Any) -> dict[str, Any]:
    """An entry of a recipe: a stage with the settings of these tests."""
    return {name: {**STAGES[name][0], **settings}}


def parameters_of(module: Any) -> int:
    """Parameters that a linear stores."""
    if isinstance(module, CodebookLinear):
        return module.in_features * module.out_features
    parts = {name: tensor.numel() for name, tensor in module.state_dict().items()}
    return sum(count for name, count in parts.items() if name != "weight_mask")


def outline(**config: Any) -> InMemoryModel:
    model = pico("qwen3_moe", **config)
    return InMemoryModel(model.config, model.state_dict(), CPU)


# What is written and what it loads as.


@pytest.mark.parametrize("name", STAGES)
def test_each_expert_is_a_linear_of_its_own_and_loads_as_it_was_measured(
    name: str, text: Path, tmp_path: Path
) -> None:
    base, out = small(tmp_path / "base", num_hidden_layers=2), tmp_path / "out"
    given = recipe(text, base, told(name, skip=["*.down_proj_linears.3"]))
    plan, report = plan_recipe(given).rows[1], run_recipe(given, out)
    model, whole = load(out), AutoModelForCausalLM.from_pretrained(base)
    assert distance(live(model), measured(out)) < 1e-5
    experts = {linear.name for linear in report.linears if ".experts." in linear.name}
    assert len(experts) == 2 * (2 * model.config.num_experts - 1)
    assert experts == {
        found for found, module in model.named_modules() if type(module) is STAGES[name][1] and "exp" in found
    }
    for index in (0, 1):  # kept, but no longer in one tensor with the others
        place = f"model.layers.{index}.mlp"
        kept = model.get_parameter(f"{place}.experts.down_proj_linears.3.weight")
        assert torch.equal(kept, whole.get_parameter(f"{place}.experts.down_proj")[3])
        router = f"{place}.gate.weight"
        assert torch.equal(model.get_parameter(router), whole.get_parameter(router))
    assert report.plug_in and not any(f".experts.{part}" in weights_of(out) for part in BOTH)
    assert plan.parameters == known(report.compressed.parameters)
    assert plan.size_bytes == sum(tensor.nbytes for tensor in weights_of(out).values())
    stage = report.stages[0].model_dump()
    tokens = known(report.data.calibration_tokens) * model.config.num_experts_per_tok
    assert [sum(layer["expert_tokens"]) for layer in stage["per_layer"]] == [tokens, tokens]
    assert any("fewer than 64 calibration tokens" in note for note in stage["notes"])
    stored = sum(map(parameters_of, (module for of, module in model.named_modules() if "_linears." in of)))
    idle = round(stored * (1 - model.config.num_experts_per_tok / model.config.num_experts))
    assert known(report.compressed.active_parameters) == known(report.compressed.parameters) - idle
    model.save_pretrained(tmp_path / "again")
    assert same_weights(out, tmp_path / "again")


@pytest.mark.parametrize("name", STAGES)
def test_kept_experts_stay_in_one_tensor(name: str, text: Path, tmp_path: Path) -> None:
    base, out = small(tmp_path / "base"), tmp_path / "out"
    report = run_recipe(recipe(text, base, told(name, experts="keep")), out)
    before, after = weights_of(base), weights_of(out)
    experts = [tensor for tensor in before if ".experts." in tensor]
    assert experts and all(torch.equal(before[tensor], after[tensor]) for tensor in experts)
    why = {kept.name: kept.why for kept in report.kept}
    assert all(why[f"model.layers.0.mlp.experts.{part}"] == "experts: keep" for part in BOTH)
    assert len(report.linears) == 4 and distance(live(load(out)), measured(out)) < 1e-5
    assert report.stages[0].model_dump()["experts"] == "keep"


@pytest.mark.parametrize("name", STAGES)
def test_experts_in_memory_are_those_on_disk(name: str, text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    assert_same_in_memory(recipe(text, base, told(name)), base, tmp_path)


def test_experts_have_few_values_zeros_or_a_low_rank(text: Path, tmp_path: Path) -> None:
    base, weights = small(tmp_path / "base"), dict[str, list[Tensor]]()
    for name in STAGES:
        run_recipe(recipe(text, base, told(name)), tmp_path / name)
        model = load(tmp_path / name)
        weights[name] = [
            module.dequantized(torch.float32)
            for module in model.modules()
            if isinstance(module, StoredLinear)
        ][4:]
        assert len(weights[name]) == 2 * model.config.num_experts
    assert all(len(row_C.unique()) <= 4 for row_C in chain.from_iterable(weights["codebook"]))
    assert all(int((W_RC == 0).sum()) == W_RC.numel() // 2 for W_RC in weights["sparsify"])
    for W_RC in weights["low_rank"]:
        R, C = W_RC.shape
        assert torch.linalg.matrix_rank(W_RC, rtol=1e-5) <= R * C // 2 // (R + C)


def test_a_run_that_lost_a_layer_goes_on_and_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", num_hidden_layers=2)
    given, again = recipe(text, base, told("sparsify")), tmp_path / "again"
    run_recipe(given, tmp_path / "once")
    with pytest.raises(AcceptError):
        run_recipe(given.model_copy(update={"accept": Accept(kl_nats=1e-12)}), again)
    (partial_folder(again) / "journal" / "sparsify.00001.safetensors").unlink()
    report = run_recipe(given, again)
    assert any("interrupted" in note for note in report.stages[0].notes)
    assert same_weights(tmp_path / "once", again)


@pytest.mark.slow
def test_levels_of_experts_learn(text: Path, tmp_path: Path) -> None:
    base, out = small(tmp_path / "base"), tmp_path / "out"
    heal = {"distill": {"train": "scales", "steps": 8, "batch": 2}}
    run_recipe(recipe(text, base, told("codebook")), tmp_path / "before")
    run_recipe(recipe(text, base, told("codebook"), heal), out)
    assert distance(live(load(out)), measured(out)) < 1e-5
    before, after = weights_of(tmp_path / "before"), weights_of(out)
    levels = [name for name in before if ".experts." in name and name.endswith("weight_levels")]
    assert any(not torch.equal(before[name], after[name]) for name in levels)
    indices = [name for name in before if ".experts." in name and name.endswith(".weight")]
    assert indices and all(torch.equal(before[name], after[name]) for name in indices)


# One stage after another.


def test_quantize_takes_the_experts_that_codebook_leaves(text: Path, tmp_path: Path) -> None:
    base, four = small(tmp_path / "base"), {"quantize": {"format": "w4a16"}}
    leaves = {"skip": told("codebook", skip=["*.experts.*"]), "keep": told("codebook", experts="keep")}
    for name, first in leaves.items():
        report = run_recipe(recipe(text, base, first, four), tmp_path / name)
        formats = {linear.name.rsplit(".", 2)[-2]: linear.format for linear in report.linears}
        assert {formats[f"{part}_linears"] for part in BOTH} == {"w4a16"} and len(report.linears) == 14
        assert distance(live(load(tmp_path / name)), measured(tmp_path / name)) < 0.02


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"quantize": {"format": "w4a16", "experts": "keep"}}, "no linear of this model can be quantised"),
        (told("codebook", experts="keep"), "no linear of this model can have a codebook"),
        (told("low_rank", experts="keep"), "no linear of this model becomes smaller"),
        ({"share": {"pairs": [[0, 1]], "parts": ["ffn"]}}, "the ffn of a qwen3_moe model has no linears"),
    ],
)
def test_experts_that_an_earlier_stage_divided_are_kept_too(
    second: dict[str, Any], why: str, text: Path, tmp_path: Path
) -> None:
    base = small(tmp_path / "base", num_hidden_layers=2)
    with pytest.raises(ModelError, match=why):
        plan_recipe(recipe(text, base, told("codebook", skip=["*.experts.*"]), second))


def test_a_recipe_that_does_not_name_experts_keeps_its_digest(text: Path) -> None:
    for name in STAGES:
        plain, said, kept = (
            recipe(text, Path("base"), told(name, **settings))
            for settings in ({}, {"experts": name}, {"experts": "keep"})
        )
        assert plain.digest == said.digest != kept.digest
        (entry,) = plain.model_dump(mode="json")["stages"]
        assert entry[name] and "experts" not in entry[name]
        assert "experts" not in plain.to_yaml() and "experts: keep" in kept.to_yaml()


def test_only_a_codebook_for_all_linears_leaves_nothing_to_quantise() -> None:
    stage = Codebook(entries=4)
    assert stage.takes_all
    assert not stage.model_copy(update={"experts": "keep"}).takes_all


# How well an expert is solved.


def full_moments(base: Path, given: Recipe) -> dict[str, tuple[Tensor, Moments]]:
    """The weight of the first linear of each expert, and the moments of what it reads in the full model."""
    model = DiskModel(base, CPU)
    model.divide_experts()
    data = calibration_data(model, given.data, byte_tokenizer())
    for layer in walk(model, data.calibration):
        (experts,) = expert_turns(layer, layer.anatomy.expert_linears[0])
        moments = layer.moments(*experts)
        return {f"{layer.name}.{name}": (layer.weight(name), read) for name, read in moments.items()}
    raise AssertionError("a model has a layer")


def test_an_expert_is_solved_under_its_own_tokens(text: Path, tmp_path: Path) -> None:
    """What the first linear of an expert reads is not changed by a stage that skips attention."""
    base, skip = small(tmp_path / "base"), {"skip": ["*.self_attn.*"]}
    stages = {
        "sparsegpt": told("sparsify", **skip),
        "magnitude": told("sparsify", score="magnitude", **skip),
        "codebook": told("codebook", **skip),
    }
    given = {name: recipe(text, base, stage, samples=32) for name, stage in stages.items()}
    whole, lost = full_moments(base, given["codebook"]), dict[str, list[float]]()
    for name, of in given.items():
        run_recipe(of, tmp_path / name)
        model = load(tmp_path / name)
        modules = [(expert, model.get_submodule(expert)) for expert in whole]
        lost[name] = [
            output_error(whole[expert][0], module.dequantized(torch.float32), whole[expert][1].H_CC)
            for expert, module in modules
            if isinstance(module, StoredLinear)
        ]
    lost["k-means"] = []
    for W_RC, moments in whole.values():
        levels_GL = kmeans(W_RC, torch.ones(W_RC.shape[1]), 4, 1)
        index_RC = nearest(W_RC, levels_GL, 1)
        lost["k-means"].append(output_error(W_RC, levels_GL.gather(1, index_RC), moments.H_CC))
    for solved, plain in (("sparsegpt", "magnitude"), ("codebook", "k-means")):
        pairs = list(zip(lost[solved], lost[plain], strict=True))
        assert len(pairs) == 5 and all(one < 0.8 * other for one, other in pairs), (solved, pairs)


@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
def test_experts_that_read_no_token_are_cut_by_magnitude(score: str, text: Path, tmp_path: Path) -> None:
    model = pico("qwen3_moe", vocab_size=256, num_hidden_layers=1, moe_intermediate_size=64)
    router = model.get_parameter("model.layers.0.mlp.gate.weight")
    router.data[1:] = router.data[:1]  # of equal scores the first are taken
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    report = run_recipe(recipe(text, tmp_path / "base", told("sparsify", score=score)), tmp_path / "out")
    (layer,) = report.stages[0].model_dump()["per_layer"]
    silent = [expert for expert, tokens in enumerate(layer["expert_tokens"]) if not tokens]
    assert silent
    found = load(tmp_path / "out")
    for expert in silent:
        name = f"model.layers.0.mlp.experts.down_proj_linears.{expert}"
        W_RC = model.get_parameter("model.layers.0.mlp.experts.down_proj")[expert]
        module = found.get_submodule(name)
        assert isinstance(module, SparseLinear)
        half = W_RC.abs().median(1, keepdim=True).values
        stays_RC = module.dequantized(torch.float32) != 0
        if score == "sparsegpt":  # rows compete
            half = W_RC.abs().median()
        assert (stays_RC == (W_RC.abs() > half)).float().mean() > 0.99


def test_experts_with_few_tokens_borrow_and_those_with_none_take_every_input_alike() -> None:
    model, tokens = outline(num_hidden_layers=1), torch.arange(24).reshape(1, 24)
    model.divide_experts()
    for layer in walk(model, tokens, reference=True):
        first, second = layer.anatomy.expert_linears
        read = {name: Moments(64) for name in first}
        for number, name in enumerate(first[1:]):
            x = noise(10, 64, seed=number)
            read[name].add(x, x + 1)
        found = dict(blended(layer, read))
        assert all(moments.gap_FC is not None for moments in found.values()), "whatever the others lack"
        own = read[first[1]].H_CC
        everyone = sum(moments.H_CC for moments in read.values()) / 4
        torch.testing.assert_close(found[first[0]].H_CC, everyone)
        torch.testing.assert_close(found[first[1]].H_CC, (10 * own + 16 * everyone) / 26)
        later = {name: Moments(192) for name in second}
        assert dict(blended(layer, later)) == later, "what a later linear reads comes from its own expert"


def test_each_expert_is_solved_under_its_moments_and_what_it_borrows() -> None:
    model, tokens = outline(num_hidden_layers=1), torch.arange(48).reshape(2, 24)
    model.divide_experts()
    layouts = {linear: SparseLayout("2:4", "float32") for linear in model.anatomy.linears}
    given = dict[str, Moments]()

    def solve(name: str, W_RC: Tensor, moments: Moments, layout: SparseLayout) -> SparseWeight:
        given[name] = moments
        return Sparsify(pattern="2:4")._solve(name, W_RC, moments, layout)

    for calibrated in (True, False):
        for layer in walk(model, tokens, reference=calibrated):
            _, facts = Rewriting("sparsify", "", solve, calibrated)._layer(model, layer, layouts)
            (experts, later) = expert_turns(layer, layouts)  # attention and the second ones are cut by now
            for turn in (experts, later):
                read = layer.moments(*turn)
                wanted = completed(layer, read) if calibrated else read
                for linear, moments in wanted.items():
                    torch.testing.assert_close(given[f"{layer.name}.{linear}"].H_CC, moments.H_CC)
            assert sum(count or 0 for count in facts.expert_tokens or ()) == 2 * tokens.numel()


def test_quantize_solves_experts_under_the_same_moments_as_the_stages_that_rewrite_linears() -> None:
    model, tokens = outline(num_hidden_layers=1), torch.arange(48).reshape(2, 24)
    model.divide_experts()
    coding = Quantize(format="w4a16").coding(torch.float32)
    rounding = Rounding(dict.fromkeys(model.anatomy.linears, coding), CPU)
    for layer in walk(model, tokens, reference=True):
        weights = {linear: layer.weight(linear).clone() for linear in rounding.codings}
        found = rounding.in_turn(layer, weights)
        for turn in expert_turns(layer, weights):  # what they read is final now
            read = layer.moments(*turn)
            for linear, moments in completed(layer, read).items():
                solution = rounding.gptq(linear, weights[linear], moments)
                assert torch.equal(solution.weight(CPU), found.solutions[linear].weight(CPU))
            few = [linear for linear, moments in read.items() if moments.tokens < len(moments.H_CC)]
            assert few, "or nothing is steadied"


def test_moments_of_few_tokens_are_steadied_and_those_of_many_stay() -> None:
    few, many, none = Moments(8), Moments(8), Moments(8)
    few.add(noise(4, 8), noise(4, 8, seed=1))
    many.add(noise(8, 8))
    assert steadied(many) is many
    found, even = steadied(few), steadied(none)
    eye_CC, size = torch.eye(8), few.H_CC.diagonal().mean()
    torch.testing.assert_close(found.H_CC, (4 * few.H_CC + 2 * size * eye_CC) / 6)
    torch.testing.assert_close(found.gap_FC, known(few.gap_FC) * 4 / 6)
    assert torch.equal(even.H_CC, eye_CC) and even.tokens == 0
    assert found.tokens == few.tokens


# How many at once, and what it takes.


def test_as_many_experts_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = outline(num_hidden_layers=1)
    model.divide_experts()
    names = [*model.expert_linears]
    for layer in walk(model, torch.arange(24).reshape(1, 24)):
        first, second = layer.anatomy.expert_linears
        assert [len(turn) for turn in expert_turns(layer, {*first, *second})] == [5, 5]
        assert moments_bytes(model, names) == 2 * 5 * 2 * 4 * 192**2
        monkeypatch.setattr(routed_experts, "AT_ONCE", 2 * 2 * 4 * 64**2)
        turns = list(expert_turns(layer, {*first, *second}))
        assert [len(turn) for turn in turns] == [2, 2, 1, 1, 1, 1, 1, 1]
        assert moments_bytes(model, names) == 2 * 2 * 4 * 192**2
        assert moments_bytes(model, []) == 0


@pytest.mark.parametrize("kind", [Codebook, LowRank, Sparsify])
def test_a_plan_counts_the_experts(kind: Any, text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", num_experts=8)
    rows = [
        plan_recipe(recipe(text, base, told(kind.name, **settings))).rows[1]
        for settings in ({}, {"experts": "keep"})
    ]
    reached, kept = rows
    assert reached.size_bytes < kept.size_bytes
    assert known(reached.seconds) > known(kept.seconds)
    assert known(reached.peak_memory_bytes) > known(kept.peak_memory_bytes)


@pytest.mark.parametrize("name", [*STAGES, "quantize"])
def test_an_expert_that_is_skipped_is_not_said_to_have_seen_no_token(
    name: str, text: Path, tmp_path: Path
) -> None:
    skip = ["*_linears.3", "*.down_proj_linears.1"]
    stage = {"quantize": {"format": "w4a16", "skip": skip}} if name == "quantize" else told(name, skip=skip)
    report = run_recipe(recipe(text, small(tmp_path / "base"), stage, samples=2), tmp_path / "out")
    (layer,) = report.stages[0].model_dump()["per_layer"]
    seen = layer["expert_tokens"]
    assert seen[3] is None and all(seen[expert] is not None for expert in (0, 1, 2, 4))
    (note,) = [note for note in report.stages[0].notes if "calibration tokens" in note]
    assert " 3 (" not in note


def test_experts_that_saw_few_tokens_are_named() -> None:
    layers = [
        QuantizedLayer(name="a", expert_tokens=(5, 100, 2)),
        QuantizedLayer(name="b"),
        QuantizedLayer(name="c", expert_tokens=(9, None)),
    ]
    assert starved_experts(layers, 6) == ["a: experts that saw fewer than 6 calibration tokens: 0 (5), 2 (2)"]
