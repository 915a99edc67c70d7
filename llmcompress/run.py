"""compress(): the whole flow, from a recipe to an artefact on disk that carries its own report.

Order is what this file is about: everything that can be refused is refused before the first hour is spent, each finished block
is in the journal, the artefact is measured from the disk it was written to, and it appears under its name only when it is
whole and within what the recipe accepts. A run that died is started again with the same arguments and goes on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmcompress.artifact import Writer
from llmcompress.chain import done, report_of, require_possible
from llmcompress.checkpoint import Journal
from llmcompress.contents import Outcome, companions, ties_of, write_weights
from llmcompress.data import Blocks
from llmcompress.evaluate import speed_of
from llmcompress.prepare import blocks_for, config_of, find_base, pick_device, tokenizer_of
from llmcompress.recipe import Recipe
from llmcompress.report import CostFacts, ModelFacts, Report
from llmcompress.report.measure import fidelity, peak_memory_bytes
from llmcompress.residency import OnDisk
from llmcompress.stages.context import Context
from llmcompress.walk import Track, logits, untracked


def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
    track: Track = untracked,
) -> Report:
    """Run a recipe on a base and write the artefact to the folder `out`; run again after a crash, it goes on.

    `base` and `data` take the place of the recipe's. Raises CompressError for whatever is wrong with the input, AcceptError
    where the result misses the recipe's bounds: then nothing is published, and the finished blocks are kept.
    """
    start = time.monotonic()
    found = find_base(base or recipe.base, recipe.revision if base is None else None)
    config_of(found.folder, base=True)
    model = OnDisk(found.folder, pick_device(device))
    require_possible(recipe, model)
    _require_sound(model)
    checkpoint = model.checkpoint
    with Writer(out, found.folder, size_bytes=checkpoint.size_bytes, overwrite=overwrite, ties=ties_of(model)) as writer:
        spec = recipe.data.model_copy(update={"source": data}) if data else recipe.data
        blocks = blocks_for(model, spec, tokenizer_of(found.folder), recipe.training_tokens)
        full = partial(OnDisk, found.folder, model.device)
        fingerprint, facts = checkpoint.fingerprint(), []
        for number, step in enumerate(recipe.stages):
            journal = Journal(writer.journal(number), _key(recipe, number, fingerprint, blocks))
            with tempfile.TemporaryDirectory(dir=writer.partial) as scratch:
                facts.append(done(step.stage, model, Context(full, blocks, journal, Path(scratch), spec.seed, track)))
            outcome = Outcome(step.stage, model, journal)
            if number < len(recipe.stages) - 1:
                model = OnDisk(_joint(journal, model, outcome, found.folder), model.device)
        folder = write_weights(writer, model, outcome)
        written = OnDisk(folder, model.device, quantized=True)
        base_model = OnDisk(found.folder, model.device)  # as it is on disk, whatever the stage did to the other
        measured = fidelity(
            logits(written, blocks.evaluation, track), blocks.evaluation, logits(base_model, blocks.evaluation, track)
        )
        peak = peak_memory_bytes(model.device)
        before = ModelFacts(
            model=found.name,
            revision=found.revision,
            parameters=checkpoint.parameters,
            size_bytes=checkpoint.size_bytes,
            perplexity=measured.base_perplexity,
            perplexity_ci95=measured.base_perplexity_ci95,
            **_speed(found.folder, blocks, model.device),
        )
        after = ModelFacts(
            model=str(out),
            parameters=written.checkpoint.parameters,
            size_bytes=written.checkpoint.size_bytes,
            perplexity=measured.perplexity,
            perplexity_ci95=measured.perplexity_ci95,
            **_speed(folder, blocks, model.device),
        )
        cost = CostFacts(seconds=time.monotonic() - start, peak_memory_bytes=peak)
        report = report_of(recipe, before, after, measured, blocks, facts, cost, model.device)
        report.require(**recipe.accept.model_dump())
        writer.publish(companions(report, recipe, found.folder))
        return report


def _joint(journal: Journal, model: OnDisk, outcome: Outcome, base: Path) -> Path:
    """The model between two stages, as a plain checkpoint in the journal of the first: it goes when that one does."""
    folder = journal.folder / "joint"
    if not folder.is_dir():
        with Writer(folder, base, size_bytes=model.checkpoint.size_bytes, ties=ties_of(model)) as writer:
            write_weights(writer, model, outcome)
            writer.publish({})
    return folder


def _require_sound(model: OnDisk) -> None:
    """Refuse a base with lost, misshapen or non-finite weights now, not hours later: it costs one read of the base."""
    for index in range(len(model.layers)):
        with model.block(index):
            pass


def _key(recipe: Recipe, number: int, fingerprint: str, blocks: Blocks) -> str:
    """Digest of all that decides what a stage makes of a block: what is done, to which weights, on which tokens, by what."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "bitsandbytes")}
    stages = recipe.model_dump(mode="json")["stages"][: number + 1]
    text = json.dumps([stages, recipe.data.seed, fingerprint, blocks.sha256, blocks.training_sha256, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _speed(folder: Path, blocks: Blocks, device: torch.device) -> dict[str, Any]:
    fast = speed_of(folder, blocks.evaluation, device)
    return {"tokens_per_s": fast.prefill_tokens_per_s, "decode_tokens_per_s": fast.decode_tokens_per_s} if fast else {}
