"""What the BOS protocol changes: recipes on a model whose tokenizer adds BOS, with and without it in every sequence.

    python evaluation/bos.py [--threads 1]

stories260K is the one model beside the project whose tokenizer does. Each recipe is run twice, and each artefact is measured in
both protocols, so that what calibration saw and what was scored are told apart. The result goes to evaluation/results/bos.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import HERE, LENGTH, MODELS, head

from llmcompress.data.sources import DataSpec
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe

RECIPES = {
    "nf4-nearest": "[{quantize: {format: nf4, rounding: nearest}}]",
    "nf4-gptq": "[{quantize: {format: nf4}}]",
    "w8a8": "[{quantize: {format: w8a8}}]",
    "w4a8": "[{quantize: {format: w4a8}}]",
    "ffn-75-obs": "[{prune: {axis: ffn, keep: 0.75}}]",
}


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each recipe, protocol of calibration and protocol of evaluation."""
    base, text = MODELS["stories260k"]
    found = []
    for name, stages in RECIPES.items():
        recipe = Recipe.parse(f"stages: {stages}")
        for calibrated in (True, False):
            out = folder / f"{name}-{calibrated}"
            run_recipe(recipe, out, base=base, data=DataSpec(source=text, length=LENGTH, bos=calibrated))
            for scored in (True, False):
                spec = DataSpec(source=text, length=LENGTH, bos=scored)
                measured = evaluate(str(out), against=base, data=spec)
                kept = {key: measured[key] for key in ("perplexity", "kl_nats_mean", "kl_nats_p99", "top1_agreement")}
                found.append({"recipe": name, "calibrated_with_bos": calibrated, "scored_with_bos": scored, **kept})
                print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    base, text = MODELS["stories260k"]
    specs = {bos: DataSpec(source=text, length=LENGTH, bos=bos) for bos in (True, False)}
    perplexity = {str(bos).lower(): evaluate(base, data=spec)["perplexity"] for bos, spec in specs.items()}
    with tempfile.TemporaryDirectory() as folder:
        result = head() | {"model": "stories260k", "base_perplexity_with_bos": perplexity, "rows": rows(Path(folder))}
    (HERE / "results" / "bos.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
