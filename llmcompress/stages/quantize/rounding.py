"""From weights to codes: the roundings of `quantize` for one linear or one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from llmcompress.algorithms.activation_quantization import Magnitudes, static_scale
from llmcompress.algorithms.hessian import Factors, Moments, metric_factor
from llmcompress.algorithms.learned_rounding import learn
from llmcompress.algorithms.least_squares import bias_shift
from llmcompress.algorithms.quantize_weight import output_error
from llmcompress.formats import registry
from llmcompress.formats.integer import IntegerWeight
from llmcompress.formats.registry import StoredWeight
from llmcompress.formats.schemes import IntegerScheme, QuantScheme
from llmcompress.formats.solution import Solution
from llmcompress.modeling.decoder_layer import DecoderLayer, firsts
from llmcompress.modeling.half_precision import half_is_fast, half_precision
from llmcompress.modeling.token_limit import loss_in_parts
from llmcompress.stages.base import naming_layer
from llmcompress.stages.routed_experts import completed, expert_turns

METRIC_DAMP = 0.05  # damping of the output Fisher matrix, so that every error counts


@dataclass
class LayerCodes:
    """The codes of the linears of a layer, by name, and what was found on the way to them."""

    solutions: dict[str, Solution] = field(default_factory=dict)  # those that were solved for
    stored: dict[str, StoredWeight] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)  # of the inputs of all but experts
    scales: dict[str, float] = field(default_factory=dict)  # static ones, of inputs
    errors: dict[str, float] = field(default_factory=dict)  # relative ones of outputs, of experts
    tokens: dict[str, int] = field(default_factory=dict)  # that each expert read


@dataclass(frozen=True)
class Rounding:
    """The scheme of each linear of a layer, by its name in it, and the device of the weights."""

    codings: Mapping[str, QuantScheme]
    device: torch.device
    # stored dtype of a parameter, by its name in the layer
    dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32
    # for a weight that layers share: moments of the inputs of all of them
    pooled: Mapping[str, Moments] = field(default_factory=dict)
    # for a weight that an earlier layer has: its codes
    known: Mapping[str, StoredWeight] = field(default_factory=dict)
    # Fisher matrices of the outputs of linears, in blocks as `two_sided.add_blocks` leaves them
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def gptq(
        self,
        linear: str,
        W_RC: Tensor,
        moments: Moments,
        input_scale: float | None = None,
        factors: Factors | None = None,
    ) -> Solution:
        """Solve for a linear in its scheme under the second moments of the inputs, against the full model's
        outputs if the moments know them.

        `factors` are those of the moments, if other linears share them. Where the Fisher matrix of the
        outputs is known, it counts too.
        """
        factors, F_RB = factors or Factors(moments), self.outputs.get(linear)
        if F_RB is not None:
            F_RB = F_RB.to(self.device)
        return self.codings[linear].solve(W_RC, factors, input_scale, F_RB)

    def in_turn(self, layer: DecoderLayer, weights: Mapping[str, Tensor]) -> LayerCodes:
        """Solve for the linears that read one input, put them in place with corrected biases, and go on to
        the next input. Processes divide the linears that read one input.

        The second moments of experts are `completed`, and dropped once their linears are solved.
        """
        found = LayerCodes()
        for consumers in layer.anatomy.consumers:
            found.scales |= self.round_inputs(layer, (consumers,), weights)
            moments = layer.moments(consumers, in_turn=True)
            found.moments |= moments
            self._solve(layer, (consumers,), weights, moments, found)
        for experts in expert_turns(layer, weights):
            found.scales |= self.round_inputs(layer, experts, weights)
            routed = layer.moments(*experts, in_turn=True)
            found.tokens |= {linear: moments.tokens for linear, moments in routed.items()}
            moments = completed(layer, routed)
            self._solve(layer, experts, weights, moments, found)
            for linear, read in moments.items():
                stored = found.solutions[linear].stored
                found.errors[linear] = self.error(weights[linear], stored, read)
        found.solutions = {linear: found.solutions[linear] for linear in weights if linear in found.solutions}
        found.stored = {linear: solution.stored for linear, solution in found.solutions.items()}
        found.stored |= self._given(found.scales)
        return found

    def nearest(self, layer: DecoderLayer, weights: Mapping[str, Tensor]) -> LayerCodes:
        """Round the linears to the nearest codes, as stock bitsandbytes does."""
        found = LayerCodes()

        def store(linears: Iterable[str]) -> None:
            for linear in linears:
                with naming_layer(f"{layer.name}.{linear}"):
                    scale = found.scales.get(linear)
                    found.stored[linear] = self.codings[linear].nearest(weights[linear], scale)

        found.scales |= self.round_inputs(layer, layer.anatomy.consumers, weights)
        found.moments = layer.moments()
        store(linear for linear in found.moments if linear in weights)
        for experts in expert_turns(layer, weights):
            found.scales |= self.round_inputs(layer, experts, weights)
            moments = layer.moments(*experts)
            store(moments)
            for linear, read in moments.items():
                found.tokens[linear] = read.tokens
                found.errors[linear] = self.error(weights[linear], found.stored[linear], read)
        return found

    def error(self, W_RC: Tensor, stored: StoredWeight, moments: Moments) -> float:
        """The relative error of a linear's output for inputs with these moments."""
        return output_error(W_RC, registry.dequantize(stored, device=W_RC.device), moments.H_CC)

    def _solve(
        self,
        layer: DecoderLayer,
        groups: Sequence[tuple[str, ...]],
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Moments],
        found: LayerCodes,
    ) -> None:
        """Solve for the linears of groups that don't read what the others give, and put them in place."""
        unknown = {
            linear: consumers
            for consumers in groups
            for linear in consumers
            if linear in weights and linear not in self.known
        }
        factors = {consumers: Factors(moments[consumers[0]]) for consumers in groups}  # all read the same
        owners = layer.shard.processes.owners({linear: weights[linear].numel() for linear in unknown})
        solved = found.solutions
        for linear, consumers in unknown.items():
            if owners[linear] == layer.shard.processes.rank:
                read = self.pooled.get(linear, moments[linear])
                shared = factors[consumers] if read is factors[consumers].moments else None
                with naming_layer(f"{layer.name}.{linear}"):
                    solved[linear] = self.gptq(
                        linear, weights[linear], read, found.scales.get(linear), shared
                    )
        for linear in [linear for consumers in groups for linear in consumers if linear in weights]:
            if linear in self.known:
                Q_RC = registry.dequantize(self.known[linear], device=self.device)
            else:
                sent = partial(self._sent, layer, linear, solved.get(linear), owners[linear])
                solved[linear] = sent(weights[linear].shape[1], found.scales.get(linear))
                Q_RC = solved[linear].weight(self.device)
            layer.set_weight(linear, Q_RC)
            if f"{linear}.bias" in layer.anatomy.layer:
                shift_R = bias_shift(weights[linear], moments[linear].full_C, Q_RC, moments[linear].mean_C)
                layer.shift_bias(linear, shift_R, self.dtype_of(f"{linear}.bias"))

    def _sent(
        self,
        layer: DecoderLayer,
        linear: str,
        own: Solution | None,
        owner: int,
        columns: int,
        input_scale: float | None,
    ) -> Solution:
        """Return the solution of the process that solved a linear of so many columns, which has it as its
        `own`."""
        processes = layer.shard.processes
        if processes.count == 1:
            assert own is not None
            return own
        parts = processes.sent(own.parts() if own else {}, owner)
        found = {name: part.to(self.device) for name, part in parts.items()}
        return own or self.codings[linear].received(found, columns, input_scale)

    def _given(self, scales: Mapping[str, float]) -> dict[str, StoredWeight]:
        """The stored form of the linears whose codes are known, each with the static scale of its own
        inputs."""
        found = dict(self.known)
        for linear in found.keys() & scales.keys():
            weight = found[linear]
            assert isinstance(weight, IntegerWeight)
            found[linear] = replace(weight, input_scale=torch.tensor(scales[linear]))
        return found

    def round_inputs(
        self, layer: DecoderLayer, groups: Sequence[tuple[str, ...]], weights: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Round the inputs of the linears of `groups` that are in `weights` from here on, as their kernels
        do. Returns their static scales, if any."""
        static = {
            linear: coding
            for linear, coding in self.codings.items()
            if linear in weights and isinstance(coding, IntegerScheme) and coding.static
        }
        seen = {
            consumers[0]: Magnitudes(layer.device) for consumers in groups if static.keys() & set(consumers)
        }
        for read, _ in (
            layer.reads(*(consumers for consumers in groups if consumers[0] in seen)) if seen else ()
        ):
            for name, magnitudes in seen.items():
                magnitudes.add(read[name])
        for magnitudes in seen.values():
            layer.shard.processes.sum_(magnitudes.counts)
            layer.shard.processes.max_(magnitudes.top)
        scales: dict[str, float] = {}
        for consumers in groups:
            for linear in [linear for linear in consumers if linear in static]:
                bits, range = static[linear].scheme.activation_bits, static[linear].range
                scales[linear] = static_scale(seen[consumers[0]], bits, range)
        for linear in [linear for consumers in groups for linear in consumers if linear in weights]:
            if inputs := self.codings[linear].inputs(scales.get(linear)):
                layer.round_input(linear, inputs)
        return scales

    def learned(
        self,
        layer: DecoderLayer,
        weights: Mapping[str, Tensor],
        found: LayerCodes,
        F_DD: Tensor,
        *,
        steps: int,
        seed: int,
    ) -> tuple[float, float]:
        """Train the linears of a layer together, from the solutions that were `found` in turn, which are
        replaced. Returns the layer's loss before and after.

        The loss is the error of the layer's output against the full model's, weighted by the output Fisher
        matrix. If training does not lower it, the start is kept. Processes divide the sequences of each step
        and add up their gradients.
        """
        shard, codings = layer.shard, self.codings
        starts = {
            name: codings[name].trainable(solution, self.device) for name, solution in found.solutions.items()
        }
        R_DD = metric_factor(F_DD.to(self.device), METRIC_DAMP)
        inputs, targets = layer.limit.units(layer.inputs), layer.limit.units(layer.targets)
        numbers = firsts(inputs)

        def part(place: int, share: float, rounded: Mapping[str, Tensor], here: slice) -> Tensor:
            stored = {f"{name}.weight": layer.oriented(name, W) for name, W in rounded.items()}
            with half_precision(self.device, half_is_fast(self.device)):
                out = layer.run(inputs[place][here], stored, first=numbers[place] + here.start)
            lost = (out - targets[place][here].to(self.device)).float()
            return (lost @ R_DD).square().sum(-1).mean() * share

        def error(rounded: Mapping[str, Tensor], place: int, share: float = 1.0) -> Tensor:
            """The mean over the tokens of one of this process's batches, times a `share`."""
            work = partial(part, place, share)
            return loss_in_parts(work, rounded, layer.limit, *inputs[place].shape[:2])

        def loss(rounded: Mapping[str, Tensor], batch: int) -> Tensor:
            """This process's part of the mean over the tokens of a batch of the text."""
            place = shard.place(batch)
            if place is None:
                return 0 * sum((W_RC.sum() for W_RC in rounded.values()), torch.zeros((), device=self.device))
            share = len(inputs[place]) / shard.sizes[batch]
            return error(rounded, place, share)

        @torch.no_grad()
        def whole(solutions: Mapping[str, Solution]) -> float:
            rounded = {name: solution.weight(self.device) for name, solution in solutions.items()}
            sizes = [len(hidden) for hidden in inputs]
            lost = sum(float(error(rounded, i)) * size for i, size in enumerate(sizes))
            return shard.processes.mean(lost / max(1, sum(sizes)), sum(sizes))

        batches, generator = len(shard.sizes), torch.Generator().manual_seed(seed * 1_000_003 + layer.index)
        rounds = -(-steps // batches)
        order = torch.cat([torch.randperm(batches, generator=generator) for _ in range(rounds)]).tolist()
        trained = learn(
            weights,
            starts,
            lambda rounded, step: loss(rounded, order[step]),
            steps=steps,
            add=shard.processes.sum_,
        )
        ends = {name: codings[name].trained(end, found.scales.get(name)) for name, end in trained.items()}
        before, after = whole(found.solutions), whole(ends)
        if after < before:
            found.solutions |= ends
            found.stored |= {linear: solution.stored for linear, solution in ends.items()}
            for experts in expert_turns(layer, ends):
                for linear, read in layer.moments(*experts).items():
                    found.errors[linear] = self.error(weights[linear], found.stored[linear], read)
        return before, after
