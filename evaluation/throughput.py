"""What does perplexity evaluation cost beyond its forward passes?

    python -m evaluation throughput [--threads 2] [--quick] [--out FILE]

The bare pass is the whole model as from_pretrained gives it, in float32, on the batches that `evaluate` uses,
its logits dropped. Perplexity reads the model from disk layer by layer, as `llmcompress evaluate` does, and
measures the logits; with a base it also takes the KL, and is held against two bare passes. The three take
turns in one process, so that a busy machine slows all of them, and the ratio is the median over the turns.
About two minutes on two cores; the result goes to results/throughput.json. With --quick (seconds, the demo
model alone) only --out is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from evaluation import machine, results
from evaluation.models import LENGTH, MODELS, present
from evaluation.options import parser
from evaluation.results import ThroughputRow
from evaluation.timing import seconds
from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import logits
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE, batches_of
from llmcompress.pipeline.resolve import calibration_data, find_base
from llmcompress.report.metrics import fidelity

MEASURED = ("demo", "wikilm-8m")
BOUND = 0.9  # of the bare pass: what perplexity evaluation is to reach


def contenders(base: str, text: str, samples: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """The tokens of one pass, and what is timed by its name: each call goes through all of them."""
    folder, device = find_base(base).folder, torch.device("cpu")
    subject, other = DiskModel(folder, device), DiskModel(folder, device)
    spec = DataSpec(source=text, samples=1, length=LENGTH, evaluation_samples=samples, bos=False)
    tokens = calibration_data(subject, spec, tokenizer_of(folder)).evaluation
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def bare() -> None:
        for batch in batches_of(tokens):
            model(input_ids=batch, use_cache=False)

    return tokens.numel(), {
        "bare": bare,
        "perplexity": lambda: fidelity(logits(subject, tokens), tokens),
        "perplexity_kl": lambda: fidelity(logits(subject, tokens), tokens, logits(other, tokens)),
    }


def measure(name: str, samples: int, repeats: int) -> ThroughputRow:
    """Median tokens/s of each contender, and the median over the turns of its ratio to the bare pass."""
    tokens, calls = contenders(*MODELS[name][:2], samples)
    for call in calls.values():
        call()  # the first call pays for what torch sets up
    times: dict[str, list[float]] = {what: [] for what in calls}
    for turn in range(repeats):
        print(f"{name}: turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
        for what in list(calls) if turn % 2 == 0 else reversed(calls):  # none always follows the same other
            times[what].append(seconds(calls[what]))

    def ratios(what: str, passes: int) -> list[float]:
        return [passes * bare / own for bare, own in zip(times["bare"], times[what], strict=True)]

    plain, against = ratios("perplexity", 1), ratios("perplexity_kl", 2)
    return ThroughputRow(
        model=name,
        tokens=tokens,
        turns=repeats,
        bare_tokens_per_s=tokens / median(times["bare"]),
        perplexity_tokens_per_s=tokens / median(times["perplexity"]),
        perplexity_kl_tokens_per_s=tokens / median(times["perplexity_kl"]),
        perplexity_ratio=median(plain),
        perplexity_ratio_range=(min(plain), max(plain)),
        perplexity_kl_ratio=median(against),
        perplexity_kl_ratio_range=(min(against), max(against)),
    )


def show(rows: Sequence[ThroughputRow]) -> None:
    """The rows as a table."""
    table = Table(
        "model", "bare tokens/s", "perplexity tokens/s", "ratio", "with KL tokens/s", "ratio to two passes"
    )
    for row in rows:
        table.add_row(
            row.model,
            f"{row.bare_tokens_per_s:,.0f}",
            f"{row.perplexity_tokens_per_s:,.0f}",
            f"{row.perplexity_ratio:.3f}",
            f"{row.perplexity_kl_tokens_per_s:,.0f}",
            f"{row.perplexity_kl_ratio:.3f}",
        )
    Console().print(table)
    worst = min(row.perplexity_ratio for row in rows)
    verdict = "kept" if worst >= BOUND else "MISSED"
    print(f"perplexity runs at {worst:.3f} of the bare pass or more; {BOUND} is {verdict}")


def main(argv: Sequence[str]) -> int:
    """Measure and write the result."""
    options = parser("throughput", __doc__)
    options.add_argument(
        "--out", type=Path, help="result file; default results/throughput.json, none with --quick"
    )
    options.add_argument(
        "--quick", action="store_true", help="the demo model alone, fewer sequences, three turns"
    )
    given = machine.parse(options, argv)
    names = ["demo"] if given.quick else [name for name in MEASURED if name in present()]
    samples, repeats = (32, 3) if given.quick else (64, 7)
    rows = [measure(name, samples, repeats) for name in names]
    show(rows)
    shape = {"length": LENGTH, "evaluation": samples, "tokens_at_once": TOKENS_AT_ONCE}
    if given.out or not given.quick:
        results.write(
            "throughput", machine.head(), {"windows": shape, "bound": BOUND, "rows": rows}, given.out
        )
    return 0
