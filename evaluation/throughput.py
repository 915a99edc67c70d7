"""What does perplexity evaluation cost beyond its forward passes? Its tokens per second against those of the bare passes.

    python evaluation/throughput.py [--threads 2] [--quick] [--out FILE]

The bare pass is the whole model as from_pretrained gives it, in float32, on the batches that the walk uses, its logits dropped.
Perplexity reads the model from disk layer by layer, as `llmcompress evaluate` does, and measures the logits; with a base it
also takes the KL, and is held against two bare passes. The three take turns in one process, so that a busy machine slows all
of them, and the ratio is the median over the turns. About two minutes on two cores; the result goes to
evaluation/results/throughput.json. With --quick (seconds, the demo model alone) only --out is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import head
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import TOKENS_AT_ONCE, batches_of, logits
from llmcompress.pipeline.resolve import calibration_data, find_base
from llmcompress.report.metrics import fidelity

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
MODELS = {  # base, text
    "demo": ("demo", "python-docs"),
    "wikilm-8m": (str(SHARED / "models" / "wikilm-8m"), str(SHARED / "data" / "wikitext-2")),
}
LENGTH = 256  # tokens a window
BOUND = 0.9  # of the bare pass: what perplexity evaluation is to reach


def contenders(base: str, text: str, samples: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """The tokens of one pass, and what is timed by its name: each call goes through all of them."""
    folder, device = find_base(base).folder, torch.device("cpu")
    subject, other = DiskModel(folder, device), DiskModel(folder, device)
    spec = DataSpec(source=text, samples=1, length=LENGTH, evaluation_samples=samples, bos=False)
    windows = calibration_data(subject, spec, tokenizer_of(folder)).evaluation
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def bare() -> None:
        for tokens in batches_of(windows):
            model(input_ids=tokens, use_cache=False)

    return windows.numel(), {
        "bare": bare,
        "perplexity": lambda: fidelity(logits(subject, windows), windows),
        "perplexity_kl": lambda: fidelity(logits(subject, windows), windows, logits(other, windows)),
    }


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, samples: int, repeats: int) -> dict[str, Any]:
    """One model's row: median tokens/s of each contender, and the median over the turns of its ratio to the bare pass."""
    tokens, runs = contenders(*MODELS[name], samples)
    for run in runs.values():
        run()  # the first call pays for what torch sets up
    times: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(repeats):
        print(f"{name}: turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
        for what in list(runs) if turn % 2 == 0 else reversed(runs):  # neither is always the one that runs after the other
            times[what].append(seconds(runs[what]))
    row: dict[str, Any] = {"model": name, "tokens": tokens, "turns": repeats}
    row |= {f"{what}_tokens_per_s": tokens / median(taken) for what, taken in times.items()}
    for what, passes in (("perplexity", 1), ("perplexity_kl", 2)):
        ratios = [passes * bare / own for bare, own in zip(times["bare"], times[what], strict=True)]
        row |= {f"{what}_ratio": median(ratios), f"{what}_ratio_range": [min(ratios), max(ratios)]}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table("model", "bare tokens/s", "perplexity tokens/s", "ratio", "with KL tokens/s", "ratio to two passes")
    for row in rows:
        speeds = [f"{row[f'{what}_tokens_per_s']:,.0f}" for what in ("bare", "perplexity", "perplexity_kl")]
        ratios = [f"{row[f'{what}_ratio']:.3f}" for what in ("perplexity", "perplexity_kl")]
        table.add_row(row["model"], speeds[0], speeds[1], ratios[0], speeds[2], ratios[1])
    Console().print(table)
    worst = min(row["perplexity_ratio"] for row in rows)
    print(f"perplexity runs at {worst:.3f} of the bare pass or more; {BOUND} is {'kept' if worst >= BOUND else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; default evaluation/results/throughput.json, none with --quick")
    parser.add_argument("--quick", action="store_true", help="the demo model alone, fewer windows, three turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = ["demo"] if given.quick else [name for name, (base, _) in MODELS.items() if name == "demo" or Path(base).is_dir()]
    samples, repeats = (32, 3) if given.quick else (64, 7)
    rows = [measure(name, samples, repeats) for name in names]
    show(rows)
    result = {
        **head(),
        "windows": {"length": LENGTH, "evaluation": samples, "tokens_at_once": TOKENS_AT_ONCE},
        "bound": BOUND,
        "rows": rows,
    }
    if out := given.out or (None if given.quick else HERE / "results" / "throughput.json"):
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
