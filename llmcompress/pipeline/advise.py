"""`advise`: which shipped recipes suit a model, from its shapes and from what was measured on other models.

The rule:

1. A recipe is left out if it can't be applied to this model, leaves more bytes than `size`, takes longer
   than `time` with every effort, or leaves what the target can't load.
2. Of the others, those count that were measured on the model nearest to this one in parameters. One is left
   out if another beats it: it leaves no more bytes, lost no more, and asks for no more: no training and no
   llmcompress to load the result where this one needs none, and no slower format where speed counts (`cpu`,
   `gpu`).
3. They are ordered by the speed of their format where that counts, to one digit, then by loss.
4. The first of each purpose come first, then the rest, five at most. Where `size` is given and no recipe is
   within it, or the best one leaves more than 5 % of it unused, `search` comes before them.
5. Where fewer than three are left, recipes that were not measured on that model fill up to three. They are
   compared with each other, and with those, on the nearest model on which both were measured.
6. Few recipes leave what an engine (`vllm`, `llama.cpp`) reads, itself or after an export: all are compared
   on the nearest model on which both were measured, those that its latest release reads come first, and those
   that others beat fill up to three, of other formats first. Their bytes are those of the export.

Bytes follow from shapes, as in a plan. Nothing is timed unless a time is given. What was not measured is
None.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal, get_args

import torch

from llmcompress.architectures.per_layer import SCHEMA
from llmcompress.data.calibration import DEMO
from llmcompress.data.sources import EFFORTS, Effort
from llmcompress.errors import CompressError, ModelError, argument
from llmcompress.exports.registry import target_of
from llmcompress.frontier.ways import palettes
from llmcompress.io import own_code
from llmcompress.io.local_names import short_name
from llmcompress.io.units import amount, duration
from llmcompress.io.user_paths import shortened
from llmcompress.modeling.from_disk import meta_model
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.engines import (
    ENGINES,
    NAMES,
    NOTES,
    VLLM_NOW,
    planned_of,
    read_by,
    require_engine,
)
from llmcompress.pipeline.plan import Foretold, foretold, text_of, times_of
from llmcompress.pipeline.ranking import (
    LEAST,
    MOST,
    Candidate,
    beats,
    distance,
    filled,
    in_order,
    least_loss,
    nearest,
    ranked,
)
from llmcompress.pipeline.resolve import Base, bytes_within, config_of, find_base, resolve
from llmcompress.recipe import catalogue, shipped
from llmcompress.recipe.catalogue import MODELS, PLUGIN, Entry
from llmcompress.recipe.recipe import Recipe
from llmcompress.recipe.speeds import CPUS, H100, Machine, Speed
from llmcompress.stages.machine import UntimedMachine

Target = Literal["cpu", "gpu", "vllm", "llama.cpp"]
FILLED = 0.95  # share of a size from which a recipe fills it
GPU = (
    "gpu: on an H100 no format is faster than bfloat16; quantise to fit a model into memory. To make it "
    "faster, prune and train: heal-after-prune; its speed was not measured for these recipes"
)


@dataclass(frozen=True)
class Advice:
    """A recipe, or a search, that suits a model. What is not known is None."""

    recipe: str | None  # None for a search
    purpose: str
    why: str
    command: str
    size_bytes: int  # of a search the most
    share: float  # of the base's bytes
    kl_nats: float | None
    measured_on: str | None
    loads_with: str
    memory_bytes: int | None = None  # that the run holds at once, beside Python and its libraries
    speed: Speed | None = None
    effort: Effort | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Advised:
    """The advice for a model, the best first; which of the recipes that were tried can't be applied to it,
    with the reason; and notes in words."""

    model: str
    parameters: int
    size_bytes: int
    advice: tuple[Advice, ...]
    refused: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The keys of `advise --json`."""
        return asdict(self)


def advise(
    model: str | os.PathLike[str],
    *,
    size: str | None = None,
    target: Target | None = None,
    time: float | None = None,
    trust_remote_code: bool = False,
) -> Advised:
    """Rank the shipped recipes that suit a model, from its config alone; no weight is read and nothing is
    run.

    Args:
        model: Hub id, of which small files are fetched, folder, or `demo`.
        size: the most bytes of the result, like `60MB`, or a share of the base's, like `40%`.
        target: where the result runs: `cpu` or `gpu` ranks formats by their measured speed, `vllm` and
            `llama.cpp` keep what the engine reads, itself or after an export.
        time: seconds that a run may take on this machine, which is then timed; without it no time is
            estimated.
        trust_remote_code: whether the model may run code of its own.

    Raises:
        CompressError: the model can't be read, or nothing fits.
    """
    if target not in (None, *get_args(Target)):
        known = ", ".join(get_args(Target))
        raise CompressError(f"target {shortened(str(target))} is not known; use one of: {known}")
    with own_code.permission(trust_remote_code):
        base = find_base(os.fspath(model), weights=False)
        own_code.trust(base.folder)
        return _advised(base, os.fspath(model), size, target, time, trust_remote_code)


def _advised(
    base: Base, name: str, size: str | None, target: Target | None, time: float | None, code: bool
) -> Advised:
    outline = meta_model(base.folder, config_of(base.folder, base=True), torch.device("cpu"))
    parameters, whole = outline.parameters(), outline.stored_bytes()
    limit = bytes_within(size, whole) if size is not None else None
    machine = _machine(target)
    if target in ENGINES:
        require_engine(target, base, outline)
    near = min(MODELS, key=lambda measured: distance(measured, parameters))
    first, rest = _entries(near)
    if target in ENGINES:  # few recipes leave what an engine reads, so all are compared
        first, rest = [*first, *rest], []
    found, refused = _candidates(first, base, outline, machine, target)
    within = _fitting(found, limit, name, time, base, outline)
    chosen = ranked(within, parameters)
    if len(chosen) < LEAST:
        others, more = _candidates(rest, base, outline, machine, target)
        found, refused = [*found, *others], refused | more
        fitting = _fitting(others, limit, name, time, base, outline)
        chosen = filled(chosen, within, ranked(fitting, parameters))
    if target in ENGINES:
        formats = {one.format for one in chosen}
        left = [one for one in in_order(within, parameters) if one not in chosen]
        chosen = filled(chosen, [], sorted(left, key=lambda one: one.format in formats))
    searched = limit is not None and target not in ENGINES and _search_fits(chosen, limit, outline)
    if not chosen and not searched:
        raise _nothing(found, refused, size, time, target)
    given = f"{shlex.quote(name)}{' --trust-remote-code' if code else ''}"
    advice = [_of(each, chosen, near, given, name, whole, machine) for each in chosen]
    if searched and limit is not None and size is not None:
        advice.insert(0, _search(chosen, given, size, limit, whole))
    notes = _notes(advice, refused, parameters, outline, machine, target, time)
    return Advised(base.name, parameters, whole, tuple(advice[:MOST]), refused, tuple(notes))


def _machine(target: Target | None) -> Machine | None:
    """The measured machine that is like the one on which the result is to run, if speed counts."""
    if target == "gpu":
        return H100
    return CPUS.get(torch.backends.cpu.get_cpu_capability()) if target == "cpu" else None


def _entries(near: str) -> tuple[list[Entry], list[Entry]]:
    """The recipes that were measured on the model `near`, and those measured on others alone. That for the
    demo alone is none of them."""
    entries = [entry for entry in catalogue.entries() if entry.measured and entry.name != DEMO]
    first = [entry for entry in entries if near in (each.model for each in entry.measured)]
    return first, [entry for entry in entries if entry not in first]


def _candidates(
    entries: Sequence[Entry], base: Base, outline: MetaModel, machine: Machine | None, target: Target | None
) -> tuple[list[Candidate], dict[str, str]]:
    """The recipes that can be applied to a base and leave what the target loads, and those that can't be
    applied with the reason. They share one outline of the base, until one divides its experts."""
    found, refused, model = list[Candidate](), dict[str, str](), outline
    for entry in entries:
        model = _whole(base, model)
        try:
            one = _candidate(entry, shipped.load(entry.name), base, model, machine, target)
        except CompressError as error:
            refused[entry.name] = str(error)
            continue
        if one is not None:
            found.append(one)
    return found, refused


def _whole(base: Base, outline: MetaModel) -> MetaModel:
    """The outline of a base, anew if a stage divided its experts."""
    if not outline.divided:
        return outline
    return meta_model(base.folder, config_of(base.folder, base=True), outline.device)


def _fitting(
    found: Sequence[Candidate],
    limit: int | None,
    name: str,
    time: float | None,
    base: Base,
    outline: MetaModel,
) -> list[Candidate]:
    """The recipes that fit in so many bytes and seconds, with the best effort that does; `name` is the user's
    for the base."""
    within = [each for each in found if limit is None or each.size_bytes <= limit]
    if time is None:
        return within
    return [timed for each in within if (timed := _within(each, name, time, _whole(base, outline)))]


def _candidate(
    entry: Entry, recipe: Recipe, base: Base, model: MetaModel, machine: Machine | None, target: Target | None
) -> Candidate | None:
    """A recipe on a model; None if the engine of the target does not read what it leaves. Errors:
    CompressError if it can't be applied."""
    steps = _foretold(recipe, model)
    left, size = steps[-1].left, steps[-1].estimate.size_bytes
    ours = left.layouts or SCHEMA in left.config.to_dict()
    loads_with, engine = PLUGIN if ours else entry.loads_with, None
    if target in ENGINES:
        planned = planned_of(base, steps)
        spares = any(stage.spares for stage in recipe.stages)
        if (way := read_by(target, planned, spares=spares, loads_with=loads_with)) is None:
            return None
        loads_with, engine = way
        size = target_of(engine).weight_bytes(planned) if engine else size
    kernels = [stage.kernel for stage in recipe.stages if stage.kernel]
    kernel = kernels[0] if len(kernels) == 1 else None
    return Candidate(
        name=entry.name,
        purpose=entry.purpose,
        size_bytes=size,
        measured=nearest(entry.measured, model.parameters()),
        loads_with=loads_with,
        learns=any(stage.learns for stage in recipe.stages),
        memory_bytes=_memory(steps),
        engine=engine,
        format=kernel,
        speed=machine.formats.get(kernel) if machine and kernel else None,
    )


def _foretold(recipe: Recipe, model: MetaModel, effort: Effort | None = None) -> list[Foretold]:
    """What each stage of a recipe leaves and costs, without times. Errors: CompressError if it can't be
    applied."""
    settled = recipe.with_effort(effort)
    resolved = resolve(settled, None, "cpu")
    samples, length = text_of(settled, resolved.data, model)
    return list(foretold(resolved, model, UntimedMachine(model.device), samples * length, length))


def _memory(steps: Sequence[Foretold]) -> int:
    return max(step.estimate.peak_memory_bytes for step in steps)


def _within(one: Candidate, name: str, seconds: float, outline: MetaModel) -> Candidate | None:
    """A recipe with the best effort that fits in a time; None if none does."""
    recipe = shipped.load(one.name)
    times = times_of(recipe, base=name)
    fits = [effort for effort in EFFORTS if times[effort] <= seconds]
    if not fits:
        return None
    memory = _memory(_foretold(recipe, outline, fits[-1]))
    return replace(one, effort=fits[-1], seconds=times[fits[-1]], memory_bytes=memory)


def _search_fits(chosen: Sequence[Candidate], limit: int, model: MetaModel) -> bool:
    """Whether a search may do better within a size than recipes: none fills it, and formats may."""
    if any(each.size_bytes >= FILLED * limit for each in least_loss(chosen)):
        return False
    codings = [way.coding(model.weight_dtype) for palette in palettes("llmcompress") for way in palette.ways]
    bits = min(coding.bits for coding in codings if coding is not None)
    return limit > bits / 8 * model.parameters()


def _nothing(
    found: Sequence[Candidate],
    refused: dict[str, str],
    size: str | None,
    time: float | None,
    target: Target | None,
) -> CompressError:
    """The error where nothing can be advised."""
    if not found and target in ENGINES:
        return ModelError(
            f"no shipped recipe leaves of this model what {NAMES[target]} reads; leave out the target "
            f"{target}"
        )
    if not found:
        return ModelError(f"no shipped recipe can be applied: {next(iter(refused.values()))}")
    least = min(found, key=lambda one: one.size_bytes)
    asked, more = list[str](), list[str]()
    if size is not None:
        asked.append(f"{argument('size')} {shortened(size)}")
        more.append(f"more bytes (the least are those of {least.name}: {amount(least.size_bytes, 'B')})")
    if time is not None:
        asked.append(f"{argument('time')} {duration(time)}")
        more.append("more time")
    return CompressError(f"no shipped recipe fits in {' and '.join(asked)}; give {' or '.join(more)}")


def _of(
    one: Candidate,
    chosen: Sequence[Candidate],
    near: str,
    given: str,
    name: str,
    whole: int,
    machine: Machine | None,
) -> Advice:
    """The advice to take one recipe among those that are chosen; `near` is the measured model that is nearest
    to this one."""
    effort = f" --effort {one.effort}" if one.effort else ""
    out = shlex.quote(f"{short_name(name)}-{one.name}")
    why = [_reason(one, chosen)]
    if one.model != near:
        why.append(f"not measured on {near}")
    if machine and one.format:
        why.append(_speed_words(one, machine))
    command = f"llmcompress run {one.name} --base {given}{effort} --out {out}"
    if one.engine is not None:
        into = shlex.quote(f"{short_name(name)}-{one.name}-{one.engine}")
        command += f" && llmcompress export {out} --to {one.engine} --out {into}"
    return Advice(
        recipe=one.name,
        purpose=one.purpose,
        why="; ".join(why),
        command=command,
        size_bytes=one.size_bytes,
        share=one.size_bytes / whole,
        kl_nats=one.loss,
        measured_on=one.model,
        loads_with=one.loads_with,
        memory_bytes=one.memory_bytes,
        speed=one.speed,
        effort=one.effort,
        seconds=one.seconds,
    )


def _reason(one: Candidate, chosen: Sequence[Candidate]) -> str:
    """Why a recipe is among those that are chosen, in a clause: in which group of them it is the best."""
    kinds: tuple[tuple[str, Callable[[Candidate], bool]], ...] = (
        ("without training", lambda each: not each.learns),
        ("without llmcompress to load it", lambda each: each.loads_with != PLUGIN),
        (f"that {VLLM_NOW} reads now", lambda each: each.loads_with == VLLM_NOW),
        (f"with {one.purpose}", lambda each: each.purpose == one.purpose),
    )
    near = [each for each in chosen if each.model == one.model]
    for count in range(len(kinds) + 1):
        for asked in combinations(kinds, count):
            group = [each for each in near if all(is_one(each) for _, is_one in asked)]
            words = " and ".join(word for word, _ in asked)
            if one not in group:
                continue
            if min(group, key=lambda each: each.loss) is one:
                return f"least loss {words}".rstrip()
            if min(group, key=lambda each: each.size_bytes) is one:
                return f"fewest bytes {words}".rstrip()
    if any(beats(other, one) for other in chosen):
        return "another of these is as small and loses less; to compare"
    return "between the others in bytes and loss"


def _speed_words(one: Candidate, machine: Machine) -> str:
    """The measured speed of a recipe's format, whatever was pruned beside it."""
    if one.speed is None:
        return f"the speed of {one.format} was not measured on {machine.name}"
    speed = one.speed
    return (
        f"{one.format} writes {speed.writing:g} x and reads {speed.reading:g} x as fast as "
        f"{machine.reference} ({machine.name}, {speed.model})"
    )


def _search(chosen: Sequence[Candidate], given: str, size: str, limit: int, whole: int) -> Advice:
    best = least_loss(chosen)
    why = (
        f"of the recipes that fit, the one of least loss, {best[0].name}, leaves "
        f"{amount(limit - best[0].size_bytes, 'B')} of the size unused"
        if best
        else "no recipe fits in the size"
    )
    return Advice(
        recipe=None,
        purpose="search",
        why=f"{why}; a search measures this model and fills it",
        command=f"llmcompress search {given} --size {shlex.quote(size)}",
        size_bytes=limit,
        share=limit / whole,
        kl_nats=None,
        measured_on=None,
        loads_with=PLUGIN,
    )


def _notes(
    advice: Sequence[Advice],
    refused: dict[str, str],
    parameters: int,
    model: MetaModel,
    machine: Machine | None,
    target: Target | None,
    time: float | None,
) -> list[str]:
    models = dict.fromkeys(each.measured_on for each in advice[:MOST] if each.measured_on)
    named = ", ".join(f"{name} ({amount(MODELS[name])} parameters)" for name in models)
    notes = [
        "bytes follow from the shapes, but for headers and for which linears `protect` spares; memory is "
        "what the run holds at once, beside Python and its libraries"
    ]
    if named:
        notes.append(
            f"KL(base || compressed) was measured on {named}, the nearest to this one "
            f"({amount(parameters)}); it compares recipes and does not predict this model"
        )
    if time is None:
        notes.append(
            "no time is estimated without --time; `llmcompress plan RECIPE --base MODEL` does it too"
        )
    else:
        notes.append(
            "time is estimated on this machine, with the best effort that fits; a KL is that of the recipe "
            "as it was measured, not of an effort, and a search is not timed"
        )
    if target in NOTES:
        notes.append(NOTES[target])
    if target == "gpu":
        notes.append(GPU)
    if target == "cpu":
        notes.append(_cpu_words(model, machine))
    if refused:
        notes.append(f"can't be applied to this model: {', '.join(refused)}; --json has the reasons")
    return notes


def _cpu_words(model: MetaModel, machine: Machine | None) -> str:
    if machine is None:
        return "cpu: no speed was measured on a processor like this one, so loss alone ranks"
    dtype = str(model.weight_dtype).removeprefix("torch.")
    speed = machine.dtypes.get(dtype)
    base = (
        f"the base's {dtype} writes {speed.writing:g} x and reads {speed.reading:g} x as fast as float32"
        if speed
        else f"the speed of the base's {dtype} was not measured"
    )
    return f"cpu: this processor has {machine.name}, where {base}"
