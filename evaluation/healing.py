"""How much of what pruning lost does training win back, and by which loss?

    python evaluation/healing.py [--models demo wikilm-8m] [--rows ...] [--threads 2]

A model is cut to 60 % of the parameters of its layers, as loses least in evaluation/pruning.py, and trained on the rest of the
text that calibrated, 4 windows of 256 tokens a step. `long` is the one to look at; the others are its loss and others' at fewer
steps, all alike but for what their name says. Each row is a whole `run_recipe` of the cut model and its own report; `kl_cut` is
the loss without training. The result goes to evaluation/results/healing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import LENGTH, MODELS, head
from pruning import WINDOWS, outline, stages

from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report

FILE = Path(__file__).parent / "results" / "healing.json"
CUTS = {"demo": "obs, sensitivity, ffn and kv", "wikilm-8m": "hidden, then ffn by sensitivity"}
RATES = {"demo": 1e-3, "wikilm-8m": 2e-4}
LONG = {"demo": 1500, "wikilm-8m": 500}  # steps
SHARE, SHORT, BATCH = 0.6, 150, 4
LOSSES = ("reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl", "total_variation", "cross_entropy")
ROWS: dict[str, dict[str, Any]] = {
    "long": {},
    "forward_kl": {},
    **{loss: {"loss": loss} for loss in LOSSES},
    "half cross-entropy": {"label_share": 0.5},
    "temperature 2": {"temperature": 2.0},
    "hidden states": {"hidden": 1.0},
    "kept teacher, 64 likeliest": {"cache": True, "top_k": 64},
    "kept teacher, 16 likeliest": {"cache": True, "top_k": 16},
    "half on-policy": {"on_policy": 0.5},
    "lora": {"train": "lora"},
    "norms": {"train": "norms"},
}


def settings(model: str, row: str) -> dict[str, Any]:
    """The `distill` of a row."""
    steps, rate = (LONG[model], 1) if row == "long" else (SHORT, {"lora": 5, "norms": 10}.get(row, 1))
    return {"steps": steps, "batch": BATCH, "learning_rate": RATES[model] * rate, **ROWS[row]}


def recipe_of(text: str, *entries: dict[str, Any]) -> Recipe:
    data = {"source": text, "samples": WINDOWS, "length": LENGTH}
    return Recipe.model_validate({"data": data, "stages": list(entries)})


def facts(report: Report) -> dict[str, Any]:
    """What is lost after cutting and training."""
    trained = report.stages[-1].model_dump()
    return {
        "kl_nats_mean": report.fidelity.kl_nats_mean,
        "perplexity": report.compressed.perplexity,
        "base_perplexity": report.base.perplexity,
        **{key: trained[key] for key in ("seconds", "kl_before", "kl_after", "curve", "notes")},
    }


def heal(name: str, rows: list[str], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows of a model, the cut made once."""
    base, text = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMCOMPRESS_CACHE"] = folder
        cuts = [{"prune": cut} for cut in stages(outline(base), SHARE)[CUTS[name]]]
        cut = run_recipe(recipe_of(text, *cuts), Path(folder) / "cut", base=base).fidelity.kl_nats_mean
        for row in rows:
            lesson = settings(name, row)
            recipe = recipe_of(text, {"distill": {**lesson, "student": str(Path(folder) / "cut")}})
            report = run_recipe(recipe, Path(folder) / "out", base=base, overwrite=True)
            found = {"model": name, "row": row, "cut": CUTS[name], **lesson, **facts(report), "kl_cut": cut}
            found |= {"won_back": 1 - found["kl_nats_mean"] / cut, "commit": head()["commit"]}
            print(f"{name}: {row}: KL {cut:.4f} -> {found['kl_nats_mean']:.4f}, {found['seconds']:.0f} s", flush=True)
            known = [old for old in known if (old["model"], old["row"]) != (name, row)] + [found]
            FILE.write_text(json.dumps({**head(), "rows": known}, indent=2) + "\n")
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
    for name in given.models:
        print(f"{name} ...", file=sys.stderr, flush=True)
        known = heal(name, given.rows, known)


if __name__ == "__main__":
    main()
