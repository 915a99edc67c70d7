"""Budgets in parameters and bytes: hit from below, or refused with what would be possible."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.architectures.resize import changed
from llmcompress.errors import ModelError, RecipeError
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.prune.allocation import of_a_unit, widths
from llmcompress.stages.prune.stage import Prune
from tests.artefacts import CPU
from tests.bases import save_base, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")


def outline(family: str = "llama", **config: Any) -> MetaModel:
    model = MetaModel(pico(family, **config).config, CPU, torch.float32)
    model.model.tie_weights()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_torch_counts_them(family: str, tied: bool) -> None:
    model = outline(family, tie_word_embeddings=tied)
    assert model.parameters() == sum(p.numel() for p in model.model.parameters())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
@pytest.mark.parametrize("budget", [{"parameters": 0.6}, {"parameters": 0.83}, {"size": 300_000}])
def test_a_uniform_budget_is_reached_from_below(family: str, budget: dict[str, Any]) -> None:
    model = outline(family)
    stage = Prune.model_validate({"axis": "ffn", "allocation": "uniform", **budget})
    left = MetaModel(changed(model.config, stage.changes(model)), CPU, torch.float32)
    left.model.tie_weights()
    each = 1 if "parameters" in budget else 4  # bytes
    reached, allowed = each * sum(p.numel() for p in left.model.parameters()), stage.allowed(model)
    assert 0.985 * allowed <= reached <= allowed, (
        "one unit in each of two layers is 0.5 to 1 % of so small a model"
    )
    assert stage.cut(model).widths["ffn"] == (stage.cut(model).widths["ffn"][0],) * 2


def test_a_budget_keeps_widths_that_kernels_like_where_it_can() -> None:
    model = outline(intermediate_size=2048, num_hidden_layers=8)
    stage = Prune.model_validate({"axis": "ffn", "parameters": 0.705, "allocation": "uniform"})
    assert stage.cut(model).widths["ffn"][0] % 8 == 0


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_there_is(seed: int) -> None:
    """Against trying everything, on curves that fall."""
    draw = random.Random(seed)
    curves = {
        axis: [sorted((draw.random() for _ in range(5)), reverse=True) for _ in range(2)]
        for axis in ("ffn", "kv")
    }
    unit = {"ffn": [3, 3], "kv": [7, 7]}
    budget = draw.randint(34, 80)
    found = widths(curves, unit, budget, {"ffn": 1, "kv": 2})
    spent = sum(unit[axis][i] * n for axis, counts in found.items() for i, n in enumerate(counts))
    loss = sum(curves[axis][i][n] for axis, counts in found.items() for i, n in enumerate(counts))
    best = min(
        curves["ffn"][0][a] + curves["ffn"][1][b] + curves["kv"][0][c] + curves["kv"][1][d]
        for a in range(1, 5) for b in range(1, 5) for c in (2, 4) for d in (2, 4)
        if 3 * (a + b) + 7 * (c + d) <= budget
    )  # fmt: skip
    assert spent <= budget and loss == pytest.approx(best)


def test_a_unit_has_the_parameters_of_all_that_runs_along_its_axis() -> None:
    assert of_a_unit(outline(), "ffn", outline().parameters) == [3 * 64, 3 * 64]
    # q and o of four heads, k and v of one
    assert of_a_unit(outline(), "kv", outline().parameters) == [64 * (2 * 16 * 4 + 2 * 16)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [{"axis": "ffn"}, {"axis": "layer"}, {"axis": "hidden", "score": "activation"}]
)
def test_a_size_is_that_of_the_file(stage: dict[str, Any], tmp_path: Path) -> None:
    text, base = write_text(tmp_path / "facts.txt"), save_base(tmp_path / "base", num_hidden_layers=4)
    whole = (base / "model.safetensors").stat().st_size
    entries = {"base": str(base), "stages": [{"prune": {**stage, "size": f"{whole * 0.8 / 1000:.3f} kB"}}]}
    data = {"source": str(text), "samples": 8, "length": 32, "evaluation_samples": 4}
    run_recipe(Recipe.model_validate({**entries, "data": data}), tmp_path / "out")
    reached = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert reached <= 0.8 * whole + 1
    assert reached >= {"layer": 0.5, "hidden": 0.75}.get(stage["axis"], 0.785) * whole


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"axis": "ffn", "parameters": 0.1}, "parameters: 0.1 can't be reached: .* at least"),
        ({"axis": "ffn", "size": "10kB"}, "size: 10000 can't be reached"),
        ({"axis": "ffn", "parameters": 1000, "allocation": "uniform"}, "parameters: 1000 can't be reached"),
        ({"axis": "layer", "parameters": 0.05}, "parameters: 0.05 can't be reached"),
        ({"axis": ["ffn", "kv"], "parameters": 0.05}, "parameters: 0.05 can't be reached"),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_least_there_is(stage: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        Prune.model_validate(stage).changes(outline())


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ("{axis: ffn}", "give one of keep, parameters and size, not none"),
        ("{axis: ffn, keep: 0.5, size: 1MB}", "give one of keep, parameters and size, not keep and size"),
        ("{axis: ffn, size: big}", "is no size; write bytes, or 100MB"),
        ("{axis: ffn, parameters: 1.2}", "prune.parameters"),
        ("{axis: [ffn, layer], keep: 0.5}", "axis layer and ffn: ffn goes with kv or with q"),
        ("{axis: [kv, q], keep: 0.5}", "everything else in a stage of its own"),
        (
            "{axis: [ffn, kv], parameters: 0.5, allocation: uniform}",
            "allocation: uniform with a budget is for one axis",
        ),
        ("{axis: layer, keep: [1, 1]}", "a list of keep is for one of ffn, kv, q, not for layer"),
        ("{axis: [ffn, kv], keep: [64, 64]}", "a list of keep is for one of ffn, kv, q, not for kv and ffn"),
        ("{axis: ffn, keep: [64, 64], multiple: 8}", "says the width of every layer; leave allocation"),
        ("{axis: ffn, keep: []}", "prune.keep"),
        ("{axis: ffn, keep: [64, -1]}", "prune.keep"),
        ("{axis: layer, keep: 0.5, allocation: sensitivity}", "allocation is for ffn, kv, q, not for layer"),
        ("{axis: expert, keep: 2, repair: true}", "repair is for ffn, hidden, kv, q, not for expert"),
        ("{axis: expert, keep: 2, score: obs}", "score obs is not for axis expert; use activation"),
        ("{axis: hidden, keep: 0.5, score: obs}", "score obs is not for axis hidden; use pca or activation"),
    ],
)
def test_a_wrong_budget_is_told_in_one_line(stage: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: [prune: {stage}]")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ([32, 32, 32], "keep lists 3 layers, and this model has 2"),
        ([32, 80], 'keep 80 of axis "ffn" in layer 1, which has 64'),
        ([0, 32], 'keep 0 of axis "ffn" in layer 0, where it must stay; keep at least 1'),
    ],
)
def test_a_list_of_widths_of_another_model_is_refused(keep: list[int], why: str) -> None:
    stage = Prune.model_validate({"axis": "ffn", "keep": keep})
    with pytest.raises(ModelError, match=why):
        stage.changes(outline(intermediate_size=64))


def test_widths_that_a_budget_found_give_the_same_bytes_as_a_list(tmp_path: Path) -> None:
    text, base = write_text(tmp_path / "facts.txt"), save_base(tmp_path / "base")
    data = {"source": str(text), "samples": 8, "length": 32, "evaluation_samples": 4}

    def left_by(stage: dict[str, Any], out: str) -> tuple[dict[str, Any], bytes]:
        entries = {"base": str(base), "data": data, "stages": [{"prune": {"axis": "ffn", **stage}}]}
        report = run_recipe(Recipe.model_validate(entries), tmp_path / out)
        return report.stages[0].model_dump(), (tmp_path / out / "model.safetensors").read_bytes()

    found, weights = left_by({"parameters": 0.8, "multiple": 4}, "found")
    assert len(set(found["widths"]["ffn"])) > 1, "the layers of this base lose unequally"
    listed, again = left_by({"keep": found["widths"]["ffn"]}, "listed")
    assert listed["widths"] == found["widths"]
    assert again == weights


@pytest.mark.parametrize(
    ("text", "size"), [("100MB", 100_000_000), ("1.5 GiB", 1610612736), ("700k", 700_000), (12, 12)]
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert Prune.model_validate({"axis": "ffn", "size": text}).size == size
