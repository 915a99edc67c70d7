"""Neurons of experts: each expert of a layer keeps its own, as many as every other.

The experts are linears of their own while their neurons are chosen, under the tokens that the router sends
each. What is written are the parameters of all experts again, narrower. A shared expert that the same field
of the config counts is cut beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.least_squares import bias_shift
from llmcompress.architectures.shape_grammar import Spelling, Term, take, units_along
from llmcompress.architectures.spec import Anatomy
from llmcompress.integrations.expert_linears import SUFFIX
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.stages.prune import structured
from llmcompress.stages.prune.structured import Part, Reading, Score
from llmcompress.stages.routed_experts import completed, expert_turns


def along(anatomy: Anatomy, axis: str) -> str | None:
    """The parameter of experts whose inputs run along an axis, if there is one, and what else is on the axis
    is of the same experts, or of one part beside them with a reader of its own."""
    read = [name for name in anatomy.experts if axis in Spelling((_inputs(anatomy, name),)).axes]
    if len(read) != 1:
        return None
    beside = [
        name
        for name, row in anatomy.layer.items()
        if axis in Spelling.parse(row).axes
        and name not in anatomy.experts
        and _module(name) != _module(read[0])
    ]
    readers = _dense_readers(anatomy, axis)
    return read[0] if len(readers) == (1 if beside else 0) else None


def _module(name: str) -> str:
    """The module that a parameter is in."""
    return name.rpartition(".")[0]


def cut(
    layer: DecoderLayer, axis: str, count: int, score: Score, mend: bool
) -> tuple[dict[str, Tensor], float]:
    """Return the parameters that change if `count` neurons of each expert stay, by their names in the layer,
    and the relative output error of the experts, as a mean weighed by their tokens."""
    anatomy = layer.anatomy
    stack = along(anatomy, axis)
    assert stack is not None
    found = dict[int, _Narrowed]()
    with layer.divided():
        (readers,) = (of for of in layer.anatomy.expert_linears if of[0] == f"{stack}{SUFFIX}.0")
        for turn in expert_turns(layer, readers):
            moments = layer.moments(*turn, in_turn=True)
            tokens = {linear: read.tokens for linear, read in moments.items()}
            for linear, read in completed(layer, moments).items():
                expert = readers.index(linear)
                found[expert] = _narrowed(layer, axis, linear, read, count, score, mend)
                found[expert].tokens = tokens[linear]
    tensors = _stacked(layer, axis, stack, [found[expert] for expert in range(len(readers))])
    tokens_E = torch.tensor([max(each.tokens, 1) for _, each in sorted(found.items())], dtype=torch.float64)
    lost_E = torch.tensor([each.lost for _, each in sorted(found.items())], dtype=torch.float64)
    if dense := _dense_readers(anatomy, axis):
        rows = {name: row for name, row in anatomy.layer.items() if name not in tensors}
        beside, _ = structured.cut(layer, axis, count, score, mend, Part(dense[0], rows))
        tensors |= beside
    return tensors, float((lost_E * tokens_E).sum() / tokens_E.sum())


class _Narrowed:
    """What stays of an expert: its units, the weight [R, P] that reads them, and what its bias needs."""

    def __init__(self, units: Tensor, left_RP: Tensor, shift_R: Tensor | None, lost: float) -> None:
        self.units, self.left_RP, self.shift_R, self.lost = units, left_RP, shift_R, lost
        self.tokens = 0


def _narrowed(
    layer: DecoderLayer, axis: str, linear: str, moments: Moments, count: int, score: Score, mend: bool
) -> _Narrowed:
    """Choose the neurons of one expert that stay, and solve the linear that reads them."""
    unit_C = units_along(layer.anatomy.input_of(linear), layer.sizes, axis).to(layer.device)
    read = Reading(linear, layer.weight(linear), moments, unit_C, layer.sizes[axis])
    number = linear.rpartition(".")[2]
    own = [name for of in layer.anatomy.expert_linears for name in of if name.rpartition(".")[2] == number]
    units, columns, left_RP, lost = structured.left(layer, axis, read, count, score, mend, own)
    shift_R = bias_shift(read.W_RC, moments.full_C, left_RP, moments.mean_C[columns]) if mend else None
    return _Narrowed(units, left_RP, shift_R, lost)


def _stacked(layer: DecoderLayer, axis: str, stack: str, experts: list[_Narrowed]) -> dict[str, Tensor]:
    """The parameters of all experts, without the neurons that go."""
    anatomy, tensors = layer.anatomy, dict[str, Tensor]()
    for name, row in anatomy.layer.items():
        if _module(name) != _module(stack) and name not in anatomy.experts:
            continue
        whole, dims = layer.module.get_parameter(name).data, Spelling.parse(row).dims
        if name == stack:
            slices = [each.left_RP.T if anatomy.experts[name] else each.left_RP for each in experts]
        elif axis in Spelling(dims[1:]).axes:
            of_one = Spelling(dims[1:])
            slices = [
                take(W, of_one, layer.sizes, axis, each.units) for W, each in zip(whole, experts, strict=True)
            ]
        elif name == f"{stack}_bias" and all(each.shift_R is not None for each in experts):
            slices = [b_R + each.shift_R for b_R, each in zip(whole, experts, strict=True)]
        else:
            continue
        tensors[name] = torch.stack([each.contiguous() for each in slices]).to(whole)
    return tensors


def _dense_readers(anatomy: Anatomy, axis: str) -> list[str]:
    """The linears beside the experts whose inputs run along an axis."""
    linears = [linear for group in anatomy.consumers for linear in group]
    return [linear for linear in linears if axis in Spelling((anatomy.input_of(linear),)).axes]


def _inputs(anatomy: Anatomy, name: str) -> Term:
    """The term that the inputs of a parameter of experts run along."""
    return Spelling.parse(anatomy.layer[name]).dims[1 if anatomy.experts[name] else 2]
