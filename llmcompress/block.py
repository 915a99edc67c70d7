"""One decoder block in memory, with the activations that enter it, and what its linears read of them.

Two streams of hidden states may reach a block: `inputs`, as the compressed blocks before it left them, and `reference`, as
the full model has them. What a stage does to a weight changes the one and never the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.family import Anatomy
from llmcompress.methods.hessian import Moments


@dataclass
class Block:
    """One decoder block in memory, and the batches of hidden states [B, L, D] that enter it (on the CPU)."""

    index: int
    name: str  # model.layers.3
    module: nn.Module
    anatomy: Anatomy
    device: torch.device
    arguments: Mapping[int, Mapping[str, Any]]  # by batch size
    inputs: list[Tensor]
    reference: list[Tensor] = field(default_factory=list)  # the same as the full model has it
    expert_tokens: dict[int, int] = field(default_factory=dict)  # expert -> tokens routed to it, counted by `moments`
    _originals: dict[str, Tensor] = field(default_factory=dict)  # parameters that a stage has replaced, by name in the block
    _targets: list[Tensor] = field(default_factory=list)

    def run(self, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output [B, L, D], with `parameters` (by name in the block, as stored) in place of its own."""
        call = partial(torch.func.functional_call, self.module, dict(parameters)) if parameters else None
        arguments = dict(self.arguments[len(hidden)])
        hidden = hidden.to(self.device)
        return call((hidden,), arguments) if call else self.module(hidden, **arguments)  # type: ignore[no-any-return]

    @torch.no_grad()
    def outputs(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The block's outputs for all `batches`, on the CPU."""
        return [self.run(hidden).cpu() for hidden in batches]

    @property
    def targets(self) -> list[Tensor]:
        """What the block as it was makes of `reference`, on the CPU: found once, by `moments` where it goes that far."""
        if not self._targets:
            with torch.no_grad():
                self._targets = [self.run(hidden, self._originals).cpu() for hidden in self.reference]
        return self._targets

    def oriented(self, linear: str, weight: Tensor) -> Tensor:
        """Between [R, C] and the way a linear is stored (Conv1D: [C, R]); its own inverse."""
        return weight.T if linear in self.anatomy.conv1d else weight

    def weight(self, linear: str) -> Tensor:
        """The weight of a linear as [R, C]: outputs, inputs."""
        return self.oriented(linear, self.module.get_parameter(f"{linear}.weight").data).contiguous()

    def set_weight(self, linear: str, W_RC: Tensor) -> None:
        """Put W [R, C] in place of the weight of a linear; `reference` goes on through the one that it replaces."""
        parameter = self.module.get_parameter(f"{linear}.weight")
        if self.reference:
            self._originals.setdefault(f"{linear}.weight", parameter.data)
        parameter.data = self.oriented(linear, W_RC).to(parameter.device, parameter.dtype).contiguous()

    @torch.no_grad()
    def moments(self, *groups: tuple[str, ...]) -> dict[str, Moments]:
        """Second moments of what the linears of `groups` read, by linear; linears that read the same input share one object.

        A group is an entry of `anatomy.readers`; none given means all. Where there is a reference, what the full model reads
        there is taken against what is read here. A pass goes no further through the block than the groups need.
        """
        wanted = groups or self.anatomy.readers
        found = {readers[0]: Moments(self.weight(readers[0]).shape[1], self.device) for readers in wanted}
        whole = self.anatomy.readers[-1] in wanted
        targets: list[Tensor] = []
        with self._listening(set(found), whole) as read:
            for i, hidden in enumerate(self.inputs):
                full: dict[str, Tensor] = {}
                if self.reference:
                    out = self._read(self.reference[i], self._originals)
                    full = dict(read)
                    targets += [out.cpu()] if out is not None else []
                self._read(hidden)
                for name, moments in found.items():
                    moments.add(read[name], full.get(name))
                if whole and self._experts:
                    self._count_routed(read[self._experts])
        self._targets = targets or self._targets
        return {linear: found[readers[0]] for readers in wanted for linear in readers}

    def _read(self, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor | None:
        try:
            return self.run(hidden, parameters)
        except _Enough:
            return None

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
        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(partial(keep, name, place))
            for name, place in places.items()
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

    def _count_routed(self, expert_of: Tensor) -> None:
        count = len(next(self.module.get_submodule(self._experts).parameters()))
        routed = torch.bincount(expert_of.flatten(), minlength=count).tolist()
        for expert in range(count):  # one more stands for no expert
            self.expert_tokens[expert] = self.expert_tokens.get(expert, 0) + routed[expert]


class _Enough(Exception):
    """A pass has read all that is wanted of it."""
