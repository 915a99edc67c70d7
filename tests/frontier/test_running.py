"""What linears take while a model runs: bytes as the loaded model holds them, and times by a clock that the
test turns."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import nn

from llmcompress.frontier.choice import Outer
from llmcompress.frontier.running import HEAD_WAYS, coded_head, held_bytes, medians, module_of, nanoseconds
from llmcompress.frontier.ways import FOUR_BITS, INT8, KEEP, MIXED, Way, palettes
from llmcompress.modeling.sequential import untracked
from llmcompress.pipeline.budgets import SECOND, Measure, Times, timed_measure
from tests.artefacts import CPU
from tests.frontier.test_choice import OUTSIDE, priced

SHAPE = (64, 256)
WEIGHTS = 64 * 256
Tracked = TypeVar("Tracked")


class Hand:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def test_the_median_of_each_counts_and_what_is_between_does_not() -> None:
    clock, order = Hand(), list[str]()
    slow, fast = iter([99, 10, 70, 11]), iter([99, 5, 6, 50])

    def run(name: str, times: Iterator[int]) -> None:
        order.append(name)
        clock.now += next(times)

    def between() -> None:
        clock.now += 1000

    runs = {"slow": lambda: run("slow", slow), "fast": lambda: run("fast", fast)}
    assert medians(runs, between, clock, rounds=3) == {"slow": 11, "fast": 6}
    assert order == ["slow", "fast"] * 4, "all ways take turns; the first time is not counted"


def test_every_way_of_a_shape_is_timed_once_and_others_are_left_out() -> None:
    clock, shown = Hand(), list[tuple[str, int]]()

    def tick() -> int:
        clock.now += 7
        return clock.now

    def track(items: Iterable[Tracked], what: str, count: int) -> Iterable[Tracked]:
        shown.append((what, count))
        return items

    offered = palettes("llmcompress")
    odd = (60, 256)  # no multiple of 32 rows, which the 4-bit kernel needs
    found = nanoseconds(
        [SHAPE, SHAPE, odd],
        offered,
        torch.float32,
        CPU,
        beside=100,
        track=track,
        clock=tick,
    )
    assert shown == [("how fast each format is", 2)]
    assert set(found.amounts.values()) == {7}
    named = {(way.name, palette.native) for palette in offered for way in palette.ways}
    assert {key[1:] for key in found.amounts if key[0] == SHAPE} == named
    four = {way.name for way in FOUR_BITS}
    assert {key[1:] for key in found.amounts if key[0] == odd} == {key for key in named if key[0] not in four}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_multiply_by_what_their_codes_stand_for(dtype: torch.dtype) -> None:
    x_TC = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    for palette in palettes("llmcompress"):
        for way in palette.ways:
            module = module_of(way, SHAPE, dtype, native=palette.native)
            assert isinstance(module, nn.Module)
            out = module(x_TC)
            assert out.shape == (1, 64) and out.dtype == dtype and bool(out.isfinite().all()), way.name


def test_bytes_in_memory_are_those_of_the_layouts() -> None:
    held = held_bytes([SHAPE], palettes("llmcompress"), torch.bfloat16)

    def of(way: Way, *, native: bool) -> int:
        return held.of(SHAPE, way.name, native=native)

    assert of(KEEP, native=True) == of(KEEP, native=False) == 2 * WEIGHTS
    assert of(INT8, native=True) == WEIGHTS + 4 * 64
    assert of(MIXED.ways[1], native=False) == WEIGHTS + 4 * 64  # w8a16
    scales, table = 4 * WEIGHTS // 32, 16 * 4
    assert of(FOUR_BITS[0], native=True) == WEIGHTS // 2 + scales + table
    # the kernel has codes and scales of its own beside those that are stored
    assert of(FOUR_BITS[0], native=False) == 2 * (WEIGHTS // 2 + scales) + table
    book = next(way for way in MIXED.ways if way.name == "codebook of 4")
    assert of(book, native=False) == WEIGHTS // 4 + 64 * 4 * 2


def times(token: int) -> Times:
    linears = tuple(
        (*SHAPE, way.name, palette.native, 100 if way is KEEP else 60)
        for palette in palettes("llmcompress")
        for way in palette.ways
    )
    return Times(token=token, linears=linears, head=(50, 20))


def test_a_token_is_its_linears_and_the_rest() -> None:
    unit = priced("layers.0.up", random.Random(0))
    measure = timed_measure(times(1000), {"layers.0.up": SHAPE}, "lm_head", True)
    assert measure.base == SECOND / 1000
    assert measure.quantity.outside(OUTSIDE) == 900
    assert measure.quantity.of(unit, KEEP.name, True) == 100
    assert measure.quantity.of(unit, "w8a16", False) == 60
    int8 = Outer("int8 embedding", {"embedding": "int8"}, {}, 0.0, 1, native=False)
    assert measure.quantity.outside(int8) == 900 + 20 - 50, "a tied head is int8 too"
    untied = timed_measure(times(1000), {"layers.0.up": SHAPE}, "lm_head", False)
    assert untied.quantity.outside(int8) == 900
    assert coded_head(Outer("int8 head", {}, {"lm_head": {}}, 0.0, 1, False), "lm_head", tied=False)


def test_linears_that_alone_took_longer_than_a_token_are_scaled_to_it() -> None:
    unit = priced("layers.0.up", random.Random(0))
    measure = timed_measure(times(50), {"layers.0.up": SHAPE}, "lm_head", True)
    assert measure.quantity.outside(OUTSIDE) == 0
    assert (
        measure.quantity.of(unit, KEEP.name, False) == 50 and measure.quantity.of(unit, "w8a16", False) == 30
    )


def test_a_speed_is_a_time_and_a_time_a_speed() -> None:
    measure = timed_measure(times(1000), {}, "lm_head", True)
    assert measure.limit("2x") == 500 and measure.limit("2000000") == 500
    assert measure.reached(500) == 2e6
    assert [words for words, _ in measure.limits(["1.5x", "2x", "1.5x"])] == ["2x", "1.5x"]
    told = str(measure.out_of_reach("9x", 500, "llmcompress", widths=False))
    assert (
        "tokens_per_s 9x is faster than any choice of formats runs here" in told and "2.00x the base" in told
    )


def test_a_memory_is_bytes_or_a_share() -> None:
    measure = Measure("memory", timed_measure(times(1000), {}, "", True).quantity, 5000, 64)
    assert measure.limit("40%") == 2000 and measure.limit("3kB") == 3000
    assert "with the cache of 64 tokens" in str(measure.out_of_reach("1%", 100, "transformers", widths=False))


def test_a_head_is_timed_in_int8_alone() -> None:
    found = nanoseconds([(64, 32)], HEAD_WAYS, torch.float32, CPU, beside=1, track=untracked, clock=Hand())
    assert {key[1] for key in found.amounts} == {"kept", "w8a16"}
