"""Bases whose weights are finite and huge, tiny, all zero, or no numbers: a right result, or one line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.bases import save_base
from tests.campaign.bench import Bench, Count, partial_of
from tests.campaign.forked import run

FORMATS = ("nf4", "fp4", "int8", "w8a8", "w4a8", "w4a4", "w8a16", "w4a16", "q4_0", "iq4_nl")
STAGES = (
    *(f"quantize: {{format: {name}, rounding: {how}}}" for name in FORMATS for how in ("nearest", "gptq")),
    *("quantize: {format: nf4, rounding: learned, steps: 4}", "quantize: {format: nf4, smooth: {}}"),
    *("quantize: {format: nf4, rotate: heads}", "quantize: {format: w8a8, embedding: int8}"),
    *("quantize: {format: w8a8, activations: static}", "quantize: {format: nf4, protect: 0.2}"),
    *(
        f"prune: {{axis: ffn, keep: 0.5, score: {score}}}"
        for score in ("obs", "taylor", "wanda", "magnitude", "activation")
    ),
    *("prune: {axis: kv, keep: 0.5}", "prune: {axis: layer, keep: 0.5}", "prune: {axis: hidden, keep: 0.5}"),
    *(
        "sparsify: {pattern: '2:4'}",
        "prune: {axis: ffn, parameters: 0.8}",
        "prune: {axis: sublayer, keep: 0.5}",
    ),
    *(
        "codebook: {entries: 4}",
        "codebook: {entries: 256}",
        "low_rank: {layers_per_basis: 2, keep: 0.75}",
        "tie: {}",
    ),
    *("share: {layers: adjacent, parts: [ffn], groups: 1}", "distill: {steps: 2, batch: 2}"),
)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one of 7e4": lambda W: W.index_put((torch.tensor([0]),) * W.dim(), torch.tensor(7e4)),
    "one of 3e38": lambda W: W.index_put((torch.tensor([0]),) * W.dim(), torch.tensor(3e38)),
    "times 1e6": lambda W: W * 1e6,
    "times 1e30": lambda W: W * 1e30,
    "times 1e-30": lambda W: W * 1e-30,
    "zeros": torch.zeros_like,
    "one NaN": lambda W: W.index_put((torch.tensor([0]),) * W.dim(), torch.tensor(math.nan)),
}


def weights(bench: Bench, tries: int) -> Count:
    """Run one stage on each of `tries` bases, in each of which one kind of tensor is changed."""
    count = Count("weights")
    sound = save_base(bench.folder / "base-weights", num_hidden_layers=2)
    names = sorted(load_file(sound / "model.safetensors"))
    for place in bench.places("weight", tries):
        stage, name, how = (
            bench.draw.choice(STAGES),
            bench.draw.choice(names),
            bench.draw.choice(sorted(CHANGES)),
        )
        base, out = place / "base", place / "out"
        shutil.copytree(sound, base)
        tensors = load_file(base / "model.safetensors")
        tensors[name] = CHANGES[how](tensors[name])
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        data = f"{{source: {bench.folder / 'facts.txt'}, samples: 8, length: 24, evaluation_samples: 4}}"
        (place / "recipe.yaml").write_text(f"data: {data}\nstages: [{{{stage}}}]\n")
        ended = run(bench.folder, "run", str(place / "recipe.yaml"), "--base", str(base), "--out", str(out))
        fault = ended.crashed or (_no_report(out) if ended.code == 0 else None)
        # a finished layer stays, to go on from
        begun = any(partial_of(out).glob("journal*/**/*.safetensors"))
        if ended.code == 2 and (out.exists() or (partial_of(out).exists() and not begun)):
            fault = fault or "a refused run left a folder that holds nothing to go on from"
        count.ended(f"code {ended.code}", f"{stage} with {name} {how}: {fault}" if fault else None)
        shutil.rmtree(place)
    return count


def _no_report(out: Path) -> str | None:
    """What is wrong with the report of an artefact, or None: JSON of finite numbers."""
    try:
        found = json.loads((out / "report.json").read_text(), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        return f"report.json: {error}"
    return None if _kl(found) is not None else "report.json tells no KL"


def _kl(report: Any) -> float | None:
    return report["fidelity"]["kl_nats_mean"]  # type: ignore[no-any-return]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")
