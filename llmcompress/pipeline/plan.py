"""Estimate what a run would give and cost from the model's config alone; no weight is read and nothing is
run.

Sizes follow from shapes and formats and are exact except for headers. Memory is the sum of what is held at
once. Time is that of counted operations, each timed for a moment on this machine (`stages.machine`), so it is
right to a factor of about two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcompress.architectures.spec import AXES, FACTS, experts_per_token
from llmcompress.data.calibration import POOL
from llmcompress.data.sources import DEFAULT, EFFORTS, DataSpec, Effort
from llmcompress.errors import CompressError, argument
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.registry import AnyLayout
from llmcompress.integrations.kv_cache import CacheSettings, growing_layers
from llmcompress.io import own_code
from llmcompress.io.units import amount, duration
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.from_disk import meta_model
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.pipeline.effort import effort_facts
from llmcompress.pipeline.outcome import outline_after
from llmcompress.pipeline.resolve import Resolved, config_of, find_base, resolve
from llmcompress.pipeline.stages import require_stage
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.rows import chosen_words
from llmcompress.stages.base import Estimate, StageResult, Time, Workload
from llmcompress.stages.cost import summed
from llmcompress.stages.machine import Machine, machine_of
from llmcompress.stages.prune.stage import cuttable

TOKENISE_S = 4e-6  # seconds per token
START_S = 1.5  # of a run: the tokenizer, the checks, the pictures
TIMED_S, TIMINGS, DECODED = 3.0, 6, 32  # the budget, the runs and the tokens of `report.metrics.speed`
KL_OPERATIONS = 12  # on each score of both models
READS = 4  # times that a run reads or hashes the whole base
PRICED = (2048, 8192)  # tokens of a text for which a cache in fewer bits is priced
SHOWN = 0.05  # share of the time from which a part is named


@dataclass(frozen=True)
class PlanRow:
    """The model after a stage: what it stores, its cost per token, and the cost of the stage. The base's row
    has no stage cost."""

    stage: str
    parameters: int
    size_bytes: int
    flops_per_token: int
    kv_cache_bytes_per_token: int | None  # None where no axis says how many heads there are
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    time: Mapping[str, float] | None = None  # what the seconds are spent on


@dataclass(frozen=True)
class Plan:
    """What a run would give and cost: one row for the base and for each stage, the whole time, which loads,
    measures and writes as well, the effort, and notes in words."""

    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]
    seconds: float
    effort: Effort


@fast_float32_products()
def plan_recipe(
    recipe: Recipe,
    *,
    base: str | None = None,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
) -> Plan:
    """Return rows for the base and for each stage. Raises CompressError as `run_recipe` would for the same
    input.

    `base`, `data` and `effort` take the place of the recipe's. No text is read.
    """
    recipe.require_own_names(base=base, data=data)
    found = find_base(base or recipe.base, recipe.revision if base is None else None, weights=False)
    own_code.trust(found.folder)
    settled = recipe.with_effort(effort)
    config, resolved = config_of(found.folder, base=True), resolve(settled, data, device)
    spec, model = resolved.data, meta_model(found.folder, config, resolved.device)
    samples, length = text_of(settled, spec, model)
    machine = machine_of(model.device)
    rows = [_row(model, Estimate("base", model.parameters(), model.stored_bytes(), 0, Time()), cost=False)]
    notes = _known(model)
    for step in foretold(resolved, model, machine, samples * length, length):
        rows.append(_row(step.left, step.estimate))
        notes += [*step.estimate.notes, *_cache_note(step.left)]
    whole = Workload(model, machine, spec.evaluation_samples * length, length, rows[0].size_bytes)
    beside = _beside_stages(whole, found.folder, samples * length + settled.training_tokens(length))
    notes += [_spent(row.stage, Time(row.time)) for row in rows if row.time]
    notes.append(_spent("load, measure, write", beside))
    seconds = beside.seconds + sum(row.seconds or 0.0 for row in rows)
    notes.append(f"the whole run: about {duration(seconds)}, longer beside other programs")
    if chosen := effort_facts(recipe, settled, spec, samples, length):
        notes.append(chosen_words(chosen))
    notes.append(f"calibration: {samples} sequences of {length} tokens, on {model.device}")
    return Plan(tuple(rows), tuple(notes), seconds, settled.effort or DEFAULT)


def text_of(settled: Recipe, spec: DataSpec, model: LayerwiseModel) -> tuple[int, int]:
    """How many sequences a run calibrates on, and of how many tokens."""
    samples, longest = spec.amount(settled.effort)
    return samples, spec.length or min(
        longest, getattr(model.text_config, "max_position_embeddings", longest)
    )


@dataclass(frozen=True)
class Foretold:
    """What a stage would leave of a model, and cost."""

    result: StageResult
    left: MetaModel
    estimate: Estimate


def foretold(
    resolved: Resolved, model: MetaModel, machine: Machine, tokens: int, length: int
) -> Iterator[Foretold]:
    """Yield what each stage of a recipe would leave of `model` and cost, with so many tokens of text in
    sequences of `length`. Errors: CompressError if a stage can't run on what those before it left."""
    before, size_bytes = list[StageResult](), model.stored_bytes()
    for stage in resolved.recipe.stages:
        if student := stage.models.get("student"):
            folder = resolved.models[student].folder
            model = meta_model(folder, config_of(folder, base=True), model.device)
        require_stage(stage, model, before, resolved.recipe.data.seed)
        before.append(stage.result(model))
        left = outline_after(before[-1], model)
        left.model.tie_weights()
        estimate = stage.estimate(model, left, Workload(model, machine, tokens, length, size_bytes))
        yield Foretold(before[-1], left, estimate)
        model, size_bytes = left, estimate.size_bytes


def _known(model: MetaModel) -> list[str]:
    """Notes on the base: how many parameters a token goes through, if not all; of a family that is not in the
    table, what is proved of it and what stays as it is."""
    idle = model.idle_parameters()
    active = [f"a token goes through {amount(model.parameters() - idle)} of the parameters"] if idle else []
    anatomy = model.anatomy
    if anatomy.level == AXES and anatomy.cuts is None:
        return active
    axes = f" (prune: {', '.join(cuttable(anatomy))})" if anatomy.level == AXES else ""
    kept = "; ".join(sorted(set(model.kept_weights.values())))
    matrices = f", and {len(model.kept_weights)} matrices stay as they are ({kept})" if kept else ""
    return [*active, f"of this {anatomy.family} model is proved {FACTS[anatomy.level]}{axes}{matrices}"]


def times_of(
    recipe: Recipe, *, base: str | None = None, data: str | DataSpec | None = None, device: str | None = None
) -> dict[Effort, float]:
    """Return the seconds of a run with each effort, by rising effort. Errors: those of `plan_recipe`."""
    return {
        effort: plan_recipe(recipe, base=base, data=data, effort=effort, device=device).seconds
        for effort in EFFORTS
    }


def fitting(
    recipe: Recipe,
    seconds: float,
    *,
    base: str | None = None,
    data: str | DataSpec | None = None,
    device: str | None = None,
) -> tuple[Effort, str]:
    """Return the best effort with which a run takes at most `seconds` on this machine, and what each would
    take, in words. Errors: CompressError if none fits, beside those of `plan_recipe`."""
    times = times_of(recipe, base=base, data=data, device=device)
    words = ", ".join(f"{effort} about {duration(time)}" for effort, time in times.items())
    fits = [effort for effort, time in times.items() if time <= seconds]
    if not fits:
        raise CompressError(
            f"no effort fits in {argument('time')} {duration(seconds)} ({words}); give more time, less text "
            "or a recipe with less work"
        )
    return fits[-1], words


def _beside_stages(work: Workload, folder: Path, tokens: int) -> Time:
    """The time of a run beside its stages: `tokens` of text are calibrated and trained on, those of `work`
    measure base and result."""
    machine, vocabulary = work.machine, work.model.text_config.vocab_size
    measured = work.passes(2) + work.heads(2, work.tokens)
    scored = KL_OPERATIONS * machine.elementwise(work.tokens, vocabulary)
    once = [
        count * Workload(work.model, machine, at_once, at_once, 0).passes(1).seconds
        for count, at_once in ((1, work.length), (DECODED, 1))
    ]
    timed = 2 * sum(max(seconds, min(TIMED_S, TIMINGS * seconds)) for seconds in once)
    largest = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size, default=None)
    reading = machine.reading(largest, READS * work.size_bytes) if largest else 0.0
    return summed(
        [
            Time({"evaluation": measured.seconds + scored, "speed tests": timed, "files": reading}),
            Time({"text": POOL * TOKENISE_S * tokens, "start": START_S}),
        ]
    )


def _spent(what: str, time: Time) -> str:
    """What most of a time is spent on: quantize (nf4, gptq): about 41 s, 52 % second moments, ..."""
    largest = sorted(time.parts.items(), key=lambda part: -part[1])
    shares = [
        f"{100 * seconds / time.seconds:.0f} % {name}"
        for name, seconds in largest
        if seconds >= SHOWN * time.seconds
    ]
    return f"{what}: about {duration(time.seconds)}, {', '.join(shares)}"


def _row(model: MetaModel, estimate: Estimate, *, cost: bool = True) -> PlanRow:
    flops, cached = per_token(model)
    return PlanRow(
        stage=estimate.stage,
        parameters=estimate.parameters,
        size_bytes=estimate.size_bytes,
        flops_per_token=flops,
        kv_cache_bytes_per_token=cached,
        peak_memory_bytes=estimate.peak_memory_bytes if cost else None,
        seconds=estimate.time.seconds if cost else None,
        time=estimate.time.parts if cost else None,
    )


def per_token(model: MetaModel) -> tuple[int, int | None]:
    """Return the operations of the matrices per token, and the bytes per token in the key-value cache, if the
    model's family is in the table: others may keep something else there.

    The operations of attention between tokens are left out, as they grow with the text.
    """
    used = sum(
        _multiplied(model.layouts.get(name), shape) * model.used_share(name)
        for name, shape in model.linear_maps()
    )
    for index, layer in enumerate(model.layers):
        for name in model.anatomy.of_layer(index).experts:
            share = experts_per_token(model.text_config) / len(layer.get_parameter(name))
            used += layer.get_parameter(name).numel() * share
    return 2 * round(used), cached_per_token(model, PRICED[0])


def cached_per_token(model: LayerwiseModel, length: int) -> int | None:
    """Bytes per token in the key-value cache of a text of `length` tokens, if the model's family is in the
    table. A sliding window counts as if it held the whole text."""
    if model.anatomy.cuts is not None:
        return None
    settings, itemsize, total = CacheSettings.of(model.config), model.weight_dtype.itemsize, 0.0
    growing = growing_layers(model.config) if settings is not None else ()
    for index in range(len(model.layers)):
        size = model.sizes_of(index)
        if settings is not None and index in growing:
            total += settings.bytes_of(length, size["kv"], size["d"], size["d"], itemsize) / length
        else:
            total += 2 * size["kv"] * size["d"] * itemsize
    return round(total)


def _cache_note(model: MetaModel) -> list[str]:
    """What the cache of a model takes per token, if its config stores it in fewer bits; nothing of a family
    that is not in the table."""
    if CacheSettings.of(model.config) is None:
        return []
    sizes = {length: cached_per_token(model, length) for length in PRICED}
    told = [f"{size:,} B at {length:,} tokens" for length, size in sizes.items() if size is not None]
    return [f"KV cache per token: {', '.join(told)}"] if told else []


def _multiplied(layout: AnyLayout | None, shape: tuple[int, int]) -> int:
    """Number of weights that multiply one token. A product counts both of its matrices."""
    whole = math.prod(shape)
    if not isinstance(layout, FactoredLayout):
        return whole
    return layout.rank * sum(shape) + (whole if layout.format == "shared" else 0)
