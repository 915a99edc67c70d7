"""Which way of making a model smaller loses least at the same bytes: cutting, tying, sharing, products, codebooks, 4 bits?

    python evaluation/sharing.py [--models demo wikilm-8m] [--rows ...] [--threads 2]

`ways`: at most 90, 75, 60 and 50 % of the base's parameters, each alone and healed by a short distillation; codes, which are
always smaller, stand once, with the bytes that they have. `tied`: the fit of one matrix for embedding and head against taking
either or their mean, before and after a short heal. `grouping`: how the layers that share are found, at the same bytes. Each
row is a whole `run_recipe` from disk to disk and its own report, on windows of 256 tokens, 64 of which calibrate. The result goes
to evaluation/results/sharing-MODEL.json, a row at a time.
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
from pruning import WINDOWS, outline

from llmcompress.errors import CompressError
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.outcome import outline_after
from llmcompress.pipeline.resolve import find_base
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.share.stage import Share

RESULTS = Path(__file__).parent / "results"
SHARES = (0.9, 0.75, 0.6, 0.5)
HEAL = {name: {"steps": 150, "batch": 4, "learning_rate": rate} for name, rate in (("demo", 3e-4), ("wikilm-8m", 2e-4))}
SCALES = {"train": "scales", "learning_rate": 1e-3}
TIE = {"tie": {}}
Stages = list[dict[str, Any]]


def smallest(
    model: MetaModel, candidates: list[dict[str, Any]], kind: type[Share] | type[LowRank], most: int
) -> dict[str, Any] | None:
    """The candidate that leaves most parameters, but not more than so many."""
    found: tuple[int, dict[str, Any] | None] = (0, None)
    for candidate in candidates:
        left = outline_after(kind.model_validate(candidate), model)
        count = left.parameters()
        if found[0] < count <= most:
            found = count, candidate
    return found[1]


def ways(model: MetaModel, share: float) -> dict[str, Stages]:
    """What is done to reach a share of the parameters, by way."""
    layers, whole = len(model.layers), model.parameters()
    most, tied = int(share * whole), model.config.tie_word_embeddings
    cut = [{"axis": ["ffn", "kv"], "parameters": most}]
    if not tied:
        cut = [{"axis": "hidden", "multiple": 2, "keep": (1 + share) / 2}, {"axis": "ffn", "parameters": most}]
    rows: dict[str, Stages] = {"prune": [{"prune": one} for one in cut]}
    parts = (["ffn"], ["ffn", "attention"])
    found = [{"layers": "auto", "groups": n, "parts": list(part)} for part in parts for n in range(1, layers)]
    if (shared := smallest(model, found, Share, most)) is not None:
        rows["share"] = [{"tie": shared}]
    for name, count in (("low rank", 1), ("basis of 2 layers", 2)):
        found = [{"basis": count, "keep": keep / 100} for keep in range(30, 100)]
        if (made := smallest(model, found, LowRank, most)) is not None:
            rows[name] = [{"tie": made}]
    return rows


def rows_of(name: str, model: MetaModel) -> dict[str, Stages]:
    """All rows of a model: what is done in each."""
    heal, rows = HEAL[name], dict[str, Stages]()
    for share in SHARES:
        for way, stages in ways(model, share).items():
            rows[f"ways: {round(100 * share)} %, {way}"] = stages
            rows[f"ways: {round(100 * share)} %, {way}, healed"] = [*stages, {"distill": heal}]
    for way, stages in {
        "codebook of 16 a row": [{"codebook": {"entries": 16}}],
        "codebook of 256 a linear": [{"codebook": {"entries": 256, "per": "linear"}}],
        "nf4": [{"quantize": {"format": "nf4"}}],
        "nf4, layer 32": [{"quantize": {"format": "nf4", "group_size": 32}}],
        "w8a16": [{"quantize": {"format": "w8a16"}}],
    }.items():
        rows[f"ways: {way}"] = stages
        if way in ("codebook of 16 a row", "nf4"):
            rows[f"ways: {way}, healed"] = [*stages, {"distill": heal | SCALES}]
    if not model.config.tie_word_embeddings:
        rows["ways: tie embedding and head"] = [TIE]
        rows["ways: tie embedding and head, healed"] = [TIE, {"distill": heal}]
        for fit in ("embedding", "head", "mean"):
            stages = [{"tie": {**TIE["tie"], "fit": fit}}]
            rows[f"tied: {fit}"], rows[f"tied: {fit}, healed"] = stages, [*stages, {"distill": heal}]
    layers = len(model.layers)
    for by in ("kl", "cka", "cosine", "adjacent"):
        rows[f"grouping: {by}"] = [{"share": {"layers": by, "groups": layers // 2 + 1}}]
    rows["grouping: kl, residual of rank 16"] = [{"share": {"layers": "kl", "groups": layers // 2 + 1, "residual_rank": 16}}]
    return rows


def measure(name: str, stages: Stages) -> dict[str, Any]:
    """A row: what is left and what is lost."""
    base, text = MODELS[name]
    recipe = Recipe.model_validate({"data": {"source": text, "samples": WINDOWS, "length": LENGTH}, "stages": stages})
    with tempfile.TemporaryDirectory() as folder:
        report = run_recipe(recipe, Path(folder) / "out", base=base)
    whole = Checkpoint.open(find_base(base).folder).size_bytes
    return {
        "size_bytes": report.compressed.size_bytes,
        "share_of_bytes": (report.compressed.size_bytes or 0) / whole,
        "parameters": report.compressed.parameters,
        "kl_nats_mean": report.fidelity.kl_nats_mean,
        "top1_agreement": report.fidelity.top1_agreement,
        "perplexity": report.compressed.perplexity,
        "base_perplexity": report.base.perplexity,
        "seconds": sum(stage.seconds for stage in report.stages),
        "facts": [told(stage.model_dump(mode="json")) for stage in report.stages],
    }


def told(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage found out."""
    return {key: stage[key] for key in ("name", "groups", "kl_nats", "balance", "kl_before", "kl_after") if key in stage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=HEAL, default=list(HEAL))
    parser.add_argument("--rows", nargs="+", help="rows whose name holds one of these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        file = RESULTS / f"sharing-{name}.json"
        for row, stages in rows_of(name, outline(MODELS[name][0])).items():
            if given.rows and not any(part in row for part in given.rows):
                continue
            try:
                found = {"row": row, "stages": stages, **measure(name, stages), "commit": head()["commit"]}
            except CompressError as error:
                print(f"{name}: {row}: {error}", file=sys.stderr, flush=True)
                continue
            print(
                f"{name}: {row}: {found['share_of_bytes']:.3f}, KL {found['kl_nats_mean']:.4f}, {found['seconds']:.0f} s",
                flush=True,
            )
            known = json.loads(file.read_text())["rows"] if file.is_file() else []
            known = [old for old in known if old["row"] != row] + [found]
            file.write_text(json.dumps({**head(), "model": name, "rows": known}, indent=2) + "\n")


if __name__ == "__main__":
    main()
