"""What does BOS change? Recipes on a model whose tokenizer adds it, with and without it in every sequence.

    python -m evaluation bos [--threads 1]

Of the models beside the checkout, stories260k alone has such a tokenizer. Each recipe is run twice, and each
artefact is evaluated in both protocols, so that what calibrated and what evaluated are told apart. The result
goes to results/bos.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation import machine, results
from evaluation.models import LENGTH, MODELS
from evaluation.options import parser
from evaluation.results import BosRow
from evaluation.runs import known, run
from llmcompress.data.sources import DataSpec
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.recipe.recipe import Recipe

MODEL = "stories260k"
RECIPES = {
    "nf4-nearest": "[{quantize: {format: nf4, rounding: nearest}}]",
    "nf4-gptq": "[{quantize: {format: nf4}}]",
    "w8a8": "[{quantize: {format: w8a8}}]",
    "w4a8": "[{quantize: {format: w4a8}}]",
    "ffn-75-obs": "[{prune: {axis: ffn, keep: 0.75}}]",
}


def data(bos: bool) -> DataSpec:
    """The text with or without BOS in every sequence."""
    return DataSpec(source=MODELS[MODEL].text, length=LENGTH, bos=bos)


def scored(name: str, folder: Path, calibrated: bool, evaluated: bool) -> BosRow:
    """An artefact, evaluated in one protocol."""
    found = evaluate(str(folder), against=MODELS[MODEL].base, data=data(evaluated))
    return BosRow(
        recipe=name,
        calibrated_with_bos=calibrated,
        scored_with_bos=evaluated,
        perplexity=found.perplexity,
        kl_nats_mean=known(found.kl_nats_mean),
        kl_nats_p99=known(found.kl_nats_p99),
        top1_agreement=known(found.top1_agreement),
    )


def main(argv: Sequence[str]) -> int:
    """Run every recipe in both protocols, evaluate in both, and write the result."""
    machine.parse(parser("bos", __doc__), argv, threads=1)
    base = MODELS[MODEL].base
    perplexity = {str(bos).lower(): evaluate(base, data=data(bos)).perplexity for bos in (True, False)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, stages in RECIPES.items():
            for calibrated in (True, False):
                out = Path(folder) / f"{name}-{calibrated}"
                run(Recipe.parse(f"stages: {stages}"), out, base, data(calibrated))
                for evaluated in (True, False):
                    rows.append(scored(name, out, calibrated, evaluated))
                    print(rows[-1], file=sys.stderr, flush=True)
    facts = {"model": MODEL, "base_perplexity_with_bos": perplexity, "rows": rows}
    results.write("bos", machine.head(), facts)
    return 0
