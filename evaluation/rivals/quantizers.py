"""What do the strongest 4-bit quantisers that run on a CPU lose, on the same tokens as ours?

    python -m evaluation rivals [--models demo wikilm-8m stories260k] [--rivals ...] [--work DIR]

For each model and rival: a virtual environment with pinned requirements (made once), its own quantisation of
the base on exactly the sequences that bench.py calibrates on, then the score of what it wrote, in that
environment and through its own loader, on exactly the sequences that bench.py evaluates on (score.py). Head
and embedding are kept by all. The group size is the largest that the model's widths allow. Seconds and memory
are the rival's own, on the threads given; a rival that fails is written down as such. AutoRound costs
minutes, the others less than one. A finished quantisation lies under --work and is not made again, only
scored. The result goes to results/rivals-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation import machine, results
from evaluation.models import present
from evaluation.options import parser
from evaluation.results import ROOT, Failure, Rival
from evaluation.rivals import sequences
from evaluation.rivals.environments import Environment

# name -> package
RIVALS = {"autoround": "auto-round", "gptqmodel": "gptqmodel", "llmcompressor": "llmcompressor"}
GROUP_SIZES = {"demo": 64, "wikilm-8m": 128, "stories260k": 32}


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
    environment = Environment(given.work / "venvs" / rival, rival, given.threads)
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
    versions = environment.versions(RIVALS[rival], "torch", "transformers")
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


def main(argv: Sequence[str]) -> int:
    """Measure every rival on every model; 1 where none runs."""
    asked = options("rivals", __doc__)
    asked.add_argument("--models", nargs="+", choices=GROUP_SIZES, default=present())
    asked.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    asked.add_argument(
        "--dtype", default="auto", help="what rivals load the base in: auto (as on disk), float32"
    )
    given = machine.parse(asked, argv, threads=1)
    ran = False
    for model in given.models:
        found = {rival: attempted(model, rival, given) for rival in given.rivals}
        files = sequences.write(model, given.work / "sequences")
        facts = {
            "threads": given.threads,
            "base": files.base.name,
            "calibration": sequences.described(files.calibration),
            "evaluation": sequences.described(files.evaluation),
            "rivals": found,
        }
        results.write(f"rivals-{model}", machine.head(), facts)
        print(table(found))
        ran |= any(isinstance(rival, Rival) for rival in found.values())
    return int(not ran)
