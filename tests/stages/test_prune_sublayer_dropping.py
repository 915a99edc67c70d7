"""Attention or ffn taken out of single layers: which, what is left, who loads it, and what may follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.errors import ModelError
from llmcompress.kernels import packed_gemm
from llmcompress.modeling.layerwise import InMemoryModel, MetaModel
from llmcompress.modeling.sequential import divergences, without_each
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.report.schema import Report
from llmcompress.stages.prune import sublayer_dropping
from llmcompress.stages.prune.stage import Prune
from tests.artefacts import CPU, distance, live, load
from tests.bases import VOCABULARY, known, save_base, staged_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

FITTING = tuple(family for family in FAMILIES if family not in ("gpt2", "qwen3_moe"))
HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


FIELDS = {"kv": "num_key_value_heads", "ffn": "intermediate_size"}


def gone(report: Report) -> list[tuple[int, str]]:
    return [(index, axis) for index, axis in report.stages[0].model_dump()["gone"]]


def deeper(family: str, layers: int) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention", *["sliding_attention"] * (layers - 2)]
    return {"num_hidden_layers": layers, **({"layer_types": kinds} if "gemma" in family else {})}


def silence(model: Any, index: int, linear: str) -> None:
    model.get_parameter(f"model.layers.{index}.{linear}.weight").data.zero_()


def generated(model: Any, **settings: Any) -> Any:
    tokens = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, **settings
    )


@pytest.mark.parametrize("family", FITTING)
def test_what_is_left_is_the_model_whose_part_says_nothing(family: str, text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", family, **deeper(family, 3))
    model = pico(family, vocab_size=VOCABULARY, **deeper(family, 3))
    report = run_recipe(
        staged_recipe(text, tmp_path / "base", {"prune": {"axis": "sublayer", "keep": 0.5}}), tmp_path / "out"
    )
    anatomy = InMemoryModel(model.config, model.state_dict(), CPU).anatomy
    for index, axis in gone(report):
        model.get_parameter(f"{anatomy.layers}.{index}.{anatomy.consumer_of(axis)}.weight").data.zero_()
        assert index
    found = load(tmp_path / "out")
    assert distance(live(found), live(model)) < 1e-6
    assert (
        report.compressed.parameters
        == sum(p.numel() for p in found.parameters())
        < known(report.base.parameters)
    )
    assert torch.equal(generated(found), generated(found, use_cache=False))
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(live(load(tmp_path / "again")), live(found))


@pytest.mark.parametrize("family", HEADS)
def test_attention_goes_where_it_says_nothing(family: str, text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", family, **deeper(family, 3))
    model = pico(family, vocab_size=VOCABULARY, **deeper(family, 3))
    silence(model, 2, "self_attn.o_proj")
    model.save_pretrained(tmp_path / "base")
    keep = 2 if "gemma" in family else 3  # all but one: of two kinds of attention the first of each stays
    report = run_recipe(
        staged_recipe(text, tmp_path / "base", {"prune": {"axis": "sublayer", "keep": keep}}),
        tmp_path / "out",
    )
    assert gone(report) == [(2, "kv")] and known(report.fidelity.kl_nats_mean) < 1e-9
    assert (
        load_file(tmp_path / "out/model.safetensors")["model.layers.2.self_attn.o_proj.weight"].shape[1] == 0
    )
    kept = generated(load(tmp_path / "out"), return_dict_in_generate=True).past_key_values
    lengths = [layer.get_seq_length() for layer in kept.layers]
    assert lengths[:2] == [14, 14] and lengths[2] == 0, "the cache of a layer without attention stays empty"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_list_with_none_of_an_axis_takes_its_part_out(family: str, text: Path, tmp_path: Path) -> None:
    """The others stay as wide as they are, so without repair nothing else changes."""
    save_base(tmp_path / "base", family, **deeper(family, 3))
    model = pico(family, vocab_size=VOCABULARY, **deeper(family, 3))
    widths = {axis: getattr(model.config, field) for axis, field in FIELDS.items()}
    lists = {axis: [units, units, 0] for axis, units in widths.items()}
    report = run_recipe(
        staged_recipe(
            text,
            tmp_path / "base",
            *({"prune": {"axis": axis, "keep": keep, "repair": False}} for axis, keep in lists.items()),
        ),
        tmp_path / "out",
    )
    assert [stage.model_dump()["widths"] for stage in report.stages] == [
        {axis: keep} for axis, keep in lists.items()
    ]
    for linear in ("self_attn.o_proj", "mlp.down_proj"):
        silence(model, 2, linear)
    found = load(tmp_path / "out")
    assert distance(live(found), live(model)) < 1e-6
    assert torch.equal(generated(found), generated(found, use_cache=False))


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("llama", {"axis": "kv", "keep": [0, 1]}, 'keep 0 of axis "kv" in layer 0, where it must stay'),
        ("llama", {"axis": "q", "keep": [1, 0]}, 'keep 0 of axis "q" in layer 1, where it must stay'),
        ("gpt2", {"axis": "ffn", "keep": [64, 0]}, "no attention or ffn of this gpt2 model can be taken out"),
    ],
    ids=str,
)
def test_a_part_that_must_stay_keeps_a_unit(family: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        Prune(**settings).changes(MetaModel(pico(family).config, CPU, torch.float32))


def test_the_loss_said_is_that_of_the_model_without_the_parts() -> None:
    model = pico("llama", num_hidden_layers=3)
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    sequences = torch.randint(1, 150, (4, 24), generator=torch.Generator().manual_seed(0))
    every: list[tuple[int, str | None]] = [
        (i, reader) for i in range(3) for reader in ("self_attn.o_proj", "mlp.down_proj")
    ]
    already: list[tuple[int, str | None]] = [(1, "mlp.down_proj")]
    streams, full = (
        without_each(source, sequences, every, already),
        without_each(source, sequences, every)[None],
    )
    found = divergences(source, full, {part: states for part, states in streams.items() if part})
    assert found.keys() == set(every) - set(already)
    expected = model(sequences).logits.detach().log_softmax(-1)
    for part, kl in found.items():
        less = pico("llama", num_hidden_layers=3)
        for index, linear in (part, *already):
            silence(less, index, str(linear))
        seen = less(sequences).logits.detach().log_softmax(-1)
        assert kl == pytest.approx(float((expected.exp() * (expected - seen)).sum(-1).mean()), rel=1e-3)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "after",
    [
        {"quantize": {"format": "nf4", "rounding": "gptq"}},
        {"quantize": {"format": "w8a8", "smooth": {}, "protect": 0.2}},
        {"quantize": {"format": "nf4", "rotate": True}},
        {"sparsify": {"pattern": "2:4", "score": "sparsegpt"}},
        {"prune": {"axis": "hidden", "keep": 0.75, "multiple": 8}},
        {"prune": {"axis": "layer", "keep": 2}},
    ],
    ids=str,
)
def test_other_stages_can_follow(
    after: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "base", num_hidden_layers=3, tie_word_embeddings=False)
    stages = {"prune": {"axis": "sublayer", "keep": 2}}, after
    report = run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")
    assert len(gone(report)) == 2 and 0 < known(report.fidelity.kl_nats_mean) < 1
    found = load(tmp_path / "out")
    # one way to multiply few tokens and many, so that only the cache is another
    monkeypatch.setattr(packed_gemm, "usable", lambda *given: False)
    assert torch.equal(generated(found), generated(found, use_cache=False))


@pytest.mark.slow
def test_without_llmcompress_loading_fails(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", num_hidden_layers=3)
    for part in ("kv", "ffn"):
        model = pico("llama", vocab_size=VOCABULARY, num_hidden_layers=3)
        linear = "self_attn.o_proj" if part == "kv" else "mlp.down_proj"
        silence(model, 1, linear)
        model.save_pretrained(tmp_path / "base")
        report = run_recipe(
            staged_recipe(text, tmp_path / "base", {"prune": {"axis": "sublayer", "keep": 3}}),
            tmp_path / part,
        )
        assert gone(report) == [(1, part)]
    script = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        assert "size" in str(error), error
    else:
        sys.exit(f"{folder} loaded")
"""
    folders = [str(tmp_path / part) for part in ("kv", "ffn")]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, cwd=tmp_path, timeout=300)


@pytest.mark.parametrize("asked", [{"parameters": 0.8}, {"parameters": 0.75}, {"size": "700KB"}], ids=str)
def test_a_budget_is_kept(asked: dict[str, Any], text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", num_hidden_layers=3)
    report = run_recipe(
        staged_recipe(text, tmp_path / "base", {"prune": {"axis": "sublayer", **asked}}), tmp_path / "out"
    )
    if "parameters" in asked:
        assert known(report.compressed.parameters) <= asked["parameters"] * known(report.base.parameters)
    else:
        assert known(report.compressed.size_bytes) <= 700_000
    kl = report.stages[0].model_dump()["kl_nats"]
    assert len(kl) == len(gone(report)) and kl[-1] > 0
    assert json.loads((tmp_path / "out/config.json").read_text())["per_layer_config"]


def test_a_plan_says_how_many_go(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", num_hidden_layers=3)
    rows = plan_recipe(staged_recipe(text, tmp_path / "base", {"prune": {"axis": "sublayer", "keep": 3}}))
    assert "sublayer, 3 of 4" in str(rows)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        (
            "gpt2",
            {"axis": "sublayer", "keep": 0.5},
            "no attention or ffn of this gpt2 model can be taken out alone",
        ),
        ("llama", {"axis": "sublayer", "keep": 2}, "leaves 2 of 2 units"),
        ("llama", {"axis": "sublayer", "parameters": 1000}, "can't be reached"),
    ],
    ids=str,
)
def test_what_can_not_go_is_refused(family: str, settings: dict[str, Any], why: str) -> None:
    stage = Prune(**settings)
    with pytest.raises(ModelError, match=why):
        stage.changes(MetaModel(pico(family).config, CPU, torch.float32))


def test_an_axis_that_a_layer_has_lost_is_not_cut_again(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", num_hidden_layers=3)
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "sublayer", "keep": 1}},
        {"prune": {"axis": "ffn", "keep": 0.5, "multiple": 32}},
    ]
    with pytest.raises(ModelError, match="has no ffn left; cut ffn before sublayers"):
        run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")


def test_the_first_attention_of_each_kind_stays() -> None:
    model = MetaModel(pico("gemma3_text", **deeper("gemma3_text", 4)).config, CPU, torch.float32)
    there = {
        axis: {index for index, other in sublayer_dropping.candidates(model) if other == axis}
        for axis in ("kv", "ffn")
    }
    assert there == {"kv": {2, 3}, "ffn": {1, 2, 3}}
