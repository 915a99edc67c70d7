"""The grammar of spellings, against an oracle of plain loops that name every position of a term by its
units."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.architectures.shape_grammar import Group, Spelling, Term, scale, take

SIZES = {"kv": 2, "q": 3, "d": 4, "hidden": 5, "ffn": 6, "expert": 3, "position": 7}
ALL = {axis: range(size) for axis, size in SIZES.items()}
SPELLINGS = (
    "hidden",
    "(kv q d) hidden",
    "hidden (kv q d)",
    "(kv q d | kv d | kv d) hidden",
    "(kv q d | kv d | kv d)",
    "hidden (kv d | kv d | kv d)",
    "(kv (q d | d | d)) hidden",
    "(ffn | ffn) hidden",
    "expert (ffn | ffn) hidden",
    "expert hidden ffn",
    "(2 | position) hidden",
)
Name = tuple[tuple[str, int], ...]


def names(term: Term, units: Mapping[str, Sequence[int]]) -> Iterator[Name]:
    """Each position of a term in storage order, named by its alternatives and units."""
    if isinstance(term, Group):
        for number, product in enumerate(term.alternatives):
            for factors in itertools.product(*(list(names(factor, units)) for factor in product)):
                yield (("|", number), *itertools.chain(*factors))
    else:
        yield from (((str(term), unit),) for unit in (units[term] if isinstance(term, str) else range(term)))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_spelling_counts_its_units_and_prints_as_it_was_written(text: str) -> None:
    spelling = Spelling.parse(text)
    assert spelling.shape(SIZES) == tuple(len(list(names(term, ALL))) for term in spelling.dims)
    assert str(spelling) == text and Spelling.parse(f" {text} ".replace("(", "( ")) == spelling
    assert hash(spelling) == hash(Spelling.parse(text))


def test_the_axes_are_named_once_in_the_order_of_the_spelling() -> None:
    assert Spelling.parse("(kv q d | kv d | kv d) hidden").axes == ("kv", "q", "d", "hidden")
    assert Spelling.parse("(2 | position) hidden").axes == ("position", "hidden")


@pytest.mark.parametrize(
    ("text", "axis"), [(text, axis) for text in SPELLINGS for axis in Spelling.parse(text).axes]
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_take_gathers_the_named_units_in_the_order_asked_for(
    text: str, axis: str, data: st.DataObject
) -> None:
    spelling = Spelling.parse(text)
    index = data.draw(
        st.lists(st.integers(0, SIZES[axis] - 1), min_size=1, max_size=SIZES[axis], unique=True)
    )
    tensor = expected = numbered(spelling.shape(SIZES))
    for dim, term in enumerate(spelling.dims):
        before = list(names(term, ALL))
        expected = expected.index_select(
            dim, torch.tensor([before.index(name) for name in names(term, {**ALL, axis: index})])
        )
    taken = take(tensor, text, SIZES, axis, torch.tensor(index))
    assert torch.equal(taken, expected)
    assert taken.shape == spelling.shape({**SIZES, axis: len(index)})


def test_taking_a_permutation_and_then_its_inverse_changes_nothing() -> None:
    tensor, order = numbered((2 * 3 * 4 + 2 * 2 * 4, 5)), [3, 0, 2, 1]
    there = take(tensor, "(kv q d | kv d | kv d) hidden", SIZES, "d", order)
    assert not torch.equal(there, tensor)
    assert torch.equal(
        take(there, "(kv q d | kv d | kv d) hidden", SIZES, "d", torch.tensor(order).argsort()), tensor
    )


def test_take_leaves_a_weight_alone_that_does_not_run_along_the_axis() -> None:
    tensor = numbered((6, 5))
    assert take(tensor, "ffn hidden", SIZES, "kv", [0]) is tensor


@pytest.mark.parametrize(
    ("text", "axes", "part"),
    [
        ("hidden", ("hidden",), None),
        ("(kv q d) hidden", ("hidden",), None),
        ("hidden (kv q d)", ("kv", "d"), None),
        ("(kv q d | kv d | kv d) hidden", ("kv", "d"), 2),
        ("hidden (kv d | kv d | kv d)", ("d", "kv"), 1),
        ("(kv (d | d | d)) hidden", ("kv", "d"), 2),
        ("expert (ffn | ffn) hidden", ("expert", "ffn"), 1),
        ("expert hidden ffn", ("expert", "ffn"), None),
    ],
)
def test_scale_multiplies_each_entry_by_the_factor_of_its_units(
    text: str, axes: tuple[str, ...], part: int | None
) -> None:
    spelling = Spelling.parse(text)
    tensor, factor = numbered(spelling.shape(SIZES)), 2 + numbered(tuple(SIZES[axis] for axis in axes))
    scaled, positions = (
        scale(tensor, text, SIZES, axes, factor, part),
        [list(names(term, ALL)) for term in spelling.dims],
    )
    for where in itertools.product(*(range(size) for size in tensor.shape)):
        name = list(itertools.chain(*(positions[dim][i] for dim, i in enumerate(where))))
        reached = part is None or ("|", part) in name
        assert scaled[where] == tensor[where] * (
            factor[tuple(dict(name)[axis] for axis in axes)] if reached else 1
        )


def test_a_part_is_spelled_like_the_weight_that_it_would_be_alone() -> None:
    assert Spelling.parse("(kv q d | kv d | kv d) hidden").part(2).shape(SIZES) == (8, 5)
    assert Spelling.parse("(kv (q d | d | d)) hidden").part(0).axes == ("kv", "q", "d", "hidden")


@pytest.mark.parametrize(
    "text", ["", "hidden)", "(kv d", "(kv | ) d", "() d", "kv | d", "kv*d", "(kv kv)", "(kv (kv d | d))"]
)
def test_a_wrong_spelling_is_shown_with_what_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid spelling"):
        Spelling.parse(text)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r'"ffn hidden" spells the shape \(6, 5\), the tensor has \(5, 6\)'):
        take(numbered((5, 6)), "ffn hidden", SIZES, "ffn", [0])


def test_an_axis_that_nobody_sized_is_named() -> None:
    with pytest.raises(ValueError, match='axis "rank" of "rank hidden" has no size'):
        Spelling.parse("rank hidden").shape(SIZES)
    with pytest.raises(ValueError, match='there is no axis "fnn"; the axes are kv, q'):
        take(numbered((6, 5)), "ffn hidden", SIZES, "fnn", [0])


def test_a_scale_that_does_not_fit_its_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a factor of shape \(6,\) does not fit the axes hidden"):
        scale(numbered((6, 5)), "ffn hidden", SIZES, ("hidden",), torch.ones(6))
    with pytest.raises(ValueError, match='"kv" is in 0 dimensions of "ffn hidden"'):
        scale(numbered((6, 5)), "ffn hidden", SIZES, ("kv",), torch.ones(2))
