"""Do recipes lose on a GPU what they lose on a CPU?

    python -m evaluation gpu [--device cuda] [--models demo ...] [--recipes nf4-gptq ...] [--quick]

Each recipe runs twice from disk to disk, on the GPU and on the CPU of the same machine, on the same
sequences. The models are small, so seconds say little. A row is written as soon as it is measured, to
results/gpu.json; rows of the same machine that are not measured again stay. With --quick (few tokens, numbers
that mean nothing) only --out is written.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation import machine, results
from evaluation.bench import recipes
from evaluation.models import MODELS, present
from evaluation.options import parser
from evaluation.reference_models import SMOLLM2
from evaluation.results import GpuRow
from evaluation.runs import known, losses, run, seconds
from llmcompress.data.sources import DataSpec
from llmcompress.recipe.recipe import Recipe

RECIPES = (
    "nf4-gptq",
    "nf4-nearest",
    "ffn-75-obs",
    "int8-nearest",
    "wanda-2-4",
    "int8-smooth",
    "w8a8",
    "w4a8",
)
SHORT = {"samples": 4, "length": 64, "evaluation_samples": 2}


def row(model: str, name: str, recipe: Recipe, device: str) -> GpuRow:
    """Run a recipe on a model, on the device and on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = MODELS[model].base, Path(folder)
        found = run(recipe, out / "device", base, device=device)
        plain = run(recipe, out / "cpu", base, device="cpu")
    return GpuRow(
        **losses(found),
        model=model,
        recipe=name,
        kl_nats_mean_cpu=known(plain.fidelity.kl_nats_mean),
        top1_agreement=known(found.fidelity.top1_agreement),
        seconds=seconds(found),
        size_bytes=int(known(found.compressed.size_bytes)),
    )


def main(argv: Sequence[str]) -> int:
    """Measure every recipe on every model."""
    options = parser("gpu", __doc__)
    options.add_argument("--device", default="cuda", help="default: cuda")
    every = [name for name in present() if name != SMOLLM2]
    options.add_argument("--models", nargs="+", choices=every, default=every)
    options.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    options.add_argument("--out", type=Path, help="result file; default results/gpu.json, none with --quick")
    options.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    given = machine.parse(options, argv)
    head = machine.head(torch.device(given.device))
    for model in given.models:
        for name in given.recipes:
            spec: DataSpec = MODELS[model].data()
            spec = spec.model_copy(update=SHORT) if given.quick else spec
            recipe = recipes(model, [name])[name].model_copy(update={"data": spec})
            print(f"{model}: {name} ...", file=sys.stderr, flush=True)
            found = row(model, name, recipe, given.device)
            both = f"KL {found.kl_nats_mean:.6f} on {given.device}, {found.kl_nats_mean_cpu:.6f} on the CPU"
            print(f"{model}: {name}: {both}, {found.seconds:.0f} s", flush=True)
            if given.out or not given.quick:
                rows = results.merge("gpu", ("model", "recipe"), found, given.out, head.hardware)
                results.write("gpu", head, {"rows": rows}, given.out)
    return 0
