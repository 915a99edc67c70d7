"""`advise`: the rule on made-up recipes, and what it says of models of which only the config is here."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import plan
from llmcompress.errors import CompressError, ModelError
from llmcompress.pipeline import advise as advise_module
from llmcompress.pipeline.advise import Candidate, advise, beats, filled, nearest, ranked
from llmcompress.recipe import catalogue, shipped
from llmcompress.recipe.catalogue import MODELS, NATIVE, PLUGIN, TRANSFORMERS, Measured
from llmcompress.recipe.speeds import AVX2, AVX512, H100, Machine, Speed
from llmcompress.stages.machine import Machine as TimedMachine
from tests.bases import save_base

RESULTS = Path(__file__).parents[2] / "evaluation" / "results"
SMOL = MODELS["smollm2-135m"]


def loss(model: str, kl: float) -> Measured:
    return Measured(model, kl, 20.0, 21.0, 60.0, None)


def one(name: str, size: int, kl: float, **others: Any) -> Candidate:
    facts: dict[str, Any] = {
        "purpose": "4 bits per weight",
        "measured": (loss("demo", kl),),
        "loads_with": NATIVE,
        "learns": False,
        "whole": True,
    }
    return Candidate(name=name, size_bytes=size, **facts | others)


def names(*found: Candidate, parameters: int = MODELS["demo"]) -> list[str]:
    return [each.name for each in ranked(found, parameters)]


def test_more_bytes_and_more_loss_is_beaten() -> None:
    small, large = one("small", 10, 0.1), one("large", 20, 0.2)
    assert beats(small, large) and not beats(large, small)
    assert not beats(small, small), "nothing beats its equal"
    assert beats(small, one("as large", 10, 0.2)) and beats(small, one("as good", 20, 0.1))
    assert not beats(small, one("better", 20, 0.05))
    assert names(large, small) == ["small"]


@pytest.mark.parametrize(
    ("asking", "modest"),
    [
        ({"learns": True}, {"learns": False}),
        ({"loads_with": PLUGIN}, {"loads_with": NATIVE}),
        ({"loads_with": PLUGIN}, {"loads_with": TRANSFORMERS}),
        ({"speed": Speed(0.5, 1.0, "a model")}, {"speed": Speed(3.0, 1.0, "a model")}),
        ({"speed": None}, {"speed": Speed(3.0, 1.0, "a model")}),
    ],
)
def test_what_asks_for_more_does_not_beat_what_asks_for_less(
    asking: dict[str, Any], modest: dict[str, Any]
) -> None:
    better, worse = one("better", 10, 0.1, **asking), one("worse", 20, 0.2, **modest)
    assert not beats(better, worse)
    assert beats(replace(better, **modest), replace(worse, **asking))


def test_losses_are_compared_on_the_nearest_model_that_both_were_measured_on() -> None:
    many = nearest([loss("demo", 0.1), loss("wikilm-8m", 0.5), loss("smollm2-135m", 0.9)], SMOL)
    assert [each.model for each in many] == ["smollm2-135m", "wikilm-8m", "demo"]
    few = nearest([loss("demo", 0.05), loss("wikilm-8m", 0.6)], SMOL)
    assert beats(one("many", 10, 0, measured=many), one("few", 10, 0, measured=few))
    assert not beats(one("few", 10, 0, measured=few), one("many", 10, 0, measured=many))
    assert not beats(
        one("many", 10, 0, measured=many), one("other", 10, 0, measured=(loss("stories260k", 9),))
    )


def test_one_of_each_purpose_comes_first_by_loss() -> None:
    eight = [
        one(f"eight-{kl}", 100 - place, kl, purpose="8 bits") for place, kl in enumerate((0.1, 0.2, 0.3))
    ]
    four = [one(f"four-{kl}", 50 - place, kl) for place, kl in enumerate((0.4, 0.5, 0.6))]
    order = ["eight-0.1", "four-0.4", "eight-0.2", "eight-0.3", "four-0.5"]
    assert names(*four, *eight) == order


def test_faster_formats_come_before_those_of_less_loss() -> None:
    slow = one("slow", 20, 0.1, speed=Speed(0.52, 1.0, "a model"))
    fast = one("fast", 20, 0.2, speed=Speed(3.39, 1.0, "a model"))
    as_fast = one("as fast", 10, 0.3, speed=Speed(3.16, 1.0, "a model"))
    assert names(slow, as_fast, fast) == ["fast", "as fast", "slow"]
    assert names(*(replace(each, speed=None) for each in (slow, as_fast))) == ["slow", "as fast"]


def test_recipes_that_the_nearest_model_lacks_only_fill_up_to_three() -> None:
    near = [one(f"near {size}", size, 0, measured=(loss("smollm2-135m", 1 / size),)) for size in (3, 4, 5)]
    far = [one(f"far {size}", size, 0, measured=(loss("demo", 0.01 / size),)) for size in (3, 4, 5)]
    assert filled(near, near, far) == near
    order = ranked(far, SMOL)
    assert [each.name for each in filled(near[:1], near[:1], order)] == ["near 3", "far 5", "far 4"]
    known = replace(near[0], measured=(*near[0].measured, loss("demo", 0.0001)))
    assert filled([known], [known], order) == [known], "beaten on the demo"
    assert filled([], [], []) == []


def test_stages_say_whether_they_learn_spare_linears_and_have_one_kernel() -> None:
    facts = {
        name: [(stage.learns, stage.spares, stage.kernel) for stage in shipped.load(name).stages]
        for name in ("nf4-gptq", "nf4-learned", "w8a8", "nf4-int8-mixed", "codebook-16", "heal-after-prune")
    }
    assert facts == {
        "nf4-gptq": [(False, False, "nf4")],
        "nf4-learned": [(True, False, "nf4")],
        "w8a8": [(False, True, "w8a8")],
        "nf4-int8-mixed": [(False, False, None)],
        "codebook-16": [(False, False, "codebook")],
        "heal-after-prune": [(False, False, None), (True, False, None)],
    }
    assert shipped.load("share-ffn-heal").stages[0].learns


def test_every_measured_model_has_its_parameters() -> None:
    assert {each.model for entry in catalogue.entries() for each in entry.measured} == MODELS.keys()
    assert plan("demo", "nf4-gptq").rows[0].parameters == MODELS["demo"]


@pytest.fixture(scope="module")
def demo() -> advise_module.Advised:
    return advise("demo")


def test_the_demo_gets_three_to_five_recipes_with_the_facts_of_their_files(
    demo: advise_module.Advised,
) -> None:
    assert 3 <= len(demo.advice) <= 5
    for advice in demo.advice:
        assert advice.recipe
        entry = next(entry for entry in catalogue.entries() if entry.name == advice.recipe)
        kls = {each.model: each.kl_nats for each in entry.measured}
        assert advice.kl_nats == kls["demo"] and advice.measured_on == "demo"
        assert (advice.loads_with, advice.purpose) == (entry.loads_with, entry.purpose)
        assert advice.size_bytes == plan("demo", advice.recipe).rows[-1].size_bytes
        assert advice.share == advice.size_bytes / demo.size_bytes
        assert advice.command == f"llmcompress run {advice.recipe} --base demo --out demo-{advice.recipe}"
        assert (advice.seconds, advice.effort, advice.speed) == (None, None, None)
    assert demo.advice[0].why == "least loss"
    assert demo.advice[0].kl_nats == min(advice.kl_nats or 9 for advice in demo.advice)
    assert json.loads(json.dumps(demo.to_dict()))["model"] == "demo"


def test_a_size_that_a_recipe_fills_needs_no_search() -> None:
    found = advise("demo", size="40%")
    assert found.advice[0].recipe == "nf4-learned-tuned"
    assert all(advice.share <= 0.4 for advice in found.advice)


def test_a_size_between_recipes_is_first_searched() -> None:
    found = advise("demo", size="48%")
    first = found.advice[0]
    assert (first.recipe, first.kl_nats, first.size_bytes) == (None, None, int(0.48 * found.size_bytes))
    assert first.command == "llmcompress search demo --size 48%"
    assert "nf4-learned-tuned, leaves" in first.why
    assert all(advice.recipe for advice in found.advice[1:]) and len(found.advice) > 3


def test_a_size_below_all_recipes_is_searched_alone() -> None:
    found = advise("demo", size="28%")
    (only,) = found.advice
    assert only.recipe is None and "no recipe fits" in only.why
    assert "tied to the embedding" in found.refused["hidden-75"], "every recipe was tried"


def test_vllm_gets_whole_native_models_alone() -> None:
    found = advise("demo", target="vllm", size="48%")
    assert {advice.loads_with for advice in found.advice} == {NATIVE}
    for advice in found.advice:
        assert advice.recipe, "a search mixes formats"
        assert not any(stage.spares for stage in shipped.load(advice.recipe).stages)
    assert any("was not run here" in note for note in found.notes)


@pytest.mark.parametrize(("capability", "first"), [("AVX512", "w8a8"), ("AVX2", "codebook-16")])
def test_a_cpu_ranks_formats_by_their_measured_speed(
    capability: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = advise("demo", target="cpu")
    assert found.advice[0].recipe == first
    assert capability in found.advice[0].why and found.advice[0].speed
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    plain = advise("demo", target="cpu")
    assert plain.advice == advise("demo").advice
    assert any("no speed was measured on a processor like this" in note for note in plain.notes)


def test_a_gpu_gets_nf4_first_and_hears_that_nothing_is_faster() -> None:
    found = advise("demo", target="gpu")
    assert found.advice[0].speed == H100.formats["nf4"]
    assert any("no format is faster than bfloat16" in note for note in found.notes)


def rows_of(file: str, what: str, **asked: Any) -> dict[str, Any]:
    rows = json.loads((RESULTS / file).read_text())["rows"]
    asked["what"] = what
    return {row["candidate"]: row for row in rows if asked.items() <= row.items()}


@pytest.mark.parametrize(
    ("machine", "file", "model", "prompt"),
    [
        (AVX2, "speed-avx2.json", "111M model", 128),
        (AVX512, "speed-avx512.json", "111M model", 128),
        (H100, "speed-cuda.json", "8B model", 2048),
    ],
)
def test_speeds_are_those_of_the_results(machine: Machine, file: str, model: str, prompt: int) -> None:
    writing, reading = (rows_of(file, model, batch=1, tokens=tokens) for tokens in (1, prompt))
    for name, speed in {**machine.dtypes, **machine.formats}.items():
        if name == "codebook":
            continue
        row = name if name in writing else f"bitsandbytes {name}"
        assert speed.writing == pytest.approx(writing[row]["speedup_p10"], abs=0.006), name
        assert speed.reading == pytest.approx(reading[row]["speedup_p10"], abs=0.006), name


def test_the_speed_of_a_codebook_is_that_of_one_linear() -> None:
    for tokens, said in ((1, AVX2.formats["codebook"].writing), (128, AVX2.formats["codebook"].reading)):
        rows = rows_of("lookup_speed-avx2.json", "linear 4096 x 11008", dtype="float32", tokens=tokens)
        assert said == pytest.approx(
            rows["plain"]["p10_s"] / rows["codebook of 16 a row"]["p10_s"], abs=0.006
        )


def test_neither_weights_nor_the_network_nor_a_clock_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(TimedMachine, "_once", refuse)
    found = advise(base)
    assert len(found.advice) >= 3 and {each.measured_on for each in found.advice} == {"stories260k"}
    assert sorted(tmp_path.rglob("*")) == before


def test_experts_in_a_native_format_need_the_plug_in(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3_moe")
    four = [advice for advice in advise(base).advice if advice.purpose == "4 bits per weight"]
    assert four and {advice.loads_with for advice in four} == {PLUGIN}
    with pytest.raises(ModelError, match="of this model what vLLM reads"):
        advise(base, target="vllm")


def test_a_time_takes_the_best_effort_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"fast": 10.0, "balanced": 20.0, "best": 90.0}

    def times_of(recipe: Any, *, base: str) -> dict[str, float]:
        slow = any(stage.learns for stage in recipe.stages)
        return {effort: 100 * time if slow else time for effort, time in times.items()}

    monkeypatch.setattr(advise_module, "times_of", times_of)
    found = advise("demo", time=30)
    assert {(advice.effort, advice.seconds) for advice in found.advice} == {("balanced", 20.0)}
    assert "--base demo --effort balanced --out" in found.advice[0].command
    with pytest.raises(CompressError, match=r"fits in time 5.0 s; give more time"):
        advise("demo", time=5)


def test_bad_input_gets_one_line(tmp_path: Path) -> None:
    wrong: Any = "tpu"
    for settings, message in (
        ({"size": "much"}, "size much is no size"),
        ({"size": "100%"}, "size 100% is no less than the base"),
        ({"size": "1kB"}, "fits in size 1kB; give more bytes"),
        ({"size": "20%", "target": "vllm"}, "fits in size 20%"),
        ({"target": wrong}, "target tpu is not known; use cpu, gpu or vllm"),
    ):
        with pytest.raises(CompressError, match=message) as caught:
            advise("demo", **settings)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ModelError, match="is no folder"):
        advise(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has no config.json"):
        advise(tmp_path)
