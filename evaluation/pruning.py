"""What does structured pruning lose? Scores, repair, allocations and axes at the same parameters.

    python -m evaluation pruning [--models demo wikilm-8m] [--shares 0.8 0.6] [--rows obs ...] [--threads 2]

A share is that of the decoder layers' parameters that stays. Scores and allocations cut the feed-forward
width until it is reached, exactly where its units allow; layers and sublayers are dropped until it is.
`hidden` narrows embedding and head too, so its models are smaller than the others at the same share. Each row
is a whole run from disk to disk and its own report, on the model's sequences (models.py), 64 of which
calibrate. The result goes to results/pruning.json, a row at a time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation import machine, results
from evaluation.models import MODELS
from evaluation.options import parser
from evaluation.results import PruningRow
from evaluation.runs import SAMPLES, known, layer_parameters, losses, outline, run, seconds
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.recipe.recipe import Recipe

NAME = "pruning"
SCORES = ("obs", "taylor", "wanda", "activation", "magnitude")
Settings = dict[str, object]  # of a `prune` stage


def stages(model: MetaModel, share: float) -> dict[str, list[Settings]]:
    """The settings of the `prune` stages of each row, for a share of the decoder layers' parameters."""
    layers = len(model.layers)
    inner = model.parameters() - model.parameters({axis: [0] * layers for axis in ("ffn", "kv")})
    target = model.parameters() - int((1 - share) * inner)
    narrow: Settings = {"axis": "hidden", "multiple": 2}
    if model.config.tie_word_embeddings:  # a tied head has no principal axes to cut
        narrow["score"] = "activation"
    rows: dict[str, list[Settings]] = {}
    for score in SCORES:
        for repair in (True, False):
            cut: Settings = {"axis": "ffn", "parameters": target, "allocation": "uniform", "multiple": 1}
            name = score if repair else f"{score}, no repair"
            rows[name] = [cut | {"score": score, "repair": repair}]
    rows["obs, sensitivity"] = [{"axis": "ffn", "parameters": target}]
    rows["obs, sensitivity, ffn and kv"] = [{"axis": ["ffn", "kv"], "parameters": target}]
    rows["layers by kl"] = [{"axis": "layer", "keep": max(1, int(share * layers))}]
    rows["layers by influence"] = [
        {"axis": "layer", "keep": max(1, int(share * layers)), "score": "influence"}
    ]
    rows["sublayers by kl"] = [{"axis": "sublayer", "parameters": target}]
    rows["hidden"] = [{**narrow, "keep": share}]
    rows["hidden, no repair"] = [{**narrow, "keep": share, "repair": False}]
    rows["hidden, then ffn by sensitivity"] = [
        {**narrow, "keep": (1 + share) / 2},
        {"axis": "ffn", "parameters": target},
    ]
    return rows


def measure(name: str, share: float, row: str, cuts: list[Settings]) -> PruningRow:
    """One row: what is left, and what it loses."""
    subject = MODELS[name]
    data = subject.data().model_copy(update={"samples": SAMPLES})
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate({"data": data, "stages": [{"prune": cut} for cut in cuts]})
        report = run(recipe, Path(folder) / "out", subject.base)
        left = layer_parameters(outline(Path(folder) / "out"))
    return PruningRow(
        **losses(report),
        model=name,
        share=share,
        row=row,
        stages=cuts,
        parameters=int(known(report.compressed.parameters)),
        block_parameters=left,
        widths=[stage.model_dump().get("widths") for stage in report.stages],
        top1_agreement=known(report.fidelity.top1_agreement),
        seconds=seconds(report),
        share_reached=left / layer_parameters(outline(subject.base)),
        commit=machine.commit(),
    )


def main(argv: Sequence[str]) -> int:
    """Measure every row and write each as soon as it is there."""
    options = parser(NAME, __doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    options.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.6])
    options.add_argument("--rows", nargs="+", help="only these")
    given = machine.parse(options, argv)
    for name in given.models:
        for share in given.shares:
            for row, cuts in stages(outline(MODELS[name].base), share).items():
                if given.rows and row not in given.rows:
                    continue
                print(f"{name}, {share}: {row} ...", file=sys.stderr, flush=True)
                found = measure(name, share, row, cuts)
                print(
                    f"{name}, {share}: {row}: KL {found.kl_nats_mean:.4f}, {found.seconds:.0f} s", flush=True
                )
                rows = results.merge(NAME, ("model", "share", "row"), found)
                results.write(NAME, machine.head(), {"calibration_windows": SAMPLES, "rows": rows})
    return 0
