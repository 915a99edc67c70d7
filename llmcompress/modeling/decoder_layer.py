"""One decoder layer in memory, with the activations that enter it, and what its linears read of them.

Two streams of hidden states may reach a layer: `inputs`, as the compressed layers before it left them, and
`reference`, as the full model has them. What a stage does to a weight, or to what a linear reads, changes the
one and never the other; a scale that crosses from a producer to its readers changes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Moments
from llmcompress.architectures.shape_grammar import Spelling, scale
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import ModelError
from llmcompress.formats.base import Inputs

Value = TypeVar("Value")


@dataclass
class DecoderLayer:
    """One decoder layer in memory, and the batches of hidden states [B, L, D] that enter it (on the CPU)."""

    index: int
    name: str  # model.layers.3
    module: nn.Module
    anatomy: Anatomy
    device: torch.device
    sizes: Mapping[str, int]  # of the axes
    arguments: Mapping[int, Mapping[str, Any]]  # by batch size
    inputs: list[Tensor]
    reference: list[Tensor] = field(default_factory=list)  # the same as the full model has it
    # expert -> tokens routed to it, counted by `moments`
    expert_tokens: dict[int, int] = field(default_factory=dict)
    rounds: dict[str, Inputs] = field(default_factory=dict)  # linear -> how its inputs are rounded here
    # parameters that a stage has replaced, by name in the layer
    _originals: dict[str, Tensor] = field(default_factory=dict)
    _targets: list[Tensor] = field(default_factory=list)
    _whole: nn.Module | None = None  # what the layer was, where a stage has put a narrower one in its place

    def run(self, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output [B, L, D], with `parameters` (by name in the layer, as stored) in place of its
        own."""
        hooks = [
            self.module.get_submodule(linear).register_forward_pre_hook(
                partial(_round_input, rounded), prepend=True
            )
            for linear, rounded in self.rounds.items()
        ]
        try:
            return self._run(self.module, hidden, parameters)
        finally:
            for hook in hooks:
                hook.remove()

    def _run(
        self, module: nn.Module, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        call = partial(torch.func.functional_call, module, dict(parameters)) if parameters else None
        arguments = dict(self.arguments[len(hidden)])
        hidden = hidden.to(self.device)
        return call((hidden,), arguments) if call else module(hidden, **arguments)  # type: ignore[no-any-return]

    def _full(self, hidden: Tensor) -> Tensor:
        """What the layer as it was makes of the full model's states."""
        return self._run(self._whole or self.module, hidden, self._originals)

    @torch.no_grad()
    def outputs(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The layer's outputs for all `batches`, on the CPU."""
        return self._sound([self.run(hidden).cpu() for hidden in batches])

    def _sound(self, batches: list[Tensor]) -> list[Tensor]:
        """The states that leave the layer, if they are numbers. Errors: ModelError."""
        if not all(bool(torch.isfinite(hidden).all()) for hidden in batches):
            raise ModelError(
                f"what leaves {self.name} is NaN or infinite: the weights up to there are too large for "
                "float32 or for a format (int8 goes through float16); take a sound base or another format"
            )
        return batches

    @property
    def targets(self) -> list[Tensor]:
        """What the layer as it was makes of `reference`, on the CPU: found once, by `moments` where it goes
        that far."""
        if not self._targets:
            with torch.no_grad():
                self._targets = [self._full(hidden).cpu() for hidden in self.reference]
        return self._sound(self._targets)

    def oriented(self, linear: str, weight: Tensor) -> Tensor:
        """Between [R, C] and the way a linear is stored (Conv1D: [C, R]); its own inverse."""
        return weight.T if linear in self.anatomy.conv1d else weight

    def weight(self, linear: str) -> Tensor:
        """The weight of a linear as [R, C]: outputs, inputs."""
        return self.oriented(linear, self.module.get_parameter(f"{linear}.weight").data).contiguous()

    def set_weight(self, linear: str, W_RC: Tensor) -> None:
        """Put W [R, C] in place of the weight of a linear; `reference` goes on through the one that it
        replaces."""
        parameter = self.module.get_parameter(f"{linear}.weight")
        if self.reference and not self._whole:
            self._originals.setdefault(f"{linear}.weight", parameter.data)
        parameter.data = self.oriented(linear, W_RC).to(parameter.device, parameter.dtype).contiguous()

    def own(self, by_name: Mapping[str, Value]) -> dict[str, Value]:
        """What there is for linears of this layer, by their full names, by their names in it."""
        names = {linear: f"{self.name}.{linear}" for linear in self.anatomy.linears}
        return {linear: by_name[name] for linear, name in names.items() if name in by_name}

    def shift_bias(self, linear: str, shift_R: Tensor, dtype: torch.dtype) -> None:
        """Add to a linear's bias, rounded to the `dtype` in which it is stored; `reference` goes on with what
        it was."""
        self.set_bias(linear, (self.module.get_parameter(f"{linear}.bias").data + shift_R).to(dtype))

    def set_bias(self, linear: str, bias_R: Tensor) -> None:
        """Put another bias in place of a linear's; `reference` goes on with the one that it replaces."""
        parameter = self.module.get_parameter(f"{linear}.bias")
        if self.reference and not self._whole:
            self._originals.setdefault(f"{linear}.bias", parameter.data)
        parameter.data = bias_R.to(parameter.device, parameter.dtype)

    def become(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Go on as a module of other widths, these parameters and else its own; `reference` goes on through
        what it was."""
        for name, parameter in list(self.module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = parameters.get(name, parameter.data).to(parameter.device, parameter.dtype)
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        self._whole, self.module = self._whole or self.module, module

    def cross(self, key: str, factor: Tensor, dtype: torch.dtype) -> list[str]:
        """Divide what a key of `scale_pairs` puts out by `factor` and multiply its readers' columns by it;
        the parameters changed.

        factor: positive, shaped as the axes of the producer's output. A norm is rounded to `dtype`, in which
        it is stored, and its readers are multiplied by what it is then really divided by: so nothing is lost
        by it.
        """
        name, part, axes = self.anatomy.producer(key)
        rows, offset = self.anatomy.layer, self.anatomy.norm_offset
        if rows.get(f"{name}.weight") == "hidden":
            gain = self.module.get_parameter(f"{name}.weight")
            before = gain.data + offset
            crossed = (before / factor - offset).to(dtype).to(gain.dtype)
            # or the channel were lost
            gain.data = torch.where((crossed + offset == 0) & (before != 0), before - offset, crossed)
            after = gain.data + offset
            factor = torch.where((before != 0) & (after != 0), before / after, factor)
            produced = [f"{name}.bias"]
        else:
            # experts have a bare name
            produced = [name if name in rows else f"{name}.weight", f"{name}.bias"]
        consumers = [
            reader if reader in rows else f"{reader}.weight" for reader in self.anatomy.scale_pairs[key]
        ]
        for row, by, within in [
            *((row, 1 / factor, part) for row in produced),
            *((row, factor, None) for row in consumers),
        ]:
            if row in rows:
                parameter = self.module.get_parameter(row)
                parameter.data = scale(
                    parameter.data, Spelling.parse(rows[row]), self.sizes, axes, by, within
                )
        return [row for row in (name, f"{name}.weight", f"{name}.bias", *consumers) if row in rows]

    @torch.no_grad()
    def moments(self, *groups: tuple[str, ...]) -> dict[str, Moments]:
        """Second moments of what the linears of `groups` read, by linear; linears that read the same input
        share one object.

        A group is an entry of `anatomy.consumers`; none given means all. Where there is a reference, what the
        full model reads there is taken against what is read here.
        """
        wanted = groups or self.anatomy.consumers
        found = {}
        for linear in (consumers[0] for consumers in wanted):
            whole = self._whole.get_parameter(f"{linear}.weight") if self._whole else None
            wide = None if whole is None else self.oriented(linear, whole).shape[1]
            found[linear] = Moments(self.weight(linear).shape[1], self.device, wide)
        for read, full in self.reads(*wanted):
            for name, moments in found.items():
                moments.add(read[name], full.get(name))
        for name, moments in found.items():
            if not moments.finite:
                raise ModelError(
                    f"{self.name}.{name} reads activations that are too large to be squared in float32, or "
                    "rounded as the format of the layers rounds them; take a sound base, skip the layer, or "
                    "use another format"
                )
        return {linear: found[consumers[0]] for consumers in wanted for linear in consumers}

    def reads(self, *groups: tuple[str, ...]) -> Generator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What the first linear of each group reads, batch by batch, here and in the full model (empty
        without a reference).

        A pass goes no further through the layer than the groups need; one through all of it leaves `targets`
        behind, and the tokens of each expert.
        """
        linears, whole = {consumers[0] for consumers in groups}, self.anatomy.consumers[-1] in groups
        targets: list[Tensor] = []
        with torch.no_grad(), self._listening(linears, whole) as read:
            for i, hidden in enumerate(self.inputs):
                full: dict[str, Tensor] = {}
                if self.reference:
                    out = _until_enough(self._full, self.reference[i])
                    full = dict(read)
                    targets += [out.cpu()] if out is not None else []
                _until_enough(self.run, hidden)
                if whole and self._experts:
                    self._count_routed(read[self._experts], first=i == 0)
                yield read, full
        self._targets = targets or self._targets

    @contextmanager
    def _listening(self, linears: set[str], whole: bool) -> Iterator[dict[str, Tensor]]:
        """What the last pass had the linears read; unless `whole`, a pass ends when all of them have read.

        Under the name of a module of experts: the expert of each token and rank, its second argument.
        """
        read: dict[str, Tensor] = {}

        def keep(name: str, place: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read[name] = args[place]
            if not whole and linears <= read.keys():
                raise _Enough

        places = dict.fromkeys(linears, 0) | ({self._experts: 1} if self._experts else {})
        modules = [self.module, self._whole] if self._whole else [self.module]
        hooks = [
            module.get_submodule(name).register_forward_pre_hook(partial(keep, name, place))
            for name, place in places.items()
            for module in modules
        ]
        try:
            yield read
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _experts(self) -> str:
        """The module that holds the experts, if there is one."""
        return self.anatomy.experts[0].rpartition(".")[0] if self.anatomy.experts else ""

    def _count_routed(self, expert_of: Tensor, *, first: bool) -> None:
        count = len(next(self.module.get_submodule(self._experts).parameters()))
        routed = torch.bincount(expert_of.flatten(), minlength=count).tolist()
        for expert in range(count):  # one more stands for no expert
            self.expert_tokens[expert] = routed[expert] + (0 if first else self.expert_tokens[expert])


def _round_input(rounded: Inputs, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(args[0]), *args[1:])


def _until_enough(run: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """The output, or None if the pass ended before."""
    try:
        return run(*args)
    except _Enough:
        return None


class _Enough(Exception):
    """A pass has read all that is wanted of it."""
