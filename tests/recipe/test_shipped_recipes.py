"""Every recipe that we ship makes an artefact of a small base, which goes to a local Hub; its card is right,
as is the report.

Text, steps and base are small, so what comes out is no good; how each is done, measured and told is what a
user gets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

from llmcompress.formats.quantization_config import METHOD
from llmcompress.recipe import catalogue
from llmcompress.report.schema import Report
from tests.bases import facts, save_base
from tests.hub_cards import wrong_with
from tests.hub_server import TOKEN, environment, serve

pytestmark = [pytest.mark.usefixtures("short_runs"), pytest.mark.slow]  # a run of each recipe

RECIPES = {file.stem: file for file in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))}
LAYERS = {"width-and-depth-budget": 8}  # which takes an eighth of them; the others have a base of 4
MAKE = """
import sys, yaml
from functools import partial
from pathlib import Path
import torch
from llmcompress import Recipe, push
from llmcompress.pipeline.run import run_recipe
from llmcompress.report import metrics
sys.modules["llmcompress.pipeline.evaluate"].speed = partial(metrics.speed, decode_tokens=2, repeats=1)
torch.set_num_threads(1)
for told in sys.argv[1:]:
    base, file = told.split("=")[0], Path(told.split("=")[1])
    entries = yaml.safe_load(file.read_text())
    entries["data"] = {"source": "them/texts", "samples": 8, "length": 32, "evaluation_samples": 4}
    for step in entries["stages"]:
        if "distill" in step:
            step["distill"] |= {"steps": 2, "batch": 2}
        if step.get("quantize", {}).get("rounding") == "learned":
            step["quantize"]["steps"] = 4
    run_recipe(Recipe.model_validate(entries), file.stem, base=base)
    push(file.stem, f"me/{file.stem}")
"""


def base_of(name: str) -> str:
    """The base that a recipe is run on."""
    return f"them/base-{LAYERS.get(name, 4)}"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, bytes]]]:
    """What is on the Hub of each recipe's artefact."""
    place = tmp_path_factory.mktemp("recipes")
    with serve() as (hub, endpoint):
        card = b"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# a base\n"
        for layers in {4, *LAYERS.values()}:
            base = save_base(place / f"base-{layers}", num_hidden_layers=layers)
            hub.add(
                f"them/{base.name}",
                {file.name: file.read_bytes() for file in base.iterdir()} | {"README.md": card},
            )
        hub.add("them/texts", facts("train.jsonl", "test.jsonl"), kind="dataset")
        command = [sys.executable, "-c", MAKE, *(f"{base_of(name)}={file}" for name, file in RECIPES.items())]
        env = {**os.environ, **environment(endpoint, place / "home", TOKEN), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        yield {name: hub.files(f"me/{name}") for name in RECIPES}


def numbers(cell: str) -> list[float]:
    """What a cell of a table says: `2.76 MB` is 2.76 millions, `12.34 [12.10, 12.60]` three numbers, `97.80
    %` a share."""
    scale = 0.01 if cell.endswith("%") else {"k": 1e3, "M": 1e6, "G": 1e9}.get(cell.rpartition(" ")[2][:1], 1)
    return [
        float(number.replace(",", "")) * scale for number in re.findall(r"[0-9][0-9.,]*[0-9]|[0-9]", cell)
    ]


def tables(text: str) -> dict[str, list[list[float]]]:
    """Every row of a card's tables by its first cell, the others as numbers."""
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {row[0].replace("\\|", "|"): [numbers(cell) for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_of_each_recipe_is_right_and_says_what_the_report_says(
    name: str, pushed: dict[str, dict[str, bytes]]
) -> None:
    there = pushed[name]
    text, report = there["README.md"].decode(), Report.from_json(there["report.json"])
    base, small, fidelity = report.base, report.compressed, report.fidelity
    assert wrong_with(text) == []
    card: Any = ModelCard(text)  # raises for a model-index that huggingface_hub can't read
    assert (card.data.license, card.data.language, card.data["library_name"]) == (
        "apache-2.0",
        ["en"],
        "transformers",
    )
    changed = (
        "quantized" if {stage.name for stage in report.stages} & {"quantize", "codebook"} else "finetune"
    )
    assert (card.data.base_model, card.data["base_model_relation"]) == (base_of(name), changed)
    results = card.data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        "perplexity": small.perplexity,
        **{
            key: getattr(fidelity, key)
            for key in ("kl_nats_mean", "kl_nats_p99", "top1_agreement", "perplexity_ratio")
        },
    }
    assert {(result.dataset_type, result.dataset_revision) for result in results} == {
        ("them/texts", report.data.revision)
    }
    entries = parse_eval_result_entries(yaml.safe_load(there[".eval_results/llmcompress.yaml"]))
    assert {entry.task_id: entry.value for entry in entries} == {
        "perplexity": small.perplexity,
        "kl_nats_mean": fidelity.kl_nats_mean,
    }
    rows = tables(text)
    for label, field in (
        ("bytes on disk", "size_bytes"),
        ("parameters", "parameters"),
        ("bytes in memory", "memory_bytes"),
        ("tokens/s, reading", "tokens_per_s"),
        ("tokens/s, writing", "decode_tokens_per_s"),
    ):
        assert [cell[0] for cell in rows[label][:2]] == pytest.approx(
            [getattr(m, field) for m in (base, small)], rel=6e-3
        )
    for cell, model in zip(rows["perplexity [95 %]"], (base, small), strict=False):
        assert cell == pytest.approx([model.perplexity, *(model.perplexity_ci95 or ())], rel=6e-4)
    assert rows["KL(base || compressed), mean"][0] == pytest.approx([fidelity.kl_nats_mean], rel=6e-4)
    assert rows["KL, 99th percentile"][0] == pytest.approx([fidelity.kl_nats_p99], rel=6e-4)
    assert rows["top-1 agreement"][0] == pytest.approx([fidelity.top1_agreement], abs=6e-5)
    ratio = [fidelity.perplexity_ratio, *(fidelity.perplexity_ratio_ci95 or ())]
    assert rows["perplexity ratio [95 %]"][0] == pytest.approx(ratio, rel=6e-4)
    for linear in report.linears:
        if linear.name in rows:  # the worst
            assert rows[linear.name][1:] == [
                [pytest.approx(linear.bits, rel=6e-4)],
                [pytest.approx(linear.relative_error, abs=6e-5)],
            ]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures and all(there[picture].startswith(b"\x89PNG") for picture in pictures)
    assert f"llmcompress reproduce me/{name}\n" in text and f'name = "me/{name}"\n' in text


@pytest.mark.parametrize("name", RECIPES)
def test_the_list_of_recipes_says_what_loads_the_artefact(
    name: str, pushed: dict[str, dict[str, bytes]]
) -> None:
    config = json.loads(pushed[name]["config.json"])
    method = config.get("quantization_config", {}).get("quant_method")
    own = method == METHOD or "per_layer_config" in config
    plain = catalogue.NATIVE if method else catalogue.TRANSFORMERS
    (entry,) = (entry for entry in catalogue.entries() if entry.name == name)
    assert entry.loads_with == (catalogue.PLUGIN if own else plain)


def test_what_the_hub_would_refuse_is_found() -> None:
    """The rules above are no check if nothing breaks them."""
    result = {"task": {"type": "text-generation"}, "dataset": {"type": "a", "name": "a"}}
    for wrong, why in (
        ({"base_model": "/home/me/base"}, "base_model"),
        ({"base_model_relation": "pruned"}, "base_model_relation"),
        ({"license": "my own"}, "license"),
        ({"license": "mit", "license_name": "mine"}, "license_name"),
        ({"language": [3]}, "language"),
        ({"tags": "llmcompress" * 20}, "tags"),
        ({"model-index": [{"results": []}]}, "model-index[0].name"),
        ({"model-index": [{"name": "a", "results": [result]}]}, "results[0].metrics"),
        (
            {"model-index": [{"name": "a", "results": [result | {"metrics": [{"type": "b"}]}]}]},
            "metrics[0].value",
        ),
    ):
        (found,) = wrong_with(f"---\n{yaml.safe_dump(wrong)}---\n# a card\n")
        assert why in found
