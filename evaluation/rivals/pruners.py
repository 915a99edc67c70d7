"""What does Torch-Pruning lose on our models, at the same parameters and on the same tokens?

    python -m evaluation rivals-pruning [--models demo wikilm-8m] [--shares 0.8 0.6] [--work DIR]

For each model every importance in every scope (rival_torchpruning.py) at every share of the decoder layers'
parameters, on the sequences that bench.py calibrates on, in the rival's own environment (made once under
--work), then the score of the checkpoint that it wrote (score.py). What was cut once lies under --work and is
only scored again. The result goes to results/rivals-pruning.json, where the rows of other models stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation import machine, results
from evaluation.models import MODELS
from evaluation.results import RivalPruningFailure, RivalPruningRow
from evaluation.rivals import sequences
from evaluation.rivals.environments import Environment
from evaluation.rivals.quantizers import options
from evaluation.rivals.score import stored

NAME = "rivals-pruning"
RIVAL = "torchpruning"
PACKAGE = "torch-pruning"
IMPORTANCES = ("taylor", "magnitude")
SCOPES = ("inner", "all", "ffn")
SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SCORED = ("kl_nats_mean", "kl_nats_stderr", "kl_nats_p99", "top1_agreement", "perplexity", "base_perplexity")
SPENT = ("seconds", "cpu_seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Cut:
    """What is asked of the rival."""

    importance: str
    scope: str
    share: float


def parameters(folder: Path) -> tuple[int, int]:
    """How many a checkpoint holds in its decoder layers, and in all; tied ones lie there once."""
    counts = {name: count for name, (count, _) in stored(folder).items()}
    return sum(count for name, count in counts.items() if name.startswith("model.layers.")), sum(
        counts.values()
    )


def pruned(model: str, cut: Cut, files: sequences.Files, given: argparse.Namespace) -> RivalPruningRow:
    """Cut the base, unless that is done already, and score what is left."""
    environment = Environment(given.work / "venvs" / RIVAL, RIVAL, given.threads)
    job = f"{model}-{sequences.described(files.calibration).sha256[:8]}-float32"
    place = given.work / "out" / job / f"{RIVAL}-{cut.importance}-{cut.scope}-{cut.share}"
    place.mkdir(parents=True, exist_ok=True)
    folder, facts, scores, log = (
        place / "model",
        place / "facts.json",
        place / "score.json",
        place / "log.txt",
    )
    if not facts.exists():
        work = ["--base", files.base, "--calibration", files.calibration, "--out", folder, "--facts", facts]
        asked = [part for name, value in asdict(cut).items() for part in (f"--{name}", value)]
        environment.run(f"rival_{RIVAL}", [*work, "--dtype", "float32", *asked], log)
    judged = ["--base", files.base, "--model", folder, "--evaluation", files.evaluation, "--json", scores]
    environment.run("score", judged, log)
    made, scored = (json.loads(file.read_text("utf-8")) for file in (facts, scores))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    versions = environment.versions(PACKAGE, "torch", "transformers")
    layers, every = parameters(folder)
    base_layers, base_every = parameters(files.base)
    return RivalPruningRow.model_validate(
        {
            "model": model,
            "rival": f"{PACKAGE} {versions[PACKAGE]}",
            **asdict(cut),
            "method": made["method"],
            "shape": {name: config[name] for name in SHAPE},
            "block_parameters": layers,
            "base_block_parameters": base_layers,
            "parameters": every,
            "base_parameters": base_every,
            **{side: sequences.described(getattr(files, side)) for side in ("calibration", "evaluation")},
            **{name: scored[name] for name in SCORED},
            **{name: made[name] for name in SPENT},
            "commit": machine.commit(),
            "environment": {"versions": versions, "device": machine.head().hardware},
        }
    )


def attempted(
    model: str, cut: Cut, files: sequences.Files, given: argparse.Namespace
) -> RivalPruningRow | RivalPruningFailure:
    """The row of a cut, or why there is none."""
    try:
        return pruned(model, cut, files, given)
    except (RuntimeError, subprocess.CalledProcessError) as failure:
        error = str(failure).replace(str(given.work), "WORK")
        return RivalPruningFailure(error=error, model=model, rival=PACKAGE, **asdict(cut))


def line(row: RivalPruningRow | RivalPruningFailure) -> str:
    """A row in words."""
    named = f"{row.model:10}{row.importance:10}{row.scope:6}{row.share:5.2f}"
    if isinstance(row, RivalPruningFailure):
        return f"{named}  failed: {row.error}"
    left = row.block_parameters / row.base_block_parameters
    widths = "/".join(str(width) for width in row.shape.values())
    sizes = f"{widths:13}{row.block_parameters:9} ({left:.3f}) of{row.parameters:8}"
    loss = f"{row.kl_nats_mean:9.4f} nats/token, perplexity {row.perplexity:.2f}"
    return f"{named}  {sizes}{loss}, {row.seconds:.0f} s"


def main(argv: Sequence[str]) -> int:
    """Measure every cut of every model; 1 where none could be made."""
    asked = options(NAME, __doc__)
    asked.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    asked.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.6])
    asked.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    asked.add_argument("--out", type=Path, help="result file; default results/rivals-pruning.json")
    given = machine.parse(asked, argv, threads=1)
    cuts = [
        Cut(importance, scope, share)
        for share in given.shares
        for scope in given.scopes
        for importance in IMPORTANCES
    ]
    measured = False
    for model in given.models:
        files = sequences.write(model, given.work / "sequences")
        for cut in cuts:
            row = attempted(model, cut, files, given)
            measured |= isinstance(row, RivalPruningRow)
            print(line(row), flush=True)
            rows = results.merge(NAME, ("model", "importance", "scope", "share"), row, given.out)
            results.write(NAME, machine.head(), {"threads": given.threads, "rows": rows}, given.out)
    return int(not measured)
