"""Do two checkouts write the same bytes? Shipped recipes, shortened, run on the demo model; tensors are compared.

    python evaluation/same_bytes.py CHECKOUT --to digests.json    once for each of two checkouts
    python evaluation/same_bytes.py --compare one.json other.json

Each checkout runs its own recipe files with its own command line, so a change of the recipe language does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

RECIPES = (
    "demo",
    "nf4-gptq-double",
    "nf4-learned",
    "nf4-rotate-gptq",
    "nf4-int8-mixed",
    "int8-smooth",
    "w8a8-static",
    "w4a8",
    "codebook-16",
    "ffn-75-obs",
    "kv-half",
    "width-and-depth-budget",
    "prune-heal-quantize",
    "scale-tuning-nf4",
    "basis-heal",
    "share-ffn-heal",
    "wanda-2-4",
)
DATA = {"source": "python-docs", "samples": 16, "length": 64, "evaluation_samples": 8}
STEPS = 4  # of training, at most


def shortened(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe on little text and with few training steps."""
    stages = [
        {
            kind: settings | {"steps": min(STEPS, settings["steps"])} if "steps" in (settings or {}) else settings
            for kind, settings in stage.items()
        }
        for stage in recipe["stages"]
    ]
    return recipe | {"data": DATA, "stages": stages, "base": "demo"}


def digests(checkout: Path) -> dict[str, Any]:
    """Of each recipe: sha256 of every tensor, and what the report measured."""
    found: dict[str, Any] = {}
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as scratch:
        for name in RECIPES:
            recipe = shortened(yaml.safe_load((checkout / "recipes" / f"{name}.yaml").read_text("utf-8")))
            file, out = Path(scratch) / f"{name}.yaml", Path(scratch) / name
            file.write_text(yaml.safe_dump(recipe), "utf-8")
            command = [sys.executable, "-m", "llmcompress", "run", str(file), "--out", str(out)]
            done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            report = json.loads((out / "report.json").read_text("utf-8"))
            found[name] = {"tensors": tensors(out), "kl": report["fidelity"]["kl_nats_mean"]}
            print(f"{name}: {len(found[name]['tensors'])} tensors, KL {found[name]['kl']}", file=sys.stderr, flush=True)
    return found


def tensors(folder: Path) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                tensor = opened.get_tensor(name)
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content).hexdigest()
    return found


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs, a line each."""
    lines = [f"{name}: in one file only" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        ours, theirs = one[name]["tensors"], other[name]["tensors"]
        differing = sorted(tensor for tensor in ours.keys() | theirs.keys() if ours.get(tensor) != theirs.get(tensor))
        if differing:
            lines.append(f"{name}: {len(differing)} of {len(ours)} tensors differ, such as {differing[0]}")
        if one[name]["kl"] != other[name]["kl"]:
            lines.append(f"{name}: KL {one[name]['kl']} and {other[name]['kl']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2)
    asked = parser.parse_args()
    if asked.compare:
        one, other = (json.loads(file.read_text("utf-8")) for file in asked.compare)
        lines = compare(one, other)
        count = sum(len(each["tensors"]) for each in one.values())
        print("\n".join(lines) or f"{len(one)} recipes, {count} tensors: all equal")
        raise SystemExit(bool(lines))
    if asked.checkout is None or asked.to is None:
        parser.error("give a checkout and --to, or --compare two files")
    asked.to.write_text(json.dumps(digests(asked.checkout.resolve()), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
