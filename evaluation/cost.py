"""What does a run cost against one plain forward pass over the same calibration tokens, and how does it grow?

    python -m evaluation cost [--threads 2] [--quick] [--out FILE]

Random-weight Llamas in bfloat16 with a tokenizer of bytes and a text of random words are made in a temporary
folder and compressed from disk to disk: deeper, wider, on more tokens. Each point is a process of its own, so
that its peak memory (VmHWM) is that run's alone; what the imports hold is taken off. The same process then
runs the plain model in float32 over the same tokens in the same batches. Layers of the memory series are 6 MB
on disk (12 MB in float32), so memory that grew with depth would show; it rounds to nearest, so that no solver
hides the growth, and the depth series says the same of gptq.

Run it on an idle machine: threads that wait for each other suffer far more than their share from a neighbour.
A point during which other processes took more than a tenth of a core is measured again, up to three times;
the first undisturbed one counts, else the fastest, and `others_cpu_share` tells. Seven or eight minutes on
two idle cores; the result goes to results/cost.json. With --quick (a minute or two, tiny models, numbers that
mean nothing) only --out is written.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation import machine, results
from evaluation.models import LENGTH
from evaluation.options import parser
from evaluation.results import CostRow
from evaluation.runs import known, run
from llmcompress.data.calibration import load_data
from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.sequential import TOKENS_AT_ONCE, batches_of
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import peak_memory_bytes

EVALUATION = 8  # sequences that measure the artefact
QUIET = 0.1  # of a core: what other processes may take while a point is measured
FORWARD_S = 1.5  # the plain pass is repeated for as long as this, and its fastest counts
MB = 1e6
Growth = dict[str, object]  # what a series says, as the result file has it


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
    """Write a random Llama, its ffn three times as wide as its hidden size, and a tokenizer of bytes."""
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
    save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes."""
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


def measure(point: Point, folder: Path, text: Path, threads: int) -> CostRow:
    """One run from disk to disk, then the plain forward pass; for a fresh process."""
    torch.set_num_threads(threads)
    baseline, start, others = peak_memory_bytes(), time.perf_counter(), others_cpu_s()
    samples = point.tokens // LENGTH
    data = {"source": str(text), "samples": samples, "length": LENGTH, "evaluation_samples": EVALUATION}
    stages = [{"quantize": {"format": "nf4", "group_size": 64, "rounding": point.rounding}}]
    recipe = Recipe.model_validate({"data": data, "stages": stages})
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        report = run(recipe, Path(out) / "out", folder)
    quantize_s, peak = report.stages[0].seconds, int(known(report.cost.peak_memory_bytes))
    forward_s = forward(folder, recipe.data)
    return CostRow(
        **asdict(point),
        checkpoint_bytes=int(known(report.base.size_bytes)),
        quantize_s=quantize_s,
        forward_s=forward_s,
        forward_passes=quantize_s / forward_s,
        run_s=report.cost.seconds,
        baseline_memory_bytes=baseline,
        peak_memory_bytes=peak,
        run_memory_bytes=peak - baseline,
        others_cpu_share=(others_cpu_s() - others) / (time.perf_counter() - start),
    )


def others_cpu_s() -> float:
    """Processor seconds that everything but this process has used so far, or taken from this machine."""
    used = psutil.cpu_times()
    return float(
        used.user
        + used.system
        + sum(getattr(used, kind, 0.0) for kind in ("nice", "steal"))
        - time.process_time()
    )


@torch.no_grad()
def forward(folder: Path, spec: DataSpec) -> float:
    """Seconds of one float32 forward pass over the calibration sequences, its logits dropped."""
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


@dataclass(frozen=True)
class Line:
    """A least-squares line, and the largest distance of a point from it as a share of that point."""

    slope: float
    intercept: float
    worst_deviation: float


def line(xs: Iterable[float], ys: Iterable[float]) -> Line:
    """The least-squares line through points."""
    x, y = torch.tensor(list(xs), dtype=torch.float64), torch.tensor(list(ys), dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    intercept = float(y.mean() - slope * x.mean())
    return Line(slope, intercept, float(((intercept + slope * x) / y - 1).abs().max()))


def exponent(series: Sequence[CostRow], values: Iterable[float]) -> float:
    """The power of the width with which values grow."""
    widths = torch.tensor([row.hidden for row in series], dtype=torch.float64).log().tolist()
    return line(widths, torch.tensor(list(values), dtype=torch.float64).log().tolist()).slope


def series_of(rows: Sequence[CostRow]) -> dict[str, list[CostRow]]:
    """The rows by series."""
    return {
        name: [row for row in rows if row.series == name]
        for name in dict.fromkeys(row.series for row in rows)
    }


def growth(series: Sequence[CostRow]) -> tuple[Growth, list[str]]:
    """How cost grows along a series, in facts and in words: per layer, per token, or with the width."""
    name, first, last = series[0].series, series[0], series[-1]
    times = [row.quantize_s for row in series]
    if name.startswith("depth"):
        each = [row.quantize_s / row.layers for row in series]
        fit = line((row.layers for row in series), times)
        stored = last.checkpoint_bytes - first.checkpoint_bytes
        grown = last.run_memory_bytes - first.run_memory_bytes
        spread = max(each) / min(each)
        facts: Growth = {
            "seconds_per_layer": each,
            "seconds_per_layer_max_over_min": spread,
            "seconds_by_layers": asdict(fit),
            "checkpoint_growth_bytes": stored,
            "memory_growth_bytes": grown,
        }
        return facts, [
            f"{name}: {fit.slope:.3f} s a layer + {fit.intercept:.2f} s; s a layer, max / min = {spread:.2f}",
            f"{name}: the checkpoint grows by {stored / MB:.1f} MB, peak memory by {grown / MB:.1f} MB",
        ]
    if name == "tokens":
        fit = line((row.tokens for row in series), times)
        rate = f"{fit.slope * 1e6:.1f} s a million tokens + {fit.intercept:.2f} s"
        words = f"{name}: {rate}; no point is off by more than {fit.worst_deviation:.1%}"
        return {"seconds_by_tokens": asdict(fit)}, [words]
    ours, plain = exponent(series, times), exponent(series, (row.forward_s for row in series))
    words = f"{name}: seconds grow with its power {ours:.2f}, those of the plain pass with {plain:.2f}"
    return {"quantize_exponent": ours, "forward_exponent": plain}, [words]


def show(rows: Sequence[CostRow], words: Sequence[str]) -> None:
    """The rows as a table, and what they say in words."""
    heads = (
        "series",
        "layers",
        "hidden",
        "tokens",
        "quantize s",
        "forward s",
        "passes",
        "run s",
        "memory MB",
    )
    table = Table(*heads, "checkpoint MB")
    for row in rows:
        shape = [row.series, str(row.layers), str(row.hidden), str(row.tokens)]
        numbers = [row.quantize_s, row.forward_s, row.forward_passes, row.run_s]
        memory = [row.run_memory_bytes / MB, row.checkpoint_bytes / MB]
        table.add_row(*shape, *(f"{value:.2f}" for value in numbers), *(f"{value:.1f}" for value in memory))
    Console(width=120).print(table)
    print("\n".join(words))
    if disturbed := sum(not quiet(row) for row in rows):
        print(
            f"{disturbed} of {len(rows)} points shared the processor; their seconds say little, so run again"
        )


def quiet(row: CostRow) -> bool:
    """Whether other processes left the run alone."""
    return row.others_cpu_share <= QUIET


def settled(point: Point, folder: Path, threads: int, attempts: int) -> CostRow:
    """The first undisturbed row of a point, else the fastest of `attempts`; each from a fresh process."""
    rows: list[CostRow] = []
    while len(rows) < attempts and not (rows and quiet(rows[-1])):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            rows.append(
                fresh.submit(measure, point, folder / point.name, folder / "words.txt", threads).result()
            )
    best = min(rows, key=lambda row: (not quiet(row), row.quantize_s))
    return best.model_copy(update={"attempts": len(rows)})


def measured(points: Sequence[Point], threads: int, attempts: int) -> list[CostRow]:
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


def main(argv: Sequence[str]) -> int:
    """Measure every point and write the result."""
    options = parser("cost", __doc__)
    options.add_argument("--out", type=Path, help="result file; default results/cost.json, none with --quick")
    options.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    given = machine.parse(options, argv)
    rows = measured(QUICK if given.quick else FULL, given.threads, attempts=1 if given.quick else 3)
    found = {name: growth(series) for name, series in series_of(rows).items()}
    show(rows, [words for _, said in found.values() for words in said])
    facts: Mapping[str, object] = {
        "tokens_at_once": TOKENS_AT_ONCE,
        "growth": {name: each for name, (each, _) in found.items()},
        "rows": rows,
    }
    if given.out or not given.quick:
        results.write("cost", machine.head(), facts, given.out)
    return 0
