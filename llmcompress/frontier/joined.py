"""Linears that an engine joins into one, which must take the same way: those that read the same input."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.frontier.costs import Cost, Priced
from llmcompress.modeling.layerwise import LayerwiseModel


def joined(units: Sequence[Priced], model: LayerwiseModel) -> list[Priced]:
    """Return the units with those of linears that read the same input in one, such as q, k and v. It takes a
    way that all of them can take, and its costs are their sums."""
    groups: dict[tuple[str, ...], list[Priced]] = {}
    prefixes = [f"{model.layer_name(index)}." for index in range(len(model.layers))]
    for unit in units:
        first = unit.linears[0]
        index, prefix = next(each for each in enumerate(prefixes) if first.startswith(each[1]))
        group = model.anatomy_of_layer(index).group_of(first.removeprefix(prefix))
        groups.setdefault((prefix, *group), []).append(unit)
    return [_sum(members) for members in groups.values()]


def _sum(members: Sequence[Priced]) -> Priced:
    ways = [way for way in members[0].costs if all(way in member.costs for member in members)]
    return Priced(
        linears=tuple(linear for member in members for linear in member.linears),
        costs={
            way: Cost(
                nats=sum(member.costs[way].nats for member in members),
                foretold=sum(member.costs[way].foretold for member in members),
                own_bytes=sum(member.costs[way].own_bytes for member in members),
                native_bytes=sum(member.costs[way].native_bytes for member in members),
            )
            for way in ways
        },
    )
