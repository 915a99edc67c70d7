"""Experts of a mixture as a stage solves for them: which it takes, how many at once, and what is known of the
inputs of those that few tokens reach."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar

from llmcompress.algorithms.hessian import Moments
from llmcompress.integrations.expert_linears import SUFFIX
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.expert_routing import experts_of
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.stages.base import LayerRecord, Stage

KEEP = "experts: keep"  # why experts stay as they are
AT_ONCE = 1 << 30  # bytes of second moments of experts that are in memory together
OTHERS = 0.25  # tokens of other experts that an expert borrows, for each of its inputs' columns
EVEN = 0.25  # tokens with even inputs that an expert with few tokens is given, for each of these columns


class ExpertStage(Stage):
    """A stage that takes each expert of a mixture as a linear of its own, unless its `experts` is `keep`."""

    newer: ClassVar[frozenset[str]] = frozenset({"experts"})

    @property
    @abstractmethod
    def takes_experts(self) -> bool:
        """Whether it takes experts too."""

    def prepare(self, model: LayerwiseModel) -> None:
        """Make each expert a linear, unless experts are kept."""
        if self.takes_experts:
            model.divide_experts()


class ExpertsRecord(LayerRecord):
    """What became of a layer; `expert_tokens` are the calibration tokens that each expert saw, None for one
    that is kept."""

    expert_tokens: tuple[int | None, ...] | None = None


def replaced_parameters(model: LayerwiseModel) -> frozenset[str]:
    """The parameters of experts whose place linears take, by full name, as far as the files still hold
    them."""
    return frozenset(name for name, stored in model.divided.items() if not stored)


def kept_experts(model: LayerwiseModel, layer: DecoderLayer, rewritten: Collection[str]) -> list[str]:
    """The weights of a layer's experts that are not `rewritten`, but no longer in one tensor with the
    others."""
    replaced = {name.removeprefix(f"{layer.name}.") for name in replaced_parameters(model)}
    return [
        f"{linear}.weight"
        for linears in layer.anatomy.expert_linears
        if linears[0].removesuffix(f"{SUFFIX}.0") in replaced
        for linear in linears
        if linear not in rewritten
    ]


def expert_turns(layer: DecoderLayer, linears: Collection[str]) -> Iterator[tuple[tuple[str], ...]]:
    """Yield the experts among `linears` that read the same states, as many as fit in memory at once, each as
    a group by itself."""
    for of_parameter in layer.anatomy.expert_linears:
        wanted = [linear for linear in of_parameter if linear in linears]
        if not wanted:
            continue
        count = _at_once(layer.weight(wanted[0]).shape[1])
        for start in range(0, len(wanted), count):
            yield tuple((linear,) for linear in wanted[start : start + count])


def moments_bytes(model: LayerwiseModel, linears: Collection[str]) -> int:
    """The most bytes of second moments that a turn of experts holds, of those among `linears`, by full name;
    twice while they are `completed`."""
    largest, shapes = 0, dict(model.linear_maps())
    for index in range(len(model.layers)):
        for of_parameter in model.anatomy.of_layer(index).expert_linears:
            names = [f"{model.layer_name(index)}.{linear}" for linear in of_parameter]
            if wanted := [name for name in names if name in linears]:
                columns = shapes[wanted[0]][1]
                largest = max(largest, 2 * min(len(wanted), _at_once(columns)) * _bytes(columns))
    return largest


def _at_once(columns: int) -> int:
    """The number of experts, which read so many columns, whose second moments are in memory together."""
    return max(1, AT_ONCE // _bytes(columns))


def _bytes(columns: int) -> int:
    """The bytes of the second moments of an expert's inputs, and of their gap to the full model's."""
    return 2 * 4 * columns**2


def completed(layer: DecoderLayer, routed: Mapping[str, Moments]) -> dict[str, Moments]:
    """The second moments that experts are solved under, from those that were read in one pass: they are
    `blended`, then `steadied`."""
    return {linear: steadied(moments) for linear, moments in blended(layer, routed)}


def blended(layer: DecoderLayer, routed: Mapping[str, Moments]) -> Iterator[tuple[str, Moments]]:
    """Yield the second moments of experts that were read in one pass, with a share of the others'.

    An expert that reads C columns and few tokens has singular moments, and later text will send it tokens
    that calibration sent to others. So the first linear of each expert, which reads the states that all
    experts read, is solved as if C / 4 tokens of all these experts were its own too. What a later linear
    reads comes from neurons of its own expert, and stays as it is.
    """
    first = next(iter(routed))
    module = experts_of(first)
    # the linears of the first parameter of the same module
    read_states = next(of for of in layer.anatomy.expert_linears if experts_of(of[0]) == module)
    if first not in read_states:
        yield from routed.items()
        return
    everyone = Moments(len(routed[first].H_CC), layer.device)
    for moments in routed.values():
        tokens = everyone.tokens + moments.tokens
        everyone = everyone.blended(moments, moments.tokens)
        everyone.tokens = tokens
    borrowed = OTHERS * len(everyone.H_CC)
    for linear, moments in routed.items():
        yield linear, moments.blended(everyone, borrowed)


def steadied(moments: Moments) -> Moments:
    """The second moments of an expert without directions that no token has.

    Under singular moments, weights in such directions cost nothing, and codes, zeros or products that are
    solved for may be anything there. So an expert that read fewer tokens than it has columns C is solved as
    if C / 4 tokens more were its own, whose inputs are all equally large.
    """
    columns = len(moments.H_CC)
    return moments.evened(EVEN * columns) if moments.tokens < columns else moments


def expert_tokens(layer: DecoderLayer, tokens: Mapping[str, int]) -> tuple[int | None, ...] | None:
    """The tokens that each expert of a layer read, from those of linears: None for one whose linears are all
    kept, and None instead of the tuple if no expert was read."""
    if not tokens:
        return None
    # the linears of an expert read the same tokens, and some of them may be kept
    each = zip(*layer.anatomy.expert_linears, strict=False)
    return tuple(next((tokens[linear] for linear in of if linear in tokens), None) for of in each)


def starved_experts(layers: Sequence[ExpertsRecord], few: int) -> list[str]:
    """Return a line for each layer with experts that saw fewer than `few` calibration tokens, with those
    experts.

    No calibrated format can be better than its data: the second moments of such an expert are singular, and
    are `completed` with what it did not read.
    """
    lines = []
    for layer in layers:
        starved = [
            f"{expert} ({tokens})"
            for expert, tokens in enumerate(layer.expert_tokens or ())
            if tokens is not None and tokens < few
        ]
        if starved:
            lines.append(
                f"{layer.name}: experts that saw fewer than {few} calibration tokens: {', '.join(starved)}"
            )
    return lines
