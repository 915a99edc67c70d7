"""`search` with widths among the choices: what is found runs by itself, in the bytes that were foretold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec
from llmcompress.errors import CompressError, RecipeError
from llmcompress.frontier import widths
from llmcompress.frontier.ways import palettes, ways_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.sequential import untracked
from llmcompress.pipeline.narrowing import Narrowing
from llmcompress.pipeline.run import run_recipe
from llmcompress.pipeline.search import Searched, prices_of
from llmcompress.pipeline.search_cache import SearchCache
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.budget.stage import CHOICES, Budget
from llmcompress.stages.prune.stage import Prune
from llmcompress.stages.prune.sublayer_dropping import candidates
from tests.artefacts import CPU
from tests.caches import own_cache
from tests.models import pico, tiny
from tests.pipeline.test_search import Place, opened_base

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = "12%"  # less than any formats leave
LITTLE = "9%"  # in which parts of layers go, or nearly all of their units
LEAST = "8%"  # in which parts of layers go


class WidePlace(Place):
    """A base with a text, where widths are among the choices."""

    def search(self, *sizes: str, **settings: Any) -> Searched:
        return super().search(*sizes, **{"choose_among": CHOICES, **settings})


@pytest.fixture
def place(tmp_path: Path, searches: Path, monkeypatch: pytest.MonkeyPatch) -> WidePlace:
    """A base whose formats and widths another search may have measured."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(searches))
    return WidePlace(tmp_path)


@pytest.fixture
def new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WidePlace:
    """A base that no search has measured."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(own_cache(tmp_path / "cache")))
    return WidePlace(tmp_path)


def test_less_than_formats_leave_takes_widths(place: Place, tmp_path: Path) -> None:
    (found,) = place.search(SMALL).found
    report = run_recipe(found.recipe, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = (place.base / "model.safetensors").stat().st_size
    assert file.stat().st_size <= found.size_bytes <= float(SMALL.removesuffix("%")) / 100 * whole
    assert file.stat().st_size >= 0.98 * found.size_bytes
    pruned = [stage for stage in found.recipe.stages if isinstance(stage, Prune)]
    assert pruned and found.recipe.stages[-1].name == "quantize"
    assert report.stages[0].name == "prune"
    assert {axis for stage in pruned for axis in stage.axes} == found.widths.keys()


def test_what_can_go_as_a_whole_goes_where_little_room_is_left(place: Place, tmp_path: Path) -> None:
    (found,) = place.search(LEAST).found
    assert any(0 in counts for counts in found.widths.values())
    lists = [stage.keep for stage in found.recipe.stages if isinstance(stage, Prune)]
    assert lists == [*found.widths.values()]
    report = run_recipe(found.recipe, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    assert 0.98 * found.size_bytes <= file.stat().st_size <= found.size_bytes
    assert report.stages[0].name == "prune" and report.plug_in


@pytest.mark.slow
def test_parts_go_only_if_the_model_without_them_is_found_to_lose_less(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()

    def told(narrowing: Narrowing, opened: Callable[[], DiskModel]) -> float:
        seen.append(any(0 in opened().widths_of(axis) for axis in widths.AXES))
        return 100.0 if seen[-1] else 0.1

    monkeypatch.setattr(Narrowing, "_lost", told)
    (found,) = place.search(LITTLE).found
    assert seen == [True, False], "the best, and the best in which every part stays"
    assert found.widths and not any(0 in counts for counts in found.widths.values())


def test_formats_alone_say_that_widths_would_go_further(place: Place) -> None:
    with pytest.raises(
        CompressError, match=r"any choice of formats leaves; .* less with prune among the"
    ) as caught:
        place.search(SMALL, choose_among=["quantize"])
    assert "\n" not in str(caught.value)


def test_less_than_any_width_leaves_is_refused(place: Place) -> None:
    with pytest.raises(
        CompressError, match="less than any choice of formats and widths leaves; the smallest"
    ):
        place.search("3%")


@pytest.mark.slow
def test_what_loads_with_transformers_has_one_width(place: Place, tmp_path: Path) -> None:
    (found,) = place.search("31%", loads_with="transformers").found
    assert found.widths and all(len({*counts}) == 1 for counts in found.widths.values())
    report = run_recipe(found.recipe, tmp_path / "out")
    assert not report.plug_in
    file = tmp_path / "out" / "model.safetensors"
    assert 0.98 * found.size_bytes <= file.stat().st_size <= found.size_bytes
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_size_at_which_formats_lose_little_takes_no_widths(place: Place) -> None:
    (found,) = place.search("60%").found
    assert not found.widths
    assert found == place.search("60%", choose_among=["quantize"]).found[0]


@pytest.mark.slow
def test_widths_that_were_measured_are_not_measured_again(
    new_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, seen = widths._cut, list[int]()

    def until_the_second(layer: Any, *rest: Any) -> Any:
        seen.append(layer.index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        yield from cut(layer, *rest)

    monkeypatch.setattr(widths, "_cut", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        new_place.search(SMALL)
    assert seen == [0, 0, 1], "heads and neurons of the first layer were done"
    again = new_place.search(SMALL)
    assert seen[3:] == [1, 1, 2, 2]
    assert new_place.search(SMALL) == again
    assert len(seen) == 7


def test_the_bytes_of_a_narrower_linear_are_those_that_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the whole width they are those of the solved weights."""
    opened, text = opened_base("llama", tmp_path, monkeypatch)
    ways = ways_of(palettes("llmcompress"))
    data = CalibrationData(text, text, DataSpec(), "text")
    prices = prices_of(opened, data, 0, ways, untracked)
    model = opened()
    for unit in prices.units:
        index = int(unit.linears[0].partition("layers.")[2].partition(".")[0])
        found = widths._narrower(model, unit, index, {}, 1.0, ways)
        assert found.costs.keys() == unit.costs.keys()
        for way, cost in unit.costs.items():
            assert found.costs[way].own_bytes == cost.own_bytes, way
            few = 20 if "double" in way else 0  # of a number that is spelled out
            assert abs(found.costs[way].native_bytes - cost.native_bytes) <= few, way


def test_models_whose_widths_can_not_be_measured_have_none() -> None:
    """The neurons of experts, and layers that hand on keys and values."""
    for family, axes in {"llama": ("kv", "ffn"), "qwen3_moe": ("kv",), "gemma4_e2b": ()}.items():
        assert widths.axes_of(MetaModel(tiny(family).config, CPU, torch.float32)) == axes


def test_widths_that_transformers_does_not_build_are_not_offered() -> None:
    """Three query heads of a width of 64 need a twin, which a model with biases has not."""
    for biased in (False, True):
        config = pico(
            "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, attention_bias=biased
        ).config
        model = MetaModel(config, CPU, torch.float32)
        assert widths._can_be_built(model, "kv", 2)
        assert widths._can_be_built(model, "kv", 3) is not biased


def test_a_width_of_zero_costs_what_the_model_without_the_part_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, text = opened_base("llama", tmp_path, monkeypatch)
    data, ways = CalibrationData(text, text, DataSpec(), "text"), ways_of(palettes("llmcompress"))
    model = opened()
    with SearchCache.of(model, data, 0, ways).context(model, data, 0, untracked) as context:
        found = widths.measured(model, context, [], ways)
    none = {(part.layer, part.axis): part.widths[0].nats for part in found if part.widths[0].count == 0}
    assert [*none] == sorted(candidates(model), key=lambda part: (widths.AXES.index(part[1]), part[0]))
    for (index, axis), nats in none.items():
        less = tiny("llama")
        reader = model.anatomy.consumer_of(str(axis))
        less.get_parameter(f"model.layers.{index}.{reader}.weight").data.zero_()
        expected, seen = (each(text).logits.detach().log_softmax(-1) for each in (tiny("llama"), less))
        assert nats == pytest.approx(float((expected.exp() * (expected - seen)).sum(-1).mean()), rel=1e-3)


def test_the_first_attention_and_feed_forward_part_stay() -> None:
    model = MetaModel(tiny("llama").config, CPU, torch.float32)
    assert {0, *range(len(model.layers))} - {index for index, _ in widths._removable(model)} == {0}
    assert widths._can_be_built(model, "ffn", 0) and widths._can_be_built(model, "kv", 0)
    assert not widths._removable(MetaModel(tiny("gpt2").config, CPU, torch.float32))


def test_a_recipe_chooses_among_formats_at_least() -> None:
    with pytest.raises(RecipeError, match="choose_among needs quantize; to prune alone"):
        Recipe.parse("stages: [budget: {size: 40%, choose_among: [prune]}]")
    recipe = Recipe.parse("stages: [budget: {size: 40%, choose_among: [quantize]}]")
    (budget,) = recipe.stages
    assert isinstance(budget, Budget) and budget.choose_among == ("quantize",)


def test_search_needs_formats_to_choose_among(place: Place) -> None:
    with pytest.raises(CompressError, match="choose_among needs quantize"):
        place.search("40%", choose_among=["prune"])
