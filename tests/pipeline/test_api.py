"""The Python API: models by name and in memory, recipes in every form, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress
from llmcompress import (
    CompressError,
    DataSpec,
    ModelError,
    Prune,
    Quantize,
    Recipe,
    RecipeError,
    Report,
    compress,
    evaluate,
    plan,
)
from llmcompress.pipeline.api import recipe_of
from llmcompress.pipeline.evaluate import Evaluation
from tests.artefacts import load
from tests.bases import byte_tokenizer, known, save_base, write_text


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    source = str(write_text(tmp_path / "text.txt"))
    return DataSpec(source=source, samples=4, length=24, evaluation_samples=4)


def model_of(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    loaded.eval()
    return loaded


STAGES = [Prune(axis="ffn", keep=0.75, multiple=8), Quantize(format="nf4", group_size=32)]
ENTRIES = [
    {"prune": {"axis": "ffn", "keep": 0.75, "multiple": 8}},
    {"quantize": {"format": "nf4", "group_size": 32}},
]


def test_a_recipe_is_read_in_every_form(tmp_path: Path) -> None:
    expected = Recipe.of_entries({"stages": ENTRIES})
    file = tmp_path / "mine.yaml"
    file.write_text(expected.to_yaml())
    for form in (STAGES, tuple(STAGES), {"stages": ENTRIES}, {"stages": STAGES}, expected, file, str(file)):
        assert recipe_of(form) == expected
    assert recipe_of(STAGES[1]).stages == (STAGES[1],)
    assert recipe_of("nf4-gptq").stages[0].name == "quantize", "a shipped recipe by its name"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"stages": [{"quantize": {"format": "int3"}}]}, "recipe: stages.0.quantize.format: .* not 'int3'"),
        ({"stages": []}, "recipe: stages: "),
        ([], "recipe: stages: "),
        ([3], "recipe: stages.0: "),
        ([Quantize(), Prune(axis="ffn", keep=0.5)], "can't be changed again"),
        (3, "a recipe can't be a int; give a name, a file"),
        ("nf4-gtpq", "did you mean nf4-gptq"),
    ],
)
def test_a_wrong_recipe_is_one_line(recipe: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        recipe_of(recipe)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_becomes_a_folder_and_a_model_in_memory_the_same_model(
    base: Path, spec: DataSpec, tmp_path: Path
) -> None:
    report = compress(base, STAGES, tmp_path / "out", data=spec)
    assert isinstance(report, Report)
    model, again = compress(base, STAGES, data=spec)
    given, third = compress(model_of(base), STAGES, tokenizer=byte_tokenizer(), data=spec)
    assert known(again.fidelity.kl_nats_mean) == pytest.approx(known(report.fidelity.kl_nats_mean), rel=1e-4)
    assert third.fidelity == again.fidelity
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = load(tmp_path / "out")(tokens).logits
        for each in (model, given):
            torch.testing.assert_close(each(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_memory_is_written_to_a_folder(base: Path, spec: DataSpec, tmp_path: Path) -> None:
    model = model_of(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = compress(model, Quantize(), tmp_path / "out", tokenizer=byte_tokenizer(), data=spec)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), (
        "it stays as it is"
    )
    whole = compress(base, Quantize(), tmp_path / "other", data=spec)
    assert report.fidelity == whole.fidelity
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_model_in_memory_needs_its_tokenizer(base: Path, spec: DataSpec, tmp_path: Path) -> None:
    model = model_of(base)
    for act in (
        lambda: compress(model, Quantize(), data=spec),
        lambda: compress(model, Quantize(), tmp_path / "out", data=spec),
        lambda: evaluate(model, data=spec),
    ):
        with pytest.raises(ModelError, match="comes without its tokenizer; give tokenizer="):
            act()
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_a_run_leaves(base: Path, spec: DataSpec, tmp_path: Path) -> None:
    told = plan(base, STAGES, data=spec)
    report = compress(base, STAGES, tmp_path / "out", data=spec)
    assert [row.stage.partition(" ")[0] for row in told.rows] == ["base", "prune", "quantize"]
    assert told.rows[-1].parameters == report.compressed.parameters
    assert "4 sequences of 24 tokens" in told.notes[-1]


def test_a_model_in_memory_measures_as_its_folder(base: Path, spec: DataSpec) -> None:
    tokenizer = byte_tokenizer()
    by_name, live = evaluate(base, data=spec), evaluate(model_of(base), tokenizer=tokenizer, data=spec)
    assert isinstance(live, Evaluation)
    assert (live.perplexity, live.tokens) == (by_name.perplexity, by_name.tokens)
    small, report = compress(base, Quantize(), data=spec)
    measured = evaluate(small, against=base, tokenizer=tokenizer, data=spec)
    assert known(measured.kl_nats_mean) == pytest.approx(known(report.fidelity.kl_nats_mean), rel=0.05)
    assert known(measured.tokens_per_s) > 0


def test_every_public_name_is_there() -> None:
    for name in llmcompress.__all__:
        assert getattr(llmcompress, name) is not None
        assert name in dir(llmcompress)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = llmcompress.nothing
    assert issubclass(ModelError, CompressError)


LATER = """
import sys
import llmcompress
large = {"torch", "transformers", "bitsandbytes", "datasets", "matplotlib", "typer", "rich", "peft"}
late = large & set(sys.modules)
assert not late, late
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

pytestmark = pytest.mark.usefixtures("short_runs")
assert "llmcompress" in AUTO_QUANTIZER_MAPPING
assert not {"matplotlib", "datasets", "typer"} & set(sys.modules)
"""


def test_importing_the_package_imports_nothing_large_and_still_registers() -> None:
    subprocess.run([sys.executable, "-c", LATER], check=True, timeout=120)
