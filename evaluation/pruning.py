"""What does structured pruning lose? Every score with and without repair, allocations and axes, at the same parameters.

    python evaluation/pruning.py [--models demo wikilm-8m] [--shares 0.8 0.6] [--rows obs ...] [--threads 2]

A share is that of the parameters of the decoder layers that stay. Scores and allocations cut the feed-forward width until it is
reached, exactly where its units allow; layers and sublayers go until it is. `hidden` narrows embedding and head too, so
its models are smaller than the others at the same share. Each row is a whole `run_recipe` from disk to disk and its own report,
on windows of 256 tokens, 64 of which calibrate. The result goes to evaluation/results/pruning.json.
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

from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.resolve import config_of, find_base
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe

FILE = Path(__file__).parent / "results" / "pruning.json"
WINDOWS = 64
SCORES = ("obs", "taylor", "wanda", "activation", "magnitude")


def stages(model: MetaModel, share: float) -> dict[str, list[dict[str, Any]]]:
    """What is done for each row of the table."""
    inner = model.parameters() - model.parameters({axis: [0] * len(model.layers) for axis in ("ffn", "kv")})
    target, layers = model.parameters() - int((1 - share) * inner), len(model.layers)
    pca = not model.config.tie_word_embeddings
    narrow = {"axis": "hidden", "multiple": 2, **({} if pca else {"score": "activation"})}
    rows: dict[str, list[dict[str, Any]]] = {}
    for score in SCORES:
        for mend in (True, False):
            cut = {"axis": "ffn", "parameters": target, "allocation": "uniform", "score": score, "repair": mend, "multiple": 1}
            rows[f"{score}{'' if mend else ', no repair'}"] = [cut]
    rows["obs, sensitivity"] = [{"axis": "ffn", "parameters": target}]
    rows["obs, sensitivity, ffn and kv"] = [{"axis": ["ffn", "kv"], "parameters": target}]
    rows["layers by kl"] = [{"axis": "layer", "keep": max(1, int(share * layers))}]
    rows["layers by influence"] = [{"axis": "layer", "keep": max(1, int(share * layers)), "score": "influence"}]
    rows["sublayers by kl"] = [{"axis": "sublayer", "parameters": target}]
    rows["hidden"] = [{**narrow, "keep": share}]
    rows["hidden, no repair"] = [{**narrow, "keep": share, "repair": False}]
    rows["hidden, then ffn by sensitivity"] = [{**narrow, "keep": (1 + share) / 2}, {"axis": "ffn", "parameters": target}]
    return rows


def measure(name: str, cuts: list[dict[str, Any]]) -> dict[str, Any]:
    base, text = MODELS[name]
    data = {"source": text, "samples": WINDOWS, "length": LENGTH}
    recipe = Recipe.model_validate({"data": data, "stages": [{"prune": cut} for cut in cuts]})
    with tempfile.TemporaryDirectory() as folder:
        report = run_recipe(recipe, Path(folder) / "out", base=base)
        left = outline(str(Path(folder) / "out"))
        inner = sum(p.numel() for layer in left.layers for p in layer.parameters())
    return {
        "stages": cuts,
        "parameters": report.compressed.parameters,
        "block_parameters": inner,
        "widths": [stage.model_dump().get("widths") for stage in report.stages],
        "kl_nats_mean": report.fidelity.kl_nats_mean,
        "top1_agreement": report.fidelity.top1_agreement,
        "perplexity": report.compressed.perplexity,
        "base_perplexity": report.base.perplexity,
        "seconds": sum(stage.seconds for stage in report.stages),
    }


def outline(base: str) -> MetaModel:
    return MetaModel(config_of(find_base(base, weights=False).folder), torch.device("cpu"), torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
    for name in given.models:
        model = outline(MODELS[name][0])
        inner = sum(p.numel() for layer in model.layers for p in layer.parameters())
        for share in given.shares:
            for row, cuts in stages(model, share).items():
                if given.rows and row not in given.rows:
                    continue
                print(f"{name}, {share}: {row} ...", file=sys.stderr, flush=True)
                found = {"model": name, "share": share, "row": row, **measure(name, cuts)}
                found["share_reached"] = found["block_parameters"] / inner
                found["commit"] = head()["commit"]
                print(f"{name}, {share}: {row}: KL {found['kl_nats_mean']:.4f}, {found['seconds']:.0f} s", flush=True)
                known = [old for old in known if (old["model"], old["share"], old["row"]) != (name, share, row)] + [found]
                FILE.write_text(json.dumps({**head(), "calibration_windows": WINDOWS, "rows": known}, indent=2) + "\n")


if __name__ == "__main__":
    main()
