"""Linears as products of low rank whose basis layers share: what is exact, what is stored once, what may
follow."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.low_rank import FactoredLayout, FactoredLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.low_rank.stage import LowRank
from tests.artefacts import (
    CPU,
    TOKENS,
    assert_refused,
    assert_same_in_memory,
    distance,
    live,
    load,
    measured,
    same_weights,
    set_linear,
    weights_of,
)
from tests.bases import VOCABULARY, byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.models import FAMILIES, noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def basis(layers: int = 2, **settings: Any) -> dict[str, Any]:
    return {"low_rank": {"layers_per_basis": layers, **(settings or {"keep": 0.5})}}


def recipe(text: Path, base: Path, *stages: dict[str, Any], samples: int = 8) -> Recipe:
    return staged_recipe(text, base, *(stages or (basis(),)), samples=samples, length=24)


def resident(family: str = "llama", **config: Any) -> LayerwiseModel:
    model = pico(family, **config)
    return InMemoryModel(model.config, model.state_dict(), CPU)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(resident(model.config.model_type).anatomy.layers).children())


def shared_names(model: PreTrainedModel, a: int = 0, b: int = 1) -> set[str]:
    """The parameters that are one in two layers."""
    one, other = (dict(layers_of(model)[index].named_parameters(remove_duplicate=False)) for index in (a, b))
    return {name for name in one if other.get(name) is one[name]}


def factored(model: PreTrainedModel) -> dict[str, FactoredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def stored_of(folder: Path) -> int:
    """Weights of the products as they are stored."""
    tensors = weights_of(folder)
    return sum(t.numel() for name, t in tensors.items() if name.endswith("_right") or t.dim() == 3)


def of_rank(folder: Path, family: str, rank: int, **config: Any) -> PreTrainedModel:
    """A base whose linears have a rank, in rows that all layers have in common."""
    model = pico(family, vocab_size=VOCABULARY, **config)
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    for name, (R, C) in source.linear_maps():
        if name.startswith(source.anatomy.layers):
            number = sum(map(ord, name.split(".", 4)[-1]))  # of the linear, whichever layer it is in
            left_RK, right_KC = noise(R, rank, seed=sum(map(ord, name))), noise(rank, C, seed=number)
            set_linear(model, name, left_RK @ right_KC * (rank * C) ** -0.5)
    for name in source.expert_weights:
        W_ERC = model.get_parameter(name).data
        E, R, C = W_ERC.shape
        left_ERK, right_EKC = noise(E, R, rank, seed=sum(map(ord, name))), noise(E, rank, C)
        W_ERC.copy_(left_ERK @ right_EKC * (rank * C) ** -0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


# What is written and what it loads as.


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_what_was_measured_and_shares_the_bases(
    family: str, text: Path, tmp_path: Path
) -> None:
    base, out, source = save_base(tmp_path / "base", family), tmp_path / "out", resident(family)
    source.divide_experts()
    report = run_recipe(recipe(text, base), out)
    model = load(out)
    assert distance(live(model), measured(out)) < 1e-5
    inner, common = source.anatomy.linears, {name for of in source.anatomy.consumers for name in of}
    assert shared_names(model) == {f"{name}.weight_right" for name in common}, "an expert has its own basis"
    assert set(factored(model)) == {linear.name for linear in report.linears} and len(
        report.linears
    ) == 2 * len(inner)
    assert ["shared" in linear.format for linear in report.linears] == [False] * len(inner) + [
        name in common for name in inner
    ]
    # what enters the first layer has as few directions as tokens
    lost = [linear.relative_error for linear in report.linears]
    assert all(0 <= error < 1 for error in lost) and max(lost) > 0.05
    whole = sum(R * C for name, (R, C) in source.linear_maps() if name in factored(model))
    assert stored_of(out) <= 0.5 * whole, "keep is a share of the parameters of the linears"
    unique = sum(parameter.numel() for parameter in model.parameters())
    assert report.compressed.parameters == Checkpoint.open(out, base=False).parameters == unique
    assert known(report.base.parameters) - unique == whole - stored_of(out)
    rows = plan_recipe(recipe(text, base)).rows
    assert rows[1].parameters == unique and rows[1].stage == "low_rank (a basis for 2 layers)"
    assert 0 <= known(report.compressed.size_bytes) - rows[1].size_bytes < 12_000  # the header
    assert rows[1].flops_per_token < rows[0].flops_per_token or rows[1].parameters < rows[0].parameters
    model.save_pretrained(tmp_path / "again")
    assert same_weights(out, tmp_path / "again")
    assert shared_names(load(tmp_path / "again")) == shared_names(model)


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 1), ("llama", 2), ("gpt2", 2), ("phi3", 2), ("qwen3_moe", 1)]
)
def test_weights_of_a_low_rank_in_common_rows_lose_nothing(
    layers: int, family: str, text: Path, tmp_path: Path
) -> None:
    model, base = of_rank(tmp_path / "base", family, 6), tmp_path / "base"
    report = run_recipe(recipe(text, base, basis(layers, rank=6)), tmp_path / "out")
    assert max(linear.relative_error for linear in report.linears) < 1e-4
    assert distance(live(load(tmp_path / "out")), live(model)) < 1e-3
    assert known(report.fidelity.kl_nats_mean) < 1e-6


def test_more_kept_is_less_lost_and_just_below_break_even_is_little(text: Path, tmp_path: Path) -> None:
    base, lost, sizes = save_base(tmp_path / "base"), [], []
    for keep in (0.3, 0.6, 0.999):
        report = run_recipe(recipe(text, base, basis(2, keep=keep)), tmp_path / str(keep))
        lost.append(known(report.fidelity.kl_nats_mean))
        sizes.append(known(report.compressed.parameters))
        assert stored_of(tmp_path / str(keep)) <= keep * sum(
            R * C for n, (R, C) in resident().linear_maps() if "layers" in n
        )
    assert all(less > more > 0 for less, more in pairwise(lost)), lost
    assert all(less < more for less, more in pairwise(sizes))
    assert lost[-1] < 0.25 * lost[0]  # of white weights, a tenth of the directions is gone


def test_a_rank_just_below_break_even_is_chosen_and_the_next_is_not() -> None:
    source = resident("gpt2")  # c_fc is 320 x 64: two of them and a basis have K (2 320 + 64) weights
    chosen, kept = LowRank.model_validate({"layers_per_basis": 2, "rank": 58}).choose(source)
    assert "transformer.h.0.mlp.c_fc" in chosen and chosen["transformer.h.1.mlp.c_fc"] == FactoredLayout(
        "basis", 58
    )
    assert 58 * (2 * 320 + 64) < 2 * 320 * 64 <= 59 * (2 * 320 + 64)
    chosen, kept = LowRank.model_validate({"layers_per_basis": 2, "rank": 59}).choose(source)
    assert kept["transformer.h.0.mlp.c_fc"] == "a product of rank 59 for 320 x 64 weights stores no less"
    assert set(chosen) == {f"transformer.h.{index}.mlp.c_proj" for index in (0, 1)}, (
        "64 x 320: K (2 64 + 320)"
    )


def test_a_basis_of_one_layer_shares_nothing(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    report = run_recipe(recipe(text, base, basis(1, rank=16)), out)
    model, config = load(out), json.loads((out / "config.json").read_text())
    assert not config["quantization_config"].get("ties") and shared_names(model) == set()
    assert {module.scheme.rank for module in factored(model).values()} == {16}
    assert not any("shared" in linear.format for linear in report.linears)
    for name, (R, C) in resident().linear_maps():
        if name in factored(model):
            assert factored(model)[name].weight.numel() + factored(model)[name].weight_right.numel() == 16 * (
                R + C
            )
    assert distance(live(model), measured(out)) < 1e-5
    before, after = (sum(p.numel() for p in load(folder).parameters()) for folder in (base, out))
    assert report.compressed.parameters == after < before
    rows = plan_recipe(recipe(text, base, basis(1, rank=16))).rows
    assert rows[1].flops_per_token < rows[0].flops_per_token, "a product of low rank has fewer operations"


def test_layers_left_over_are_a_group_of_their_own(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base", num_hidden_layers=3), tmp_path / "out"
    report = run_recipe(recipe(text, base, basis(2, keep=0.5)), out)
    model = load(out)
    assert shared_names(model, 0, 1) and not shared_names(model, 1, 2) and not shared_names(model, 0, 2)
    ranks = [cast(Any, layer).mlp.up_proj.scheme.rank for layer in layers_of(model)]
    assert ranks[0] == ranks[1] == int(0.5 * 2 * 320 * 64 / (2 * 320 + 64)) and ranks[2] == int(
        0.5 * 320 * 64 / (320 + 64)
    )
    assert distance(live(model), measured(out)) < 1e-5
    rows = plan_recipe(recipe(text, base, basis(2, keep=0.5))).rows
    assert rows[1].parameters == report.compressed.parameters == sum(p.numel() for p in model.parameters())


def test_layers_of_other_widths_are_not_in_one_group(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    prune = {"prune": {"axis": "ffn", "parameters": 0.7, "allocation": "sensitivity", "multiple": 64}}
    report = run_recipe(recipe(text, base, prune, basis(2)), tmp_path / "out")
    widths = report.stages[0].model_dump()["widths"]["ffn"]
    model = load(tmp_path / "out")
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5
    for index in (0, 1):
        names = shared_names(model, index, index + 1)
        assert not names or widths[index] == widths[index + 1]
    assert len(set(widths)) > 1


def test_what_is_skipped_is_kept_with_the_others_of_its_group() -> None:
    source = resident()
    chosen, kept = LowRank.model_validate(
        {"layers_per_basis": 2, "rank": 8, "skip": ["model.layers.1.mlp.up_proj"]}
    ).choose(source)
    assert kept["model.layers.1.mlp.up_proj"] == "skip"
    assert kept["model.layers.0.mlp.up_proj"] == "another of its group is kept"
    assert kept["lm_head"] == "the head stays" and len(chosen) == 12
    moe = LowRank.model_validate({"layers_per_basis": 2, "rank": 8}).choose(resident("qwen3_moe"))[1]
    assert moe["model.layers.0.mlp.experts.down_proj"] == "experts: keep"


def test_it_generates_is_cast_and_dequantised(text: Path, tmp_path: Path) -> None:
    run_recipe(recipe(text, save_base(tmp_path / "base", "gpt2")), tmp_path / "out")
    model = cast(Any, load(tmp_path / "out"))
    expected, names = live(model), shared_names(model)
    told: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, slow = (model.generate(TOKENS, use_cache=cache, **told) for cache in (True, False))
    assert torch.equal(cached, slow)
    half = model.to(torch.bfloat16)
    assert shared_names(half) == names and distance(live(half), expected) < 0.05
    plain = cast(Any, load(tmp_path / "out")).dequantize()
    assert distance(live(plain), expected) < 1e-5 and not factored(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert distance(live(load(tmp_path / "plain")), expected) < 1e-5


# What may follow.

LESSON = {"steps": 8, "batch": 4, "learning_rate": 2e-5}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("gpt2", 2), ("qwen2", 1)])
def test_what_is_healed_stays_a_product_and_shared(
    family: str, layers: int, text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base", family), tmp_path / "out"
    stages = basis(layers, keep=0.1), {"distill": LESSON}
    report = run_recipe(recipe(text, base, *stages), out)
    found = report.stages[1].model_dump()
    assert found["kl_after"] < found["kl_before"] and not found["notes"]
    model = load(out)
    assert len(shared_names(model)) == (len(resident(family).anatomy.linears) if layers == 2 else 0)
    assert distance(live(model), measured(out)) < 1e-5
    result, again = apply_recipe(
        recipe(text, base, *stages), AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    )
    assert shared_names(result) == shared_names(model) and distance(live(result), live(model)) < 1e-4
    assert again.compressed.parameters == report.compressed.parameters


def test_the_head_beside_products_can_be_quantised_and_products_can_not(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    with pytest.raises(ModelError, match=r"can be quantised \(is stored as basis already\)"):
        run_recipe(recipe(text, base, basis(), {"quantize": {"format": "w8a8", "head": "keep"}}), out)
    stages = basis(), {"quantize": {"format": "nf4", "head": "quantize"}}
    report = run_recipe(recipe(text, base, *stages), out)
    model = load(out)
    assert {linear.name for linear in report.linears if linear.format == "nf4"} == {"lm_head"}
    assert len(shared_names(model)) == 7 and distance(live(model), measured(out)) < 0.02
    rows = plan_recipe(recipe(text, base, *stages)).rows
    assert rows[-1].parameters == report.compressed.parameters


# In memory, interrupted, told, refused.


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("gpt2", 2), ("phi3", 1)])
def test_a_model_in_memory_becomes_what_the_folder_holds(
    family: str, layers: int, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    told = recipe(text, base, basis(layers, keep=0.4))
    result, report, written = assert_same_in_memory(told, base, tmp_path)
    assert report.linears == written.linears and report.kept == written.kept
    assert shared_names(result) == shared_names(load(tmp_path / "out"))
    assert report.compressed.parameters == sum(p.numel() for p in result.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(layers: int, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    told = recipe(text, base, basis(layers))
    run_recipe(told, tmp_path / "once")
    for lost in (["low_rank.00001"], ["low_rank.00000", "found.00000"]):
        with pytest.raises(AcceptError):
            run_recipe(
                told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again", overwrite=True
            )
        for name in lost:
            (partial_folder(tmp_path / "again") / "journal" / f"{name}.safetensors").unlink(
                missing_ok=layers == 1
            )
        run_recipe(told, tmp_path / "again", overwrite=True)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (
                lost,
                file,
            )


def test_a_base_of_16_bits_keeps_its_type(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)).save_pretrained(
        base
    )
    run_recipe(recipe(text, base), tmp_path / "out")
    model = load(tmp_path / "out")
    assert {str(tensor.dtype) for tensor in weights_of(tmp_path / "out").values()} == {"torch.bfloat16"}
    assert model.dtype == torch.bfloat16 and distance(live(model), measured(tmp_path / "out")) < 0.05


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    run_recipe(recipe(text, save_base(tmp_path / "base")), tmp_path / "out")
    report = Report.of(tmp_path / "out")
    facts = report.stages[0].model_dump()
    assert (facts["name"], facts["layers_per_basis"], facts["keep"]) == ("low_rank", 2, 0.5)
    assert report.linears[0].format.startswith("basis of rank ") and report.linears[-1].format.endswith(
        ", shared"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    install = card.split("```")[1]
    assert "import llmcompress" in card and "llmcompress" in install
    assert "bitsandbytes" not in install, "a product does not need it"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"layers_per_basis": 3, "rank": 8},
            "layers_per_basis: 3 is more than the 2 layers of this model; use fewer",
        ),
        (
            {"layers_per_basis": 2, "rank": 4000},
            r"no linear of this model becomes smaller \(.*\); use another rank or keep",
        ),
        (
            {"layers_per_basis": 2, "keep": 0.0001},
            r"no linear of this model becomes smaller \(.*\); use another rank or keep",
        ),
        (
            {"layers_per_basis": 2, "rank": 8, "skip": ["*.nothing"]},
            r'skip "\*.nothing" matches no linear of this model; they have names',
        ),
        ({"layers_per_basis": 2, "rank": 8, "skip": ["*"]}, "no linear of this model becomes smaller"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_read(
    settings: dict[str, Any], why: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    assert_refused(recipe(text, base, {"low_rank": settings}), why, tmp_path / "out")


def test_a_share_too_small_for_any_rank_is_said() -> None:
    _, kept = LowRank.model_validate({"layers_per_basis": 1, "keep": 0.03}).choose(resident())
    assert kept["model.layers.0.self_attn.k_proj"] == "keep leaves no rank of 32 x 64 weights"
