"""One word that decides how much work a run is: what it chooses, and where that is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmcompress.data.sources import AMOUNTS, EFFORTS
from llmcompress.errors import CompressError, RecipeError
from llmcompress.pipeline import plan as planning
from llmcompress.pipeline.api import compress
from llmcompress.pipeline.effort import effort_facts
from llmcompress.pipeline.plan import Plan, fitting, plan_recipe
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report
from tests.bases import known, save_base, write_text

pytestmark = pytest.mark.usefixtures("short_runs")
LITTLE: Any = {"length": 16, "evaluation_samples": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


def recipe_of(text: Path, base: Path, data: dict[str, Any], **settings: Any) -> Recipe:
    entries = {"base": str(base), "data": {"source": str(text), **data}, "stages": [{"quantize": settings}]}
    return Recipe.model_validate(entries)


def test_what_an_effort_chose_is_in_report_card_and_recipe(text: Path, base: Path, tmp_path: Path) -> None:
    asked = recipe_of(text, base, LITTLE)
    report = run_recipe(asked, tmp_path / "out", effort="fast")
    facts = known(report.effort)
    assert facts.level == "fast"
    assert facts.chosen == {"data.samples": 32, "stages.0.quantize.rounding": "gptq"}
    assert report.data.calibration_tokens == 32 * 16
    written = Recipe.from_pretrained(tmp_path / "out")
    assert written.effort == "fast" and (written.data.samples, written.data.length) == (32, 16)
    assert written.digest == report.recipe_digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Chosen by effort `fast`: `data.samples: 32`, `stages.0.quantize.rounding: gptq`." in card
    assert Report.of(tmp_path / "out").effort == facts


def test_the_recipe_of_an_artefact_does_the_same_again(text: Path, base: Path, tmp_path: Path) -> None:
    asked = recipe_of(text, base, {"evaluation_samples": 4}, rounding="nearest")
    first = run_recipe(asked, tmp_path / "out")
    # as the text is short: 96 tokens are the most that the tokenizer's model takes
    assert known(first.effort).chosen.keys() == {"data.samples", "data.length"}
    assert reproduce(str(tmp_path / "out")).verdict == "bit-equal"


def test_what_a_recipe_says_wins(text: Path, base: Path, tmp_path: Path) -> None:
    asked = recipe_of(text, base, {"samples": 3, **LITTLE}, rounding="nearest")
    report = run_recipe(asked, tmp_path / "out", effort="best")
    assert report.effort is None and report.data.calibration_tokens == 3 * 16
    assert plan_recipe(asked, effort="best").rows[1].stage == "quantize (nf4, nearest)"


def test_a_model_in_memory_takes_an_effort_too(text: Path, base: Path) -> None:
    _, report = compress(base, recipe_of(text, base, LITTLE), effort="fast")
    assert known(report.effort).chosen["data.samples"] == AMOUNTS["fast"].samples


def test_an_unknown_effort_is_one_clear_line(text: Path, base: Path, tmp_path: Path) -> None:
    wrong: Any = "most"
    with pytest.raises(RecipeError, match="effort is most; use fast, balanced, best"):
        run_recipe(recipe_of(text, base, LITTLE), tmp_path / "out", effort=wrong)


def test_the_plan_says_what_an_effort_chooses(text: Path, base: Path) -> None:
    asked = recipe_of(text, base, LITTLE)
    plan = plan_recipe(asked)
    assert plan.effort == "balanced" and "effort balanced: data.samples 128" in plan.notes
    best = plan_recipe(asked, effort="best")
    assert best.effort == "best" and best.rows[1].stage == "quantize (nf4, learned)"
    assert any(
        "stages.0.quantize.rounding learned, stages.0.quantize.steps 200" in note for note in best.notes
    )
    assert effort_facts(asked, asked.with_effort("best"), asked.data, 128, 16) is not None


def test_more_effort_takes_more_time(text: Path, base: Path) -> None:
    asked = recipe_of(text, base, LITTLE)
    seconds = [known(plan_recipe(asked, effort=effort).rows[1].seconds) for effort in EFFORTS]
    assert seconds == sorted(seconds)


def test_the_best_effort_that_fits_is_taken(text: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"fast": 100.0, "balanced": 200.0, "best": 400.0}
    monkeypatch.setattr(
        planning, "plan_recipe", lambda recipe, *, effort, **given: Plan((), (), taken[effort], effort)
    )
    asked = recipe_of(text, base, LITTLE)
    words = "fast about 1 min 40 s, balanced about 3 min 20 s, best about 6 min 40 s"
    assert fitting(asked, 250) == ("balanced", words)
    assert fitting(asked, 400)[0] == "best" and fitting(asked, 100)[0] == "fast"
    with pytest.raises(CompressError) as caught:
        fitting(asked, 99)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
