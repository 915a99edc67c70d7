"""run_recipe(): the whole flow, from a recipe to an artefact on disk that carries its own report.

This file decides the order. Everything that can be refused is refused before the first hour is spent. Each
finished layer is in the journal. The artefact is measured from the disk that it was written to. It appears
under its name only when it is whole and within what the recipe accepts. A run that died resumes when it is
started again with the same arguments.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec, Effort
from llmcompress.errors import DataError, OutputError, argument, first_line
from llmcompress.integrations import distributed
from llmcompress.integrations.distributed import Processes
from llmcompress.io import own_code
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import Writer, partial_folder
from llmcompress.io.safetensors_writer import discard
from llmcompress.io.tokenizer import keep_tokens, require_portable, tokenizer_of
from llmcompress.io.user_paths import path_of
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import Track, logits, untracked
from llmcompress.modeling.token_limit import batches_of
from llmcompress.pipeline.disk_store import DiskStore
from llmcompress.pipeline.effort import as_it_ran, effort_facts
from llmcompress.pipeline.evaluate import Trial, trial_of
from llmcompress.pipeline.export import beside, repack, require_places
from llmcompress.pipeline.kv_cache import cache_facts
from llmcompress.pipeline.outcome import companions, require_pictures, write_weights
from llmcompress.pipeline.report_facts import Compared, Loads, Ran, Stored, model_facts, report_of
from llmcompress.pipeline.resolve import (
    Base,
    calibration_data,
    config_of,
    find_base,
    require_computable,
    require_loadable,
    require_same_vocabulary,
    resolve,
    student_folder,
)
from llmcompress.pipeline.search import expanded
from llmcompress.pipeline.stages import require_possible, run_stages
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import Columns, Fidelity, Speed, columns, peak_memory_bytes, summary
from llmcompress.report.samples import Witness, continuations, prompts_of
from llmcompress.report.schema import CostFacts, ModelFacts, ParagraphFacts, Report, SampleFacts

logger = logging.getLogger(__name__)

# spells the paragraph with a tokenizer; None on a process that has not seen it
Seen = Callable[[PreTrainedTokenizerBase], ParagraphFacts] | None


@fast_float32_products()
def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | Base | None = None,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    overwrite: bool = False,
    device: str | None = None,
    tokens_sha256: str | None = None,
    track: Track = untracked,
) -> Report:
    """Run a recipe on a base and write the artefact to the folder `out`. The same call resumes after a crash.

    `base`, `data` and `effort` take the place of the recipe's; a string of `data` is taken as
    DataSpec.with_text takes it. `tokens_sha256` is the hash that the tokens must have. Raises CompressError
    for wrong input, and AcceptError if the result misses the recipe's bounds; then nothing is published, and
    the finished layers are kept. An export that the recipe asks for and the result can't be put into is an
    error as well; the result is there then.
    """
    start = time.monotonic()
    recipe.require_own_names(base=base.name if isinstance(base, Base) else base, data=data)
    target = path_of(out, argument("out"), OutputError)
    place = partial_folder(target)
    require_pictures()
    distributed.join(device)
    found = (
        base
        if isinstance(base, Base)
        else find_base(base or recipe.base, recipe.revision if base is None else None)
    )
    _import_code(found.folder)
    config = config_of(found.folder, base=True)
    recipe = expanded(recipe, found, data, effort, device, track)
    settled = recipe.with_effort(effort)
    resolved, tokenizer = resolve(settled, data, device), tokenizer_of(found.folder)
    pinned, spec, where = resolved.recipe, resolved.data, resolved.device
    require_same_vocabulary(resolved, config, tokenizer)
    base_size = Checkpoint.open(found.folder).size_bytes
    if distributed.first():
        require_places(recipe.exports, target, found.folder, config, overwrite=overwrite)
    with (
        Writer(target, found.folder, size_bytes=base_size, overwrite=overwrite)
        if distributed.first()
        else nullcontext() as writer
    ):
        distributed.wait()
        model = DiskModel(_student(pinned, place, spec.seed) or found.folder, where)
        require_possible(pinned, model)
        require_computable(model)
        require_loadable(found.folder, config)
        require_portable(found.folder, model.checkpoint.config, tokenizer, within=place)
        text = calibration_data(model, spec, tokenizer, settled.training_tokens, settled.effort)
        if tokens_sha256 not in (None, text.sha256):
            raise DataError(
                f"{spec.source} gives tokens with sha256 {text.sha256[:16]}, the report was made with "
                f"{tokens_sha256[:16]}; give the same text with {argument('data')}, or the same base with "
                f"{argument('base')}"
            )
        store = DiskStore(pinned, model, found.folder, text, place)
        facts = run_stages(pinned, store, store.teacher, text, track)
        folder = None
        if writer is not None:
            folder = write_weights(writer, store.model, store.left)
            keep_tokens(folder, tokenizer, found.folder)
        folder = Processes.all("batch").agreed(folder)
        assert folder is not None, "rank 0 writes"
        del model, store  # measuring reads from the disk what it needs
        measured, stored, seen = _compare(folder, found.folder, where, text, track)
        if writer is not None:
            cached = cache_facts(
                DiskModel(folder, where, quantized=True), text.evaluation, text.unscored, track
            )
            prompts, tokens = prompts_of(text.evaluation)
            base_trial = _trial_of_base(found.folder, text, where, prompts, tokens)
            pair = prompts if base_trial.written is not None else None  # one model's text shows nothing
            trial = trial_of(folder, text.evaluation, where, pair, tokens)
            before = _facts_of_base(found, stored[1], measured, base_trial.speed)
            after = _facts_of_artefact(str(out), stored[0], measured, trial.speed)
            samples = _samples(seen, prompts, base_trial, trial, tokenizer)
            cost = CostFacts(seconds=time.monotonic() - start, peak_memory_bytes=peak_memory_bytes(where))
            ran = as_it_ran(settled, text)
            chosen = effort_facts(recipe, settled, spec, *text.calibration.shape)
            report = report_of(
                Ran(ran, text, where, facts, chosen, cost),
                Compared(before, after, measured),
                Loads(config, stored[0].plain, bool(own_code.carried(found.folder))),
            ).model_copy(update={"samples": samples, "kv_cache": cached})
            report.require(**ran.accept.model_dump())
            writer.publish(companions(report, ran, found.folder, place))
    distributed.wait()
    for to in recipe.exports if distributed.first() else ():
        repack(target, to, beside(target, to), overwrite=overwrite)
    return Report.of(target)


def _import_code(folder: Path) -> None:
    """Let the base run code of its own, if the user allows it. One process copies it to transformers' cache,
    before the others read it there."""
    own_code.trust(folder)
    if own_code.runs(folder):
        with distributed.first_alone() as writes:
            if writes:
                config_of(folder, base=True)
                tokenizer_of(folder)


def _student(recipe: Recipe, place: Path, seed: int) -> Path | None:
    """Return the folder of the student that takes the place of the base, or None without a student."""
    if recipe.student is None:
        return None
    with distributed.first_alone() as writes:
        if writes:
            discard(place / "student")  # whatever an earlier run left there
        return student_folder(recipe.student, place / "student", seed, write=writes)


@torch.no_grad()
def _compare(
    written: Path, base: Path, device: torch.device, text: CalibrationData, track: Track
) -> tuple[Fidelity, list[Stored], Seen]:
    """Return how far two models on disk are apart, what each stores, and what was seen of a paragraph. Each
    process measures its share of the sequences. The weights are dropped, before others are loaded whole to be
    timed."""
    models = DiskModel(written, device, quantized=True), DiskModel(base, device)
    processes, found = Processes.all("batch"), dict[int, Columns]()
    shard, witness = processes.shard(batches_of(text.evaluation)), Witness(text.scored)
    if shard.batches:
        sequences = torch.cat(list(shard.batches))
        scored = sequences[:, text.unscored :]
        ours, theirs = (logits(each, sequences, track, text.unscored) for each in models)
        pairs = zip(ours, theirs, strict=True)
        # the paragraph is of the first batch
        measured = columns(witness.seeing(pairs) if 0 in shard.numbers else pairs, scored)
        positions = [len(batch) * scored.shape[1] for batch in shard.batches]
        by_batch = (torch.cat(column).split(positions) for column in zip(*measured, strict=True))
        found = dict(zip(shard.numbers, zip(*by_batch, strict=True), strict=True))
    whole = summary([*processes.gathered(found).values()], text.scored.shape[1])
    paragraph = partial(witness.paragraph, found[0][2]) if 0 in found else None
    return whole, [_stored(each) for each in models], paragraph


def _stored(model: DiskModel) -> Stored:
    checkpoint = model.checkpoint
    return Stored(checkpoint.parameters, model.idle_parameters(), checkpoint.size_bytes, model.plain)


def _facts_of_base(base: Base, stored: Stored, measured: Fidelity, speed: Speed | None) -> ModelFacts:
    """What the report says of the base."""
    return model_facts(
        base.name,
        measured.base_perplexity,
        measured.base_perplexity_ci95,
        stored=stored,
        revision=base.revision,
        speed=speed,
    )


def _facts_of_artefact(out: str, stored: Stored, measured: Fidelity, speed: Speed | None) -> ModelFacts:
    """What the report says of the artefact."""
    return model_facts(
        out,
        measured.perplexity,
        measured.perplexity_ci95,
        stored=stored,
        speed=speed,
    )


def _trial_of_base(
    folder: Path, text: CalibrationData, device: torch.device, prompts: Tensor, tokens: int
) -> Trial:
    """Time the base and let it write, or do without, so that hours of work are not lost."""
    try:
        return trial_of(folder, text.evaluation, device, prompts, tokens)
    except Exception as error:  # the weights were read and computed before, so they are sound
        logger.warning("%s can't be timed (%s), so the report has no speed of it", folder, first_line(error))
        return Trial(why="the base could not be loaded whole")


def _samples(
    seen: Seen, prompts: Tensor, base: Trial, ours: Trial, tokenizer: PreTrainedTokenizerBase | None
) -> SampleFacts | None:
    """What the report tells of text, token by token; None if it can't be spelled, so that hours of work are
    not lost."""
    if seen is None or tokenizer is None:
        return None
    try:
        if base.written is None or ours.written is None:
            return SampleFacts(paragraph=seen(tokenizer), left_out=base.why or ours.why)
        pairs = continuations(prompts, base.written, ours.written, tokenizer)
        return SampleFacts(paragraph=seen(tokenizer), continuations=pairs)
    except Exception as error:  # tokenizers of others decode as they like
        logger.warning("the report has no samples of text (%s)", first_line(error))
        return None
