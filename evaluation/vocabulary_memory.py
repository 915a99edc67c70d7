"""How does the peak memory of a run grow with the vocabulary?

    python -m evaluation vocabulary-memory [--threads 2] [--quick] [--out FILE]

Random-weight Gemma 3 models in bfloat16, of two layers of one size and of one matrix for embedding and head,
are compressed from disk to disk with a vocabulary of 32 thousand to 262 thousand tokens. `nf4-nearest` and
`nf4-gptq` hold the logits of the evaluation and of the speed measurement, `nf4-learned` those of the Fisher
pass too. Each point is a process of its own, so that its peak memory (VmHWM) is that run's alone; what the
imports hold is given beside it. The time says nothing: few tokens are calibrated on.

Ten minutes on two cores; the result goes to results/vocabulary_memory.json. With --quick (half a minute,
tiny models, numbers that mean nothing) only --out is written.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from evaluation import machine, results
from evaluation.cost import MB, make_text, save_byte_tokenizer
from evaluation.options import parser
from evaluation.results import VocabularyMemoryRow
from evaluation.runs import known, run
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import peak_memory_bytes

LENGTH = 1024  # tokens of a sequence: whole float32 logits of two of them are 2.1 GB at 262,144 tokens
SAMPLES = 2  # sequences that calibrate
EVALUATION = 2  # sequences that measure the artefact
STEPS = 10  # of learned rounding
LAYERS = 2


@dataclass(frozen=True)
class Point:
    """One run: the model's vocabulary and width, and how its linears are rounded."""

    vocabulary: int
    hidden: int
    rounding: str

    @property
    def folder(self) -> str:
        """The folder of its model."""
        return f"{self.vocabulary}x{self.hidden}"


ROUNDINGS = ("nearest", "gptq", "learned")
FULL = tuple(
    Point(vocabulary, 640, rounding) for vocabulary in (32_768, 131_072, 262_144) for rounding in ROUNDINGS
)
QUICK = tuple(Point(vocabulary, 64, rounding) for vocabulary in (512, 4096) for rounding in ROUNDINGS[:2])


def make_model(folder: Path, vocabulary: int, hidden: int) -> None:
    """Write a random Gemma 3 whose head is its embedding, and a tokenizer of bytes."""
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=hidden // 4,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).bfloat16().save_pretrained(folder)
    save_byte_tokenizer(folder)


def measure(point: Point, folder: Path, text: Path, threads: int) -> VocabularyMemoryRow:
    """One run from disk to disk; for a fresh process."""
    torch.set_num_threads(threads)
    baseline = peak_memory_bytes()
    data = {"source": str(text), "samples": SAMPLES, "length": LENGTH, "evaluation_samples": EVALUATION}
    steps = {"steps": STEPS} if point.rounding == "learned" else {}
    stage = {"quantize": {"format": "nf4", "group_size": 64, "rounding": point.rounding, **steps}}
    recipe = Recipe.model_validate({"data": data, "stages": [stage]})
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        report = run(recipe, Path(out) / "out", folder)
    peak = int(known(report.cost.peak_memory_bytes))
    return VocabularyMemoryRow(
        **asdict(point),
        checkpoint_bytes=int(known(report.base.size_bytes)),
        whole_logits_bytes=4 * EVALUATION * LENGTH * point.vocabulary,
        baseline_memory_bytes=baseline,
        peak_memory_bytes=peak,
        run_memory_bytes=peak - baseline,
    )


def measured(points: Sequence[Point], threads: int) -> list[VocabularyMemoryRow]:
    """Every point in a fresh process, one after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_text(folder / "words.txt", 40 * (SAMPLES + EVALUATION) * LENGTH)
        for number, point in enumerate(points, 1):
            print(f"{number} of {len(points)}: {point}", file=sys.stderr, flush=True)
            model = folder / point.folder
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                if not model.exists():
                    fresh.submit(make_model, model, point.vocabulary, point.hidden).result()
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                rows.append(fresh.submit(measure, point, model, folder / "words.txt", threads).result())
    return rows


def show(rows: Sequence[VocabularyMemoryRow]) -> None:
    """The rows as a table, in MB."""
    table = Table("vocabulary", "rounding", "checkpoint", "imports", "run", "peak")
    for row in rows:
        sizes = (row.checkpoint_bytes, row.baseline_memory_bytes, row.run_memory_bytes, row.peak_memory_bytes)
        table.add_row(str(row.vocabulary), row.rounding, *(f"{size / MB:.0f}" for size in sizes))
    Console(width=100).print(table)


def main(argv: Sequence[str]) -> int:
    """Measure every point and write the result."""
    options = parser("vocabulary-memory", __doc__)
    options.add_argument(
        "--out", type=Path, help="result file; default results/vocabulary_memory.json, none with --quick"
    )
    options.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    given = machine.parse(options, argv)
    rows = measured(QUICK if given.quick else FULL, given.threads)
    show(rows)
    if given.out or not given.quick:
        facts = {"layers": LAYERS, "length": LENGTH, "calibration": SAMPLES, "rows": rows}
        results.write("vocabulary_memory", machine.head(), facts, given.out)
    return 0
