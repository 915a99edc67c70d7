"""How much do the recipes lose? Every recipe of recipes/ on every model at hand, beside stock bitsandbytes.

    python -m evaluation bench [--models smollm2-135m demo ...] [--recipes nf4-gptq ...] [--threads 2]

Each row is a whole run from disk to disk and its own report, on the sequences that models.py gives for the
model; on SmolLM2 the perplexity of sequences of 2048 tokens, with BOS where its tokenizer puts one, stands
beside. A row is written to results/fidelity-MODEL.json as soon as it is measured. SmolLM2 is measured once
`python -m evaluation reference-models` made it, the models and texts beside the checkout (../shared) where
they are; the demo model needs nothing. Last, RESULTS.md and the heads of the recipes are written.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from evaluation import machine, results, tables
from evaluation.baselines import STAGES
from evaluation.models import MODELS, Subject, present
from evaluation.options import parser
from evaluation.results import ROOT, Environment, FidelityRow, modern
from evaluation.runs import known, losses, run, seconds
from llmcompress.errors import ModelError
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report

LONG = {"length": 2048, "evaluation_samples": 16, "bos": "auto"}  # sequences as long as papers have them


def recipes(model: str, names: Sequence[str] | None) -> dict[str, Recipe]:
    """The recipes of recipes/ and the baselines, all or by name; `demo` is for the demo model alone."""
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    every = {modern(file.stem): Recipe.from_file(file) for file in files}
    every |= {name: Recipe.parse(f"stages: {stages}") for name, stages in STAGES.items()}
    return {
        name: recipe
        for name, recipe in every.items()
        if (name != "demo" or model == "demo") and (not names or name in names)
    }


def row(name: str, report: Report) -> FidelityRow:
    """What the tables show of a report, and what it was measured with."""
    small = report.compressed
    bits = [found["bits"] for stage in report.stages if "bits" in (found := stage.model_dump())]
    return FidelityRow(
        **losses(report),
        recipe=name,
        bits=bits[-1] if bits else 8 * known(small.size_bytes) / known(small.parameters),
        size_bytes=int(known(small.size_bytes)),
        kl_nats_p99=report.fidelity.kl_nats_p99,
        top1_agreement=known(report.fidelity.top1_agreement),
        perplexity_ratio=report.fidelity.perplexity_ratio,
        perplexity_ratio_ci95=report.fidelity.perplexity_ratio_ci95,
        seconds=seconds(report),
        peak_memory_bytes=report.cost.peak_memory_bytes,
        recipe_digest=report.recipe_digest,
        data_sha256=report.data.sha256,
        parameters=small.parameters,
        kept=sum(len(stage.kept) for stage in report.stages),
        commit=machine.commit(),
        environment=Environment(**report.environment.model_dump()),
    )


def write(model: str, rows: list[dict[str, object]]) -> None:
    """Write the rows of a model, in the order of KL."""
    facts = {
        "model": model,
        "text": Path(MODELS[model].text).name,
        "windows": {
            "length": MODELS[model].length,
            "calibration": MODELS[model].samples,
            "evaluation": MODELS[model].evaluation_samples,
        },
        "rows": sorted(rows, key=lambda entry: float(str(entry["kl_nats_mean"]))),
    }
    results.write(f"fidelity-{model}", machine.head(), facts)


@cache
def base_on_long(subject: Subject) -> float:
    """Perplexity of the base on sequences of 2048 tokens."""
    return on_long(subject, subject.base)


def on_long(subject: Subject, folder: str) -> float:
    """Perplexity of a model in a folder on sequences of 2048 tokens of the subject's text."""
    return evaluate(folder, data=subject.data().model_copy(update=LONG)).perplexity


def measure(model: str, name: str, recipe: Recipe) -> None:
    """Measure one recipe on one model and replace its row; remove it where the recipe does not apply."""
    print(f"{model}: {name} ...", file=sys.stderr, flush=True)
    subject = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "out", time.process_time()
        try:
            report = run(recipe.model_copy(update={"data": subject.data()}), out, subject.base)
        except ModelError as error:
            print(f"{model}: {name}: {error}", file=sys.stderr, flush=True)
            write(model, results.without(f"fidelity-{model}", recipe=name))
            return
        found = row(name, report).model_copy(update={"cpu_seconds": time.process_time() - start})
        if subject.long:
            long = {"base_perplexity_2048": base_on_long(subject)}
            long["perplexity_2048"] = on_long(subject, str(out))
            found = found.model_copy(update=long)
    write(model, results.merge(f"fidelity-{model}", ("recipe",), found))
    print(f"{model}: {name}: KL {found.kl_nats_mean:.6f} nats/token, {found.seconds:.0f} s", flush=True)


def main(argv: Sequence[str]) -> int:
    """Measure, then write the tables."""
    options = parser("bench", __doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=present())
    options.add_argument("--recipes", nargs="+", help="only these")
    given = machine.parse(options, argv)
    for model in given.models:
        for name, recipe in recipes(model, given.recipes).items():
            measure(model, name, recipe)
    return tables.main([])
