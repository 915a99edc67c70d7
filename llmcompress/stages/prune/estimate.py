"""Estimate a cut: parameters and bytes exactly, memory and operations approximately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.sequential import SAMPLE
from llmcompress.stages.base import Estimate, Workload
from llmcompress.stages.fisher import tokens_for
from llmcompress.stages.prune import (
    sublayer_dropping,
)

if TYPE_CHECKING:
    from llmcompress.stages.prune.stage import Prune


def of(stage: Prune, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
    """Estimate the cost of finding what goes and of solving for what stays."""
    inner, layers = model.inner_parameters(), len(model.layers)
    if stage.of_layers or stage.of_parts:
        spoken, operations, states, notes = _dropping(stage, model, inner)
        widest = 0
    else:
        spoken, operations, widest, notes = _cutting(stage, model, inner, work)
        states = 4 * work.tokens * model.config.hidden_size
    return Estimate(
        stage=f"prune ({spoken})",
        parameters=left.parameters(),
        size_bytes=left.stored_bytes(),
        peak_memory_bytes=4 * (4 * inner // layers + states + 8 * widest * widest),
        seconds=operations / work.rate,
        notes=notes,
    )


def _dropping(stage: Prune, model: MetaModel, inner: int) -> tuple[str, float, int, tuple[str, ...]]:
    """For layers or sublayers: what goes in words, the operations, the floats of the states, and notes."""
    layers, D = len(model.layers), model.config.hidden_size
    if stage.of_layers:
        gone = stage.cut(model).gone
        operations = 2.0 * inner * SAMPLE * layers * len(gone) / 2
        return f"layer, {layers - len(gone)} of {layers}", operations, layers * SAMPLE * D, ()
    every, without = sublayer_dropping.candidates(model), sublayer_dropping.guess(model, stage)
    operations = 2.0 * inner * SAMPLE * len(every) * len(without) / 2
    note = "the run finds the sublayers that lose least; these numbers are without the last ones"
    return (
        f"sublayer, {len(every) - len(without)} of {len(every)}",
        operations,
        2 * layers * SAMPLE * D,
        (note,),
    )


def _cutting(
    stage: Prune, model: MetaModel, inner: int, work: Workload
) -> tuple[str, float, int, tuple[str, ...]]:
    """For units of axes: what stays in words, the operations, the widest input that is solved for, and
    notes."""
    cut, maps, sizes = stage.cut(model), dict(model.linear_maps()), stage.sizes(model)
    consumers = [f"{model.layer_name(0)}.{model.anatomy.consumer_of(axis)}" for axis in stage.axes]
    C = max(maps[name][1] if name in maps else model.config.hidden_size for name in consumers)
    solved = len(model.layers) * (4.0 * C**2 * work.tokens + 8.0 * C**3)  # moments and removal
    operations = 4 * 2.0 * inner * work.tokens + solved
    if stage.sensitive or stage.ranking in ("obs", "taylor"):
        operations += 5 * 2.0 * inner * tokens_for(model.config.hidden_size)
    spoken = "; ".join(f"{axis}, {cut.widths[axis][0]} of {sizes[axis][0]}" for axis in stage.axes)
    if not stage.sensitive:
        return spoken, operations, C, ()
    operations += 2 * 2.0 * inner * work.tokens + solved
    note = "the run finds a width for each layer, where it loses least; these numbers are for equal widths"
    return f"{spoken} in the mean", operations, C, (note,)
