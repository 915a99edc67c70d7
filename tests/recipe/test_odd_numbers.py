"""Numbers and words of a recipe that no run can end with, and packages that it would miss only hours
later."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.data.sources import DataSpec
from llmcompress.errors import CompressError, RecipeError
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.distill import config

pytestmark = pytest.mark.usefixtures("short_runs")

NUMBERS = (10**400, 10**30, 2**63, ".inf", ".nan", "1e400")
PLACES = (
    *("data: {samples: N}", "data: {length: N}", "data: {evaluation_samples: N}"),
    *(
        f"distill: {{{key}: N}}"
        for key in ("steps", "batch", "length", "temperature", "hidden", "attention", "weight_decay")
    ),
    *(
        f"distill: {{{key}: N}}"
        for key in ("evaluate_every", "patience", "micro_batch", "learning_rate", "label_share")
    ),
    *("distill: {train: lora, rank: N}", "distill: {cache: true, top_k: N}"),
    *(
        "quantize: {steps: N}",
        "quantize: {format: int8, threshold: N}",
        "low_rank: {layers_per_basis: N}",
        "low_rank: {layers_per_basis: 1, rank: N}",
    ),
    *(
        "share: {layers: auto, groups: N}",
        "share: {layers: auto, groups: 1, residual_rank: N}",
        "share: {pairs: [[0, N]]}",
    ),
    *(
        "prune: {axis: ffn, size: N}",
        "prune: {axis: ffn, keep: 0.5, multiple: N}",
        "prune: {axis: ffn, parameters: N}",
    ),
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", NUMBERS, ids=[str(number)[:8] for number in NUMBERS])
def test_a_number_beyond_all_runs_is_refused_by_its_key(place: str, number: int | str) -> None:
    text = place.replace("N", str(number))
    text = f"{text}\nstages: [quantize]" if place.startswith("data") else f"stages: [{{{text}}}]"
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(text)
    assert len(str(refused.value)) < 400 and str(refused.value).isprintable()


def test_the_largest_numbers_that_are_taken_have_a_digest_and_a_yaml() -> None:
    recipe = Recipe.parse(
        "data: {samples: 10000000}\nstages: [{distill: {steps: 1000000000, batch: 1000000000}}]"
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe and recipe.digest and recipe.training_tokens(2048)


SURROGATES = (
    'base: "\\ud800"\nstages: [quantize]',
    'data: {source: "\\ud800"}\nstages: [quantize]',
    'stages: ["\\ud800"]',
    'stages: [{"\\ud800": 1}]',
    '"\\ud800": 1',
    'stages: [{quantize: {skip: ["\\ud800"]}}]',
    'stages: [{quantize: {overrides: {"\\ud800": {group_size: 64}}}}]',
    'stages: [{distill: {teacher: "\\ud800"}}]',
    'stages: [{distill: {trackers: ["\\ud800"]}}]',
)


@pytest.mark.parametrize("text", SURROGATES)
def test_half_a_code_point_in_a_recipe_is_one_line_that_can_be_written(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(text)
    assert str(refused.value).encode() and str(refused.value).isprintable()


def test_half_a_code_point_in_the_data_of_a_command_is_one_line() -> None:
    for text in ('{source: "\\ud800"}', '{"\\ud800": x}'):
        with pytest.raises(CompressError) as refused:
            DataSpec().with_text(text)
        assert str(refused.value).encode()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_tracker_without_its_package_is_refused_at_the_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "available_trackers", lambda: ["wandb"])
    recipe = Recipe.parse("base: demo\ndata: {samples: 2, length: 16, evaluation_samples: 2}\n"
                          "stages: [{distill: {steps: 1, trackers: [wandb, tensorboard]}}]")  # fmt: skip
    with pytest.raises(
        CompressError, match="tensorboard needs the package tensorboard; pip install tensorboard"
    ):
        run_recipe(recipe, tmp_path / "out") if command == "run" else plan_recipe(recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "plan"])
def test_lora_without_its_package_is_refused_at_the_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "is_peft_available", lambda: False)
    recipe = Recipe.parse(
        "base: demo\nstages: [{prune: {axis: ffn, keep: 0.5}}, {distill: {steps: 1, train: lora}}]"
    )
    with pytest.raises(CompressError, match="lora needs the package peft; pip install peft"):
        run_recipe(recipe, tmp_path / "out") if command == "run" else plan_recipe(recipe)
    assert not list(tmp_path.iterdir())
