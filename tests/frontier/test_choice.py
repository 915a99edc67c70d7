"""The choice of ways within a budget, and the recipe that spells it out."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from llmcompress.frontier.choice import BYTES, Choice, Outer, Quantity, best, counted, least, taken, uniform
from llmcompress.frontier.costs import Cost, Priced
from llmcompress.frontier.spelling import stages_of
from llmcompress.frontier.ways import KEEP, MIXED, NATIVE, Palette, Way
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.quantize.stage import Quantize
from tests.artefacts import CPU
from tests.models import pico

OUTSIDE = Outer("kept", {}, {}, 0.0, 1000, native=True)
CODED = Outer("int8 embedding", {"embedding": "int8"}, {}, 0.01, 600, native=False)


def priced(
    linear: str, draw: random.Random, ways: tuple[Way, ...] = MIXED.ways, largest: int = 400
) -> Priced:
    """A linear whose ways have random costs; the ways that are listed later take fewer bytes."""
    sizes = sorted((draw.randint(10, largest) for _ in ways), reverse=True)
    return Priced(
        linears=(linear,),
        costs={
            way.name: Cost(
                nats=0.0 if way is KEEP else draw.random(),
                foretold=0.0,
                own_bytes=size,
                native_bytes=size + 3,
            )
            for way, size in zip(ways, sizes, strict=True)
        },
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    """Against trying everything."""
    draw = random.Random(seed)
    ways = (KEEP, *MIXED.ways[1:3], MIXED.ways[-1])
    palette = Palette(ways, native=False)
    units = [priced(f"layers.{number}.up", draw, ways) for number in range(4)]
    budget = 1000 + draw.randint(400, 1200)
    found = best(units, [palette], [CODED], budget)
    assert found is not None and found.size_bytes <= budget
    tried = [
        CODED.nats + sum(unit.costs[way.name].nats for unit, way in zip(units, taken, strict=True))
        for taken in product(ways, repeat=4)
        if taken != (KEEP,) * 4
        and 600 + sum(unit.costs[way.name].own_bytes for unit, way in zip(units, taken, strict=True))
        <= budget
    ]
    assert found.nats == pytest.approx(min(tried))


MEMORY = Quantity(
    lambda unit, way, native: 3 * unit.costs[way].own_bytes + (10 if native else 25),
    lambda outer: 7000 if outer.native else 6500,
)


def _time(unit: Priced, way: str, native: bool) -> int:
    """Nanoseconds that do not fall with the bytes, as a format may be smaller and slower."""
    return random.Random(f"{unit.linears} {way}").randint(10**5, 10**7)


TIME = Quantity(_time, lambda outer: 3 * 10**6)


@pytest.mark.parametrize("quantity", [BYTES, MEMORY, TIME], ids=["bytes", "memory", "nanoseconds"])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_within_any_quantity(seed: int, quantity: Quantity) -> None:
    """Against trying everything, in two palettes and with two ways outside the layers."""
    draw = random.Random(seed)
    native, mixed = Palette((KEEP, *MIXED.ways[2:4]), native=True), Palette((KEEP, *MIXED.ways[1:4]), False)
    units = [priced(f"layers.{number}.up", draw, mixed.ways) for number in range(4)]
    tried = []
    for palette, outer in ((native, OUTSIDE), (mixed, OUTSIDE), (mixed, CODED)):
        for ways in product(palette.ways, repeat=4):
            if palette is mixed and outer is OUTSIDE and mixed.ways[1] not in ways:
                continue  # plain transformers loads it, and the native palette has it
            if outer is CODED and ways == (KEEP,) * 4:
                continue  # quantize codes nothing outside the layers by itself
            amount = taken(units, Choice(palette, outer, ways, 0.0, 0), quantity)
            lost = sum(unit.costs[way.name].nats for unit, way in zip(units, ways, strict=True))
            tried.append((amount, outer.nats + lost))
    smallest, largest = min(tried)[0], max(tried)[0]
    for share in (0.0, 0.3, 0.6):
        budget = smallest + int(share * (largest - smallest))
        found = best(units, [native, mixed], [OUTSIDE, CODED], budget, quantity)
        wanted = min(nats for amount, nats in tried if amount <= budget)
        assert found is not None and found.nats == pytest.approx(wanted)
        assert taken(units, found, quantity) <= budget
    assert best(units, [native, mixed], [OUTSIDE, CODED], smallest - 1, quantity) is None


def test_one_linear_at_least_is_coded_beside_what_is_coded_outside_the_layers() -> None:
    draw = random.Random(8)
    units = [priced(f"layers.{number}.up", draw) for number in range(3)]
    found = best(units, [MIXED], [CODED], 10**6)
    assert found is not None
    coded = [
        unit.costs[way.name].nats for unit, way in zip(units, found.ways, strict=True) if way is not KEEP
    ]
    assert coded == [min(cost.nats for unit in units for name, cost in unit.costs.items() if name != "kept")]
    assert stages_of(units, found)[0]["quantize"]["embedding"] == "int8"


def test_a_model_of_one_way_says_what_it_takes() -> None:
    draw = random.Random(7)
    units = [priced(f"layers.{number}.up", draw) for number in range(3)]
    (found,) = [each for each in uniform(units, [MIXED], [CODED], MEMORY) if each.way == "w8a16"]
    assert found.taken == 6500 + sum(3 * unit.costs["w8a16"].own_bytes + 25 for unit in units)
    assert found.size_bytes == 600 + sum(unit.costs["w8a16"].own_bytes for unit in units)


def test_nothing_is_chosen_below_the_least_there_is() -> None:
    units = [priced("layers.0.up", random.Random(1))]
    smallest = least(units, [MIXED], [OUTSIDE, CODED])
    assert best(units, [MIXED], [OUTSIDE, CODED], smallest - 1) is None
    found = best(units, [MIXED], [OUTSIDE, CODED], smallest)
    assert found is not None and found.size_bytes == smallest


def test_a_native_palette_counts_native_bytes_and_keeps_the_embedding() -> None:
    ways = NATIVE[0].ways
    units = [priced("layers.0.up", random.Random(2), ways)]
    found = best(units, [NATIVE[0]], [OUTSIDE, CODED], 1350)
    assert found is not None and found.outer is OUTSIDE
    taken = units[0].costs[found.ways[0].name]
    assert found.size_bytes == 1000 + taken.native_bytes


def test_ways_are_counted_once() -> None:
    draw = random.Random(3)
    units = [priced(f"layers.{number}.up", draw) for number in range(3)]
    choice = Choice(MIXED, OUTSIDE, (KEEP, MIXED.ways[1], MIXED.ways[1]), 0.0, 0)
    rows = counted(units, choice)
    assert [(name, linears) for name, linears, _, _ in rows] == [("kept", 1), ("w8a16", 2)]
    assert rows[1][2] == sum(unit.costs["w8a16"].own_bytes for unit in units[1:])


def test_models_of_one_way_leave_out_ways_that_most_linears_can_not_take() -> None:
    draw = random.Random(4)
    units = [priced(f"layers.{number}.up", draw) for number in range(4)]
    few = [unit.model_copy(update={"costs": {**unit.costs}}) for unit in units]
    for unit in few[:3]:
        del unit.costs["nf4"]
    assert "nf4" in {each.way for each in uniform(units, [MIXED], [OUTSIDE])}
    assert "nf4" not in {each.way for each in uniform(few, [MIXED], [OUTSIDE])}


@pytest.mark.parametrize("seed", range(4))
def test_a_recipe_gives_every_linear_the_way_that_was_chosen(seed: int) -> None:
    model = MetaModel(pico("llama", num_hidden_layers=3).config, CPU, torch.float32)
    draw = random.Random(seed)
    units = [priced(linear, draw) for linear in model.layer_linears]
    ways = tuple(draw.choice((KEEP, *MIXED.ways[1:3])) for _ in units)
    if seed == 3:  # the same in every layer
        ways = tuple(MIXED.ways[1] if "down_proj" in unit.linears[0] else MIXED.ways[3] for unit in units)
    stages = stages_of(units, Choice(MIXED, OUTSIDE, ways, 0.0, 0))
    quantize = Recipe.of_entries({"stages": stages}).stages[0]
    assert isinstance(quantize, Quantize)
    chosen, _ = quantize.choose(model)
    wanted = {
        unit.linears[0]: way.coding(model.weight_dtype)
        for unit, way in zip(units, ways, strict=True)
        if way is not KEEP
    }
    assert chosen == wanted
    if seed == 3:
        assert list(quantize.overrides) == ["*.mlp.down_proj"]


def test_a_head_of_its_own_is_an_override() -> None:
    units = [priced("model.layers.0.mlp.up_proj", random.Random(6))]
    outer = Outer("int8 head", {"head": "quantize"}, {"lm_head": {"format": "w8a16"}}, 0.0, 0, native=False)
    stages = stages_of(units, Choice(MIXED, outer, (MIXED.ways[3],), 0.0, 0))
    settings = stages[0]["quantize"]
    assert settings["head"] == "quantize" and settings["overrides"] == {"lm_head": {"format": "w8a16"}}


def test_keeping_all_linears_is_no_stage() -> None:
    units = [priced("layers.0.up", random.Random(5))]
    assert stages_of(units, Choice(MIXED, OUTSIDE, (KEEP,), 0.0, 0)) == []
