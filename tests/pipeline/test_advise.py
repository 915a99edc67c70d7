"""`advise`: the rule on made-up recipes, and what it says of models of which only the config is here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import DataSpec, Recipe, compress, plan
from llmcompress.errors import CompressError, ModelError
from llmcompress.exports.artefact import Artefact
from llmcompress.exports.registry import TARGETS
from llmcompress.modeling import layerwise, model_config
from llmcompress.modeling.from_disk import meta_model
from llmcompress.pipeline import advise as advise_module
from llmcompress.pipeline.advise import advise
from llmcompress.pipeline.engines import planned_of
from llmcompress.pipeline.plan import foretold
from llmcompress.pipeline.ranking import Candidate, beats, filled, nearest, ranked
from llmcompress.pipeline.resolve import config_of, find_base, resolve
from llmcompress.recipe import catalogue, shipped
from llmcompress.recipe.catalogue import MODELS, NATIVE, PLUGIN, TRANSFORMERS, Measured
from llmcompress.recipe.speeds import AVX2, AVX512, H100, Machine, Speed
from llmcompress.stages.machine import Machine as TimedMachine
from llmcompress.stages.machine import UntimedMachine
from tests.bases import save_base, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

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
        rows = plan("demo", advice.recipe).rows
        assert advice.memory_bytes == max(row.peak_memory_bytes or 0 for row in rows)
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


def test_vllm_gets_what_its_latest_release_reads_first() -> None:
    found = advise("demo", target="vllm", size="60%")
    order = [advice.loads_with for advice in found.advice]
    assert order == sorted(order) and set(order) == {"vLLM", "vLLM up to 0.27.1"}
    assert [advice.recipe for advice in found.advice][:2] == ["w8a8-all", "w4a16"]
    for advice in found.advice:
        assert advice.recipe, "a search mixes formats"
        assert not any(stage.spares for stage in shipped.load(advice.recipe).stages)
        exported = f"--to compressed-tensors --out demo-{advice.recipe}-compressed-tensors" in advice.command
        assert exported == (advice.loads_with == "vLLM")
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


def test_llama_cpp_gets_what_a_gguf_file_holds_and_both_commands() -> None:
    found = advise("demo", target="llama.cpp")
    assert 3 <= len(found.advice) <= 5
    formats = {"w8a8", "w4a8", "q4_0", "iq4_nl"}
    for advice in found.advice:
        assert advice.recipe and advice.loads_with == "llama.cpp"
        kernels = {stage.kernel for stage in shipped.load(advice.recipe).stages if stage.kernel}
        assert kernels <= formats, "what is rounded again is refused by the export"
        made = f"demo-{advice.recipe}"
        assert advice.command == (
            f"llmcompress run {advice.recipe} --base demo --out {made} && "
            f"llmcompress export {made} --to gguf --out {made}-gguf"
        )
    assert {"w8a8", "iq4_nl", "q4_0"} <= {advice.recipe for advice in found.advice}
    assert any("llmcompress[gguf]" in note for note in found.notes)


def test_a_recipe_of_a_llama_cpp_format_has_the_loss_of_the_results() -> None:
    rows = json.loads((RESULTS / "gguf.json").read_text())["rows"]
    for name in ("q4_0", "iq4_nl"):
        measured = {
            row["model"]: row["kl_nats_mean"]
            for row in rows
            if (row["format"], row["rounding"]) == (name, "gptq")
        }
        entry = next(entry for entry in catalogue.entries() if entry.name == name)
        assert {each.model for each in entry.measured} == measured.keys()
        for each in entry.measured:
            assert each.kl_nats == pytest.approx(measured[each.model], abs=6e-6) and each.seconds is None


def test_llama_cpp_refuses_a_family_and_a_tokenizer_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llama.cpp can't run this model: .*; leave out the target"):
        advise(save_base(tmp_path / "moe", "qwen3_moe"), target="llama.cpp")
    llama = save_base(tmp_path / "llama")
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"llama.cpp can't run this model: .*tokenizer"):
        advise(llama, target="llama.cpp")


@pytest.mark.parametrize(
    "name", ["q4_0", "iq4_nl", "w4a16", "w8a8-all", "int8-smooth", "nf4-gptq", "ffn-75-obs"]
)
def test_a_planned_artefact_has_the_bytes_and_refusals_of_the_one_that_is_made(
    name: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    stages = [
        stage.model_copy(update={"protect": 0.0}) if stage.spares else stage
        for stage in shipped.load(name).stages
    ]
    file = write_text(tmp_path / "text.txt")
    text = DataSpec(source=str(file), samples=4, length=24, evaluation_samples=2)
    small = tmp_path / "small"
    compress(base, stages, small, data=text)
    made = Artefact(small)
    outline = meta_model(base, config_of(base, base=True), torch.device("cpu"))
    resolved = resolve(Recipe(stages=tuple(stages)), text, "cpu")
    steps = list(foretold(resolved, outline, UntimedMachine(outline.device), 96, 24))
    found = planned_of(find_base(str(base)), steps)
    assert found.matrices.keys() == made.matrices.keys()
    assert {key: (each.shape, each.format) for key, each in found.matrices.items()} == {
        key: (each.shape, each.format) for key, each in made.matrices.items()
    }
    for target in TARGETS.values():
        assert target.unfit(found) == target.unfit(made)
        if target.unfit(made) is None:
            assert target.weight_bytes(found) == target.weight_bytes(made)


def test_an_outline_is_built_once_and_once_more_for_each_stage_that_changes_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, real = list[str](), model_config.skeleton

    def counted(config: Any, dtype: torch.dtype) -> Any:
        built.append(config.to_json_string())
        return real(config, dtype)

    monkeypatch.setattr(layerwise, "skeleton", counted)
    found = advise("demo")
    assert len(found.advice) == 5
    base = built[0]
    assert built.count(base) == 1, "recipes share one outline of the base"
    tried = [entry.name for entry in catalogue.entries() if any(m.model == "demo" for m in entry.measured)]
    changing = ("prune", "tie", "distill")
    shapes = sum(stage.name in changing for name in tried for stage in shipped.load(name).stages)
    assert len(built) <= 1 + shapes


WITHOUT = """
import sys
from llmcompress.cli.app import main
sys.argv = ["llmcompress", "advise", "demo"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
late = {"bitsandbytes", "datasets", "pandas", "matplotlib", "peft"} & set(sys.modules)
assert not late, late
"""


@pytest.mark.slow
def test_the_command_imports_neither_bitsandbytes_nor_what_reads_text() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 w8a8" in done.stdout


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
    plain = advise(base, target="vllm").advice
    assert plain and {(advice.loads_with, "export" in advice.command) for advice in plain} == {
        ("vLLM", False)
    }


def test_a_time_takes_the_best_effort_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"fast": 10.0, "balanced": 20.0, "best": 90.0}

    def times_of(recipe: Any, *, base: str) -> dict[str, float]:
        slow = any(stage.learns for stage in recipe.stages)
        return {effort: 100 * time if slow else time for effort, time in times.items()}

    monkeypatch.setattr(advise_module, "times_of", times_of)
    found = advise("demo", time=30)
    assert {(advice.effort, advice.seconds) for advice in found.advice} == {("balanced", 20.0)}
    fast = advise("demo", time=15)
    memory = {advice.recipe: advice.memory_bytes or 0 for advice in fast.advice}
    assert {advice.effort for advice in fast.advice} == {"fast"}
    for advice in found.advice:
        assert memory[advice.recipe] < (advice.memory_bytes or 0), "of the text of that effort"
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
        ({"target": wrong}, "target tpu is not known; use one of: cpu, gpu, vllm, llama.cpp"),
    ):
        with pytest.raises(CompressError, match=message) as caught:
            advise("demo", **settings)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ModelError, match="is no folder"):
        advise(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has no config.json"):
        advise(tmp_path)
