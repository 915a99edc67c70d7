"""Widths among the choices: the best widths and formats within a budget, and the stages that cut to them."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from llmcompress.frontier.choice import Outer
from llmcompress.frontier.costs import Cost, Priced, header_bytes
from llmcompress.frontier.narrow import Narrow, least, narrow
from llmcompress.frontier.ways import KEEP, MIXED, NATIVE, Palette
from llmcompress.frontier.widths import Part, Width, _narrower, counts
from llmcompress.modeling.layerwise import MetaModel
from tests.artefacts import CPU
from tests.frontier.test_choice import priced
from tests.models import pico

OUTSIDE = Outer("kept", {}, {}, 0.0, 1000, native=True)
WAYS = (KEEP, *MIXED.ways[1:3])
PALETTE = Palette(WAYS, native=False)


def part(draw: random.Random, layer: int, axis: str | None = "ffn", units: int = 2) -> Part:
    """Linears of a layer with random costs at the widths 2, 4 and 6, or along no axis with one width."""
    tried = (2, 4, 6) if axis else (0,)
    losses = sorted((draw.random() for _ in tried[1:]), reverse=True)
    return Part(
        axis=axis,
        layer=layer,
        widths=tuple(
            Width(
                count=count,
                nats=lost,
                units=tuple(
                    priced(f"layers.{layer}.{axis}.{number}", draw, WAYS, 60 * count + 50)
                    for number in range(units)
                ),
            )
            for count, lost in zip(tried, [*losses, 0.0], strict=True)
        ),
    )


def tried(parts: list[Part], budget: int, *, uniform: bool) -> list[tuple[float, dict[str, tuple[int, ...]]]]:
    """The nats of everything within a budget, with the widths."""
    found = []
    for widths in product(*(part.widths for part in parts)):
        kept = [width.count for part, width in zip(parts, widths, strict=True) if part.axis]
        if uniform and len({*kept}) > 1:
            continue
        units = [unit for width in widths for unit in width.units]
        for ways in product(WAYS, repeat=len(units)):
            costs = [unit.costs[way.name] for unit, way in zip(units, ways, strict=True)]
            if 1000 + sum(cost.own_bytes for cost in costs) <= budget:
                nats = sum(width.nats for width in widths) + sum(cost.nats for cost in costs)
                found.append((nats, {"ffn": tuple(kept)}))
    return found


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_widths_are_the_best_there_are(seed: int, uniform: bool) -> None:
    """Against trying everything."""
    draw = random.Random(seed)
    parts = [part(draw, 0), part(draw, 1), part(draw, 0, None, 1)]
    budget = 1000 + draw.randint(600, 1000)
    found = narrow(parts, [PALETTE], [OUTSIDE], budget, 2, uniform=uniform)
    every = tried(parts, budget, uniform=uniform)
    assert found is not None and found.size_bytes <= budget
    nats, counts = min(every, key=lambda each: each[0])
    assert found.nats == pytest.approx(nats)
    assert 0 <= found.cut_nats <= found.nats
    assert found.counts == ({} if counts == {"ffn": (6, 6)} else counts)
    assert len({each["ffn"] for _, each in every}) > 1, "there is a choice of widths"


@pytest.mark.parametrize("uniform", [False, True])
def test_nothing_is_chosen_below_the_least_there_is(uniform: bool) -> None:
    draw = random.Random(7)
    parts = [part(draw, 0), part(draw, 1), part(draw, 0, None, 1)]
    smallest = least(parts, [PALETTE], [OUTSIDE], uniform=uniform)
    assert narrow(parts, [PALETTE], [OUTSIDE], smallest - 1, 2, uniform=uniform) is None
    found = narrow(parts, [PALETTE], [OUTSIDE], smallest, 2, uniform=uniform)
    assert found is not None and found.size_bytes == smallest
    if uniform:
        assert len({*found.counts["ffn"]}) == 1


def test_layers_of_different_widths_take_no_native_bytes() -> None:
    native = Palette(NATIVE[0].ways[:1], native=True)
    parts = [part(random.Random(8), 0)]
    assert narrow(parts, [native], [OUTSIDE], 10**6, 1, uniform=False) is None
    assert narrow(parts, [native], [OUTSIDE], 10**6, 1, uniform=True) is not None


def test_heads_are_cut_before_neurons_and_equal_widths_are_one_number() -> None:
    found = Narrow({"ffn": (64, 128), "kv": (1, 1)}, 0.0, 0.0, 0)
    assert found.stages() == [
        {"prune": {"axis": "kv", "keep": 1}},
        {"prune": {"axis": "ffn", "keep": [64, 128]}},
    ]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (1, []),
        (2, [1]),
        (3, [1, 2]),
        (384, [64, 96, 128, 192, 256, 288, 320]),
        (1536, [192, 384, 576, 768, 960, 1152, 1344]),
    ],
)
def test_widths_are_about_eighths_in_multiples_that_groups_need(units: int, expected: list[int]) -> None:
    assert counts(units) == expected


def test_a_way_that_a_narrow_linear_can_not_take_is_not_offered() -> None:
    """96 columns are no groups of 64."""
    model = MetaModel(pico("llama", intermediate_size=128).config, CPU, torch.float32)
    linear = "model.layers.0.mlp.down_proj"
    ways = MIXED.ways
    cost = Cost(nats=0.8, foretold=0.8, own_bytes=1, native_bytes=1)
    unit = Priced(linears=(linear,), costs={way.name: cost for way in ways})
    found = _narrower(model, unit, 0, {"ffn": 96}, 0.75, ways)
    assert "nf4" not in found.costs and "nf4, groups of 32" in found.costs
    assert found.costs["codebook of 4"].nats == pytest.approx(0.6)
    assert found.costs["kept"].nats == 0.0


def test_linears_of_a_part_that_is_gone_take_their_entries_in_the_header_alone() -> None:
    model = MetaModel(pico("llama").config, CPU, torch.float32)
    linear = "model.layers.1.mlp.down_proj"
    cost = Cost(nats=0.8, foretold=0.8, own_bytes=1000, native_bytes=1000)
    unit = Priced(linears=(linear,), costs={way.name: cost for way in MIXED.ways})
    found = _narrower(model, unit, 1, {"ffn": 0}, 0.0, MIXED.ways)
    assert found.costs.keys() == {"kept"} and found.costs["kept"].nats == 0.0
    assert found.costs["kept"].own_bytes == header_bytes(f"{linear}.weight", (model.hidden_size, 0))
