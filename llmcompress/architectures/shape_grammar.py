"""The grammar in which an anatomy spells the axes of a weight: `(kv q d | kv d | kv d) hidden`.

A spelling has one term for each dimension of the tensor. A term is an axis, a number (rows that belong to no
axis), or a group in parentheses. In a group, factors side by side are nested, the last one running fastest,
and alternatives between bars are concatenated. Groups nest, so a fused projection laid out head by head is
`(kv (d | d | d)) hidden`. Weights that share an axis are coupled, and `take` cuts or reorders any of them
along it without knowing what the weight does. Parsing is cached; `take` costs one index_select per dimension
that has the axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

import torch
from torch import Tensor

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[()|])")
_BAR = "|"  # used as an axis: the number of the alternative of a position


@dataclass(frozen=True)
class Group:
    """Concatenated alternatives, each a product of terms whose last factor runs fastest."""

    alternatives: tuple[tuple[Term, ...], ...]


Term = str | int | Group  # an axis, a number of rows without one, or a group


@dataclass(frozen=True)
class Spelling:
    """The dimensions of a weight, spelled in named axes."""

    dims: tuple[Term, ...]

    @staticmethod
    def parse(text: str) -> Spelling:
        """Parse a spelling. Raises ValueError that shows the text and what is wrong with it."""
        return _parse(text)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes, each once, in the order in which they first appear."""
        return tuple(dict.fromkeys(axis for term in self.dims for axis in _axes(term)))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of a weight with this spelling, with `sizes` units on each axis.

        Raises ValueError for an axis without a size.
        """
        missing = [axis for axis in self.axes if axis not in sizes]
        if missing:
            raise ValueError(
                f'axis "{missing[0]}" of "{self}" has no size; sizes are given for {", ".join(sizes)}'
            )
        return tuple(_size(term, sizes) for term in self.dims)

    def part(self, number: int) -> Spelling:
        """Return the spelling of one part of a fused weight.

        Each group of several alternatives keeps only the alternative of that number.
        """
        return Spelling(tuple(_part(term, number) for term in self.dims))

    def __str__(self) -> str:
        return " ".join(_text(term) for term in self.dims)


def take(
    tensor: Tensor,
    spelling: Spelling | str,
    sizes: Mapping[str, int],
    axis: str,
    index: Tensor | Sequence[int],
) -> Tensor:
    """Keep the units `index` of `axis`, in that order, in every dimension that runs along it.

    A tensor without the axis is returned as it is. `sizes` are the sizes before the cut. `index` is 1-D and
    the same in every group, so along `q` of `(kv q d)` each kv head keeps the same query heads. Raises
    ValueError for an unknown axis or a tensor without the spelled shape.
    """
    spelling = _fitting(tensor, spelling, sizes)
    if axis not in sizes:
        raise ValueError(f'there is no axis "{axis}"; the axes are {", ".join(sizes)}')
    kept = torch.as_tensor(index, dtype=torch.int64)
    for dim, term in enumerate(spelling.dims):
        if axis in _axes(term):
            tensor = tensor.index_select(dim, _positions(term, sizes, axis, kept).to(tensor.device))
    return tensor


def scale(
    tensor: Tensor,
    spelling: Spelling | str,
    sizes: Mapping[str, int],
    axes: Sequence[str],
    factor: Tensor,
    part: int | None = None,
) -> Tensor:
    """Multiply by `factor`, whose dimensions are `axes`, wherever the tensor runs along all of them.

    The factor is repeated along other axes: on `hidden (kv q d)`, a factor over `kv d` reaches every query
    head. `part` restricts it to that alternative of a fused weight. Raises ValueError for a wrong shape, or
    for an axis that is not in exactly one dimension.
    """
    spelling = _fitting(tensor, spelling, sizes)
    if tuple(factor.shape) != tuple(sizes[axis] for axis in axes):
        raise ValueError(f"a factor of shape {tuple(factor.shape)} does not fit the axes {' '.join(axes)}")
    coordinates = [_coordinates(spelling, sizes, axis).to(tensor.device) for axis in axes]
    factor = factor.to(tensor)[tuple(c.clamp(min=0) for c in coordinates)]
    reached = torch.ones_like(tensor, dtype=torch.bool)
    for c in coordinates:
        reached &= c >= 0
    if part is not None:
        reached &= _coordinates(spelling, sizes, _BAR).to(tensor.device) == part
    return torch.where(reached, tensor * factor, tensor)


def _fitting(tensor: Tensor, spelling: Spelling | str, sizes: Mapping[str, int]) -> Spelling:
    spelling = Spelling.parse(spelling) if isinstance(spelling, str) else spelling
    if tuple(tensor.shape) != spelling.shape(sizes):
        raise ValueError(
            f'"{spelling}" spells the shape {spelling.shape(sizes)}, the tensor has {tuple(tensor.shape)}'
        )
    return spelling


def _axes(term: Term) -> Iterator[str]:
    if isinstance(term, str):
        yield term
    elif isinstance(term, Group):
        for product in term.alternatives:
            for factor in product:
                yield from _axes(factor)


def _size(term: Term, sizes: Mapping[str, int]) -> int:
    if isinstance(term, Group):
        return sum(prod(_size(factor, sizes) for factor in product) for product in term.alternatives)
    return sizes[term] if isinstance(term, str) else term


def _positions(term: Term, sizes: Mapping[str, int], axis: str, kept: Tensor) -> Tensor:
    """Return where the kept units lie within a term, int64, one entry for each position of the cut term."""
    if not isinstance(term, Group):
        return kept if term == axis else torch.arange(_size(term, sizes))
    parts, start = [], 0
    for product in term.alternatives:
        inside = torch.zeros(1, dtype=torch.int64)
        for factor in product:
            here = _positions(factor, sizes, axis, kept)
            inside = (inside[:, None] * _size(factor, sizes) + here).flatten()
        parts.append(inside + start)
        start += prod(_size(factor, sizes) for factor in product)
    return torch.cat(parts)


def _coordinates(spelling: Spelling, sizes: Mapping[str, int], axis: str) -> Tensor:
    """Return the unit of `axis` at each position, -1 for none, shaped to broadcast against the tensor."""
    found = [dim for dim, term in enumerate(spelling.dims) if (units_along(term, sizes, axis) >= 0).any()]
    if len(found) != 1:
        raise ValueError(
            f'"{axis}" is in {len(found)} dimensions of "{spelling}"; a scale needs it in exactly one'
        )
    shape = [1] * len(spelling.dims)
    shape[found[0]] = -1
    return units_along(spelling.dims[found[0]], sizes, axis).reshape(shape)


def units_along(term: Term, sizes: Mapping[str, int], axis: str) -> Tensor:
    """Return the unit of `axis` at each position of a term, int64; -1 for none."""
    if not isinstance(term, Group):
        size = _size(term, sizes)
        return torch.arange(size) if term == axis else torch.full((size,), -1)
    parts = []
    for number, product in enumerate(term.alternatives):
        inside = torch.full((1,), number if axis == _BAR and len(term.alternatives) > 1 else -1)
        for factor in product:
            inside = torch.maximum(inside[:, None], units_along(factor, sizes, axis)).flatten()
        parts.append(inside)
    return torch.cat(parts)


def _part(term: Term, number: int) -> Term:
    if not isinstance(term, Group):
        return term
    kept = term.alternatives[number : number + 1] if len(term.alternatives) > 1 else term.alternatives
    return Group(tuple(tuple(_part(factor, number) for factor in product) for product in kept))


def _text(term: Term) -> str:
    if isinstance(term, Group):
        return (
            "("
            + " | ".join(" ".join(_text(factor) for factor in product) for product in term.alternatives)
            + ")"
        )
    return str(term)


@cache
def _parse(text: str) -> Spelling:
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()):
        raise ValueError(f'"{text}" is not a valid spelling; write axes, numbers, ( | ) and spaces')
    dims = _product(tokens, text)
    if tokens or not dims:
        why = f"unexpected {tokens[0]}" if tokens else "nothing is named"
        raise ValueError(f'"{text}" is not a valid spelling: {why}')
    return Spelling(dims)


def _product(tokens: list[str], text: str) -> tuple[Term, ...]:
    """Read terms from the front of `tokens` up to a bar, a closing parenthesis or the end."""
    terms: list[Term] = []
    while tokens and tokens[0] not in ("|", ")"):
        token = tokens.pop(0)
        terms.append(_group(tokens, text) if token == "(" else int(token) if token.isdigit() else token)
    return tuple(terms)


def _group(tokens: list[str], text: str) -> Group:
    """Read a group from the front of `tokens`, after its opening parenthesis."""
    alternatives = [_product(tokens, text)]
    while tokens and tokens[0] == "|":
        tokens.pop(0)
        alternatives.append(_product(tokens, text))
    if not tokens:
        raise ValueError(f'"{text}" is not a valid spelling: a parenthesis is not closed')
    tokens.pop(0)
    for product in alternatives:
        named = [axis for term in product for axis in set(_axes(term))]
        if not product or len(named) != len(set(named)):
            raise ValueError(
                f'"{text}" is not a valid spelling: '
                f"{'an empty alternative' if not product else 'an axis inside itself'}"
            )
    return Group(tuple(alternatives))
