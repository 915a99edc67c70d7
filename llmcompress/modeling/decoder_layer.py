"""One decoder layer in memory, with the hidden states that enter it and the inputs of its linears.

Two streams of hidden states may reach a layer: `inputs`, as the compressed layers before it left them, and
`reference`, as the full model has them. A stage that changes a weight or the input of a linear changes only
the first stream. A scale that crosses from a producer to its readers changes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.overflow import all_finite
from llmcompress.architectures.shape_grammar import Spelling, scale
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import ModelError
from llmcompress.formats.base import Inputs
from llmcompress.integrations.distributed import Shard
from llmcompress.integrations.expert_linears import divide, unite
from llmcompress.integrations.layer_calls import Handed, called
from llmcompress.kernels import moments as half_moments
from llmcompress.modeling.expert_routing import experts_of, kept_to, taken_down
from llmcompress.modeling.finished_parts import FinishedParts
from llmcompress.modeling.half_precision import half_precision
from llmcompress.modeling.handed_on import HandedOn
from llmcompress.modeling.host_memory import to_host
from llmcompress.modeling.layer_arguments import CallArguments
from llmcompress.modeling.token_limit import TokenLimit, joined

Value = TypeVar("Value")


@dataclass
class DecoderLayer:
    """One decoder layer in memory, and the batches of hidden states [B, L, D] that enter it (on the CPU)."""

    index: int
    name: str  # model.layers.3
    module: nn.Module
    anatomy: Anatomy
    device: torch.device
    sizes: Mapping[str, int]  # units on each axis
    arguments: CallArguments
    inputs: list[Tensor]
    reference: list[Tensor] = field(default_factory=list)  # as the full model has them
    full_arguments: CallArguments | None = None  # of the full model, if they are others
    handed: HandedOn = field(default_factory=HandedOn)  # by the layers before it, as they are here
    full_handed: HandedOn = field(default_factory=HandedOn)  # as the full model has it
    half: bool = False  # whether products are computed in bfloat16 where no gradient is asked for
    shard: Shard = field(default_factory=Shard)  # which units of tokens these are, of those of all
    limit: TokenLimit = field(default_factory=TokenLimit)  # tokens in one pass
    rounds: dict[str, Inputs] = field(default_factory=dict)  # linear -> how its inputs are rounded here
    # parameters that a stage has replaced, by name in the layer
    _originals: dict[str, Tensor] = field(default_factory=dict)
    _targets: list[Tensor] = field(default_factory=list)
    _whole: nn.Module | None = None  # the layer before a stage replaced it by a narrower one

    def __post_init__(self) -> None:
        """Nothing of the layer is final yet, for `inputs` and for `reference`."""
        last = _last_linears(self.anatomy)
        self._finished, self._finished_full = FinishedParts(last), FinishedParts(last)

    def run(
        self, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None, *, first: int | None = None
    ) -> Tensor:
        """Return the layer's output [B, L, D]. `parameters` (by name in the layer, as stored) take the place
        of its own.

        first: the number of the first of these sequences among those of all batches. It may be left out where
        the arguments of a layer do not depend on the tokens.
        """
        return self.handing_on(hidden, self.handed_to(hidden, first), parameters, first=first)[0]

    def handed_to(self, hidden: Tensor, first: int | None) -> Handed:
        """What the layers before it have handed on for some of the sequences."""
        return self.handed.of(first, len(hidden), self.device)

    def handing_on(
        self,
        hidden: Tensor,
        entering: Handed,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        first: int | None = None,
    ) -> tuple[Tensor, Handed]:
        """Return the layer's output as `run` does, and what it hands on; `entering` is what those before it
        have handed on."""
        hooks = [
            self.module.get_submodule(linear).register_forward_pre_hook(
                partial(_round_input, rounded), prepend=True
            )
            for linear, rounded in self.rounds.items()
        ]
        try:
            arguments = self.arguments(len(hidden), first)
            return self._run(self.module, hidden, arguments, entering, parameters)
        finally:
            for hook in hooks:
                hook.remove()

    def _run(
        self,
        module: nn.Module,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        entering: Handed,
        parameters: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, Handed]:
        def replaced(states: Tensor, **named: Any) -> Any:
            return torch.func.functional_call(module, dict(parameters or {}), (states,), named)

        call = replaced if parameters else module
        return called(call, hidden.to(self.device), arguments, self.anatomy.form, entering)

    def _precision(self) -> AbstractContextManager[None]:
        """The precision of passes without a gradient."""
        return half_precision(self.device, self.half)

    def _full(self, hidden: Tensor, first: int, *, keep: bool) -> Tensor:
        """The output of the original layer for hidden states of the full model; with `keep`, what it hands on
        is kept."""
        arguments = (self.full_arguments or self.arguments)(len(hidden), first)
        entering = self.full_handed.of(first, len(hidden), self.device)
        out, left = self._run(self._whole or self.module, hidden, arguments, entering, self._originals)
        if keep:
            self.full_handed.keep(first, len(hidden), entering, left)
        return out

    def _target(self, hidden: Tensor, first: int) -> Tensor:
        """The output of the original layer, on the CPU."""
        return self._left(self._full(hidden, first, keep=True))

    @torch.no_grad()
    def outputs(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The layer's outputs for all `batches`, on the CPU."""
        finished = self._finished if batches is self.inputs else FinishedParts({})
        return [
            self._outputs(i, hidden, finished, first)
            for i, (hidden, first) in enumerate(zip(batches, firsts(batches), strict=True))
        ]

    @torch.no_grad()
    def pass_on(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states that leave the layer, here and in the full model. Those that entered it are given
        up one batch after another, so that memory does not hold both. What else it hands on is then what
        enters the next one."""
        targets, found, numbers = self.targets, list[Tensor](), firsts(self.inputs)
        self.reference, waiting, self.inputs = [], self.inputs[::-1], []
        self._finished_full.clear()
        while waiting:
            i = len(found)
            found.append(self._outputs(i, waiting.pop(), self._finished, numbers[i], keep=True))
            self._finished.drop(i)
        for handed in (self.handed, self.full_handed):
            handed.advance()
        return found, targets

    def _outputs(
        self, i: int, hidden: Tensor, finished: FinishedParts, first: int, *, keep: bool = False
    ) -> Tensor:
        """The layer's output for batch `i`, on the CPU; with `keep`, what it hands on is kept."""
        work = partial(self._output, hidden, i, finished, first, keep)
        return joined(self.limit.each(work, *hidden.shape[:2]))

    def _output(
        self, hidden: Tensor, i: int, finished: FinishedParts, first: int, keep: bool, here: slice
    ) -> Tensor:
        """The layer's output for a part of batch `i`, on the CPU."""
        part = _part(i, here, hidden)
        with finished.reused(self.module, part, self.device), self._precision():
            return self._left(self._passed(hidden[here], None, first + here.start, keep=keep))

    def _passed(
        self, hidden: Tensor, parameters: Mapping[str, Tensor] | None, first: int, *, keep: bool
    ) -> Tensor:
        """The layer's output; with `keep`, what it hands on is kept."""
        entering = self.handed_to(hidden, first)
        out, left = self.handing_on(hidden, entering, parameters, first=first)
        if keep:
            self.handed.keep(first, len(hidden), entering, left)
        return out

    @torch.no_grad()
    def outputs_with(
        self,
        batches: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        device: torch.device,
        finished: FinishedParts | None = None,
        final: Collection[str] = (),
        *,
        keep: bool = False,
    ) -> list[Tensor]:
        """The layer's outputs for all `batches`, on `device`, with `parameters` in place of its own.

        The batches hold the text from its start on. The outputs of `final` submodules do not depend on
        `parameters`; they are kept in `finished`. With `keep`, what the layer hands on is kept.
        """
        kept = finished or FinishedParts({})

        def output(i: int, hidden: Tensor, first: int, here: slice) -> Tensor:
            with kept.reused(self.module, _part(i, here, hidden), self.device, final):
                return self._passed(hidden[here], parameters, first + here.start, keep=keep).to(device)

        return [
            joined(self.limit.each(partial(output, i, hidden, first), *hidden.shape[:2]))
            for i, (hidden, first) in enumerate(zip(batches, firsts(batches), strict=True))
        ]

    def _left(self, hidden: Tensor) -> Tensor:
        """Return hidden states that leave the layer, on the CPU, if all of them are finite. Errors:
        ModelError."""
        if not all_finite(hidden):
            raise ModelError(
                f"what leaves {self.name} is NaN or infinite: the weights up to there are too large for "
                "float32 or for a format (int8 goes through float16); take a sound base or another format"
            )
        return to_host(hidden)

    @property
    def targets(self) -> list[Tensor]:
        """The outputs of the original layer for `reference`, on the CPU.

        They are computed once. A pass of `moments` through the whole layer computes them too.
        """
        if not self._targets:
            with torch.no_grad(), self._precision():
                self._targets = [
                    joined(self.limit.each(partial(self._targets_of, hidden, first), *hidden.shape[:2]))
                    for hidden, first in zip(self.reference, firsts(self.reference), strict=True)
                ]
        return self._targets

    def _targets_of(self, hidden: Tensor, first: int, here: slice) -> Tensor:
        return self._target(hidden[here], first + here.start)

    def oriented(self, linear: str, weight: Tensor) -> Tensor:
        """Convert a weight between [R, C] and the way the linear is stored (Conv1D: [C, R]); its own
        inverse."""
        return weight.T if linear in self.anatomy.conv1d else weight

    def weight(self, linear: str) -> Tensor:
        """The weight of a linear as [R, C]: outputs, inputs."""
        return self.oriented(linear, self.module.get_parameter(f"{linear}.weight").data).contiguous()

    def set_weight(self, linear: str, W_RC: Tensor) -> None:
        """Replace the weight of a linear by W [R, C]. `reference` still goes through the original weight."""
        parameter = self.module.get_parameter(f"{linear}.weight")
        weight = self.oriented(linear, W_RC).to(parameter.device, parameter.dtype).contiguous()
        self._replace(f"{linear}.weight", weight)

    def own(self, by_name: Mapping[str, Value]) -> dict[str, Value]:
        """Select the values of this layer's linears, given by their full names; returned by their names in
        the layer."""
        names = {linear: f"{self.name}.{linear}" for linear in self.anatomy.linears}
        return {linear: by_name[name] for linear, name in names.items() if name in by_name}

    def shift_bias(self, linear: str, shift_R: Tensor, dtype: torch.dtype) -> None:
        """Add to a linear's bias and round it to the `dtype` in which it is stored. `reference` still uses
        the original bias."""
        self.set_bias(linear, (self.module.get_parameter(f"{linear}.bias").data + shift_R).to(dtype))

    def set_bias(self, linear: str, bias_R: Tensor) -> None:
        """Replace a linear's bias. `reference` still uses the original bias."""
        parameter = self.module.get_parameter(f"{linear}.bias")
        self._replace(f"{linear}.bias", bias_R.to(parameter.device, parameter.dtype))

    def _replace(self, name: str, data: Tensor) -> None:
        """Replace a parameter; `reference` still goes through the original one."""
        parameter = self.module.get_parameter(name)
        if self.reference and not self._whole:
            self._originals.setdefault(name, parameter.data)
        if not self._finished.empty and not torch.equal(parameter.data, data):
            self._forget(name.rpartition(".")[0])
        parameter.data = data

    def round_input(self, linear: str, rounded: Inputs) -> None:
        """Round what a linear reads from here on, as its kernel will."""
        self._forget(linear, read=True)
        self.rounds[linear] = rounded

    def _forget(self, linear: str, *, read: bool = False) -> None:
        """Forget what depends on the weight of a linear, and with `read` on what it reads."""
        place = self._place(self.anatomy.group_of(linear))
        later = self.anatomy.consumers[place if read else place + 1 :]
        earlier = self.ending_before(self.anatomy.group_of(linear))
        self._finished.forget(
            {*self._finished.last} - {*earlier}, [name for group in later for name in group]
        )

    def become(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Replace the module by one of other widths, with `parameters` and otherwise its own; buffers that a
        checkpoint has count as parameters. `reference` still goes through the original module."""
        self._finished.clear()
        self._finished_full.clear()
        for name, tensor in self.module.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            value = parameters.get(name, tensor).to(tensor.device, tensor.dtype)
            place = module.get_submodule(owner)
            if leaf in place._parameters:
                place._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                place._buffers[leaf] = value
        self._whole, self.module = self._whole or self.module, module

    @contextmanager
    def divided(self) -> Iterator[None]:
        """Make each expert a linear of its own within the context; their weights must not be replaced
        there."""
        whole = self.anatomy
        linears = {
            name: divide(self.module, name, transposed=transposed)
            for name, transposed in whole.experts.items()
        }
        self.anatomy = whole.divided(linears)
        self.__post_init__()  # other submodules end the layer now
        try:
            yield
        finally:
            for name in linears:
                unite(self.module, name)
            self.anatomy = whole
            self.__post_init__()

    def cross(self, key: str, factor: Tensor, dtype: torch.dtype) -> list[str]:
        """Divide the output of a key of `scale_pairs` by `factor` and multiply its readers' columns by it.
        Returns the names of the changed parameters.

        factor: positive, shaped as the axes of the producer's output. A norm's gain is rounded to `dtype`, in
        which it is stored. Its readers are multiplied by the factor that the rounded gain was really divided
        by, so nothing is lost by the rounding.
        """
        self._finished.clear()
        self._finished_full.clear()
        name, part, axes = self.anatomy.producer(key)
        rows, offset = self.anatomy.layer, self.anatomy.norm_offset
        if len(Spelling.parse(rows.get(f"{name}.weight", "1 1")).dims) == 1:
            gain = self.module.get_parameter(f"{name}.weight")
            before = gain.data + offset
            crossed = (before / factor - offset).to(dtype).to(gain.dtype)
            # a gain that would become zero stays, or its channel would be lost
            gain.data = torch.where((crossed + offset == 0) & (before != 0), before - offset, crossed)
            after = gain.data + offset
            factor = torch.where((before != 0) & (after != 0), before / after, factor)
            produced = [f"{name}.bias"]
        else:
            # the parameters of experts have no `.weight`
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
    def moments(self, *groups: tuple[str, ...], in_turn: bool = False) -> dict[str, Moments]:
        """Return the second moments of the inputs of the linears of `groups`, by linear. Linears that read
        the same input share one object.

        A group is an entry of `anatomy.consumers`, the default is all of them; or an expert by itself, with
        others of the same parameter, of which some may read no token. With a reference, the full model's
        inputs are taken against these inputs too. Asked `in_turn`, all that comes before the first of
        `groups` is final, and submodules that end before it are run once for all that follows; their outputs
        are kept on the CPU. Raises ModelError if the inputs are too large.
        """
        wanted = groups or self.anatomy.consumers
        found = {}
        for linear in (consumers[0] for consumers in wanted):
            whole = self._whole.get_parameter(f"{linear}.weight") if self._whole else None
            wide = None if whole is None else self.oriented(linear, whole).shape[1]
            half = self.half and wide is None and half_moments.takes(self.device)
            kind = half_moments.HalfMoments if half else Moments
            found[linear] = kind(self.weight(linear).shape[1], self.device, wide)
        for read, full in self.reads(*wanted, in_turn=in_turn):
            for name, x in read.items():
                self.add(found[name], x, full.get(name))
        self.shard.processes.pool(found.values())
        for name, moments in found.items():
            if not moments.finite:
                raise ModelError(
                    f"{self.name}.{name} reads activations that are too large to be squared in float32, or "
                    "rounded as the format of the layers rounds them; take a sound base, skip the layer, or "
                    "use another format"
                )
        return {linear: found[consumers[0]] for consumers in wanted for linear in consumers}

    def add(self, moments: Moments, x: Tensor, full: Tensor | None = None) -> None:
        """Accumulate inputs x [..., C] and, if given, the full model's in their place, in as many parts as
        the memory asks for."""
        X_TC, F_TC = (None if part is None else part.flatten(0, -2) for part in (x, full))
        assert X_TC is not None
        self.limit.each(
            lambda here: moments.add(X_TC[here], None if F_TC is None else F_TC[here]), len(X_TC), 1
        )

    def reads(
        self, *groups: tuple[str, ...], in_turn: bool = False
    ) -> Generator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the input of the first linear of each group, batch by batch, here and in the full model
        (empty without a reference). A batch comes in parts if memory runs out.

        A pass stops once all groups have been read. A pass through the whole layer also sets `targets`.
        `in_turn` is that of `moments`.
        """
        targets, numbers = list[Tensor](), firsts(self.inputs)
        with torch.no_grad(), self._listening({consumers[0] for consumers in groups}) as listener:
            for i, hidden in enumerate(self.inputs):
                outs = list[Tensor]()
                read = partial(self._read, listener, i, numbers[i], groups, in_turn)
                for full, out in self.limit.parts(read, *hidden.shape[:2]):
                    outs += [out] if out is not None else []
                    yield listener.read, full
                targets += [joined(outs)] if outs else []
        self._targets = targets or self._targets

    def _read(
        self,
        listener: _Listener,
        i: int,
        first: int,
        groups: tuple[tuple[str, ...], ...],
        in_turn: bool,
        here: slice,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run a part of batch `i`, whose first sequence has the number `first`, until the listener has read
        the first linear of each group.

        Returns what they read in the full model, and its output if the pass went through the whole layer.
        """
        if groups[0] not in self.anatomy.consumers:
            return self._read_routed(listener, i, first, groups, in_turn, here), None
        linears, whole = {consumers[0] for consumers in groups}, self.anatomy.consumers[-1] in groups
        full, out, hidden = dict[str, Tensor](), None, self.inputs[i]
        part, first = _part(i, here, hidden), first + here.start
        if self.reference:
            listener.begin(linears, through=whole)
            with self._reusing(self._finished_full, part, groups, in_turn, listener):
                out = _until_enough(self._target, self.reference[i][here], first)
            full = listener.read
        listener.begin(linears)
        with self._reusing(self._finished, part, groups, in_turn, listener):
            _until_enough(partial(self.run, first=first), hidden[here])
        return full, out

    def _read_routed(
        self,
        listener: _Listener,
        i: int,
        first: int,
        groups: tuple[tuple[str, ...], ...],
        in_turn: bool,
        here: slice,
    ) -> dict[str, Tensor]:
        """Run a part of batch `i` until the listener has read the experts of `groups` that it reaches.

        Returns what they read in the full model, if it is sent the tokens that it is sent here.
        """
        experts = self.module.get_submodule(experts_of(groups[0][0]))
        linears, part = {consumers[0] for consumers in groups}, _part(i, here, self.inputs[i])
        first += here.start
        listener.begin(linears)
        with taken_down(experts) as routing, self._reusing(self._finished, part, groups, in_turn, listener):
            _until_enough(partial(self.run, first=first), self.inputs[i][here])
        read, tokens = listener.read, self.inputs[i][here][..., 0].numel()
        if not self.reference or not routing.covers(tokens):
            return {}
        listener.begin(linears)
        with (
            kept_to(experts, routing),
            self._reusing(self._finished_full, part, groups, in_turn, listener),
        ):
            _until_enough(partial(self._full, keep=False), self.reference[i][here], first)
        full, listener.read = listener.read, read
        return {name: x for name, x in full.items() if name in read and x.shape == read[name].shape}

    @contextmanager
    def _reusing(
        self,
        finished: FinishedParts,
        part: Hashable,
        groups: tuple[tuple[str, ...], ...],
        in_turn: bool,
        listener: _Listener,
    ) -> Iterator[None]:
        """One pass of a part of a batch, which uses what is finished; `in_turn` it adds to that."""
        final = self.ending_before(groups[0]) if in_turn else ()
        wanted = {consumers[0].partition(".")[0] for consumers in groups}
        with finished.reused(self.module, part, self.device, final, wanted), self._precision():
            yield
        for linear in [consumers[0] for consumers in groups] if in_turn and self._whole is None else ():
            if linear in listener.read and (linear,) in self.anatomy.consumers[:-1]:
                x = listener.read[linear]
                finished.keep_input(part, linear, x.bfloat16() if self.half else x)

    @contextmanager
    def _listening(self, linears: set[str]) -> Iterator[_Listener]:
        """Yield what listens to the inputs of the linears."""
        listener = _Listener()

        def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            listener.read[name] = args[0]
            listener.left.discard(name)
            if not listener.through and not listener.left:
                raise _Enough

        modules = [self.module, self._whole] if self._whole else [self.module]
        hooks = [
            module.get_submodule(name).register_forward_pre_hook(partial(keep, name))
            for name in linears
            for module in modules
        ]
        try:
            yield listener
        finally:
            for hook in hooks:
                hook.remove()

    def _place(self, group: tuple[str, ...]) -> int:
        """How many groups of `consumers` come before a group; all, before an expert."""
        consumers = self.anatomy.consumers
        return consumers.index(group) if group in consumers else len(consumers)

    def ending_before(self, group: tuple[str, ...]) -> list[str]:
        """The submodules of the layer, such as self_attn, whose linears all come before a group."""
        if self._whole is not None:
            return []
        place = self._place(group)
        earlier = {linear for consumers in self.anatomy.consumers[:place] for linear in consumers}
        return [name for name, linear in self._finished.last.items() if linear in earlier]


@dataclass
class _Listener:
    """The inputs of linears in the last pass, by name, and those that this pass has not come to yet.

    A pass ends once all of them have been read, unless it goes `through` the whole layer.
    """

    read: dict[str, Tensor] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    through: bool = False

    def begin(self, linears: Collection[str], *, through: bool = False) -> None:
        """Expect a new pass."""
        self.read, self.left, self.through = {}, set(linears), through


def _round_input(rounded: Inputs, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(args[0]), *args[1:])


def firsts(batches: Sequence[Tensor]) -> list[int]:
    """The number of the first sequence of each of some batches [B, L, D], which follow each other."""
    return [0, *accumulate(map(len, batches))][: len(batches)]


def _part(batch: int, here: slice, hidden: Tensor) -> Hashable:
    """The key of a part of a batch: the batch's number, if the part is all of it."""
    return batch if here == slice(0, len(hidden)) else (batch, here.start, here.stop)


def _last_linears(anatomy: Anatomy) -> dict[str, str]:
    """The submodules of a layer, such as self_attn, and the linear that comes last in each; none of a layer
    that writes to what is handed on, as a submodule that is not run does not."""
    if anatomy.writes:
        return {}
    linears = [linear for linear in anatomy.linears if "." in linear]
    return {linear.partition(".")[0]: linear for linear in linears}


def _until_enough(run: Callable[..., Value], *args: Any) -> Value | None:
    """Return the output, or None if the pass ended early."""
    try:
        return run(*args)
    except _Enough:
        return None


class _Enough(Exception):
    """Ends a pass once all wanted inputs have been read."""
