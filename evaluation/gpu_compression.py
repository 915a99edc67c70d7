"""What does quantising a model of 1 B and of 8 B parameters take on a GPU, beside the quantisers of others?

    python -m evaluation gpu-compression [--device cuda] [--models 8b ...] [--methods nf4-gptq ...] [--quick]

Random Llamas of the shapes of Llama 3 are made on the spot (`random_llamas`) and quantised from disk to disk
on 128 sequences of 2048 tokens: by recipes of recipes/, and by those of llm-compressor, GPTQModel and
AutoRound that are installed in this very environment or in the folder --rival-packages, which comes first on
their path; one that is in neither is written down as absent. Seconds are those from the start to the written
weights; imports and the evaluation of the result are left out. Memory is the peak until then: of the GPU as
torch allocates it, of the host as the process has it resident. Whatever takes too long for eight minutes on
all layers is measured on four layers of the 8 B model; its cost grows with their number.

The goal: 8 B by nf4-gptq in at most 250 s and 6 GB of GPU memory.

Every quantisation is a process of its own with a limit in time. Its row is written as soon as it is there,
with the lines of llmcompress that took longest, also of one that took too long. They come in the order of
their worth, and end after --limit seconds. The result goes to results/gpu_compression.json; rows of the same
machine that are not measured again stay. With --quick (tiny models, numbers that mean nothing) only --out is
written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from evaluation import machine, random_llamas, results
from evaluation.cost import make_text
from evaluation.options import parser
from evaluation.random_llamas import Shape
from evaluation.results import ROOT, GpuCompressionFailure, GpuCompressionRow
from evaluation.rivals.environments import SETTINGS
from evaluation.rivals.quantizers import RIVALS
from evaluation.rivals.sequences import KEY
from evaluation.sampling import Sampler, longest
from llmcompress.data.calibration import load_data
from llmcompress.data.sources import DataSpec
from llmcompress.errors import first_line
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.sequential import EVALUATE
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import peak_memory_bytes

ONE_B = Shape(16, 2048, 8192, 32, 8, 128256, tied=True)
EIGHT_B = Shape(32, 4096, 14336, 32, 8, 128256)
FOUR_LAYERS = Shape(4, 4096, 14336, 32, 8, 128256)
MODELS = {"8b": EIGHT_B, "1b": ONE_B, "8b-4-layers": FOUR_LAYERS}
TINY = Shape(2, 64, 192, 4, 2, 512)
GROUP_SIZE = 64  # of the rivals, as ours have it
SLACK_S = 1.0  # for a process to end by itself before it is killed
PROFILE, LONGEST = "profile.json", 16  # where a process writes what took long, and how many lines are kept
Row = GpuCompressionRow | GpuCompressionFailure


class Job(NamedTuple):
    """A model, a recipe or rival, and the seconds after which it is given up."""

    model: str
    method: str
    limit_s: float


class Setting(NamedTuple):
    """The sequences, the device, and the folder with the rivals' packages, if there is one."""

    spec: DataSpec
    device: str
    packages: Path | None = None


JOBS = (
    Job("8b", "nf4-gptq", 300),
    Job("1b", "nf4-gptq", 60),
    Job("8b-4-layers", "nf4-gptq", 60),
    Job("8b-4-layers", "w8a8", 90),
    Job("8b-4-layers", "llmcompressor", 90),
    Job("8b-4-layers", "gptqmodel", 90),
    Job("8b-4-layers", "nf4-learned", 120),
    Job("8b-4-layers", "autoround", 120),
    Job("1b", "w8a8", 120),
    Job("1b", "nf4-learned", 120),
    Job("1b", "llmcompressor", 120),
    Job("1b", "gptqmodel", 120),
    Job("1b", "autoround", 120),
)


class Weights(Exception):
    """The weights are written, and the evaluation would begin."""


class Phases:
    """A Track that times what a run goes through, and ends it before it is evaluated."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, things: Iterable[Any], what: str, count: int) -> Iterator[Any]:
        """Yield `things`. Raises Weights once the evaluation begins."""
        if what == EVALUATE:
            raise Weights
        start = time.perf_counter()
        yield from things
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


def measure(base: Path, recipe: Recipe, device: str, facts: Path) -> None:
    """Run a recipe up to the written weights and put what that took, or its error, into `facts`; for a fresh
    process."""
    start, phases = time.perf_counter(), Phases()
    found: dict[str, object] = {}
    try:
        with tempfile.TemporaryDirectory(dir=base.parent) as out, Sampler(facts.with_name(PROFILE)):
            run_recipe(recipe, Path(out) / "out", base=str(base), device=device, track=phases)
    except Weights:
        found = {
            "seconds": time.perf_counter() - start,
            "phases": phases.seconds,
            "peak_host_bytes": peak_memory_bytes(),
            "peak_gpu_bytes": peak_memory_bytes(device) if device != "cpu" else None,
        }
    except Exception as error:  # of whatever kind: the next row is measured nevertheless
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    facts.write_text(json.dumps(found), "utf-8")


def of_recipe(base: Path, recipe: Recipe, device: str, limit_s: float) -> dict[str, Any]:
    """What `measure` finds in a process of its own, or the error that it ended with."""
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        facts = Path(folder) / "facts.json"
        process = get_context("spawn").Process(target=measure, args=(base, recipe, device, facts))
        process.start()
        process.join(limit_s)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        error = f"took longer than {limit_s:.0f} s" if late else f"died with {process.exitcode}"
        found: dict[str, Any] = json.loads(facts.read_text("utf-8")) if facts.is_file() else {"error": error}
        return found | {"profile": longest(facts.with_name(PROFILE), LONGEST)}


def of_rival(base: Path, rival: str, setting: Setting, limit_s: float) -> dict[str, Any]:
    """What a rival takes. Errors: TimeoutError."""
    spec = setting.spec
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        place = Path(folder)
        tokens_SL = load_data(spec, tokenizer_of(base), 256, spec.length).calibration
        save_file({KEY: tokens_SL.contiguous()}, place / "calibration.safetensors")
        try:
            done = subprocess.run(
                command_of(base, rival, place, setting.device),
                env=os.environ | SETTINGS | {"PYTHONPATH": path_of(setting.packages)},
                cwd=place,
                timeout=limit_s,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"took longer than {limit_s:.0f} s") from None
        if done.returncode:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return {"error": words[-1][:300] if words else f"exit code {done.returncode}, no output"}
        facts = json.loads((place / "facts.json").read_text("utf-8"))
        return {
            "seconds": facts["seconds"],
            "peak_host_bytes": facts["peak_memory_bytes"],
            "peak_gpu_bytes": facts["peak_gpu_bytes"],
        }


def command_of(base: Path, rival: str, place: Path, device: str) -> list[str]:
    """The command that quantises a base with a rival into a folder, which holds the sequences already."""
    options: dict[str, object] = {
        "base": base,
        "calibration": place / "calibration.safetensors",
        "out": place / "model",
        "facts": place / "facts.json",
        "group": GROUP_SIZE,
        "device": device,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", f"evaluation.rivals.rival_{rival}", *words]


def path_of(packages: Path | None) -> str:
    """The PYTHONPATH of a rival: its packages, then the folders that this process was given."""
    places = [ROOT, packages.resolve() if packages else None, os.environ.get("PYTHONPATH")]
    return os.pathsep.join(str(place) for place in places if place)


def installed(rival: str, packages: Path | None) -> str | None:
    """The version of a rival's package in a folder or else in this environment, or None."""
    places = [*([str(packages.resolve())] if packages else []), *sys.path]
    found = metadata.distributions(name=RIVALS[rival].package, path=places)
    return next((one.version for one in found), None)


def row_of(job: Job, shape: Shape, base: Path, setting: Setting, limit_s: float) -> Row:
    """Measure one job, or say why it is missing."""
    spec, device = setting.spec, setting.device
    about: dict[str, Any] = {"model": job.model, "layers": shape.layers, "method": job.method}
    try:
        if job.method in RIVALS:
            if (version := installed(job.method, setting.packages)) is None:
                return GpuCompressionFailure(**about, error="not installed")
            about["version"] = version
            found = of_rival(base, job.method, setting, limit_s)
        else:
            recipe = Recipe.from_file(ROOT / "recipes" / f"{job.method}.yaml")
            found = of_recipe(base, recipe.model_copy(update={"data": spec}), device, limit_s)
    except TimeoutError as late:
        found = {"error": str(late)}
    if "error" in found:
        found["error"] = found["error"].replace(str(base.parent), "FOLDER")
        return GpuCompressionFailure(**about, **found)
    return GpuCompressionRow(**about, tokens=int(spec.samples or 0) * int(spec.length or 0), **found)


def said(row: Row) -> str:
    """A row in one line."""
    name = f"{row.model}, {row.method}"
    if isinstance(row, GpuCompressionFailure):
        return f"{name}: {row.error}"
    gpu = f"{row.peak_gpu_bytes / 1e9:.2f} GB of the GPU, " if row.peak_gpu_bytes is not None else ""
    return f"{name}: {row.seconds:.1f} s, {gpu}{row.peak_host_bytes / 1e9:.2f} GB of the host"


def measured(jobs: Sequence[Job], shapes: dict[str, Shape], setting: Setting, end: float) -> Iterator[Row]:
    """Yield the row of each job until the clock is at `end`. Each model is made when it is first needed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, spec = folder / "words.txt", setting.spec
        make_text(text, (2 * int(spec.samples or 0) + 20) * int(spec.length or 0))  # its last tenth evaluates
        setting = setting._replace(spec=spec.with_text(str(text)))
        for job in jobs:
            left = end - time.monotonic() - SLACK_S
            if left <= 0:
                print("no time is left", file=sys.stderr, flush=True)
                return
            base, shape = folder / job.model, shapes[job.model]
            if job.method in RIVALS and installed(job.method, setting.packages) is None:
                yield row_of(job, shape, base, setting, left)
                continue
            if not base.exists():
                start = time.perf_counter()
                random_llamas.make(base, shape, int(spec.length or 0), torch.device(setting.device))
                print(f"made {job.model} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
                left = end - time.monotonic() - SLACK_S
            yield row_of(job, shape, base, setting, max(SLACK_S, min(job.limit_s, left)))


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    found = parser("gpu-compression", __doc__)
    found.add_argument("--device", default="cuda", help="default: cuda")
    found.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    methods = list(dict.fromkeys(job.method for job in JOBS))
    found.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    found.add_argument("--samples", type=int, default=128, help="sequences that calibrate; default: 128")
    found.add_argument("--length", type=int, default=2048, help="tokens of a sequence; default: 2048")
    found.add_argument("--limit", type=float, default=480.0, help="seconds for everything; default: 480")
    found.add_argument("--rival-packages", type=Path, metavar="FOLDER", help="with the rivals' packages")
    found.add_argument(
        "--out", type=Path, help="result file; default results/gpu_compression.json, none with --quick"
    )
    found.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    return found


def main(argv: Sequence[str]) -> int:
    """Measure what was asked for and write each row as soon as it is there; 1 where none was measured."""
    end = time.monotonic()
    given = machine.parse(options(), argv)
    end += given.limit
    shapes, spec = (
        MODELS,
        DataSpec(samples=given.samples, length=given.length, evaluation_samples=1, bos=False),
    )
    if given.quick:
        shapes, spec = dict.fromkeys(MODELS, TINY), spec.model_copy(update={"samples": 2, "length": 64})
    jobs = [job for job in JOBS if job.model in given.models and job.method in given.methods]
    head, done = machine.head(torch.device(given.device)), 0
    for row in measured(jobs, shapes, Setting(spec, given.device, given.rival_packages), end):
        print(said(row), flush=True)
        done += isinstance(row, GpuCompressionRow)
        if given.out or not given.quick:
            rows = results.merge("gpu_compression", ("model", "method"), row, given.out, head.hardware)
            results.write("gpu_compression", head, {"rows": rows}, given.out)
    return int(not done)
