"""`search` and the stage `budget`: what is found is as small as asked, runs by itself, and is found again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec
from llmcompress.errors import CompressError, ModelError, RecipeError
from llmcompress.frontier import costs
from llmcompress.frontier.ways import palettes, ways_of
from llmcompress.modeling.from_disk import DiskModel, meta_model
from llmcompress.modeling.sequential import untracked
from llmcompress.pipeline import budgets
from llmcompress.pipeline.compare import is_search, write_search_page
from llmcompress.pipeline.plan import cached_per_token, plan_recipe
from llmcompress.pipeline.resolve import config_of
from llmcompress.pipeline.run import run_recipe
from llmcompress.pipeline.search import Searched, prices_of, search, write
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.counted import Counted
from llmcompress.report.search_facts import SearchFacts
from llmcompress.stages.budget.stage import CHOICES, Budget
from tests.artefacts import CPU
from tests.bases import known, save_base, write_text
from tests.caches import own_cache
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("short_runs")


SIZES = {"num_hidden_layers": 3, "intermediate_size": 128}


class Place:
    """A base with a text."""

    def __init__(self, folder: Path, family: str = "llama", **config: Any) -> None:
        self.base = save_base(folder / "base", family, **{**SIZES, **config})
        source = str(write_text(folder / "facts.txt"))
        self.data: dict[str, Any] = {"source": source, "samples": 8, "length": 32, "evaluation_samples": 4}

    def search(self, *sizes: str, **settings: Any) -> Searched:
        """Search among formats alone, unless told otherwise."""
        asked = {"choose_among": ["quantize"], **settings}
        return search(self.base, sizes, data=json.dumps(self.data), **asked)

    def run(self, stages: list[dict[str, Any]], out: Path) -> Path:
        entries = {"base": str(self.base), "data": self.data, "stages": stages}
        run_recipe(Recipe.model_validate(entries), out)
        return out / "model.safetensors"


@pytest.fixture
def place(tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A base whose formats another search may have measured."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    return Place(tmp_path)


@pytest.fixture
def new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A base that no search has measured."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(own_cache(tmp_path / "cache")))
    return Place(tmp_path)


@pytest.mark.parametrize("size", ["30%", "45%"])
def test_what_is_found_is_as_small_as_was_asked(place: Place, size: str, tmp_path: Path) -> None:
    (found,) = place.search(size).found
    report = run_recipe(found.recipe, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = (place.base / "model.safetensors").stat().st_size
    allowed = float(size.removesuffix("%")) / 100 * whole
    assert file.stat().st_size <= found.size_bytes <= allowed
    assert found.size_bytes >= 0.93 * allowed, "a tiny model has few choices, but more than this"
    assert report.plug_in


@pytest.mark.parametrize("tied", [True, False])
def test_the_smallest_model_has_int8_outside_the_layers(
    tied: bool, tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    place = Place(tmp_path, tie_word_embeddings=tied)
    (found,) = place.search("26%").found
    assert found.outside == ("int8 embedding" if tied else "int8 embedding and head")
    run_recipe(found.recipe, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    assert 0.99 * found.size_bytes <= file.stat().st_size <= found.size_bytes


@pytest.mark.slow
def test_all_experts_of_a_layer_take_the_same_way(
    tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    place = Place(tmp_path, "qwen3_moe")
    (found,) = place.search("30%").found
    report = run_recipe(found.recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= found.size_bytes
    formats: dict[str, set[str]] = {}
    for linear in report.stages[0].linears:
        if ".experts." in linear.name:
            formats.setdefault(linear.name.partition(".experts.")[0], set()).add(linear.format)
    assert len(formats) == 3 and all(len(each) == 1 for each in formats.values())


def opened_base(
    family: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[partial[DiskModel], torch.Tensor]:
    """What opens a small base in a folder, which has the cache of searches too, and a text for it."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(own_cache(place / "cache")))
    tiny(family).save_pretrained(place / "base")
    text = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
    return partial(DiskModel, place / "base", CPU), text


@pytest.mark.slow
def test_a_layer_that_hands_on_keys_and_values_is_offered_fine_formats_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, text = opened_base("gemma4_e2b", tmp_path, monkeypatch)
    writers = [index for index, of in enumerate(opened().anatomy.each_layer) if of.writes]
    assert writers
    data = CalibrationData(text, text, DataSpec(), "text")
    prices = prices_of(opened, data, 0, ways_of(palettes("llmcompress")), untracked)
    for unit in prices.units:
        of = int(unit.linears[0].partition("layers.")[2].partition(".")[0])
        assert ("codebook of 8" in unit.costs) == (of not in writers), unit.linears
        assert "w8a16" in unit.costs


def test_more_bytes_lose_less(place: Place) -> None:
    found = place.search("60%", "30%", "45%").found
    assert [each.asked for each in found] == ["30%", "45%", "60%"]
    losses = [each.expected_nats for each in found]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_what_loads_with_transformers_needs_no_plugin(place: Place, tmp_path: Path) -> None:
    (found,) = place.search("60%", loads_with="transformers").found
    report = run_recipe(found.recipe, tmp_path / "out")
    assert not report.plug_in and found.outside == "kept"
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"]
    assert kind == "bitsandbytes"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_budget_gives_the_bytes_of_the_recipe_that_search_writes(place: Place, tmp_path: Path) -> None:
    searched = place.search("40%", choose_among=CHOICES)
    write(searched, tmp_path / "searched")
    written = Recipe.from_file(tmp_path / "searched" / "40-percent.yaml")
    assert (tmp_path / "searched" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "searched" / "search.json").read_text())["found"][0]["asked"] == "40%"
    run_recipe(written, tmp_path / "written")
    file = place.run([{"budget": {"size": "40%"}}], tmp_path / "budget")
    assert file.read_bytes() == (tmp_path / "written" / "model.safetensors").read_bytes()
    left = Recipe.from_file(tmp_path / "budget" / "recipe.yaml")
    assert left.stages == written.stages, "the artefact has every choice spelled out"


@pytest.mark.slow
def test_training_may_follow_a_budget(place: Place, tmp_path: Path) -> None:
    distill = {"distill": {"steps": 2, "batch": 2, "train": "norms"}}
    place.run([{"budget": {"size": "40%"}}, distill], tmp_path / "out")
    left = Recipe.from_file(tmp_path / "out" / "recipe.yaml")
    assert [stage.name for stage in left.stages] == ["quantize", "distill"]


def test_a_search_that_was_interrupted_goes_on(new_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    priced, seen = costs._priced, list[int]()

    def until_the_second(model: Any, layer: Any, *rest: Any) -> Any:
        seen.append(layer.index)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return priced(model, layer, *rest)

    monkeypatch.setattr(costs, "_priced", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        new_place.search("40%")
    again = new_place.search("40%")
    assert seen == [0, 1, 1, 2], "the first layer was done"
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(new_place.base.parent / "another"))
    assert new_place.search("40%") == again
    assert len(seen) == 7
    new_place.search("50%")
    assert len(seen) == 7, "another size measures nothing"


def test_costs_of_layers_add_up_to_what_was_measured() -> None:
    def cost(nats: float) -> costs.Cost:
        return costs.Cost(nats=nats, foretold=nats, own_bytes=1, native_bytes=1)

    layer = [{"nf4": cost(0.1), "kept": cost(0.0)}, {"nf4": cost(0.3)}]
    corrected = costs._corrected(layer, {"nf4": 0.2})
    assert [each["nf4"].nats for each in corrected] == pytest.approx([0.05, 0.15])
    assert corrected[0]["nf4"].foretold == 0.1


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ("5%", "is less than any choice of formats leaves; the smallest that loads with llmcompress has"),
        ("100%", "is no less than the base, which has"),
        ("huge", "size huge is no size; give bytes like 60MB, or a share"),
        ("0%", "size 0% is no size"),
    ],
)
def test_a_wrong_size_is_refused_in_one_line(place: Place, size: str, why: str) -> None:
    with pytest.raises(CompressError, match=why) as caught:
        place.search(size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ("[budget: {size: 12 parsecs}]", "is no size; write bytes like 60MB"),
        ("[tie, budget: {size: 40%}]", "budget comes first"),
        ("[budget: {size: 40%}, quantize]", "a quantised model can't be changed again"),
        ("[budget: {}]", "a budget is one of size, memory, tokens_per_s, and got none"),
        ("[budget: {size: 40%, memory: 1GB}]", "and got size and memory"),
        ("[budget: {memory: much}]", "memory much is no size; write bytes like 60MB"),
        ("[budget: {tokens_per_s: 0}]", "tokens_per_s 0 is no speed; write tokens/s like 30"),
        ("[budget: {tokens_per_s: fast}]", "tokens_per_s fast is no speed"),
        ("[budget: {size: 40%, context: 100}]", "context is the length of the cache that memory counts"),
    ],
)
def test_a_wrong_budget_is_refused_in_one_line(stages: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        Recipe.parse(f"stages: {stages}")


def test_a_budget_can_not_be_planned(place: Place) -> None:
    recipe = Recipe.parse("stages: [budget: {size: 40%}]")
    with pytest.raises(ModelError, match="`llmcompress search` writes the recipe"):
        plan_recipe(recipe, base=str(place.base))


def test_what_is_found_for_a_memory_stays_within_it_once_it_is_loaded(place: Place, tmp_path: Path) -> None:
    context = 100
    searched = place.search("60%", of="memory", context=context)
    (found,) = searched.found
    report = run_recipe(found.recipe, tmp_path / "out")
    model = meta_model(place.base, config_of(place.base), CPU)
    cache = context * known(cached_per_token(model, context))
    held = [known(each.memory_bytes) + cache for each in (report.base, report.compressed)]
    assert searched.measure.base == held[0], "the base has what is counted of it"
    assert held[1] <= found.reached <= 0.6 * held[0]
    assert held[1] >= 0.97 * found.reached
    assert found.file == "memory-60-percent.yaml" and found.size_bytes < found.base_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_the_least_memory_has_int8_outside_the_layers(
    tied: bool, tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    place = Place(tmp_path, tie_word_embeddings=tied)
    with pytest.raises(CompressError, match="with the cache of 8 tokens") as caught:
        place.search("1%", of="memory", context=8)
    (found,) = place.search("33%", of="memory", context=8).found
    assert found.outside != "kept" and "the smallest that loads with llmcompress has" in str(caught.value)
    report = run_recipe(found.recipe, tmp_path / "out")
    cache = 8 * known(cached_per_token(meta_model(place.base, config_of(place.base), CPU), 8))
    assert 0.97 * found.reached <= known(report.compressed.memory_bytes) + cache <= found.reached


def test_a_longer_context_leaves_less_for_the_weights(place: Place) -> None:
    sizes = [place.search("120kB", of="memory", context=tokens).found[0].size_bytes for tokens in (10, 40)]
    assert sizes[0] > sizes[1]


@pytest.mark.slow
def test_a_speed_out_of_reach_says_what_can_be_had_and_nothing_is_timed_twice(
    new_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompressError, match="the fastest that loads with llmcompress is expected") as first:
        new_place.search("1000x", of="tokens_per_s")
    with monkeypatch.context() as patched:
        patched.setattr(budgets, "speed_of", None)
        with pytest.raises(CompressError) as again:
            new_place.search("1000x", of="tokens_per_s")
    assert str(again.value) == str(first.value) and "\n" not in str(first.value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(budgets, "speed_of", lambda *_: None)
    with pytest.raises(ModelError, match="too large to be loaded whole"):
        new_place.search("1000x", of="tokens_per_s")


def test_what_is_found_for_a_speed_is_expected_to_reach_it(
    new_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose times are given."""

    def known_times(model: Any, shapes: dict[str, tuple[int, int]], offered: Any, *_: Any) -> budgets.Times:
        linears = tuple(
            (
                *shape,
                way.name,
                palette.native,
                100 if way.name == "kept" else 40 if way.name == "w8a16" else 60,
            )
            for shape in dict.fromkeys(shapes.values())
            for palette in offered
            for way in palette.ways
        )
        return budgets.Times(token=100 * len(shapes) + 900, linears=linears, head=(500, 300))

    monkeypatch.setattr(budgets, "_times", known_times)
    searched = new_place.search("1.25x", "1.1x", of="tokens_per_s")
    fast, slow = searched.found
    assert (fast.file, slow.file) == ("1.25x-tokens-per-s.yaml", "1.1x-tokens-per-s.yaml")
    for found, factor in ((fast, 1.25), (slow, 1.1)):
        coded = sum(way == "w8a16" for way in found.ways.values())
        saved = 60 * coded + (200 if found.outside != "kept" else 0)
        assert set(found.ways.values()) <= {"kept", "w8a16"}, "the fastest loses least here"
        assert found.reached == pytest.approx(1e9 / (100 * len(found.ways) + 900 - saved))
        assert found.reached >= factor * searched.measure.base
    assert fast.expected_nats > slow.expected_nats
    write(searched, tmp_path / "searched")
    assert (tmp_path / "searched" / fast.file).is_file()
    assert "Tokens/s of at least 1.25x" in (tmp_path / "searched" / "search.html").read_text()


def test_the_speed_of_experts_is_not_asked_for(
    tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    with pytest.raises(ModelError, match="how fast experts are is not timed"):
        Place(tmp_path, "qwen3_moe").search("1.5x", of="tokens_per_s")


@pytest.mark.parametrize(
    ("of", "asked", "why"),
    [
        ("memory", "100%", "memory 100% is no less than the base, which has"),
        ("memory", "lots", "memory lots is no size"),
        ("tokens_per_s", "quick", "tokens_per_s quick is no speed; give tokens/s like 30"),
        ("tokens_per_s", "0.5x", "tokens_per_s 0.5x is no faster than the base, which writes"),
    ],
)
def test_a_wrong_budget_is_refused_before_formats_are_measured(
    place: Place, of: Counted, asked: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.pipeline.search.prices_of", None)
    with pytest.raises(CompressError, match=why):
        place.search(asked, of=of)


def test_a_budget_of_memory_in_a_recipe_gives_what_search_finds(place: Place, tmp_path: Path) -> None:
    (found,) = place.search("60%", of="memory", context=50).found
    place.run([{"budget": {"memory": "60%", "context": 50}}], tmp_path / "out")
    assert Recipe.from_file(tmp_path / "out" / "recipe.yaml").stages == found.recipe.stages


@pytest.mark.parametrize(
    ("budget", "counted", "asked"),
    [
        ("{size: 40%}", "size", "40%"),
        ("{memory: 2GB, context: 4096}", "memory", "2GB"),
        ("{tokens_per_s: 1.5x}", "tokens_per_s", "1.5x"),
        ("{tokens_per_s: 30}", "tokens_per_s", "30"),
    ],
)
def test_a_budget_is_one_of_three(budget: str, counted: str, asked: str) -> None:
    stage = Recipe.parse(f"stages: [budget: {budget}]").stages[0]
    assert isinstance(stage, Budget)
    assert (stage.counted, stage.asked) == (counted, asked)


def test_a_search_writes_its_page_and_report_writes_it_anew(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "searched"
    write(place.search("40%", "60%"), folder)
    text = (folder / "search.html").read_text()
    facts = SearchFacts.of(folder)
    assert [each.file for each in facts.found] == ["40-percent.yaml", "60-percent.yaml"]
    assert set(facts.found[0].ways.values()) <= facts.bits.keys()
    assert str(place.base) not in text and "base: ./base" in text
    (folder / "search.html").unlink()
    assert is_search(folder) and write_search_page(folder).read_text() == text
    assert not is_search(place.base)
