"""How much of what pruning lost does training recover, and by which loss?

    python -m evaluation healing [--models demo wikilm-8m] [--rows ...] [--threads 2]

A model is cut to 60 % of the parameters of its decoder layers, in the way that loses least in pruning.py, and
trained on the rest of the text that calibrated, 4 sequences of 256 tokens a step. `long` is the row to look
at; the others are its loss and others at fewer steps, all alike but for what their name says. Each row is a
whole run on the cut model and its own report; `kl_cut` is the loss without training. The result goes to
results/healing.json, a row at a time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation import machine, results
from evaluation.models import MODELS
from evaluation.options import parser
from evaluation.pruning import Settings, stages
from evaluation.results import HealingRow
from evaluation.runs import known, losses, outline, recipe_of, run
from llmcompress.report.schema import Report

NAME = "healing"
CUTS = {"demo": "obs, sensitivity, ffn and kv", "wikilm-8m": "hidden, then ffn by sensitivity"}
RATES = {"demo": 1e-3, "wikilm-8m": 2e-4}
LONG = {"demo": 1500, "wikilm-8m": 500}  # steps
SHORT = 150
BATCH = 4  # sequences of a step
SHARE = 0.6  # of the decoder layers' parameters that stays
LOSSES = (
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
    "cross_entropy",
)
ROWS: dict[str, Settings] = {
    "long": {},
    "forward_kl": {},
    **{loss: {"loss": loss} for loss in LOSSES},
    "half cross-entropy": {"label_share": 0.5},
    "temperature 2": {"temperature": 2.0},
    "hidden states": {"hidden": 1.0},
    "cached teacher, top 64": {"cache": True, "top_k": 64},
    "cached teacher, top 16": {"cache": True, "top_k": 16},
    "half on-policy": {"on_policy": 0.5},
    "lora": {"train": "lora"},
    "norms": {"train": "norms"},
}


def settings(model: str, row: str) -> Settings:
    """The settings of a row's `distill` stage."""
    steps, factor = (LONG[model], 1) if row == "long" else (SHORT, {"lora": 5, "norms": 10}.get(row, 1))
    return {"steps": steps, "batch": BATCH, "learning_rate": RATES[model] * factor, **ROWS[row]}


def measured(model: str, row: str, report: Report, kl_cut: float) -> HealingRow:
    """What is lost after cutting and training."""
    trained = report.stages[-1].model_dump()
    loss = losses(report)
    return HealingRow.model_validate(
        {
            "model": model,
            "row": row,
            "cut": CUTS[model],
            **settings(model, row),
            **loss,
            **{key: trained[key] for key in ("seconds", "kl_before", "kl_after", "curve", "notes")},
            "kl_cut": kl_cut,
            "won_back": 1 - loss["kl_nats_mean"] / kl_cut,
            "commit": machine.commit(),
        }
    )


def heal(model: str, rows: Sequence[str]) -> None:
    """Cut a model once, train it in the way of each row, and write each row as soon as it is there."""
    base, text = MODELS[model][:2]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMCOMPRESS_CACHE"] = folder
        cut = Path(folder) / "cut"
        cuts = stages(outline(base), SHARE)[CUTS[model]]
        kl_cut = known(
            run(recipe_of([{"prune": each} for each in cuts], text), cut, base).fidelity.kl_nats_mean
        )
        for row in rows:
            recipe = recipe_of([{"distill": {**settings(model, row), "student": str(cut)}}], text)
            report = run(recipe, Path(folder) / "out", base, overwrite=True)
            found = measured(model, row, report, kl_cut)
            print(
                f"{model}: {row}: KL {kl_cut:.4f} -> {found.kl_nats_mean:.4f}, {found.seconds:.0f} s",
                flush=True,
            )
            results.write(NAME, machine.head(), {"rows": results.merge(NAME, ("model", "row"), found)})


def main(argv: Sequence[str]) -> int:
    """Measure the rows of every model."""
    options = parser(NAME, __doc__)
    options.add_argument("--models", nargs="+", choices=CUTS, default=list(CUTS))
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    given = machine.parse(options, argv)
    for model in given.models:
        print(f"{model} ...", file=sys.stderr, flush=True)
        heal(model, given.rows)
    return 0
