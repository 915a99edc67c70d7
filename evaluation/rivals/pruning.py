"""Side by side with structural pruning: Torch-Pruning on our models, at the same parameters left and on the same tokens.

    python evaluation/rivals/pruning.py --work DIR [--models demo wikilm-8m] [--shares 0.8 0.6]

For each model: the windows that `evaluation/bench.py` uses, then every importance in every scope (see rival_torchpruning.py) at
every share of the parameters of the decoder layers, each in the rival's own environment (made once under DIR, as run.py does),
then the score of the checkpoint that it wrote (see score.py). The result goes to evaluation/results/rivals-pruning.json. Run in
the project's own environment; what was cut once lies under DIR and is only scored again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from run import ASK_VERSIONS, HERE, environment, hardware, run, windows
from score import stored

sys.path.insert(0, str(HERE.parent))
from bench import MODELS, commit

from llmcompress.pipeline.resolve import find_base

RIVAL, PACKAGE = "torchpruning", "torch-pruning"
IMPORTANCES = ("taylor", "magnitude")
SCOPES = ("inner", "all", "ffn")
SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SCORED = ("kl_nats_mean", "kl_nats_stderr", "kl_nats_p99", "top1_agreement", "perplexity", "base_perplexity")
SPENT = ("seconds", "cpu_seconds", "peak_memory_bytes")


def parameters(folder: Path) -> tuple[int, int]:
    """How many a checkpoint holds in its decoder layers, and in all; tied ones lie there once."""
    counts = {name: count for name, (count, _) in stored(folder).items()}
    return sum(count for name, count in counts.items() if name.startswith("model.layers.")), sum(counts.values())


def measure(row: dict[str, Any], base: Path, calibration: Path, evaluation: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Cut the base as `row` says, unless that is done already, and score what is left."""
    python = environment(given.work / "venvs" / RIVAL, HERE / f"requirements-{RIVAL}.txt")
    asked = {name: row[name] for name in ("importance", "scope", "share")}
    job = f"{row['model']}-{windows(calibration)['sha256'][:8]}-float32"
    place = given.work / "out" / job / "-".join([RIVAL, *map(str, asked.values())])
    place.mkdir(parents=True, exist_ok=True)
    model, facts, scores, log = place / "model", place / "facts.json", place / "score.json", place / "log.txt"
    if not facts.exists():
        script = [python, HERE / f"rival_{RIVAL}.py", "--base", base, "--calibration", calibration, "--out", model]
        script += ["--facts", facts, "--dtype", "float32", *(part for name in asked for part in (f"--{name}", asked[name]))]
        run(script, log, given.threads)
    judge = [python, HERE / "score.py", "--base", base, "--model", model]
    run([*judge, "--evaluation", evaluation, "--json", scores], log, given.threads)
    made, scored = json.loads(facts.read_text()), json.loads(scores.read_text())
    config = json.loads((model / "config.json").read_text())
    versions = json.loads(subprocess.check_output([python, "-c", ASK_VERSIONS, PACKAGE, "torch", "transformers"], text=True))
    (layers, every), (base_blocks, base_every) = parameters(model), parameters(base)
    return {
        **row,
        "rival": f"{PACKAGE} {versions[PACKAGE]}",
        "method": made["method"],
        "shape": {name: config[name] for name in SHAPE},
        "block_parameters": layers,
        "base_block_parameters": base_blocks,
        "parameters": every,
        "base_parameters": base_every,
        **{name: scored[name] for name in SCORED},
        **{name: made[name] for name in SPENT},
        "commit": commit(),
        "environment": {"versions": versions, "device": f"{hardware()}, {given.threads} threads"},
    }


def compare(model: str, given: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The windows of one model, and its rows."""
    folder, base = given.work / "windows", find_base(MODELS[model][0]).folder
    subprocess.run([sys.executable, HERE / "windows.py", "--model", model, "--out", folder], check=True)
    calibration, evaluation = (folder / f"{side}-{model}.safetensors" for side in ("calibration", "evaluation"))
    rows = []
    for share in given.shares:
        for scope in given.scopes:
            for importance in IMPORTANCES:
                row = {"model": model, "rival": PACKAGE, "importance": importance, "scope": scope, "share": share}
                try:
                    rows.append(measure(row, base, calibration, evaluation, given))
                except (RuntimeError, subprocess.CalledProcessError) as failure:
                    rows.append(row | {"error": str(failure).replace(str(given.work), "WORK")})
                print(line(rows[-1]), flush=True)
    return {"calibration": windows(calibration), "evaluation": windows(evaluation)}, rows


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    named = f"{row['model']:10}{row['importance']:10}{row['scope']:6}{row['share']:5.2f}"
    if "error" in row:
        return f"{named}  failed: {row['error']}"
    left = row["block_parameters"] / row["base_block_parameters"]
    widths = "/".join(str(width) for width in row["shape"].values())
    sizes = f"{widths:13}{row['block_parameters']:9} ({left:.3f}) of{row['parameters']:8}"
    return f"{named}  {sizes}{row['kl_nats_mean']:9.4f} nats, perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "rivals-pruning.json")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    compared = {model: compare(model, given) for model in given.models}
    options = {
        "--models": " ".join(given.models),
        "--shares": " ".join(map(str, given.shares)),
        "--scopes": " ".join(given.scopes),
    }
    named = {"--work": "WORK", **options, "--threads": given.threads}
    report = {
        "command": "python evaluation/rivals/pruning.py " + " ".join(f"{name} {value}" for name, value in named.items()),
        "hardware": hardware(),
        "threads": given.threads,
        "windows": {model: used for model, (used, _) in compared.items()},
        "rows": [row for _, rows in compared.values() for row in rows],
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
