"""Where a scale may cross in a decoder layer: from a norm to its readers, and from outputs of a linear to the
columns of a later one.

Candidates are seen on a tiny model. A gain whose output linears read is one. The others come from probing:
each output of a linear is made half as large again, one in each sequence of a batch. An input of a later
linear that grows exactly as one output does, and with no other, is that output. A candidate counts once it is
proved: with random scales on one side and their inverses on the other, the logits stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.derivation.subject import LENGTH, Subject, same
from llmcompress.integrations.layer_calls import Handed, called, entering, of_batch
from llmcompress.integrations.linear_modules import is_linear, shape_of
from llmcompress.integrations.transformers_compat import Conv1D

GROWTH = 1.5
SEEN = 1e-6  # a change of an input, relative to its size, that is no rounding
OFFSETS = (0.0, 1.0)  # a norm multiplies by its weight, or by one more


@dataclass(frozen=True)
class Crossing:
    """A scale that crosses from a producer to its readers, all named in their layer.

    Column c of a reader reads output `unit_C[c]` of the producer. `readers` maps modules and parameters to
    the dimension that these columns are. `offset` is that of a norm's gain; None if a linear produces.
    """

    producer: str
    readers: Mapping[str, int]
    unit_C: Tensor
    offset: float | None = None


@dataclass(frozen=True)
class Way:
    """Along which dimension, from the last, modules that are no linears read: with matrices, and with stacks
    of them."""

    matrices: int = 1
    stacks: int = 1


WAYS = (Way(), Way(2, 2), Way(1, 2))


@dataclass
class Seen:
    """The first input and the output [T, C] of the modules of a layer in one pass, in the order of calls."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def readers(self, layer: nn.Module, x_TC: Tensor, way: Way) -> dict[str, int]:
        """The linears that read x, and the matrices and stacks of matrices of other modules that read it,
        with the dimension that they read it along."""
        found: dict[str, int] = {}
        for name, read in self.inputs.items():
            if same(read, x_TC):
                module = layer.get_submodule(name)
                if is_linear(module):
                    found[name] = 0 if isinstance(module, Conv1D) else 1
                    continue
                for part, parameter in module.named_parameters(recurse=False):
                    dim = parameter.dim() - (way.matrices if parameter.dim() == 2 else way.stacks)
                    fit = parameter.dim() > 1 and parameter.shape[dim] == x_TC.shape[1]
                    if fit and not part.endswith("bias"):  # of experts, [experts, outputs]
                        found[f"{name}.{part}"] = dim
        return found


def proved_crossings(subject: Subject, index: int) -> list[Crossing]:
    """The crossings of layer `index` that are proved; of several readings of one norm, the first that is."""
    seen = _seen(subject, index)
    found = list[Crossing]()
    for candidates in [*_from_norms(subject, index, seen), *_from_linears(subject, index, seen)]:
        proved = (crossing for crossing in candidates if prove_crossing(subject, index, crossing))
        found += [crossing for crossing in [next(proved, None)] if crossing is not None]
    return found


@torch.no_grad()
def prove_crossing(subject: Subject, index: int, crossing: Crossing) -> bool:
    """Whether the logits stay if random scales cross."""
    return subject.distance_with(crossed(subject, index, crossing)) < subject.exact


@torch.no_grad()
def final_norm(subject: Subject) -> str | None:
    """The module outside the layers whose gain the head follows: its scale crosses to the head's columns.
    None if there is none."""
    model, head = subject.model, subject.model.get_output_embeddings().weight
    outside = {name: module for name, module in model.named_modules() if not name.startswith(subject.path)}
    names = {id(module): name for name, module in outside.items()}
    own = names[id(model.get_output_embeddings())]
    draw = torch.rand(head.shape[1], generator=torch.Generator().manual_seed(2)).to(head) + 0.5
    for name, module in outside.items():
        gain = module._parameters.get("weight")
        if gain is None or tuple(gain.shape) != tuple(draw.shape):
            continue
        for offset in OFFSETS:
            changed = {f"{name}.weight": (gain + offset) * draw - offset, f"{own}.weight": head / draw}
            if isinstance(bias := module._parameters.get("bias"), Tensor):
                changed[f"{name}.bias"] = bias * draw
            if subject.distance_with(changed, tied=False) < subject.exact:
                return str(name)
    return None


def crossed(subject: Subject, index: int, crossing: Crossing) -> dict[str, Tensor]:
    """The parameters of a model, by full name, once random scales have crossed."""
    layer, prefix = subject.layers[index], f"{subject.path}.{index}."
    producer = layer.get_submodule(crossing.producer)
    weight = producer.get_parameter("weight").data
    rows = weight.dim() - 1 if isinstance(producer, Conv1D) else 0
    draw = torch.rand(weight.shape[rows], generator=torch.Generator().manual_seed(2)).to(weight) + 0.5
    used = torch.zeros(len(draw), dtype=torch.bool).index_fill(0, crossing.unit_C, True)
    factor = torch.where(used, draw, torch.ones_like(draw))
    offset = crossing.offset or 0.0
    changed = {f"{crossing.producer}.weight": _along(weight + offset, factor, rows) - offset}
    if isinstance(getattr(producer, "bias", None), Tensor):
        changed[f"{crossing.producer}.bias"] = producer.get_parameter("bias").data * factor
    for name, dim in crossing.readers.items():
        part = name if name in dict(layer.named_parameters()) else f"{name}.weight"
        changed[part] = _along(layer.get_parameter(part).data, 1 / factor[crossing.unit_C], dim)
    return {prefix + name: tensor for name, tensor in changed.items()}


def _along(tensor: Tensor, factor: Tensor, dim: int) -> Tensor:
    """A tensor times a factor along one dimension."""
    return tensor * factor.reshape([-1 if each == dim else 1 for each in range(tensor.dim())])


def _from_norms(subject: Subject, index: int, seen: Seen) -> Iterator[list[Crossing]]:
    """For each gain whose output is read, the ways in which it may cross."""
    layer = subject.layers[index]
    for name, y_TC in seen.outputs.items():
        gain = getattr(layer.get_submodule(name), "weight", None)
        if not isinstance(gain, Tensor) or tuple(gain.shape) != y_TC.shape[1:]:
            continue
        unit_C = torch.arange(len(gain))
        each = [readers for way in WAYS if (readers := seen.readers(layer, y_TC, way))]
        if each:
            yield [Crossing(name, readers, unit_C, offset) for readers in each for offset in OFFSETS]


def _from_linears(subject: Subject, index: int, seen: Seen) -> Iterator[list[Crossing]]:
    """For each pair of linears, of which the later one reads outputs of the earlier one times something, the
    one way in which a scale may cross."""
    layer = subject.layers[index]
    for producer, units in _probed(subject, index, seen).items():
        for reader, unit_C in units.items():
            yield [Crossing(producer, seen.readers(layer, seen.inputs[reader], Way()), unit_C)]


def _probed(subject: Subject, index: int, seen: Seen) -> dict[str, dict[str, Tensor]]:
    """For each linear, the later linears all of whose inputs are its outputs times something, with the output
    that each of their columns reads; of those that read one input, the first."""
    layer = subject.layers[index]
    linears = [name for name in seen.inputs if is_linear(layer.get_submodule(name))]
    first = [
        name
        for place, name in enumerate(linears)
        if not any(same(seen.inputs[name], seen.inputs[other]) for other in linears[:place])
    ]
    found: dict[str, dict[str, Tensor]] = {}
    entered = _entered(subject, index)
    for place, producer in enumerate(linears):
        R, _ = shape_of(layer.get_submodule(producer))
        later = [name for name in linears[place + 1 :] if name in first]
        if not later:
            continue
        plain = _inputs(subject, index, entered, producer, torch.zeros(1, R), later)
        grown = _inputs(subject, index, entered, producer, torch.eye(R), later)
        for reader, x_RTC in grown.items():
            if (unit_C := _units(plain[reader], x_RTC)) is not None:
                found.setdefault(producer, {})[reader] = unit_C
    return found


def _units(plain_1TC: Tensor, grown_RTC: Tensor) -> Tensor | None:
    """The output that each column reads, int64 [C], from the inputs [R, T, C] with one output grown in each
    sequence; None if some column is not exactly one output times something."""
    size_C = SEEN * plain_1TC.abs().amax((0, 1))
    exact_RC = (grown_RTC - GROWTH * plain_1TC).abs().amax(1) <= size_C
    return exact_RC.int().argmax(0) if bool((exact_RC.sum(0) == 1).all()) else None


@torch.no_grad()
def _entered(subject: Subject, index: int) -> tuple[Tensor, Handed]:
    """The states [1, L, W] of one sequence that enter a layer, and what the layers before it hand on."""
    states, arguments = entering(subject.model, subject.layers, subject.tokens[0][:1], subject.form)
    handed: Handed = {}
    for other in range(index):
        states, handed = called(subject.layers[other], states, arguments[other], subject.form, handed)
    return states, handed


@torch.no_grad()
def _inputs(
    subject: Subject,
    index: int,
    entered: tuple[Tensor, Handed],
    producer: str,
    grown_SR: Tensor,
    readers: Sequence[str],
) -> dict[str, Tensor]:
    """The inputs [S, T, C] of some linears of a layer for S copies of the sequence that `entered` it,
    with some outputs of the producer larger in each.

    All its outputs are raised to above zero before, so that no relu hides one.
    """
    layer, found = subject.layers[index], dict[str, Tensor]()
    sequences = len(grown_SR)
    tokens = subject.tokens[0][:1].expand(sequences, -1).contiguous()

    def grow(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        factor_SR = 1 + (GROWTH - 1) * grown_SR.to(out)
        raised_STR = (out + out.abs().max()).reshape(sequences, -1, out.shape[-1])
        return (raised_STR * factor_SR[:, None]).reshape(out.shape)

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0].reshape(sequences, -1, args[0].shape[-1]).clone()

    hooks = [layer.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in readers]
    hooks.append(layer.get_submodule(producer).register_forward_hook(grow))
    try:
        _, arguments = entering(subject.model, subject.layers, tokens, subject.form)
        states_1LW, handed = entered
        states, all_handed = torch.cat([states_1LW] * sequences), of_batch([handed] * sequences)
        called(layer, states, arguments[index], subject.form, all_handed)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: x for name, x in found.items() if x.shape[1] == LENGTH}


@contextmanager
def _watching(layer: nn.Module) -> Iterator[Seen]:
    """Yield what will hold the inputs and outputs of the modules of a layer; of one that is called again, the
    first ones."""
    seen = Seen()

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        read = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if read is not None and read.dim() > 1:
            seen.inputs.setdefault(name, read.flatten(0, -2).clone())
        if isinstance(out, Tensor) and out.dim() > 1:
            seen.outputs.setdefault(name, out.flatten(0, -2).clone())

    hooks = [
        module.register_forward_hook(partial(keep, name), with_kwargs=True)
        for name, module in layer.named_modules()
        if name
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _seen(subject: Subject, index: int) -> Seen:
    with _watching(subject.layers[index]) as seen:
        subject.model(input_ids=subject.tokens[0], use_cache=False)
    return seen
