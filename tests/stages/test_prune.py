"""Pruned models: what is cut, that the rest makes up for it, and that transformers loads what is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.errors import AcceptError, ModelError, RecipeError
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.modeling.sequential import divergences, without_each
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.prune.stage import Prune
from tests.artefacts import CPU, TOKENS, distance, live, load, measured
from tests.bases import VOCABULARY, byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

# whose heads need not fill the hidden width
HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
KEEP = {"ffn": 192, "kv": 1, "q": 2}  # of 320, 2 and 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def resident(family: str = "llama", **config: Any) -> LayerwiseModel:
    model = pico(family, **config)
    return InMemoryModel(model.config, model.state_dict(), CPU)


CUTS = [("ffn", family) for family in FAMILIES] + [(axis, f) for f in HEADS for axis in ("kv", "q")]


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "family"), CUTS)
def test_what_is_left_is_a_plain_checkpoint_of_the_widths_asked_for(
    axis: str, family: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    keep = KEEP[axis] if family != "qwen3_moe" else 128  # its experts have 192
    report = run_recipe(staged_recipe(text, base, {"prune": {"axis": axis, "keep": keep}}), tmp_path / "out")
    model = load(tmp_path / "out")
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    assert source.sizes[axis] == keep
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5
    told: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, slow = (cast(Any, model).generate(TOKENS, use_cache=cache, **told) for cache in (True, False))
    assert torch.equal(cached, slow)
    assert report.compressed.parameters is not None and report.base.parameters is not None
    assert report.compressed.parameters == sum(p.numel() for p in model.parameters()) < report.base.parameters
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.fidelity.kl_nats_mean is not None and report.fidelity.kl_nats_mean > 0


def test_a_llama_whose_heads_no_longer_divide_its_width_becomes_the_same_mistral(
    text: Path, tmp_path: Path
) -> None:
    base = save_base(
        tmp_path / "base", "llama", num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1
    )
    run_recipe(staged_recipe(text, base, {"prune": {"axis": "kv", "keep": 5}}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_units_that_say_nothing_are_cut_for_free(family: str, text: Path, tmp_path: Path) -> None:
    """Some neurons have zero weights where they are read, one kv head's outputs are not read."""
    model = pico(family, vocab_size=256)
    dead = torch.randperm(320, generator=torch.Generator().manual_seed(0))[:128]
    anatomy = resident(family).anatomy
    for layer in model.get_submodule(anatomy.layers).children():
        # (kv q d) = (2 4 16): the second kv head
        for axis, units in (("ffn", dead), ("kv", torch.arange(64, 128))):
            reader = anatomy.consumer_of(axis)
            if reader and (axis == "ffn" or family in HEADS):
                weight = layer.get_parameter(f"{reader}.weight").data
                (weight.T if reader in anatomy.conv1d else weight)[:, units] = 0
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for score in ("obs", "wanda") if family == "llama" else ("obs",):
        axes = ("ffn", "kv") if family in HEADS else ("ffn",)
        stages: list[dict[str, Any]] = [
            {"prune": {"axis": axis, "keep": KEEP[axis], "score": score}} for axis in axes
        ]
        report = run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / score)
        assert known(report.fidelity.kl_nats_mean) < 1e-6
        read = byte_tokenizer()(text.read_text()[:90], return_tensors="pt").input_ids
        with torch.no_grad():
            before, after = (load(tmp_path / name)(read).logits for name in ("base", score))
        assert distance(after, before) < 1e-4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("score", ["obs", "wanda"])
def test_each_expert_loses_the_neurons_that_say_nothing_there(
    transposed: bool, score: str, text: Path, tmp_path: Path
) -> None:
    """Each expert has neurons of its own that are not read, or nothing gets to."""
    config = shrunk(AutoConfig.for_model("gpt_oss" if transposed else "mixtral"), 2)
    config.vocab_size = VOCABULARY
    model = cast(Any, tiny_model(config, dtype=torch.float32))
    generator, dead = torch.Generator().manual_seed(0), dict[tuple[int, int], Tensor]()
    for index, layer in enumerate(model.model.layers):
        for expert, W in enumerate(layer.mlp.experts.down_proj.data):
            dead[index, expert] = torch.randperm(96, generator=generator)[:32]
            (W if transposed else W.T)[dead[index, expert]] = 0
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    stage = {"axis": "ffn", "keep": 64, "score": score, "multiple": 1}
    report = run_recipe(staged_recipe(text, tmp_path / "base", {"prune": stage}), tmp_path / "out")
    assert known(report.fidelity.kl_nats_mean) < 1e-6
    left = cast(Any, load(tmp_path / "out"))
    for index, layer in enumerate(left.model.layers):
        whole = model.model.layers[index].mlp.experts.down_proj.data
        for expert, W in enumerate(layer.mlp.experts.down_proj.data):
            gone = torch.isin(torch.arange(96), dead[index, expert])
            own = whole[expert][~gone] if transposed else whole[expert][:, ~gone]
            assert distance(W, own) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_keeps_all_leaves_every_bit(family: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    axes = [
        "layer",
        *(["expert", "ffn"] if family == "qwen3_moe" else ["ffn"]),
        *(["kv", "q"] if family in HEADS else []),
    ]
    stages: list[dict[str, Any]] = [{"prune": {"axis": axis, "keep": 1.0}} for axis in axes]
    stages += (
        [{"prune": {"axis": "hidden", "keep": 1.0, "score": "activation"}}]
        if family in ("llama", "qwen3", "phi3")
        else []
    )
    report = run_recipe(staged_recipe(text, base, *stages), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert report.fidelity.kl_nats_mean == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_obs_with_repair_loses_least(text: Path, tmp_path: Path) -> None:
    base, kl = save_base(tmp_path / "base"), {}
    for score in ("obs", "wanda", "activation", "magnitude"):
        for repair in (True, False):
            stage = {"prune": {"axis": "ffn", "keep": 192, "score": score, "repair": repair}}
            kl[score, repair] = known(
                run_recipe(
                    staged_recipe(text, base, stage), tmp_path / f"{score}-{repair}"
                ).fidelity.kl_nats_mean
            )
        assert kl[score, True] < kl[score, False], score
    assert min(kl.values()) == kl["obs", True]


@pytest.mark.slow
def test_pruned_twice_then_quantised_is_native_and_survives_an_interruption(
    text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "ffn", "keep": 256}},
        {"prune": {"axis": "q", "keep": 2}},
        {"quantize": {"format": "nf4"}},
    ]
    report = run_recipe(staged_recipe(text, base, *stages), tmp_path / "once")
    assert [stage.name for stage in report.stages] == ["prune", "prune", "quantize"]
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (256, 4)
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert distance(live(load(tmp_path / "once")), measured(tmp_path / "once")) < 0.02
    strict = staged_recipe(text, base, *stages).model_copy(update={"accept": Accept(kl_nats=1e-12)})
    with pytest.raises(AcceptError):
        run_recipe(strict, tmp_path / "again")
    work = partial_folder(tmp_path / "again")
    for lost in (
        ["journal-2/quantize.00001"],
        ["journal-1/joint", "journal-1/prune.00001"],
        ["journal/prune.00000", "journal/joint"],
    ):
        shutil.copytree(work, partial_folder(tmp_path / "other"))
        for name in lost:
            path = partial_folder(tmp_path / "other") / name
            shutil.rmtree(path) if path.is_dir() else path.with_name(f"{path.name}.safetensors").unlink()
        run_recipe(staged_recipe(text, base, *stages), tmp_path / "other")
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "other" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (
                lost,
                file,
            )
        shutil.rmtree(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_go_leave_a_plain_checkpoint_of_the_others(
    family: str, text: Path, tmp_path: Path
) -> None:
    kinds: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    }
    base = save_base(tmp_path / "base", family, num_hidden_layers=4, **(kinds if "gemma" in family else {}))
    report = run_recipe(
        staged_recipe(text, base, {"prune": {"axis": "layer", "keep": 0.5}}), tmp_path / "out"
    )
    facts = report.stages[0].model_dump()
    assert len(facts["gone"]) == len(facts["kl_nats"]) == 2 and 0 < facts["kl_nats"][0] < facts["kl_nats"][1]
    model, whole = load(tmp_path / "out"), load(base)
    stays = [index for index in range(4) if index not in facts["gone"]]
    layers, all_layers = (x.get_submodule(resident(family).anatomy.layers) for x in (model, whole))
    for layer, index in zip(layers.children(), stays, strict=True):
        expected = dict(list(all_layers.children())[index].named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in layer.named_parameters())
    if "gemma" in family:
        assert model.config.layer_types == [kinds["layer_types"][index] for index in stays]
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5


def test_the_layer_that_goes_is_the_one_whose_absence_costs_least(text: Path, tmp_path: Path) -> None:
    model = pico("llama", vocab_size=256, num_hidden_layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # the third layer writes nothing
        model.get_parameter(f"model.layers.2.{name}.weight").data.zero_()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for score in ("kl", "influence"):
        report = run_recipe(
            staged_recipe(text, tmp_path / "base", {"prune": {"axis": "layer", "keep": 3, "score": score}}),
            tmp_path / score,
        )
        assert report.stages[0].model_dump()["gone"] == [2]
        assert known(report.fidelity.kl_nats_mean) < 1e-9


def test_the_loss_said_is_that_of_the_model_without_the_layer() -> None:
    model = pico("llama", num_hidden_layers=3)
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    sequences = torch.randint(1, 150, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(sequences).logits.log_softmax(-1)
        for gone in ((), (1,)):
            every: list[tuple[int, str | None]] = [(index, None) for index in range(len(source.layers))]
            streams = without_each(source, sequences, every, [(index, None) for index in gone])
            full = without_each(source, sequences, every)[None]
            found = divergences(source, full, {part[0]: states for part, states in streams.items() if part})
            assert found.keys() == set(range(3)) - set(gone)
            for index, kl in found.items():
                less = pico("llama", num_hidden_layers=3)
                for other in sorted({index, *gone}, reverse=True):
                    del less.model.layers[other]
                seen = less(sequences, use_cache=False).logits.log_softmax(-1)
                assert kl == pytest.approx(
                    float((expected.exp() * (expected - seen)).sum(-1).mean()), rel=1e-4
                )


@pytest.mark.slow
def test_a_model_in_memory_becomes_a_new_one_like_the_folder(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "layer", "keep": 1}},
        {"prune": {"axis": "ffn", "keep": 256}},
    ]
    stages.append({"quantize": {"format": "w8a8"}})
    written = run_recipe(staged_recipe(text, base, *stages), tmp_path / "out")
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval())
    before = live(model)
    result, report = apply_recipe(staged_recipe(text, base, *stages), model, byte_tokenizer())
    assert result is not model and torch.equal(live(model), before), "the model given was changed"
    assert report.compressed.parameters == written.compressed.parameters
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-3)
    assert distance(live(result), live(load(tmp_path / "out"))) < 1e-5


def test_the_report_of_a_pruned_model_is_whole(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    run_recipe(staged_recipe(text, base, {"prune": {"axis": "ffn", "keep": 0.6}}), tmp_path / "out")
    report = Report.of(tmp_path / "out")
    facts = report.stages[0].model_dump()
    assert (facts["axis"], facts["units"], facts["kept_units"]) == ("ffn", 320, 192)
    assert 0 < facts["per_layer"][0]["relative_error"] < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "192 of 320" in card
    assert "bitsandbytes" not in card.split("```")[1], "a pruned model needs nothing but transformers"


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        (
            "llama",
            {"axis": "ffn", "keep": 0.95},
            'keep 0.95 of axis "ffn" leaves 320 of 320 units .multiples of 64',
        ),
        (
            "llama",
            {"axis": "ffn", "keep": 100, "multiple": 64},
            'keep 100 of axis "ffn" is no multiple of 64',
        ),
        ("llama", {"axis": "kv", "keep": 2}, "nothing would be cut"),
        ("gpt2", {"axis": "q", "keep": 1}, 'axis "q" of this gpt2 model can\'t be cut'),
        (
            "gpt2",
            {"axis": "kv", "keep": 2},
            "the heads of a gpt2 model share out its hidden width, so neither can be cut",
        ),
        (
            "qwen3_moe",
            {"axis": "ffn", "keep": 64, "score": "taylor"},
            "score: taylor is not for the neurons of experts; use score: obs",
        ),
        (
            "qwen3_moe",
            {"axis": "ffn", "parameters": 0.8, "allocation": "sensitivity"},
            "layers of a qwen3_moe model can't have widths of their own; use allocation: uniform",
        ),
    ],
)
def test_a_cut_that_can_not_be_is_refused_before_anything_is_read(
    family: str, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        Prune.model_validate(settings).changes(resident(family))


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (
            "[prune: {axis: ffm, keep: 0.5}]",
            "prune.axis: .*'ffn', 'kv', 'q', 'expert', 'hidden', 'layer' or 'sublayer', not 'ffm'",
        ),
        (
            "[prune: {axis: ffn, keep: 0.5, score: kl}]",
            "score kl is not for axis ffn; use obs or taylor or wanda or activation or magnitude",
        ),
        (
            "[prune: {axis: layer, keep: 0.5, score: obs}]",
            "score obs is not for axis layer; use kl or influence",
        ),
        ("[prune: {keep: 0.5}]", "prune.axis: is missing"),
        ("[prune: {axis: ffn, keep: 1.5}]", "prune.keep"),
        ("[prune: {axis: ffn, keep: 0}]", "prune.keep"),
        (
            "[{prune: {axis: ffn, keep: 0.5}, quantize: {}}]",
            "stages.0: an entry is one stage, this one has prune and quantize",
        ),
        ("[quantize: {}, prune: {axis: ffn, keep: 0.5}]", "a quantised model can't be changed again"),
        ("[prun: {axis: ffn, keep: 0.5}]", 'stages.0: "prun" is no stage; did you mean prune?'),
    ],
)
def test_a_wrong_stage_is_told_in_one_line(stages: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: {stages}")
    assert "\n" not in str(caught.value)


def test_the_reader_of_an_axis_is_the_linear_whose_columns_run_along_it() -> None:
    assert resident("llama").anatomy.consumer_of("kv") == "self_attn.o_proj"
    assert resident("gpt2").anatomy.consumer_of("ffn") == "mlp.c_proj"
    assert resident("qwen3_moe").anatomy.consumer_of("ffn") is None


def test_an_artefact_of_pruning_alone_has_the_bytes_of_its_weights(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    run_recipe(staged_recipe(text, base, {"prune": {"axis": "ffn", "keep": 64}}), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))

    def width(tensors: dict[str, Tensor], name: str) -> tuple[int, ...]:
        return tuple(tensors[f"model.layers.0.mlp.{name}.weight"].shape)

    assert width(after, "gate_proj") == width(after, "up_proj") == (64, 64) and width(after, "down_proj") == (
        64,
        64,
    )
    gate, kept = before["model.layers.0.mlp.gate_proj.weight"], after["model.layers.0.mlp.gate_proj.weight"]
    assert all(any(torch.equal(row, other) for other in gate) for row in kept), "rows are taken as they are"
    assert before.keys() == after.keys()
