"""Do two checkouts write the same bytes? Shipped recipes, shortened, run on the demo model.

    python -m evaluation same-bytes CHECKOUT --to digests.json    once for each of two checkouts
    python -m evaluation same-bytes --compare one.json other.json

Each checkout runs its own recipe files with its own command line, so a change of the recipe language does not
matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel, RootModel
from safetensors import safe_open

from evaluation.options import parser
from evaluation.results import modern

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
    "low-rank-heal",
    "share-ffn-heal",
    "wanda-2-4",
)
DATA = {"source": "python-docs", "samples": 16, "length": 64, "evaluation_samples": 8}
STEPS = 4  # of training, at most


class Written(BaseModel):
    """What a run wrote: sha256 of every tensor, and the KL of its report."""

    tensors: dict[str, str]
    kl: float


class Digests(RootModel[dict[str, Written]]):
    """The file that is compared: what each recipe wrote."""


def shortened(recipe: Mapping[str, object]) -> dict[str, object]:
    """A recipe on little text and with few training steps."""
    entries = recipe["stages"]
    assert isinstance(entries, list)
    stages = [{kind: _few(settings) for kind, settings in _one(entry).items()} for entry in entries]
    return {**recipe, "data": DATA, "stages": stages, "base": "demo"}


def _one(entry: object) -> dict[str, object]:
    """An entry of a recipe; a stage without settings may be its name alone."""
    return entry if isinstance(entry, dict) else {str(entry): {}}


def _few(settings: object) -> object:
    """Settings of a stage, with no more than STEPS."""
    if isinstance(settings, dict) and "steps" in settings:
        return {**settings, "steps": min(STEPS, settings["steps"])}
    return settings


def files(checkout: Path) -> dict[str, Path]:
    """The recipes to run, whichever name the checkout has for them."""
    found = {modern(file.stem): file for file in (checkout / "recipes").glob("*.yaml")}
    return {name: found[name] for name in RECIPES}


def digests(checkout: Path) -> Digests:
    """What each recipe writes, run by the checkout's own command line."""
    found: dict[str, Written] = {}
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as scratch:
        for name, source in files(checkout).items():
            file, out = Path(scratch) / f"{name}.yaml", Path(scratch) / name
            file.write_text(yaml.safe_dump(shortened(yaml.safe_load(source.read_text("utf-8")))), "utf-8")
            command = [sys.executable, "-m", "llmcompress", "run", str(file), "--out", str(out)]
            done = subprocess.run(
                command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            report = json.loads((out / "report.json").read_text("utf-8"))
            found[name] = Written(tensors=tensors(out), kl=report["fidelity"]["kl_nats_mean"])
            print(
                f"{name}: {len(found[name].tensors)} tensors, KL {found[name].kl}",
                file=sys.stderr,
                flush=True,
            )
    return Digests(found)


def tensors(folder: Path) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                tensor = opened.get_tensor(name)
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(
                    f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content
                ).hexdigest()
    return found


def compare(one: Digests, other: Digests) -> list[str]:
    """What differs, a line each."""
    lines = [f"{name}: in one file only" for name in sorted(one.root.keys() ^ other.root.keys())]
    for name in sorted(one.root.keys() & other.root.keys()):
        ours, theirs = one.root[name], other.root[name]
        every = ours.tensors.keys() | theirs.tensors.keys()
        differing = sorted(
            tensor for tensor in every if ours.tensors.get(tensor) != theirs.tensors.get(tensor)
        )
        if differing:
            count = f"{len(differing)} of {len(ours.tensors)} tensors differ"
            lines.append(f"{name}: {count}, such as {differing[0]}")
        if ours.kl != theirs.kl:
            lines.append(f"{name}: KL {ours.kl} and {theirs.kl}")
    return lines


def main(argv: Sequence[str]) -> int:
    """Run one checkout, or compare two; 1 where they differ."""
    options = parser("same-bytes", __doc__)
    options.add_argument("checkout", type=Path, nargs="?")
    options.add_argument("--to", type=Path, help="where the digests of the checkout go")
    options.add_argument("--compare", type=Path, nargs=2, help="two such files")
    given = options.parse_args(argv)
    if given.compare:
        one, other = (Digests.model_validate_json(file.read_text("utf-8")) for file in given.compare)
        lines = compare(one, other)
        count = sum(len(each.tensors) for each in one.root.values())
        print("\n".join(lines) or f"{len(one.root)} recipes, {count} tensors: all equal")
        return int(bool(lines))
    if given.checkout is None or given.to is None:
        options.error("give a checkout and --to, or --compare two files")
    given.to.write_text(digests(given.checkout.resolve()).model_dump_json(indent=1) + "\n", "utf-8")
    return 0
