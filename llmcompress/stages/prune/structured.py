"""Units of an axis in one layer: which of them stay, and the layer without the others.

Saliency comes from the linear that consumes the axis, or from all linears on it. With `obs` units are removed
one after another, each time the one with the least loss once the others make up for it, weighted by its
effect on the model's predictions. The other scores sort the units once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.algorithms import saliency
from llmcompress.algorithms.hessian import Moments, retarget
from llmcompress.algorithms.least_squares import bias_shift, repair
from llmcompress.algorithms.obs import Removal, remove
from llmcompress.algorithms.quantize_weight import output_error
from llmcompress.architectures.shape_grammar import Spelling, take, units_along
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel


@dataclass(frozen=True)
class Reading:
    """The linear that consumes an axis: its weight W_RC, the moments of its inputs here, and the unit of each
    of its columns."""

    linear: str
    W_RC: Tensor
    moments: Moments
    unit_C: Tensor
    units: int

    @classmethod
    def of(cls, layer: DecoderLayer, axis: str, reader: str | None = None) -> Reading:
        """Run the calibration text through the layer as far as the linear that consumes `axis`, or one that
        is given."""
        linear = reader or layer.anatomy.consumer_of(axis)
        assert linear is not None
        moments = layer.moments(next(group for group in layer.anatomy.consumers if linear in group))[linear]
        unit_C = units_along(layer.anatomy.input_of(linear), layer.sizes, axis).to(layer.device)
        return cls(linear, layer.weight(linear), moments, unit_C, layer.sizes[axis])

    def removal(self, aim_RC: Tensor, metric_RR: Tensor | None, least: int) -> Removal:
        """Remove the units one after another until `least` are left; `aim_RC` is the target weight.

        The losses are squares of e M, e the error of an output and M the metric, if there is one.
        """
        weighed_RC = aim_RC if metric_RR is None else metric_RR.T @ aim_RC
        return remove(weighed_RC, self.moments.H_CC, self.unit_C, self.units, least=least)


@dataclass(frozen=True)
class Part:
    """A part of a layer whose units are cut by themselves: the linear that reads them, and the rows of the
    parameters among which theirs are."""

    reader: str
    rows: Mapping[str, str]


@dataclass(frozen=True)
class Score:
    """How saliency is computed: the name of the score, and what was computed in the whole model: a metric of
    the layer's errors, or a saliency."""

    name: str
    metric_RR: Tensor | None = None
    saliency_U: Tensor | None = None


def kept(
    layer: DecoderLayer,
    axis: str,
    read: Reading,
    aim_RC: Tensor,
    score: Score,
    count: int,
    linears: Sequence[str],
) -> Tensor:
    """The `count` units that stay, int64 in ascending order. `linears` are those that may write the axis."""
    W_RC, unit_C, units = aim_RC, read.unit_C, read.units
    norm_C = read.moments.H_CC.diagonal().sqrt()
    if count == units:
        return torch.arange(units, device=layer.device)
    if score.name == "obs":
        return read.removal(aim_RC, score.metric_RR, count).kept(count)
    if score.saliency_U is not None:
        saliency_U = score.saliency_U.to(layer.device)
    elif score.name == "wanda":
        saliency_U = saliency.wanda(W_RC, norm_C, unit_C, units)
    elif score.name == "activation":
        saliency_U = saliency.activation(norm_C, unit_C, units)
    else:
        saliency_U = saliency.magnitude(W_RC, unit_C, units)
        for linear in linears:  # those that write the axis are part of the unit
            unit_R = units_along(layer.anatomy.output_of(linear), layer.sizes, axis)
            if bool((unit_R >= 0).any()):
                saliency_U = saliency_U + saliency.magnitude(
                    layer.weight(linear).T, unit_R.to(layer.device), units
                )
    return saliency_U.argsort(descending=True, stable=True)[:count].sort().values


def taylor(model: LayerwiseModel, index: int, axis: str, gradient: Tensor) -> Tensor:
    """First-order saliency of each unit of an axis in a layer, by the gradient of the linear that consumes
    it, as stored."""
    anatomy = model.anatomy_of_layer(index)
    reader = anatomy.consumer_of(axis)
    assert reader is not None
    with model.layer(index) as module:
        weight = module.get_parameter(f"{reader}.weight").data
        turned = reader in anatomy.conv1d
        W_RC, G_RC = (tensor.T if turned else tensor for tensor in (weight, gradient))
        sizes = model.sizes_of(index)
        unit_C = units_along(anatomy.input_of(reader), sizes, axis).to(W_RC.device)
        return saliency.taylor(W_RC, G_RC, unit_C, sizes[axis])


def left(
    layer: DecoderLayer,
    axis: str,
    read: Reading,
    count: int,
    score: Score,
    mend: bool,
    linears: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Choose the `count` units that stay. Returns them, the columns of the linear that reads them, its weight
    [R, P] for these, and its relative output error."""
    W_RC, moments = read.W_RC, read.moments
    aim_RC = retarget(W_RC, moments) if mend else W_RC
    units = kept(layer, axis, read, aim_RC, score, count, linears)
    # all processes keep the same, also where ties fall otherwise on another device
    units = layer.shard.processes.sent({"units": units}, 0)["units"].to(layer.device)
    columns, left_RP, padded_RC = solved_without(layer, axis, read, units, aim_RC, mend)
    return units, columns, left_RP, output_error(W_RC, padded_RC, moments.H_CC)


def solved_without(
    layer: DecoderLayer, axis: str, read: Reading, units: Tensor, aim_RC: Tensor, mend: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns [P] of the linear that reads the `units` that stay, its weight [R, P] for these, and the
    same as wide as it was [R, C], with zeros in place of the others."""
    place = torch.arange(len(read.unit_C), device=layer.device)
    term = layer.anatomy.input_of(read.linear)
    columns = take(place, Spelling((term,)), layer.sizes, axis, units)
    left_RP = repair(aim_RC, read.moments.H_CC, columns) if mend else read.W_RC[:, columns]
    return columns, left_RP, torch.zeros_like(read.W_RC).index_copy(1, columns, left_RP)


def cut(
    layer: DecoderLayer, axis: str, count: int, score: Score, mend: bool, part: Part | None = None
) -> tuple[dict[str, Tensor], float]:
    """Return the parameters that change if `count` units stay, by their names in the layer, and the relative
    output error.

    With `mend` the linear that consumes the axis is solved again for what is left, and for what the layers
    before lost. The layer itself stays as wide as it was, with zeros in place of removed units, so that
    another axis can be cut after this one. A `part` of a layer is cut by itself.
    """
    anatomy, read = layer.anatomy, Reading.of(layer, axis, part.reader if part else None)
    reader, W_RC, moments = read.linear, read.W_RC, read.moments
    units, columns, left_RP, lost = left(layer, axis, read, count, score, mend, anatomy.linears)
    tensors = {
        name: take(layer.module.get_parameter(name).data, row, layer.sizes, axis, units)
        for name, row in (part.rows if part else anatomy.layer).items()
        if axis in Spelling.parse(row).axes
    }
    tensors[f"{reader}.weight"] = layer.oriented(reader, left_RP)
    if mend and (bias := f"{reader}.bias") in anatomy.layer:
        shift_R = bias_shift(W_RC, moments.full_C, left_RP, moments.mean_C[columns])
        tensors[bias] = layer.module.get_parameter(bias).data + shift_R
        layer.set_bias(reader, tensors[bias])
    padded_RC = torch.zeros_like(W_RC).index_copy(1, columns, left_RP)
    layer.set_weight(reader, padded_RC)
    return tensors, lost
