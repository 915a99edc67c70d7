"""Where the time of a stage goes: counted operations of a model, at the speed of this machine.

A stage counts passes through the layers, sums of second moments, factorisations, solvers of linears and steps
of training. What one of these takes of a model is counted here, how many a stage needs in its `estimate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from llmcompress.architectures.spec import experts_per_token
from llmcompress.modeling.half_precision import half_is_fast
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE
from llmcompress.stages.machine import Machine

# operations of a layer beside products: on each number of the hidden states (norms, sums), of the queries
# (rotary tables) and of the feed-forward part, and calls whose numbers are too few to matter
ON_HIDDEN, ON_QUERIES, ON_FFN, CALLS = 14, 8, 3, 200
# passes through a layer whose linears are solved in turn, in both streams together: each goes through it
# once, and the solved one again through what comes before the last linear of the feed-forward part
IN_TURN = 2.4
PASSES, MOMENTS, FACTORS, SOLVER = "forward passes", "second moments", "factorisations", "solver"
TRAINING, ERRORS = "training", "measured errors"


@dataclass(frozen=True)
class Time:
    """Seconds by what they are spent on."""

    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.parts.values())

    def __add__(self, other: Time) -> Time:
        both = dict(self.parts)
        for what, seconds in other.parts.items():
            both[what] = both.get(what, 0.0) + seconds
        return Time(both)


def summed(times: Iterable[Time]) -> Time:
    """All of several times."""
    return sum(times, Time())


@dataclass(frozen=True)
class Workload:
    """A model as a stage finds it, the text, and the machine: what operations of the stage take, in an
    estimate."""

    model: MetaModel
    machine: Machine
    tokens: int  # tokens of calibration text
    length: int  # tokens of a sequence
    size_bytes: int  # size of the model as the stage finds it

    @property
    def batch(self) -> int:
        """Tokens that go through a layer at once."""
        return min(self.tokens, max(1, TOKENS_AT_ONCE // self.length) * self.length)

    @property
    def half(self) -> bool:
        """Whether a walk that may compute in bfloat16 does."""
        return self.model.weight_dtype == torch.bfloat16 and self.half_is_fast

    @property
    def half_is_fast(self) -> bool:
        """Whether this machine multiplies bfloat16 faster."""
        return half_is_fast(self.machine.device)

    def passes(
        self, count: float, tokens: float | None = None, *, half: bool = False, what: str = PASSES
    ) -> Time:
        """The time of forward passes of `tokens`, by default the calibration text, through all layers. A
        backward pass is two of them, or one if no weight learns."""
        tokens = self.tokens if tokens is None else tokens
        return Time({what: count * tokens / self.batch * self._batch_s(half)})

    def moments(self, streams: int = 2, *columns: int, half: bool = False) -> Time:
        """The time to sum the second moments of inputs of linears in all layers, by default of all inputs.
        With two streams of states also those of the gap between them."""
        each = columns or tuple(self.inputs.values())
        seconds = sum(self.machine.moments(self.tokens, C, streams, half=half) for C in each)
        return Time({MOMENTS: len(self.model.layers) * seconds})

    def factors(self, count: int, *columns: int) -> Time:
        """The time of triangular factors of second moments in all layers, by default of all inputs."""
        seconds = sum(self.machine.factor(C) for C in columns or tuple(self.inputs.values()))
        return Time({FACTORS: count * len(self.model.layers) * seconds})

    def routed(self, streams: int, *, half: bool = False, factors: int = 0) -> Time:
        """The time of `moments` and of so many `factors` for the inputs of experts, which are sent a share of
        the tokens each."""
        maps, times = dict(self.model.linear_maps()), Time()
        for name in self.model.expert_linears:
            C, tokens = maps[name][1], self.tokens * self.model.used_share(name)
            summed_s = self.machine.moments(tokens, C, streams, half=half)
            times += Time({MOMENTS: summed_s, FACTORS: factors * self.machine.factor(C)})
        return times

    def products(self, count: float, shapes: Iterable[tuple[int, int]], what: str = SOLVER) -> Time:
        """The time of products of weights [R, C] and second moments [C, C]."""
        return Time({what: count * sum(self.machine.product(R, (C, C)) for R, C in shapes)})

    def heads(self, count: float, tokens: float, what: str = PASSES) -> Time:
        """The time of products with the output head."""
        shape = self.model.text_config.vocab_size, self.model.hidden_size
        return Time({what: count * self.machine.product(tokens, shape)})

    @cached_property
    def inputs(self) -> dict[str, int]:
        """The width of each input of linears of a layer, by the first linear that reads it."""
        shapes, layer = dict(self.model.linear_maps()), self.model.layer_name(0)
        first = {group[0]: f"{layer}.{group[0]}" for group in self.model.anatomy.of_layer(0).consumers}
        return {linear: shapes[name][1] for linear, name in first.items() if name in shapes}

    def _batch_s(self, half: bool) -> float:
        """Seconds of one batch through all layers."""
        inside = f"{self.model.anatomy.layers}."
        products = sum(
            self.machine.product(self.batch * self.model.used_share(name), shape, half=half)
            for name, shape in self.model.linear_maps()
            if name.startswith(inside)
        )
        return products + sum(self._beside_s(index, half) for index in range(len(self.model.layers)))

    def _beside_s(self, index: int, half: bool) -> float:
        """Seconds of one batch in one layer for all but the products of its linears."""
        machine, sizes, tokens = self.machine, self.model.sizes_of(index), self.batch
        D = self.model.hidden_size
        d, heads, ffn = sizes.get("d", 0), sizes.get("kv", 0) * sizes.get("q", 1), sizes.get("ffn", 0)
        seconds = CALLS * machine.elementwise(1, 1)
        seconds += ON_HIDDEN * machine.elementwise(tokens, D)
        if heads * d:
            seconds += machine.attention(tokens, self.length, heads, d, half=half)
            seconds += ON_QUERIES * machine.elementwise(tokens, heads * d)
        if ffn:
            seconds += ON_FFN * machine.elementwise(tokens, ffn)
        for name in self.model.anatomy.of_layer(index).experts:
            parameter = self.model.layers[index].get_parameter(name)
            weights = parameter.numel() * experts_per_token(self.model.text_config) / len(parameter)
            seconds += machine.product(tokens, (int(weights / D), D))
        return seconds
