"""What the budget of a search is of: bytes on disk, bytes in memory, or the time of a token.

Each is a `Measure`: how much every linear takes in every way, what the rest of the model takes, and what the
user's words allow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcompress.data.calibration import CalibrationData
from llmcompress.errors import CompressError, ModelError, argument
from llmcompress.frontier.choice import BYTES, Outer, Quantity
from llmcompress.frontier.running import HEAD_WAYS, Shape, Taken, coded_head, held_bytes, nanoseconds
from llmcompress.frontier.ways import KEEP, Palette
from llmcompress.io.cache import cache_folder
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.io.units import rate_of
from llmcompress.io.user_paths import shortened
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Track
from llmcompress.pipeline.disk_store import source_digest
from llmcompress.pipeline.evaluate import speed_of
from llmcompress.pipeline.plan import cached_per_token
from llmcompress.pipeline.resolve import bytes_within
from llmcompress.report.counted import Counted, shown
from llmcompress.report.metrics import environment
from llmcompress.stages.budget.stage import EXPORTED, Loader
from llmcompress.stages.linear_rewriting import refused

TIMES = "times"  # entry of the journal of what was timed
SECOND = 10**9  # nanoseconds
CONTEXT = 2048  # tokens whose keys and values are in memory, by default


@dataclass(frozen=True)
class Measure:
    """What a budget is of. `base` is what the base has of it, in bytes or tokens/s."""

    counted: Counted
    quantity: Quantity
    base: float
    context: int | None = None

    def limits(self, asked: Sequence[str]) -> list[tuple[str, int]]:
        """How much each of the user's words allows, the tightest first. Errors: CompressError."""
        return sorted({each: self.limit(each) for each in asked}.items(), key=lambda each: each[1])

    def limit(self, asked: str) -> int:
        """How much of the quantity is allowed. Errors: CompressError."""
        if self.counted != "tokens_per_s":
            return bytes_within(asked, round(self.base), self.counted)
        return int(SECOND / self._speed(asked))

    def _speed(self, asked: str) -> float:
        name = argument("tokens_per_s")
        if (rate := rate_of(asked)) is None:
            raise CompressError(
                f"{name} {shortened(asked)} is no speed; give tokens/s like 30, or a multiple of the base's "
                "like 1.5x"
            )
        wanted = rate[0] * self.base if rate[1] else rate[0]
        if wanted <= self.base:
            raise CompressError(
                f"{name} {shortened(asked)} is no faster than the base, which writes "
                f"{shown(self.counted, self.base)} here; give a higher one"
            )
        return wanted

    def reached(self, taken: int) -> float:
        """What a model has that takes so much: bytes, or tokens/s."""
        return SECOND / taken if self.counted == "tokens_per_s" else taken

    def out_of_reach(self, asked: str, least: int, loads_with: Loader, *, widths: bool) -> CompressError:
        """The error if no choice of formats, and of `widths` if they are chosen too, is within what was
        asked, and one takes the `least`."""
        given, most = f"{argument(self.counted)} {shortened(asked)}", self.reached(least)
        if self.counted == "tokens_per_s":
            return CompressError(
                f"{given} is faster than any choice of formats runs here; the fastest that loads with "
                f"{loads_with} is expected to write {shown(self.counted, most)}, {most / self.base:.2f}x the "
                "base"
            )
        beside = f" with the cache of {self.context} tokens" if self.counted == "memory" else ""
        if self.counted == "size" and not widths and loads_with not in EXPORTED:
            beside = ", and less with prune among the choices"
        return CompressError(
            f"{given} is less than any choice of {'formats and widths' if widths else 'formats'} leaves; the "
            f"smallest that loads with {loads_with} has {shown(self.counted, most)}{beside}"
        )


def of_size(whole: int) -> Measure:
    """The bytes of the files, of a base of so many."""
    return Measure("size", BYTES, whole)


def of_memory(model: LayerwiseModel, offered: Sequence[Palette], context: int) -> Measure:
    """The bytes of the tensors of the loaded model, as reports count them, with the keys and values of so
    many tokens. Errors: ModelError if the model's cache is not known."""
    cached = cached_per_token(model, context)
    if cached is None:
        raise ModelError(
            f"no axis of this {model.anatomy.family} model says how much its cache takes, so its memory "
            f"can't be counted; give {argument('size')}"
        )
    shapes, dtype = _shapes(model), _loaded_dtype(model)
    held = held_bytes(shapes.values(), offered, dtype)
    buffers = sum(buffer.nbytes for buffer in model.model.buffers())
    whole = model.parameters() * dtype.itemsize + buffers + context * cached
    beside = whole - sum(_kept(held, shape) for shape in shapes.values())
    V, D = _matrix(model)
    saved = V * D * (dtype.itemsize - 1) - 4 * V  # by int8 codes with a scale a row
    head, tied = _head_of(model)

    def outside(outer: Outer) -> int:
        coded = ("embedding" in outer.settings) + (not tied and head in outer.overrides)
        return beside - coded * saved

    return Measure("memory", held.quantity(shapes, outside), whole, context)


class Times(JournalFacts):
    """What was timed on a machine: a token of the base, and each linear by shape, way and whether plain
    transformers loads it, in nanoseconds."""

    token: int
    linears: tuple[tuple[int, int, str, bool, int], ...]
    head: tuple[int, int]  # as it is and in int8

    def taken(self) -> Taken:
        """The times of the linears."""
        return Taken({((R, C), way, native): amount for R, C, way, native, amount in self.linears})


def of_speed(model: DiskModel, offered: Sequence[Palette], text: CalibrationData, track: Track) -> Measure:
    """The time of a token that is written at batch size 1 on this machine: that of each linear, and the rest
    of a token of the base. Errors: ModelError if the base can't be timed."""
    if model.expert_linears or any(model.anatomy.of_layer(i).experts for i in range(len(model.layers))):
        raise ModelError(
            "how fast experts are is not timed, as a token takes few of them; give "
            f"{argument('size')} or {argument('memory')}"
        )
    shapes = _shapes(model)
    times = _times(model, shapes, offered, text, track)
    return timed_measure(times, shapes, *_head_of(model))


def timed_measure(times: Times, shapes: Mapping[str, Shape], head: str, tied: bool) -> Measure:
    """The measure of what was timed, of linears with these shapes by name; `head` is the name of the head,
    `tied` whether it is the matrix of the embedding."""
    taken = times.taken()
    spent = sum(_kept(taken, shape) for shape in shapes.values())
    if spent > times.token:  # the linears alone took longer than in the model
        taken, spent = taken.scaled(times.token / spent), times.token
    rest, (plain, coded) = times.token - spent, times.head

    def outside(outer: Outer) -> int:
        return max(0, rest + (coded - plain if coded_head(outer, head, tied=tied) else 0))

    return Measure("tokens_per_s", taken.quantity(shapes, outside), SECOND / times.token)


def _times(
    model: DiskModel,
    shapes: dict[str, Shape],
    offered: Sequence[Palette],
    text: CalibrationData,
    track: Track,
) -> Times:
    """What was timed on this machine before, with the same model, versions and threads, or is timed now."""
    about = environment(model.device)
    ways = [[way.name, dict(way.settings), palette.native] for palette in offered for way in palette.ways]
    said: list[Any] = [
        model.fingerprint(),
        about.device,
        about.versions,
        source_digest(Path(__file__).parents[1]),
        ways,
    ]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    kept = Journal(cache_folder() / "searches" / f"times-{key[:32]}", key, shared=True)
    if kept.has(TIMES, 0):
        return kept.facts(TIMES, 0, Times)
    speed = speed_of(model.folder, text.calibration, model.device)
    if speed is None or speed.decode_tokens_per_s is None:
        why = "it keeps no cache" if speed else "it is too large to be loaded whole"
        raise ModelError(
            f"the base can't be timed here ({why}), so no speed can be asked for; give {argument('size')} or "
            f"{argument('memory')}"
        )
    dtype, where = _loaded_dtype(model), model.device
    timed = partial(nanoseconds, dtype=dtype, device=where, beside=speed.memory_bytes, track=track)
    linears, heads = timed(shapes.values(), offered), timed([_matrix(model)], HEAD_WAYS)
    plain, coded = (heads.of(_matrix(model), way.name, native=False) for way in HEAD_WAYS[0].ways)
    found = Times(
        token=round(SECOND / speed.decode_tokens_per_s),
        linears=tuple((*shape, way, native, ns) for (shape, way, native), ns in linears.amounts.items()),
        head=(plain, coded),
    )
    kept.save(TIMES, 0, {}, found)
    return found


def _shapes(model: LayerwiseModel) -> dict[str, Shape]:
    """The shapes of all linears that take a way, by full name."""
    model.divide_experts()
    known = dict(model.linear_maps())
    return {
        linear: known[linear]
        for linear in model.layer_linears
        if refused(linear, model, (), experts=True) is None
    }


def _kept(taken: Taken, shape: Shape) -> int:
    return taken.of(shape, KEEP.name, native=True)


def _loaded_dtype(model: LayerwiseModel) -> torch.dtype:
    """The dtype in which from_pretrained loads the model."""
    named = getattr(model.config, "dtype", None) or model.weight_dtype
    return named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."))


def _head_of(model: LayerwiseModel) -> tuple[str, bool]:
    """The name of the head, and whether it is the matrix of the embedding."""
    return model.anatomy.head, model.reader(model.anatomy.embedding) == model.anatomy.head


def _matrix(model: LayerwiseModel) -> Shape:
    """The shape of embedding and head."""
    V, D = model.model.get_parameter(f"{model.anatomy.embedding}.weight").shape
    return V, D
