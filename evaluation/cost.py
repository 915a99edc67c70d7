"""What does a run cost against one plain forward pass over the same calibration tokens, and how does it grow?

    python evaluation/cost.py [--threads 2] [--quick] [--out FILE]

Random-weight Llamas in bfloat16 with a tokenizer of bytes and a text of random words are made in a temporary folder and
compressed from disk to disk: deeper, wider, on more tokens. Each point is a process of its own, so that its peak memory (VmHWM)
is that run's alone; what the imports hold is taken off. The same process then runs the plain model in float32 over the same
tokens in the same batches. Blocks of the memory series are 6 MB on disk (12 MB in float32), so memory that grew with depth
would show; it rounds to nearest, so that no solver hides the growth, and the depth series says the same of gptq.

Run it on an idle machine: threads that wait for each other suffer far more than their share from a neighbour. A point during
which other processes took more than a tenth of a core is measured again, up to three times; the first undisturbed one counts,
else the fastest, and `others_cpu_share` tells. Seven or eight minutes on two idle cores; the result goes to
evaluation/results/cost.json. With --quick (a minute or two, tiny models, numbers that mean nothing) only --out is written.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from bench import head
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmcompress.data.calibration import load_data
from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.sequential import TOKENS_AT_ONCE, batches_of
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import peak_memory_bytes

HERE = Path(__file__).parent
LENGTH, EVALUATION = 256, 8  # tokens a window; windows that measure the artefact
QUIET = 0.1  # of a core: what other processes may take while a point is measured
FORWARD_S = 1.5  # the plain pass is repeated for as long as this, and its fastest counts
MB = 1e6
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One run: which series it belongs to, the model's shape and the calibration tokens."""

    series: str
    layers: int
    hidden: int
    tokens: int
    rounding: str = "gptq"

    @property
    def name(self) -> str:
        """The folder of its model."""
        return f"{self.layers}x{self.hidden}"


FULL = (
    *(Point("depth", layers, 256, 8192) for layers in (4, 8, 16, 32)),
    *(Point("width", 4, hidden, 16384) for hidden in (128, 256, 512)),
    *(Point("tokens", 4, 256, tokens) for tokens in (16384, 32768, 65536)),
    *(Point("depth, learned", layers, 128, 8192, "learned") for layers in (2, 4, 8)),
    *(Point("depth, memory", layers, 512, 4096, "nearest") for layers in (4, 8, 16, 32)),
)
QUICK = (
    *(Point("depth", layers, 64, 1024) for layers in (1, 2)),
    *(Point("width", 1, hidden, 1024) for hidden in (64, 128)),
    *(Point("tokens", 1, 64, tokens) for tokens in (1024, 2048)),
)


def make_model(folder: Path, layers: int, hidden: int) -> None:
    """A random Llama of some depth and width, ffn three times as wide, and a tokenizer that gives a token a byte."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: token for token, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_text(file: Path, characters: int) -> None:
    """At least so many characters of random words, a line a sentence, the same each time."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    text = []
    while characters > 0:
        text.append(" ".join(draw.choices(words, k=12)) + "\n")
        characters -= len(text[-1])
    file.write_text("".join(text), encoding="utf-8")


def measure(point: Point, folder: Path, text: Path, threads: int) -> Row:
    """One run from disk to disk, then the plain forward pass; for a fresh process."""
    torch.set_num_threads(threads)
    baseline, start, others = peak_memory_bytes(), time.perf_counter(), others_cpu_s()
    data = {"source": str(text), "samples": point.tokens // LENGTH, "length": LENGTH, "evaluation_samples": EVALUATION}
    stages = [{"quantize": {"format": "nf4", "group_size": 64, "rounding": point.rounding}}]
    recipe = Recipe.model_validate({"data": data, "stages": stages})
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        report = run_recipe(recipe, Path(out) / "out", base=str(folder))
    quantize_s, peak = report.stages[0].seconds, report.cost.peak_memory_bytes
    assert peak is not None
    forward_s = forward(folder, recipe.data)
    return {
        **asdict(point),
        "checkpoint_bytes": report.base.size_bytes,
        "quantize_s": quantize_s,
        "forward_s": forward_s,
        "forward_passes": quantize_s / forward_s,
        "run_s": report.cost.seconds,
        "baseline_memory_bytes": baseline,
        "peak_memory_bytes": peak,
        "run_memory_bytes": peak - baseline,
        "others_cpu_share": (others_cpu_s() - others) / (time.perf_counter() - start),
    }


def others_cpu_s() -> float:
    """Processor seconds that everything but this process has used so far, or taken from this machine."""
    used = psutil.cpu_times()
    return float(used.user + used.system + sum(getattr(used, kind, 0.0) for kind in ("nice", "steal")) - time.process_time())


@torch.no_grad()
def forward(folder: Path, spec: DataSpec) -> float:
    """Seconds of one pass of the whole model in float32 over the calibration windows, its logits dropped."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batches = batches_of(load_data(spec, tokenizer_of(folder), model.config.vocab_size, LENGTH).calibration)
    model(input_ids=batches[0], use_cache=False)  # the first call pays for what torch sets up
    times: list[float] = []
    while sum(times) < FORWARD_S:
        start = time.perf_counter()
        for tokens in batches:
            model(input_ids=tokens, use_cache=False)
        times.append(time.perf_counter() - start)
    return min(times)


def line(xs: Iterable[float], ys: Iterable[float]) -> dict[str, float]:
    """The least-squares line, and the largest distance of a point from it as a share of that point."""
    x, y = torch.tensor(list(xs), dtype=torch.float64), torch.tensor(list(ys), dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    intercept = float(y.mean() - slope * x.mean())
    return {"slope": slope, "intercept": intercept, "worst_deviation": float(((intercept + slope * x) / y - 1).abs().max())}


def growth(rows: list[Row]) -> dict[str, Any]:
    """What the series say: constant per layer? linear in tokens? memory against the checkpoint?"""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["series"] for row in rows):
        series = [row for row in rows if row["series"] == name]
        first, last = series[0], series[-1]
        if name.startswith("depth"):
            each = [row["quantize_s"] / row["layers"] for row in series]
            found[name] = {
                "seconds_per_layer": each,
                "seconds_per_layer_max_over_min": max(each) / min(each),
                "seconds_by_layers": line((row["layers"] for row in series), (row["quantize_s"] for row in series)),
                "checkpoint_growth_bytes": last["checkpoint_bytes"] - first["checkpoint_bytes"],
                "memory_growth_bytes": last["run_memory_bytes"] - first["run_memory_bytes"],
            }
        elif name == "tokens":
            found[name] = {"seconds_by_tokens": line((row["tokens"] for row in series), (row["quantize_s"] for row in series))}
        else:
            logs = [[torch.tensor(row[key]).log().item() for row in series] for key in ("hidden", "quantize_s", "forward_s")]
            found[name] = {
                "quantize_exponent": line(logs[0], logs[1])["slope"],
                "forward_exponent": line(logs[0], logs[2])["slope"],
            }
    return found


def show(rows: list[Row], found: dict[str, Any]) -> None:
    """The rows as a table, and what they say in words."""
    heads = ("series", "layers", "hidden", "tokens", "quantize s", "forward s", "passes", "run s", "memory MB", "checkpoint MB")
    table = Table(*heads)
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("quantize_s", "forward_s", "forward_passes", "run_s")]
        memory = [f"{row[key] / MB:.1f}" for key in ("run_memory_bytes", "checkpoint_bytes")]
        table.add_row(row["series"], *(str(row[key]) for key in ("layers", "hidden", "tokens")), *numbers, *memory)
    Console(width=120).print(table)
    for name, said in found.items():
        if name.startswith("depth"):
            fit, spread = said["seconds_by_layers"], said["seconds_per_layer_max_over_min"]
            print(f"{name}: {fit['slope']:.3f} s a layer + {fit['intercept']:.2f} s; s a layer, max / min = {spread:.2f}")
            grown, stored = said["memory_growth_bytes"] / MB, said["checkpoint_growth_bytes"] / MB
            print(f"{name}: the checkpoint grows by {stored:.1f} MB, peak memory by {grown:.1f} MB")
        elif name == "tokens":
            fit = said["seconds_by_tokens"]
            slope, off = fit["slope"] * 1e6, fit["worst_deviation"]
            print(f"{name}: {slope:.1f} s a million tokens + {fit['intercept']:.2f} s; no point is off by more than {off:.1%}")
        else:
            ours, plain = said["quantize_exponent"], said["forward_exponent"]
            print(f"{name}: seconds grow with its power {ours:.2f}, those of the plain pass with {plain:.2f}")
    if disturbed := sum(not quiet(row) for row in rows):
        print(f"{disturbed} of {len(rows)} points shared the processor, so their seconds say little; run again when it is idle")


def quiet(row: Row) -> bool:
    """Whether other processes left the run alone."""
    return bool(row["others_cpu_share"] <= QUIET)


def settled(point: Point, folder: Path, threads: int, attempts: int) -> Row:
    """The first row of a point that was left alone, else the fastest of `attempts`; each from a fresh process."""
    rows: list[Row] = []
    while len(rows) < attempts and not (rows and quiet(rows[-1])):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure, point, folder / point.name, folder / "words.txt", threads).result())
    return min(rows, key=lambda row: (not quiet(row), row["quantize_s"])) | {"attempts": len(rows)}


def run(points: tuple[Point, ...], threads: int, attempts: int) -> list[Row]:
    """Every point in a fresh process, one after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_text(folder / "words.txt", 2 * max(point.tokens for point in points) + 20 * EVALUATION * LENGTH)
        for number, point in enumerate(points, 1):
            print(f"{number} of {len(points)}: {point}", file=sys.stderr, flush=True)
            if not (folder / point.name).exists():
                make_model(folder / point.name, point.layers, point.hidden)
            rows.append(settled(point, folder, threads, attempts))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; default evaluation/results/cost.json, none with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = run(QUICK, given.threads, attempts=1) if given.quick else run(FULL, given.threads, attempts=3)
    found = growth(rows)
    show(rows, found)
    result = {
        **head(),
        "tokens_at_once": TOKENS_AT_ONCE,
        "growth": found,
        "rows": rows,
    }
    if out := given.out or (None if given.quick else HERE / "results" / "cost.json"):
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
