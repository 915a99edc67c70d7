"""Codebooks as a format of quantize: what they have in common with the stage of that name, beside other
formats, planned, learned, spared, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.algorithms.codebook import Palette, kmeans
from llmcompress.algorithms.quantize_weight import RoundedWeight
from llmcompress.errors import AcceptError, ModelError, RecipeError
from llmcompress.formats import registry
from llmcompress.formats.codebook import CodebookLayout, CodebookLinear, CodebookWeight
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.formats.solution import GridSolution, Solution
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import StageFacts
from llmcompress.stages.quantize.rounding import Rounding
from llmcompress.stages.quantize.stage import Quantize
from tests.artefacts import (
    CPU,
    assert_refused,
    assert_same_in_memory,
    distance,
    live,
    load,
    measured,
    weights_of,
)
from tests.bases import VOCABULARY, known, staged_recipe, write_text
from tests.models import pico
from tests.stages.test_codebook import small

pytestmark = pytest.mark.usefixtures("short_runs")

# 4.125 bits and 8 bits beside the 3 and 2 of indices
MIXED = {
    "format": "nf4",
    "double_quant": True,
    "overrides": {
        "*.mlp.*": {"format": "codebook", "entries": 8},
        "*.down_proj": {"entries": 4, "format": "codebook"},
        "*.o_proj": {"format": "w8a16"},
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def recipe(text: Path, base: Path, *stages: dict[str, Any]) -> Recipe:
    return staged_recipe(text, base, *stages, samples=4, length=24)


def quantized(text: Path, base: Path, **settings: Any) -> Recipe:
    return recipe(text, base, {"quantize": settings or {"format": "codebook", "entries": 4}})


def books(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of linears in codebooks."""
    names = [name.removesuffix("_levels") for name in tensors if name.endswith("_levels")]
    return {part: tensors[part] for name in names for part in (name, f"{name}_levels")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is written.


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_model_all_in_codebooks_is_what_the_stage_of_that_name_writes(
    family: str, text: Path, tmp_path: Path
) -> None:
    """Codes and levels, biases that take up the mean error, and experts."""
    base = small(tmp_path / "base", family)
    staged = run_recipe(recipe(text, base, {"codebook": {"entries": 4}}), tmp_path / "staged")
    report = run_recipe(quantized(text, base), tmp_path / "out")
    assert same(weights_of(tmp_path / "staged"), weights_of(tmp_path / "out"))
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("staged", "out")]
    assert configs[0] == configs[1]
    assert report.linears == staged.linears and report.linears[0].format == "codebook of 4 a row"
    assert report.fidelity.kl_nats_mean == staged.fidelity.kl_nats_mean


def test_a_mixture_loads_as_what_was_measured_in_memory_too(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    _, report, written = assert_same_in_memory(quantized(text, base, **MIXED), base, tmp_path)
    assert report.linears == written.linears
    kinds = {linear.name.rpartition(".")[2]: linear.format for linear in written.linears}
    assert kinds == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "nf4"),
        **dict.fromkeys(("gate_proj", "up_proj"), "codebook of 8 a row"),
        "o_proj": "w8a16",
        "down_proj": "codebook of 4 a row",
    }
    model = load(tmp_path / "out")
    assert sum(isinstance(module, CodebookLinear) for module in model.modules()) == 3
    assert distance(live(model), measured(tmp_path / "out")) < 0.02  # the 4-bit kernel computes in bfloat16
    widths = {linear.format: linear.bits for linear in written.linears}
    assert widths["codebook of 8 a row"] == 3 + 8 * 16 / 64


def test_each_linear_makes_up_for_those_before_it_whatever_their_formats(text: Path, tmp_path: Path) -> None:
    """With the linears before it in w8a16, a codebook is solved for on other inputs than behind nf4, and
    against the outputs of the same full model."""
    base, found = small(tmp_path / "base"), dict[str, dict[str, torch.Tensor]]()
    for other in ("nf4", "w8a16"):
        settings = {"format": other, "overrides": {"*.down_proj": {"format": "codebook", "entries": 4}}}
        run_recipe(quantized(text, base, **settings), tmp_path / other)
        found[other] = books(weights_of(tmp_path / other))
    assert found["nf4"].keys() == found["w8a16"].keys() and not same(found["nf4"], found["w8a16"])


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", MIXED),
        ("gpt2", {"format": "codebook", "entries": 8}),
        ("llama", {"format": "codebook", "entries": 8, "head": "quantize", "embedding": "int8"}),
        ("qwen3_moe", {"format": "w8a8", "overrides": {"ffn": {"format": "codebook", "entries": 4}}}),
    ],
)
def test_a_plan_foretells_the_bytes(
    family: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    width: dict[str, Any] = {"gpt2": {"n_inner": 132}, "llama": {"intermediate_size": 192}}.get(family, {})
    base = small(tmp_path / "base", family, **width)  # rows of 132 indices of 3 bits end within a byte
    told = quantized(text, base, **settings)
    planned = plan_recipe(told).rows[1]
    report = run_recipe(told, tmp_path / "out")
    assert planned.parameters == report.base.parameters
    stored = weights_of(tmp_path / "out")
    tables = sum(t.nbytes for name, t in stored.items() if name.endswith(("nested_quant_map", "quant_map")))
    beside = sum(t.nbytes for name, t in stored.items() if "weight_format" in name)
    size = sum(tensor.nbytes for tensor in stored.values()) - tables - beside
    nested = sum(linear.format == "nf4" for linear in report.linears)  # the last group of 8-bit scales
    assert 0 <= size - planned.size_bytes <= 1100 * nested
    assert 0 < known(report.compressed.size_bytes) - planned.size_bytes < 12_000  # and the header
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 0.02
    assert known(planned.seconds) > 0 and "codebook of" in planned.stage


@pytest.mark.slow
def test_experts_of_a_mixture_have_codebooks_and_the_rest_has_not(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", "qwen3_moe")
    settings = {"format": "w4a16", "overrides": {"*.experts.*": {"format": "codebook", "entries": 4}}}
    report = run_recipe(quantized(text, base, **settings), tmp_path / "out")
    kinds = {(".experts." in linear.name, linear.format) for linear in report.linears}
    assert kinds == {(True, "codebook of 4 a row"), (False, "w4a16")}
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 1e-4


def test_layers_that_share_a_weight_share_its_codebooks(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", num_hidden_layers=2)
    stages = (
        {"share": {"pairs": [[0, 1]], "parts": ["ffn"], "steps": 2}},
        {"quantize": {"format": "codebook", "entries": 4}},
    )
    report = run_recipe(recipe(text, base, *stages), tmp_path / "out")
    model = load(tmp_path / "out")
    one, other = (model.get_submodule(f"model.layers.{index}.mlp.up_proj") for index in (0, 1))
    assert isinstance(one, CodebookLinear) and one.weight_levels is other.weight_levels
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5
    assert known(report.compressed.parameters) < known(report.base.parameters)


# Nearest, learned, smoothed, spared, trained.


def test_nearest_takes_the_levels_of_k_means_and_the_nearest_of_them(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    settings = {"format": "codebook", "entries": 4, "rounding": "nearest"}
    run_recipe(quantized(text, base, **settings), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    W_RC, model = weights_of(base)[f"{name}.weight"].float(), load(tmp_path / "out")
    module = model.get_submodule(name)
    assert isinstance(module, CodebookLinear)
    levels = kmeans(W_RC, torch.ones(W_RC.shape[1]), 4, 1).half().float()
    best = (W_RC[..., None] - levels[:, None]).abs().min(-1).values
    torch.testing.assert_close((module.dequantized(torch.float32) - W_RC).abs(), best, rtol=0, atol=0)
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5


def test_learned_trains_codebooks_with_the_other_linears_of_a_layer() -> None:
    """From scales and levels that are a tenth too large, so that there is something to learn."""
    model = pico("llama", num_hidden_layers=1)
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    chosen, _ = Quantize.model_validate(MIXED).choose(source)
    sequences = torch.randint(0, 160, (4, 24), generator=torch.Generator().manual_seed(0))
    for layer in walk(source, sequences, reference=True):
        codings = layer.own(chosen)
        rounding, weights = Rounding(codings, CPU), {linear: layer.weight(linear) for linear in codings}
        found = rounding.in_turn(layer, weights)
        for linear, coding in codings.items():
            solution = found.solutions[linear]
            if isinstance(coding, CodebookScheme):
                assert isinstance(solution.stored, CodebookWeight)
                levels_GL = coding.layout.snap(1.1 * solution.stored.levels_GL.float())
                palette = Palette(solution.stored.codes_RC, levels_GL, 1)
                found.solutions[linear] = Solution(CodebookWeight.of(palette, coding.layout))
            else:
                assert isinstance(solution, GridSolution)
                index_RC, scale_RG = solution.rounded.index_RC.long(), solution.rounded.scale_RG
                found.solutions[linear] = coding.solution(RoundedWeight(index_RC, 1.1 * scale_RG))
        starts = dict(found.solutions)
        before, after = rounding.learned(layer, weights, found, torch.eye(64), steps=40, seed=0)
        assert after < before and found.solutions.keys() == starts.keys() == weights.keys()
        assert {isinstance(coding, CodebookScheme) for coding in codings.values()} == {True, False}
        for linear, start in starts.items():
            assert not torch.equal(found.solutions[linear].weight(CPU), start.weight(CPU))
            stored = registry.dequantize(found.stored[linear])
            torch.testing.assert_close(stored, found.solutions[linear].weight(CPU), rtol=1e-6, atol=0)


def test_codebooks_alone_are_trained_too_and_kept_only_where_that_lowers_the_loss(
    text: Path, tmp_path: Path
) -> None:
    base, told = small(tmp_path / "base"), {"format": "codebook", "entries": 4}
    run_recipe(quantized(text, base, **told), tmp_path / "gptq")
    report = run_recipe(quantized(text, base, **told, rounding="learned", steps=8), tmp_path / "learned")
    (layer,) = report.stages[0].model_dump()["per_layer"]
    better = 0 < layer["loss_learned"] < layer["loss_gptq"]
    assert same(weights_of(tmp_path / "gptq"), weights_of(tmp_path / "learned")) != better
    best = Recipe.parse("stages: [{quantize: {format: codebook, entries: 4}}]").with_effort("best")
    assert best.stages[0].model_dump()["rounding"] == "learned"


@pytest.mark.slow
def test_scales_cross_before_codebooks_and_what_is_protected_keeps_its_dtype(
    text: Path, tmp_path: Path
) -> None:
    base = small(tmp_path / "base")
    settings = {"format": "codebook", "entries": 4, "smooth": {"method": "awq"}, "protect": 0.3}
    report = run_recipe(quantized(text, base, **settings), tmp_path / "out")
    spared = [entry.name for entry in report.kept if entry.why == "protect"]
    tensors = weights_of(tmp_path / "out")
    assert spared and all(tensors[f"{name}.weight"].dim() == 2 for name in spared)
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 1e-5
    assert "30 % of the weights kept in their dtype" in Quantize.model_validate(settings).leaves


@pytest.mark.slow
def test_levels_and_scales_of_a_mixture_learn_and_codes_stay(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    settings = {"format": "codebook", "entries": 4, "overrides": {"*.q_proj": {"format": "nf4"}}}
    lesson = {"steps": 8, "batch": 4, "learning_rate": 1e-4, "train": "scales"}
    run_recipe(quantized(text, base, **settings), tmp_path / "codes")
    report = run_recipe(recipe(text, base, {"quantize": settings}, {"distill": lesson}), tmp_path / "out")
    facts = report.stages[1].model_dump()
    assert facts["kl_after"] < facts["kl_before"]
    before, after = weights_of(tmp_path / "codes"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("_levels"):
            assert not torch.equal(before[name], after[name]), name
            codes = name.removesuffix("_levels")
            assert torch.equal(before[codes], after[codes]), codes
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 0.02


# The head and the embedding.


def test_a_head_of_its_own_has_codebooks_if_the_recipe_says_so(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    settings = {"format": "codebook", "entries": 4, "head": "quantize"}
    run_recipe(quantized(text, base, **settings), tmp_path / "out")
    model = load(tmp_path / "out")
    assert isinstance(model.get_submodule("lm_head"), CodebookLinear)
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5


def test_a_tied_head_is_one_int8_matrix_with_the_embedding_or_refused(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", tie_word_embeddings=True)
    settings = {"format": "codebook", "entries": 4}
    why = "head: quantize needs an untied lm_head, and this one is tied to the embedding"
    assert_refused(quantized(text, base, **settings, head="quantize"), why, tmp_path / "no")
    report = run_recipe(quantized(text, base, **settings, embedding="int8"), tmp_path / "out")
    assert report.linears[0].name == "model.embed_tokens" and report.linears[0].format == "w8a8"
    model = load(tmp_path / "out")
    assert type(model.get_submodule("lm_head")).__name__ == "IntegerLinear"
    assert distance(live(model), measured(tmp_path / "out")) < 1e-4


# Interrupted, told, refused.


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("lost", ["00000", "00001"])
def test_an_interrupted_mixture_goes_on_and_gives_the_same_bytes(
    lost: str, text: Path, tmp_path: Path
) -> None:
    told = quantized(text, small(tmp_path / "base", num_hidden_layers=2), **MIXED)
    run_recipe(told, tmp_path / "once")
    with pytest.raises(AcceptError):
        run_recipe(told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again")
    (partial_folder(tmp_path / "again") / "journal" / f"quantize.{lost}.safetensors").unlink()
    report = run_recipe(told, tmp_path / "again", overwrite=True)
    assert any("interrupted" in note for note in report.stages[0].notes)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), file


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    report = run_recipe(quantized(text, base), tmp_path / "out")
    facts: StageFacts = report.stages[0]
    told = facts.model_dump()
    assert (told["format"], told["entries"]) == ("codebook", 4)
    assert told["bits"] == pytest.approx(31 / 11)  # with 64 bits of levels per row of 64 or 128 weights
    assert not {"group_size", "double_quant"} & told.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import llmcompress" in card and "bitsandbytes" not in card.split("```")[1]
    run_recipe(quantized(text, base, format="w8a16"), tmp_path / "other")
    assert "entries" not in (tmp_path / "other" / "report.json").read_text()


def test_of_two_overrides_the_last_holds_and_levels_are_in_a_type_of_the_base() -> None:
    stage = Quantize.model_validate(
        {
            "format": "codebook",
            "entries": 16,
            "overrides": {"ffn": {"entries": 4}, "*.up_proj": {"format": "nf4", "group_size": 32}},
        }
    )
    model = pico("llama", vocab_size=VOCABULARY)
    chosen, _ = stage.choose(InMemoryModel(model.config, model.state_dict(), CPU))
    inner = "model.layers.0."
    assert chosen[f"{inner}self_attn.q_proj"] == CodebookScheme(CodebookLayout(16, 1, "float16"))
    assert chosen[f"{inner}mlp.gate_proj"] == CodebookScheme(CodebookLayout(4, 1, "float16"))
    assert chosen[f"{inner}mlp.up_proj"] == FourBitScheme("nf4", 32, False, torch.float32)
    assert stage.weight_bits == (2, 5) and stage.needs_plugin and stage.leaves == "2 to 5 bits per weight"
    half = stage.coding(torch.bfloat16)
    assert isinstance(half, CodebookScheme) and half.layout.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("format: codebook", "format: codebook needs entries, how many values .*: 4, 8, 16 or 256"),
        ("entries: 8", "entries is for codebook, not nf4"),
        ("format: codebook, entries: 5", "entries: .*4, 8, 16 or 256"),
        ("format: codebook, entries: 8, group_size: 64", "group_size is for 4-bit .*codebook has no scales"),
        ("format: codebook, entries: 8, double_quant: true", "double_quant is for nf4 and fp4, not codebook"),
        ("format: codebook, entries: 8, activations: none", "activations is for w8a8, .*, not codebook"),
        ("format: codebook, entries: 8, per: linear", "per: unknown key"),
        ("overrides: {ffn: {entries: 8}}", "overrides.ffn: entries is for codebook, not nf4"),
        ("overrides: {ffn: {format: codebook}}", "overrides.ffn: format: codebook needs entries"),
        (
            "format: codebook, entries: 8, overrides: {ffn: {format: w8a16, entries: 8}}",
            "overrides.ffn: entries is for codebook, not w8a16",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: [quantize: {{{settings}}}]")
    assert "\n" not in str(caught.value)


def test_linears_that_would_become_no_smaller_are_kept_with_the_reason(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    settings = {"overrides": {"*.up_proj": {"format": "codebook", "entries": 256}}}
    _, kept = Quantize.model_validate(settings).choose(DiskModel(base, CPU))
    why = "weights take .* bits each in a codebook of 256 a row, and 16 as they are"
    (reason,) = {kept[name] for name in kept if name.endswith("up_proj")}
    with pytest.raises(ModelError, match=rf"no linear of this model can be quantised \(.*{why}\)"):
        Quantize.model_validate({"format": "codebook", "entries": 256, "skip": ["*.down_proj"]}).choose(
            DiskModel(base, CPU)
        )
    assert "in a codebook of 256 a row" in reason


def test_weights_beyond_the_type_of_levels_are_named(text: Path, tmp_path: Path) -> None:
    model = pico("llama", vocab_size=VOCABULARY, num_hidden_layers=1)
    W_RC = model.get_parameter("model.layers.0.self_attn.q_proj.weight").data
    W_RC[0, 0] = 1e6
    base = small(tmp_path / "base")
    model.save_pretrained(base)
    for rounding in ("gptq", "nearest"):
        told = quantized(text, base, format="codebook", entries=4, rounding=rounding)
        with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: .*float16"):
            run_recipe(told, tmp_path / "out")


def test_recipes_without_entries_have_the_digests_that_they_had() -> None:
    digests = {
        "quantize": ("a98445a0f1345ea87d929ffedf8f86970afced4fb61ef95af0c18f9cd51a7bd3"),
        "quantize: {format: w8a8, overrides: {ffn: {format: nf4}}, smooth: {}}": (
            "67bf6dfb653a4e8af221727dae6312d4dcf7925d88667dbd9a6b2d4dc34f7ae9"
        ),
        "quantize: {experts: keep}": ("dc55b172a1e814848547457ea93c92985d2d2d36d13783188129f19e3ae6a9ef"),
        "codebook: {entries: 8, experts: keep}": (
            "15103c361492ef0ea4e80dd76f50b5c6402b87ea6135f51e9cd7ce9ca8340ef4"
        ),
    }
    for entry, digest in digests.items():
        assert (
            Recipe.parse(f"stages: [{{{entry}}}]" if ":" in entry else "stages: [quantize]").digest == digest
        )
    one, other = (
        Recipe.parse(f"stages: [quantize: {{format: codebook, entries: {entries}}}]") for entries in (4, 8)
    )
    assert one.digest != other.digest and Recipe.parse(one.to_yaml()).digest == one.digest
