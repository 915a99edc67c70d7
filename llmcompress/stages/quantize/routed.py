"""Experts of a mixture: how many are solved for at once, and what is known of the inputs of those that few
tokens reach."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from llmcompress.algorithms.hessian import Moments
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.expert_routing import experts_of

AT_ONCE = 1 << 30  # bytes of second moments of experts that are in memory together
OTHERS = 0.25  # tokens of other experts that an expert borrows, for each of its inputs' columns


def expert_turns(layer: DecoderLayer, linears: Collection[str]) -> Iterator[tuple[tuple[str], ...]]:
    """Yield the experts among `linears` that read the same states, as many as fit in memory at once, each as
    a group by itself."""
    for of_parameter in layer.anatomy.expert_linears:
        wanted = [linear for linear in of_parameter if linear in linears]
        if not wanted:
            continue
        columns = layer.weight(wanted[0]).shape[1]
        count = max(1, AT_ONCE // (2 * 4 * columns**2))
        for start in range(0, len(wanted), count):
            yield tuple((linear,) for linear in wanted[start : start + count])


def blended(layer: DecoderLayer, routed: Mapping[str, Moments]) -> dict[str, Moments]:
    """The second moments of experts that were read in one pass, with a share of the others'.

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
        return dict(routed)
    everyone = Moments(len(routed[first].H_CC), layer.device)
    for moments in routed.values():
        tokens = everyone.tokens + moments.tokens
        everyone = everyone.blended(moments, moments.tokens)
        everyone.tokens = tokens
    borrowed = OTHERS * len(everyone.H_CC)
    return {linear: moments.blended(everyone, borrowed) for linear, moments in routed.items()}
