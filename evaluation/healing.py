"""How much of what pruning lost does training win back, and by which loss?

    python evaluation/healing.py [--models demo wikilm-8m] [--losses forward_kl cross_entropy ...] [--steps 150] [--threads 2]

A model is cut to 60 % of the parameters of its blocks, as loses least in evaluation/pruning.py, and trained on the text that
calibrated, 16 windows of 256 tokens a step. Each row is a whole `compress` and its own report; `kl_cut` is the loss of the row
without training. The result goes to evaluation/results/healing.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import LENGTH, MODELS, head
from pruning import WINDOWS, outline, stages

from llmcompress.recipe import Recipe
from llmcompress.run import compress

FILE = Path(__file__).parent / "results" / "healing.json"
CUTS = {"demo": "obs, sensitivity, ffn and kv", "wikilm-8m": "hidden, then ffn by sensitivity"}
SHARE = 0.6


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One row: what is lost after cutting and training."""
    base, text = MODELS[name]
    cuts = [{"prune": cut} for cut in stages(outline(base), SHARE)[CUTS[name]]]
    data = {"source": text, "samples": WINDOWS, "length": LENGTH}
    recipe = Recipe.model_validate({"data": data, "stages": [*cuts, {"distill": settings}]})
    with tempfile.TemporaryDirectory() as folder:
        report = compress(recipe, Path(folder) / "out", base=base)
    trained = report.stages[-1].model_dump()
    return {
        "cut": CUTS[name],
        "kl_nats_mean": report.fidelity.kl_nats_mean,
        "perplexity": report.compressed.perplexity,
        "base_perplexity": report.base.perplexity,
        "seconds": trained["seconds"],
        **{key: trained[key] for key in ("kl_before", "kl_after", "curve", "notes")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--losses", nargs="+", default=["forward_kl", "cross_entropy"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
    cut = {
        (row["model"], row["row"]): row
        for row in json.loads((FILE.parent / "pruning.json").read_text())["rows"]
        if row["share"] == SHARE
    }
    for name in given.models:
        for loss in given.losses:
            print(f"{name}: {loss} ...", file=sys.stderr, flush=True)
            settings = {"loss": loss, "steps": given.steps, "batch": 16, "learning_rate": given.learning_rate}
            row = {"model": name, **settings, **measure(name, settings), "kl_cut": cut[name, CUTS[name]]["kl_nats_mean"]}
            row["won_back"] = 1 - row["kl_nats_mean"] / row["kl_cut"]
            row["commit"] = head()["commit"]
            print(f"{name}: {loss}: KL {row['kl_cut']:.4f} -> {row['kl_nats_mean']:.4f}, {row['seconds']:.0f} s", flush=True)
            same = (name, loss, given.steps, given.learning_rate)
            known = [old for old in known if (old["model"], old["loss"], old["steps"], old["learning_rate"]) != same] + [row]
            FILE.write_text(json.dumps({**head(), "rows": known}, indent=2) + "\n")


if __name__ == "__main__":
    main()
