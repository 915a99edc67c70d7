"""Which way of making a model smaller loses least at the same bytes?

    python -m evaluation sharing [--models demo wikilm-8m] [--rows ...] [--threads 2]

`ways`: at most 90, 75, 60 and 50 % of the base's parameters, each alone and healed by a short distillation;
codes, which are always smaller, stand once, with the bytes that they have. `tied`: the fit of one matrix for
embedding and head against taking either or their mean, before and after a short distillation. `grouping`: how
the layers that share are found, at the same bytes. Each row is a whole run from disk to disk and its own
report, on sequences of 256 tokens, 64 of which calibrate. The result goes to results/sharing-MODEL.json, a
row at a time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation import machine, results
from evaluation.models import MODELS
from evaluation.options import parser
from evaluation.pruning import Settings
from evaluation.results import SharingRow
from evaluation.runs import Stage, known, losses, outline, recipe_of, run, seconds
from llmcompress.errors import CompressError
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.outcome import outline_after
from llmcompress.pipeline.resolve import find_base
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.share.stage import Share

# facts of a stage that are written down
TOLD = ("name", "groups", "kl_nats", "balance", "kl_before", "kl_after")
SHARES = (0.9, 0.75, 0.6, 0.5)
HEAL: dict[str, Settings] = {
    "demo": {"steps": 150, "batch": 4, "learning_rate": 3e-4},
    "wikilm-8m": {"steps": 150, "batch": 4, "learning_rate": 2e-4},
}
SCALES: Settings = {"train": "scales", "learning_rate": 1e-3}
CODES: dict[str, Stage] = {
    "codebook of 16 entries per row": {"codebook": {"entries": 16}},
    "codebook of 256 entries per linear": {"codebook": {"entries": 256, "per": "linear"}},
    "nf4": {"quantize": {"format": "nf4"}},
    "nf4, group size 32": {"quantize": {"format": "nf4", "group_size": 32}},
    "w8a16": {"quantize": {"format": "w8a16"}},
}
HEALED_CODES = ("codebook of 16 entries per row", "nf4")


def largest(
    model: MetaModel, candidates: Sequence[Settings], kind: type[Share] | type[LowRank], most: int
) -> Settings | None:
    """The candidate that leaves most parameters, but not more than so many."""
    found: tuple[int, Settings | None] = (0, None)
    for candidate in candidates:
        left = outline_after(kind.model_validate(candidate).result(model), model)
        count = left.parameters()
        if found[0] < count <= most:
            found = count, candidate
    return found[1]


def ways(model: MetaModel, share: float) -> dict[str, list[Stage]]:
    """What is done to reach a share of the parameters, by way."""
    layers = len(model.layers)
    most = int(share * model.parameters())
    cut: list[Settings] = [{"axis": ["ffn", "kv"], "parameters": most}]
    if not model.config.tie_word_embeddings:
        cut = [
            {"axis": "hidden", "multiple": 2, "keep": (1 + share) / 2},
            {"axis": "ffn", "parameters": most},
        ]
    rows: dict[str, list[Stage]] = {"prune": [{"prune": one} for one in cut]}
    parts = (["ffn"], ["ffn", "attention"])
    found: list[Settings] = [
        {"layers": "auto", "groups": count, "parts": list(part)}
        for part in parts
        for count in range(1, layers)
    ]
    if (shared := largest(model, found, Share, most)) is not None:
        rows["share"] = [{"share": shared}]
    for name, count in (("low rank", 1), ("low rank over 2 layers", 2)):
        found = [{"layers_per_basis": count, "keep": keep / 100} for keep in range(30, 100)]
        if (made := largest(model, found, LowRank, most)) is not None:
            rows[name] = [{"low_rank": made}]
    return rows


def rows_of(name: str, model: MetaModel) -> dict[str, list[Stage]]:
    """The stages of every row of a model."""
    heal, rows = HEAL[name], dict[str, list[Stage]]()
    for share in SHARES:
        for way, stages in ways(model, share).items():
            rows[f"ways: {round(100 * share)} %, {way}"] = stages
            rows[f"ways: {round(100 * share)} %, {way}, healed"] = [*stages, {"distill": heal}]
    for way, stage in CODES.items():
        rows[f"ways: {way}"] = [stage]
        if way in HEALED_CODES:
            rows[f"ways: {way}, healed"] = [stage, {"distill": heal | SCALES}]
    if not model.config.tie_word_embeddings:
        fits: dict[str, Settings] = {"ways: tie embedding and head": {}}
        fits |= {f"tied: {fit}": {"fit": fit} for fit in ("embedding", "head", "mean")}
        for row, settings in fits.items():
            rows[row] = [{"tie": settings}]
            rows[f"{row}, healed"] = [{"tie": settings}, {"distill": heal}]
    groups = len(model.layers) // 2 + 1
    for by in ("kl", "cka", "cosine", "adjacent"):
        rows[f"grouping: {by}"] = [{"share": {"layers": by, "groups": groups}}]
    residual = {"layers": "kl", "groups": groups, "residual_rank": 16}
    rows["grouping: kl, residual of rank 16"] = [{"share": residual}]
    return rows


def measure(name: str, row: str, stages: list[Stage]) -> SharingRow:
    """A row: what is left, and what it loses."""
    base, text = MODELS[name][:2]
    with tempfile.TemporaryDirectory() as folder:
        report = run(recipe_of(stages, text), Path(folder) / "out", base)
    size = int(known(report.compressed.size_bytes))
    facts = [stage.model_dump(mode="json") for stage in report.stages]
    return SharingRow(
        **losses(report),
        row=row,
        stages=stages,
        size_bytes=size,
        share_of_bytes=size / Checkpoint.open(find_base(base).folder).size_bytes,
        parameters=report.compressed.parameters,
        top1_agreement=known(report.fidelity.top1_agreement),
        seconds=seconds(report),
        facts=[{key: stage[key] for key in TOLD if key in stage} for stage in facts],
        commit=machine.commit(),
    )


def main(argv: Sequence[str]) -> int:
    """Measure every row and write each as soon as it is there."""
    options = parser("sharing", __doc__)
    options.add_argument("--models", nargs="+", choices=HEAL, default=list(HEAL))
    options.add_argument("--rows", nargs="+", help="rows whose name holds one of these")
    given = machine.parse(options, argv)
    for name in given.models:
        for row, stages in rows_of(name, outline(MODELS[name].base)).items():
            if given.rows and not any(part in row for part in given.rows):
                continue
            try:
                found = measure(name, row, stages)
            except CompressError as error:
                print(f"{name}: {row}: {error}", file=sys.stderr, flush=True)
                continue
            loss = f"KL {found.kl_nats_mean:.4f}, {found.seconds:.0f} s"
            print(f"{name}: {row}: {found.share_of_bytes:.3f} of the bytes, {loss}", flush=True)
            rows = results.merge(f"sharing-{name}", ("row",), found)
            results.write(f"sharing-{name}", machine.head(), {"model": name, "rows": rows})
    return 0
