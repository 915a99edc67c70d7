"""Estimate a cut: parameters and bytes exactly, memory and time approximately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcompress.architectures.spec import experts_per_token
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.sequential import SAMPLE
from llmcompress.stages import fisher
from llmcompress.stages.base import Estimate, Time, Workload
from llmcompress.stages.prune import allocation, expert_widths, sublayer_dropping

if TYPE_CHECKING:
    from llmcompress.stages.prune.stage import Prune

REMOVAL, SEARCH = "removal of units", "search for what goes"


def of(stage: Prune, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
    """Estimate the cost of finding what goes and of solving for what stays."""
    inner, layers = model.inner_parameters(), len(model.layers)
    if stage.of_layers or stage.of_parts:
        spoken, time, states, notes = _dropping(stage, model, work)
        widest = 0
    else:
        spoken, time, widest, notes = _cutting(stage, model, work)
        states = 4 * work.tokens * model.hidden_size
    return Estimate(
        stage=f"prune ({spoken})",
        parameters=left.parameters(),
        size_bytes=left.stored_bytes(),
        peak_memory_bytes=4 * (4 * inner // layers + states + 8 * widest * widest),
        time=time,
        notes=notes,
    )


def _dropping(stage: Prune, model: MetaModel, work: Workload) -> tuple[str, Time, int, tuple[str, ...]]:
    """For layers or sublayers: what goes in words, the time, the floats of the states, and notes."""
    layers, D = len(model.layers), model.hidden_size
    if stage.of_layers:
        gone = stage.cut(model).gone
        time = work.passes(layers * len(gone) / 2, SAMPLE, what=SEARCH)
        return f"layer, {layers - len(gone)} of {layers}", time, layers * SAMPLE * D, ()
    every, without = sublayer_dropping.candidates(model), sublayer_dropping.guess(model, stage)
    time = work.passes(len(every) * len(without) / 2, SAMPLE, what=SEARCH)
    note = "the run finds the sublayers that lose least; these numbers are without the last ones"
    return (
        f"sublayer, {len(every) - len(without)} of {len(every)}",
        time,
        2 * layers * SAMPLE * D,
        (note,),
    )


def _cutting(stage: Prune, model: MetaModel, work: Workload) -> tuple[str, Time, int, tuple[str, ...]]:
    """For units of axes: what stays in words, the time, the widest input that is solved for, and notes."""
    cut, sizes = stage.cut(model), stage.sizes(model)
    # the first layer with the axis stands for all
    first = {axis: next(index for index, size in enumerate(sizes[axis]) if size) for axis in stage.axes}
    readers = {axis: _reader(model, index, axis) for axis, index in first.items()}
    shapes = {axis: read.shape for axis, read in readers.items()}
    time = Time()
    for axis, read in readers.items():
        R, C = read.shape
        # no unit is chosen where all of them go
        gone = [sizes[axis][index] - count for index, count in enumerate(cut.widths[axis]) if count]
        # of the inputs here and of the full model, then on the way out
        time += work.passes(3, half=work.half) + work.factors(3 * read.count, C)
        time += work.moments(2, *[C] * read.passes, half=work.half)
        time += work.products(5 * len(model.layers) * read.count, [(R, C)])
        if stage.ranking == "obs":
            removed = (work.machine.removal(C, sizes[axis][first[axis]], count) for count in gone if count)
            time += Time({REMOVAL: read.count * sum(removed)})
    by_layer = stage.by_layer(model)
    if by_layer or stage.ranking in ("obs", "taylor"):
        time += fisher.time_of(work)
    spoken = "; ".join(
        f"{axis}, {cut.widths[axis][index]} of {sizes[axis][index]}" for axis, index in first.items()
    )
    widest = max(C for _, C in shapes.values())
    if not by_layer:
        return spoken, time, widest, ()
    time += _allocation(model, work, shapes, sizes)
    note = "the run finds a width for each layer, where it loses least; these numbers are for equal widths"
    return f"{spoken} in the mean", time, widest, (note,)


@dataclass(frozen=True)
class _Reader:
    """The linears of a layer that read an axis: their shape and number, and how often all tokens are read."""

    shape: tuple[int, int]
    count: int = 1
    passes: int = 1


def _reader(model: MetaModel, index: int, axis: str) -> _Reader:
    """What reads an axis in one layer."""
    anatomy, maps = model.anatomy.of_layer(index), dict(model.linear_maps())
    if (stack := expert_widths.along(anatomy, axis)) is not None:
        E, *sides = model.layers[index].get_parameter(stack).shape
        C, R = sides if anatomy.experts[stack] else sides[::-1]
        return _Reader((R, C), E, min(E, experts_per_token(model.text_config)))
    name = f"{model.layer_name(index)}.{anatomy.consumer_of(axis)}"
    return _Reader(maps.get(name, (0, model.hidden_size)))


def _allocation(
    model: MetaModel,
    work: Workload,
    shapes: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, Sequence[int]],
) -> Time:
    """What each width would lose in each layer: the removal of all units, and each layer cut alone."""
    layers, time = len(model.layers), Time()
    for axis, (_, C) in shapes.items():
        removed = layers * work.machine.removal(C, sizes[axis][0], sizes[axis][0])
        time += (
            work.passes(2, half=work.half)
            + work.moments(1, C, half=work.half)
            + Time({REMOVAL: 1.25 * removed})
        )
        time += work.passes(layers / 2, allocation.SAMPLE, what=SEARCH)
    return time
