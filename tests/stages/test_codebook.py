"""Linears in codebooks as a stage: what is exact, what is written, planned, healed and refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.codebook import CodebookLayout, CodebookLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.codebook.stage import Codebook
from tests.artefacts import (
    CPU,
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
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

# A layer, narrow where it can be, for the solving of codes is most of the time here.
WIDTHS = {"gpt2": "n_inner", "opt": "ffn_dim", "qwen3_moe": "moe_intermediate_size"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def narrow(family: str, **config: Any) -> dict[str, Any]:
    kinds = {"layer_types": ["sliding_attention"]} if "gemma" in family else {}
    return {"num_hidden_layers": 1, WIDTHS.get(family, "intermediate_size"): 128, **kinds, **config}


def small(folder: Path, family: str = "llama", **config: Any) -> Path:
    return save_base(folder, family, **narrow(family, **config))


def cluster(entries: int = 16, **settings: Any) -> dict[str, Any]:
    return {"codebook": {"entries": entries, **settings}}


def recipe(text: Path, base: Path, *stages: dict[str, Any]) -> Recipe:
    return staged_recipe(text, base, *(stages or (cluster(),)), samples=4, length=24)


def codebooks(model: PreTrainedModel) -> dict[str, CodebookLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CodebookLinear)}


def clustered(
    folder: Path, family: str, entries: int, rows: int | None, dtype: torch.dtype
) -> PreTrainedModel:
    """A base whose linears have at most so many values in each `rows` rows of outputs, all of them values of
    a type."""
    model, generator = pico(family, vocab_size=VOCABULARY, **narrow(family)), torch.Generator().manual_seed(3)
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    for name, (R, C) in source.linear_maps():
        if name.startswith(source.anatomy.layers):
            at_once = rows or R
            levels_GL = (
                (torch.randn(-(-R // at_once), entries, generator=generator) * C**-0.5).to(dtype).float()
            )
            codes_RC = torch.randint(entries, (R, C), generator=generator)
            W_RC = levels_GL.repeat_interleave(at_once, 0)[:R].gather(1, codes_RC)
            set_linear(model, name, W_RC)
    for name in source.expert_weights:
        W_ERC = model.get_parameter(name).data
        levels_EGL = (torch.randn(*W_ERC.shape[:2], entries, generator=generator) * 0.1).to(dtype).float()
        W_ERC.copy_(levels_EGL.gather(2, torch.randint(entries, W_ERC.shape, generator=generator)))
    if dtype == torch.bfloat16:  # whose base decides the type of the levels
        cast(Any, model).to(dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


# What is written and what it loads as.


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_what_was_measured_and_saves_it_again(
    family: str, text: Path, tmp_path: Path
) -> None:
    base, out = small(tmp_path / "base", family), tmp_path / "out"
    entries = 4 if family in ("mistral", "qwen3") else 8  # these are solved for in less time than 16
    report = run_recipe(recipe(text, base, cluster(entries)), out)
    model = load(out)
    assert distance(live(model), measured(out)) < 1e-5
    source = InMemoryModel(model.config, pico(family, **narrow(family)).state_dict(), CPU)
    source.divide_experts()
    assert set(codebooks(model)) == {linear.name for linear in report.linears}
    assert set(codebooks(model)) == {f"{source.layer_name(0)}.{name}" for name in source.anatomy.linears}
    for linear in report.linears:
        module = codebooks(model)[linear.name]
        weight = module.dequantized(torch.float32)
        assert max(len(row.unique()) for row in weight) <= entries
        assert linear.format == f"codebook of {entries} a row"
        C = module.in_features
        assert linear.bits == entries.bit_length() - 1 + 16 * entries / C and 0 < linear.relative_error < 0.7
    counted = Checkpoint.open(out, base=False).parameters
    assert report.compressed.parameters == counted == report.base.parameters, (
        "as many weights, of fewer values"
    )
    assert known(report.compressed.size_bytes) < known(report.base.size_bytes)
    model.save_pretrained(tmp_path / "again")
    assert same_weights(out, tmp_path / "again")


@pytest.mark.parametrize(
    ("family", "entries", "rows", "dtype"),
    [
        ("llama", 16, 1, torch.float16),
        ("gpt2", 16, 1, torch.float16),
        ("phi3", 16, 1, torch.bfloat16),
        ("qwen3_moe", 4, 1, torch.float16),
        ("opt", 16, None, torch.float16),
        ("qwen2", 8, 4, torch.bfloat16),
    ],
)
def test_weights_of_few_values_are_kept_exactly(
    family: str, entries: int, rows: int | None, dtype: torch.dtype, text: Path, tmp_path: Path
) -> None:
    model, base = clustered(tmp_path / "base", family, entries, rows, dtype), tmp_path / "base"
    per = {1: {}, None: {"per": "linear"}}.get(rows, {"per": "group", "rows": rows})
    report = run_recipe(recipe(text, base, cluster(entries, **per)), tmp_path / "out")
    assert max(linear.model_dump()["weight_error"] for linear in report.linears) < 1e-6
    assert report.fidelity.kl_nats_mean == pytest.approx(0, abs=1e-9)
    near = 1e-5 if dtype == torch.float16 else 0.02
    assert (
        distance(live(load(tmp_path / "out")), live(model)) < near
        and distance(measured(tmp_path / "out"), live(model)) < near
    )


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"entries": 16, "per": "linear"}, "codebook of 16 a linear"),
    ("gpt2", {"entries": 256, "per": "linear", "skip": ["*.c_fc"]}, "codebook of 256 a linear"),
    ("llama", {"entries": 8, "per": "group", "rows": 5}, "codebook of 8 for 5 rows"),  # 5 divides nothing
    # more than there are
    ("phi3", {"entries": 4, "per": "group", "rows": 1000}, "codebook of 4 for 1000 rows"),
    ("qwen3_moe", {"entries": 4}, "codebook of 4 a row"),
]


@pytest.mark.parametrize(
    ("family", "settings", "spoken"), SETTINGS, ids=[spoken for _, _, spoken in SETTINGS]
)
def test_a_plan_foretells_the_parameters_and_bytes(
    family: str, settings: dict[str, Any], spoken: str, text: Path, tmp_path: Path
) -> None:
    base, out, told = small(tmp_path / "base", family), tmp_path / "out", {"codebook": settings}
    plan = plan_recipe(recipe(text, base, told))
    rows, notes = plan.rows, plan.notes
    report = run_recipe(recipe(text, base, told), out)
    assert {linear.format for linear in report.linears} == {spoken}
    assert rows[1].parameters == report.compressed.parameters
    assert rows[1].size_bytes == sum(tensor.nbytes for tensor in weights_of(out).values())
    assert 0 <= known(report.compressed.size_bytes) - rows[1].size_bytes < 8000  # the header
    assert rows[1].stage == f"codebook ({settings['entries']} entries)" and known(rows[1].seconds) > 0
    assert f"{len(report.linears)} linears are rewritten, {len(report.kept)} kept" in " ".join(notes)
    assert distance(live(load(out)), measured(out)) < 1e-5
    source = InMemoryModel(load(out).config, pico(family, **narrow(family)).state_dict(), CPU)
    source.divide_experts()
    shapes = dict(source.linear_maps())
    bits = sum(linear.bits * shapes[linear.name][0] * shapes[linear.name][1] for linear in report.linears)
    stored = sum(
        t.nbytes
        for name, t in weights_of(out).items()
        if f"{name.removesuffix('_levels')}_levels" in weights_of(out)
    )
    assert bits == pytest.approx(8 * stored)


def test_more_values_and_more_codebooks_lose_less(text: Path, tmp_path: Path) -> None:
    base, lost = small(tmp_path / "base"), list[float]()
    for settings in ({"entries": 4, "per": "linear"}, {"entries": 4}, {"entries": 8}):
        report = run_recipe(recipe(text, base, {"codebook": settings}), tmp_path / str(len(lost)))
        lost.append(known(report.fidelity.kl_nats_mean))
    assert all(less > more > 0 for less, more in pairwise(lost)), lost


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_levels_are_in_a_type_of_16_bits_that_the_base_has(dtype: str, text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", "qwen2")
    cast(
        PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    ).save_pretrained(base)
    run_recipe(recipe(text, base, cluster(4)), tmp_path / "out")
    (scheme,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["schemes"]
    assert scheme["dtype"] == dtype and scheme["rows"] == 1 and scheme["entries"] == 4
    model, tensors = load(tmp_path / "out"), weights_of(tmp_path / "out")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}", "torch.uint8"}
    assert model.dtype == getattr(torch, dtype) and distance(live(model), measured(tmp_path / "out")) < 0.05


# What may follow.


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_levels_learn_and_codes_stay(family: str, text: Path, tmp_path: Path) -> None:
    base, out = small(tmp_path / "base", family), tmp_path / "out"
    rate = 1e-4 if family == "llama" else 1e-5  # gpt2 has lost next to nothing that could be learnt anew
    lesson = {"steps": 8, "batch": 4, "learning_rate": rate, "train": "scales"}
    stages = cluster(4, skip=["*.q_proj"] if family == "llama" else []), {"distill": lesson}
    run_recipe(recipe(text, base, stages[0]), tmp_path / "codes")
    report = run_recipe(recipe(text, base, *stages), out)
    found = report.stages[1].model_dump()
    assert found["kl_after"] < found["kl_before"]
    before, after = weights_of(tmp_path / "codes"), weights_of(out)
    assert before.keys() == after.keys()
    levels = [name for name in before if name.endswith("_levels")]
    assert levels and all(not torch.equal(before[name], after[name]) for name in levels), "all levels learn"
    for name in levels:
        assert torch.equal(before[name.removesuffix("_levels")], after[name.removesuffix("_levels")]), (
            "codes stay"
        )
        assert before[name].dtype == after[name].dtype
    moved = {name for name in before if name not in levels and not torch.equal(before[name], after[name])}
    assert all(before[name].dim() == 1 for name in moved), "only norms and biases learn beside them"
    assert distance(live(load(out)), measured(out)) < 1e-5
    result, again = apply_recipe(
        recipe(text, base, *stages), AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    )
    assert again.fidelity.kl_nats_mean == pytest.approx(report.fidelity.kl_nats_mean, rel=1e-3)
    assert distance(live(result), live(load(out))) < 1e-4


def test_what_is_skipped_can_be_quantised(text: Path, tmp_path: Path) -> None:
    base, out = small(tmp_path / "base"), tmp_path / "out"
    stages = cluster(4, skip=["*.mlp.*"]), {"quantize": {"format": "nf4", "rounding": "nearest"}}
    report = run_recipe(recipe(text, base, *stages), out)
    kinds = {linear.name.split(".")[3]: linear.format for linear in report.linears}
    assert kinds == {"self_attn": "codebook of 4 a row", "mlp": "nf4"}
    assert {entry.why for entry in report.stages[1].kept if "self_attn" in entry.name} == {
        "is stored as codebook already"
    }
    model = load(out)
    assert len(codebooks(model)) == 4 and distance(live(model), measured(out)) < 0.02
    rows = plan_recipe(recipe(text, base, *stages)).rows
    assert rows[-1].parameters == report.compressed.parameters == report.base.parameters
    result, again = apply_recipe(
        recipe(text, base, *stages), AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    )
    assert again.linears == report.linears and distance(live(result), live(model)) < 1e-6


# In memory, interrupted, told, refused.


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {"per": "linear"}), ("gpt2", {"skip": ["*.c_fc"]}), ("phi3", {})]
)
def test_a_model_in_memory_becomes_what_the_folder_holds(
    family: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base = small(tmp_path / "base", family)
    told = recipe(text, base, cluster(4, **settings))
    _, report, written = assert_same_in_memory(told, base, tmp_path)
    assert report.linears == written.linears and report.kept == written.kept


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", "gpt2", num_hidden_layers=2)
    told = recipe(text, base, cluster(4))
    run_recipe(told, tmp_path / "once")
    for lost in (["00001"], ["00000"]):
        with pytest.raises(AcceptError):
            run_recipe(
                told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again", overwrite=True
            )
        for layer in lost:
            (partial_folder(tmp_path / "again") / "journal" / f"codebook.{layer}.safetensors").unlink()
        report = run_recipe(told, tmp_path / "again", overwrite=True)
        assert any("interrupted" in note for note in report.stages[0].notes)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (
                lost,
                file,
            )


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base", "qwen3_moe")
    run_recipe(recipe(text, base, cluster(4, skip=["*.k_proj"], experts="keep")), tmp_path / "out")
    report = Report.of(tmp_path / "out")
    facts = report.stages[0].model_dump()
    assert (facts["name"], facts["entries"], facts["per"], facts["bits"]) == (
        "codebook",
        4,
        "row",
        pytest.approx(2.8, abs=0.3),
    )
    why = {kept.name: kept.why for kept in report.kept}
    assert why["lm_head"] == "the head stays" and why["model.layers.0.self_attn.k_proj"] == "skip"
    assert why["model.layers.0.mlp.experts.gate_up_proj"] == "experts: keep"
    card = (tmp_path / "out" / "README.md").read_text()
    install = card.split("```")[1]
    assert "import llmcompress" in card and "llmcompress" in install
    assert "bitsandbytes" not in install, "a codebook does not need it"


def test_linears_that_would_become_no_smaller_are_kept_with_the_reason() -> None:
    model = pico("llama")
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    stage = Codebook.model_validate({"entries": 256, "per": "group", "rows": 8})
    chosen, kept = stage.choose(source)
    assert set(chosen) == {
        f"model.layers.{index}.{name}" for index in (0, 1) for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert set(chosen.values()) == {CodebookLayout(256, 8, "float16")}
    why = "320 x 64 weights take 16 bits each in a codebook of 256 for 8 rows, and 16 as they are"
    assert kept["model.layers.1.mlp.up_proj"] == why


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"entries": 16, "skip": ["*.nothing"]},
            r'skip "\*.nothing" matches no linear of this model; they have names like',
        ),
        (
            {"entries": 16, "skip": ["*"]},
            r"no linear of this model can have a codebook \(skip\); leave the stage",
        ),
        ({"entries": 256}, r"no linear of this model can have a codebook \(.* weights take .* bits each"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_read(
    settings: dict[str, Any], why: str, text: Path, tmp_path: Path
) -> None:
    base = small(tmp_path / "base")
    assert_refused(recipe(text, base, {"codebook": settings}), why, tmp_path / "out")


def test_two_codebooks_one_after_the_other_find_nothing_left(text: Path, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    with pytest.raises(ModelError, match=r"can have a codebook \(is stored as codebook already\)"):
        run_recipe(recipe(text, base, cluster(4), cluster(8)), tmp_path / "out")
    stages = cluster(4, skip=["*.mlp.*"]), cluster(8)
    report = run_recipe(recipe(text, base, *stages), tmp_path / "out")
    assert {linear.format for linear in report.linears} == {"codebook of 4 a row", "codebook of 8 a row"}
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 1e-5
