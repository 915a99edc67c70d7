"""How much do the recipes lose? Every recipe of recipes/ on every model at hand, beside stock bitsandbytes, in one run.

    python evaluation/bench.py [--models demo wikilm-8m stories260k] [--recipes nf4-gptq ...] [--threads 2]

Each row is a whole `run_recipe` from disk to disk and its own report; windows are 256 tokens, 256 calibrate and 64 evaluate. The
results go to evaluation/results/fidelity-MODEL.json, and evaluation/tables.py writes them into README.md and the recipes. The
models and texts beside the project (../shared) are used where they are; the demo model needs nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llmcompress.errors import ModelError
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import environment
from llmcompress.report.schema import Report

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
MODELS = {  # base, text
    "demo": ("demo", "python-docs"),
    "wikilm-8m": (str(SHARED / "models" / "wikilm-8m"), str(SHARED / "data" / "wikitext-2")),
    "stories260k": (str(SHARED / "models" / "stories260K"), str(SHARED / "data" / "tinystories")),
}
STOCK = {  # what stock bitsandbytes and the classics offer besides nf4-nearest, and what a recipe is to be read against
    "nf4-nearest-double": "stages: [{quantize: {format: nf4, double_quant: true, rounding: nearest}}]",
    "fp4-nearest": "stages: [{quantize: {format: fp4, rounding: nearest}}]",
    "int8-nearest": "stages: [{quantize: {format: int8, rounding: nearest}}]",
    "int8-nearest-6": "stages: [{quantize: {format: int8, threshold: 6.0, rounding: nearest}}]",
    "int8-smooth-all": "stages: [{quantize: {format: int8, smooth: {}}}]",  # what protecting wins
    "w8a8-all": "stages: [{quantize: {format: w8a8, smooth: {}}}]",
    "w4a16": "stages: [{quantize: {format: w4a8, activations: none, smooth: {}}}]",  # what w4a8 loses by its activations
    "ffn-75-magnitude": "stages: [{prune: {axis: ffn, keep: 0.75, multiple: 32, score: magnitude, repair: false}}]",
    "kv-half-magnitude": "stages: [{prune: {axis: kv, keep: 0.5, score: magnitude, repair: false}}]",
    "depth-75-influence": "stages: [{prune: {axis: layer, keep: 0.75, score: influence}}]",
    "depth-50-kl": "stages: [{prune: {axis: layer, keep: 0.5}}]",
    "ffn-budget-uniform": "stages: [{prune: {axis: ffn, parameters: 0.8, allocation: uniform}}]",  # what the allocation wins
    "hidden-75-plain": "stages: [{prune: {axis: hidden, keep: 0.75, repair: false}}]",
    "magnitude-2-4": "stages: [{sparsify: {pattern: '2:4', score: magnitude}}]",
    "wanda-50": "stages: [{sparsify: {pattern: unstructured, keep: 0.5, score: wanda}}]",
    "tie-plain": "stages: [{tie: {}}]",
    "share-ffn": "stages: [{share: {layers: auto, parts: [ffn], groups: 3}}]",
    "basis-75": "stages: [{low_rank: {layers_per_basis: 2, keep: 0.75}}]",
    "nf4-gptq-32": "stages: [{quantize: {format: nf4, group_size: 32}}]",  # about the bytes of codebook-16
    "magnitude-50": "stages: [{sparsify: {pattern: unstructured, keep: 0.5, score: magnitude}}]",
}
LENGTH = 256
WINDOWS = {"length": LENGTH, "bos": False}  # text alone, as what the rivals were measured on (rivals/windows.py)


def recipes(model: str, names: list[str] | None) -> dict[str, Recipe]:
    """The recipes of recipes/ and the stock ones; the demo recipe is for the demo model."""
    files = {file.stem: Recipe.from_file(file) for file in sorted((HERE.parent / "recipes").glob("*.yaml"))}
    every = {**files, **{name: Recipe.parse(text) for name, text in STOCK.items()}}
    wanted = {name for name in every if name != "demo" or model == "demo"}
    return {name: recipe for name, recipe in every.items() if name in wanted and (not names or name in names)}


def row(name: str, report: Report) -> dict[str, Any]:
    """What the tables show of a report."""
    small = report.compressed
    bits = [stage.model_dump()["bits"] for stage in report.stages if "bits" in stage.model_dump()]
    return {
        "recipe": name,
        "bits": bits[-1] if bits else 8 * (small.size_bytes or 0) / (small.parameters or 1),
        "size_bytes": report.compressed.size_bytes,
        **report.fidelity.model_dump(mode="json"),
        "perplexity": report.compressed.perplexity,
        "base_perplexity": report.base.perplexity,
        "seconds": sum(stage.seconds for stage in report.stages),
        "peak_memory_bytes": report.cost.peak_memory_bytes,
        "recipe_digest": report.recipe_digest,
        "data_sha256": report.data.sha256,
        "parameters": small.parameters,
        "kept": sum(len(stage.kept) for stage in report.stages),
        "commit": commit(),
        "environment": report.environment.model_dump(mode="json"),
    }


def commit() -> str:
    """The commit that is measured."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()


def head() -> dict[str, Any]:
    """What every result of a script begins with: the command, the commit, the versions and the hardware."""
    script = f"evaluation/{Path(sys.argv[0]).name}"
    about = environment(torch.device("cpu"))
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "commit": commit(),
        "hardware": about["device"],
        "versions": about["versions"],
    }


def bench(model: str, chosen: dict[str, Recipe]) -> None:
    base, text = MODELS[model]
    file = HERE / "results" / f"fidelity-{model}.json"
    known = {entry["recipe"]: entry for entry in json.loads(file.read_text())["rows"]} if file.is_file() else {}
    for name, recipe in chosen.items():
        print(f"{model}: {name} ...", file=sys.stderr, flush=True)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=WINDOWS)})
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = run_recipe(recipe, Path(folder) / "out", base=base, data=text)
            except ModelError as error:  # what a recipe asks of a model that this one is not
                print(f"{model}: {name}: {error}", file=sys.stderr, flush=True)
                known.pop(name, None)
                continue
        known[name] = row(name, report)
        print(f"{model}: {name}: KL {report.fidelity.kl_nats_mean:.6f} nats, {known[name]['seconds']:.0f} s", flush=True)
    result = {
        "command": f"python evaluation/bench.py --models {model} --threads {torch.get_num_threads()}",
        "model": model,
        "text": Path(text).name,
        "windows": {"length": LENGTH, "calibration": 256, "evaluation": 64},
        "rows": sorted(known.values(), key=lambda entry: float(entry["kl_nats_mean"])),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=[m for m, (b, _) in MODELS.items() if m == "demo" or Path(b).is_dir()]
    )
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for model in given.models:
        bench(model, recipes(model, given.recipes))
    subprocess.run([sys.executable, HERE / "tables.py"], check=True)


if __name__ == "__main__":
    main()
