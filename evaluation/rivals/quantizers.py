"""What do the strongest quantisers that run on a CPU lose, on the same tokens as ours?

    python -m evaluation rivals [--models smollm2-135m demo ...] [--rivals ...] [--work DIR]

For each model and rival: a virtual environment with pinned requirements (made once), its own quantisation of
the base on exactly the sequences that bench.py calibrates on, then the score of what it wrote, in that
environment and through its own loader, on exactly the sequences that bench.py evaluates on (score.py). Head
and embedding are kept by all. The group size of 4-bit weights is the largest that the model's widths allow,
and 64 on SmolLM2, as ours have it. Seconds and memory are the rival's own, on the threads given; a rival that
fails is written down as such. On SmolLM2 AutoRound costs hours and each of the others five minutes; on the
small models AutoRound costs minutes, the others less than one. A finished quantisation lies under --work and
is not made again, only scored. The result goes to results/rivals-MODEL.json, a rival at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation import machine, results
from evaluation.models import MODELS, present
from evaluation.options import parser
from evaluation.reference_models import FIRST_LAYERS, SMOLLM2, WIDE
from evaluation.results import ROOT, Failure, Rival, Rivals
from evaluation.rivals import sequences
from evaluation.rivals.environments import Environment


class Quantizer(NamedTuple):
    """A quantiser of others: its package, and the environment that it runs in."""

    package: str
    environment: str


RIVALS = {  # by the name of their script: rival_NAME.py
    "llmcompressor": Quantizer("llmcompressor", "llmcompressor"),
    "gptqmodel": Quantizer("gptqmodel", "gptqmodel"),
    "autoround": Quantizer("auto-round", "autoround"),
    "smoothquant": Quantizer("llmcompressor", "llmcompressor"),
}
GROUP_SIZES = {SMOLLM2: 64, FIRST_LAYERS: 64, WIDE: 64, "demo": 64, "wikilm-8m": 128, "stories260k": 32}


def options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """What the rivals of both kinds take."""
    found = parser(name, doc)
    found.add_argument(
        "--work",
        type=lambda text: Path(text).resolve(),
        default=ROOT / "out" / "rivals",
        help="where environments and models lie; default: out/rivals",
    )
    return found


def quantized(model: str, rival: str, given: argparse.Namespace) -> Rival:
    """Quantise a model with one rival, unless that is done already, and score the result."""
    files = sequences.write(model, given.work / "sequences")
    package, named = RIVALS[rival]
    environment = Environment(given.work / "venvs" / named, named, given.threads)
    group_size = GROUP_SIZES[model]
    job = f"{model}-{sequences.described(files.calibration).sha256[:8]}-g{group_size}-{given.dtype}"
    place = given.work / "out" / job / rival
    place.mkdir(parents=True, exist_ok=True)
    facts, scores, log = place / "facts.json", place / "score.json", place / "log.txt"
    if not facts.exists():
        shutil.rmtree(place / "model", ignore_errors=True)  # what a killed run left
        work = [
            "--base",
            files.base,
            "--calibration",
            files.calibration,
            "--out",
            place / "model",
            "--facts",
            facts,
        ]
        environment.run(f"rival_{rival}", [*work, "--group", group_size, "--dtype", given.dtype], log)
    made = json.loads(facts.read_text("utf-8"))
    judged = ["--base", files.base, "--model", place / "model" / made.pop("folder")]
    environment.run("score", [*judged, "--evaluation", files.evaluation, "--json", scores], log)
    versions = environment.versions(package, "torch", "transformers")
    return Rival.model_validate({"versions": versions} | made | json.loads(scores.read_text("utf-8")))


def attempted(model: str, rival: str, given: argparse.Namespace) -> Rival | Failure:
    """What a rival makes of a model, or why it does not run."""
    print(f"{model}: {rival} ...", flush=True)
    try:
        return quantized(model, rival, given)
    except (RuntimeError, subprocess.CalledProcessError) as failure:
        return Failure(error=str(failure).replace(str(given.work), "WORK"))


def table(found: Mapping[str, Rival | Failure]) -> str:
    """The results as a few aligned lines."""
    lines = [f"{'rival':15}{'bits':>7}{'KL nats':>10}{'top-1':>8}{'perplexity':>12}{'MB':>7}{'CPU s':>8}"]
    for name, rival in found.items():
        if isinstance(rival, Failure):
            lines.append(f"{name:15}failed: {rival.error}")
            continue
        quality = f"{rival.bits_per_weight:7.3f}{rival.kl_nats_mean:10.5f}{rival.top1_agreement:8.4f}"
        size = f"{rival.perplexity:12.3f}{rival.size_bytes / 1e6:7.2f}{rival.cpu_seconds:8.0f}"
        lines.append(f"{name:15}{quality}{size}")
    return "\n".join(lines)


def write(model: str, rival: str, found: Rival | Failure, given: argparse.Namespace) -> None:
    """Write what a rival made of a model beside the others that read the same sequences."""
    files = sequences.write(model, given.work / "sequences")
    used = {side: sequences.described(getattr(files, side)) for side in ("calibration", "evaluation")}
    before = results.load(results.RESULTS, f"rivals-{model}", Rivals)
    same = before is not None and (before.calibration, before.evaluation) == tuple(used.values())
    others = before.rivals if before is not None and same else {}
    facts = {"threads": given.threads, "base": files.base.name, **used, "rivals": {**others, rival: found}}
    results.write(f"rivals-{model}", machine.head(), facts)


def main(argv: Sequence[str]) -> int:
    """Measure every rival on every model; 1 where none runs."""
    asked = options("rivals", __doc__)
    asked.add_argument("--models", nargs="+", choices=MODELS, default=present())
    asked.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    asked.add_argument(
        "--dtype", default="auto", help="what rivals load the base in: auto (as on disk), float32"
    )
    given = machine.parse(asked, argv, threads=1)
    ran = False
    for model in given.models:
        for rival in given.rivals:
            found = attempted(model, rival, given)
            write(model, rival, found, given)
            print(table({rival: found}), flush=True)
            ran |= isinstance(found, Rival)
    return int(not ran)
