"""Counted operations: passes, moments and products of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch

from llmcompress.modeling.layerwise import MetaModel
from llmcompress.stages.codebook.stage import Codebook
from llmcompress.stages.cost import MOMENTS, PASSES, SOLVER, Time, Workload, summed
from llmcompress.stages.machine import ROWS, Machine, Run, machine_of
from llmcompress.stages.quantize.stage import Quantize
from tests.models import FAMILIES, pico

CPU = torch.device("cpu")


def work(family: str = "llama", tokens: int = 4096, length: int = 64) -> Workload:
    model = MetaModel(pico(family).config, CPU, torch.float32)
    return Workload(model, machine_of(CPU), tokens, length, model.stored_bytes())


def test_times_add_up_by_what_they_are_spent_on() -> None:
    both = Time({"a": 1.0, "b": 2.0}) + Time({"b": 3.0, "c": 4.0})
    assert both.parts == {"a": 1.0, "b": 5.0, "c": 4.0} and both.seconds == 10.0
    assert summed([both, both]).seconds == 20.0 and Time().seconds == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_and_its_moments_take_time_in_every_family(family: str) -> None:
    given = work(family)
    passes, moments = given.passes(1), given.moments()
    assert passes.parts.keys() == {PASSES} and passes.seconds > 0
    assert moments.parts.keys() == {MOMENTS} and moments.seconds > 0
    assert set(given.inputs) <= {group[0] for group in given.model.anatomy.consumers}


def test_twice_the_text_takes_twice_the_time() -> None:
    once, twice = work(tokens=4096), work(tokens=8192)
    assert twice.passes(1).seconds == pytest.approx(2 * once.passes(1).seconds)
    assert twice.moments().seconds == pytest.approx(2 * once.moments().seconds)
    assert once.passes(2, 1024).seconds == pytest.approx(once.passes(0.5).seconds)


def test_a_batch_is_as_many_sequences_as_go_through_a_layer_at_once() -> None:
    given = work()
    assert given.batch == 2048
    assert replace(given, tokens=640).batch == 640
    assert replace(given, length=3000, tokens=9000).batch == 3000


class OnlySolvers(Machine):
    """A machine on which a solver takes a second, and nothing else takes any time."""

    def _timed(self, key: Hashable, made: Callable[[], Run]) -> float:
        return float(isinstance(key, tuple) and key[0] == "solver")


def test_codebooks_are_foretold_alike_as_a_stage_and_as_a_format_by_the_time_of_their_solver() -> None:
    model = MetaModel(pico("llama").config, CPU, torch.float32)
    given = replace(work(), model=model, machine=OnlySolvers(CPU))
    linears = sum(shape[0] / min(shape[0], ROWS) for name, shape in model.linear_maps() if "layers" in name)
    for stage in (Codebook(entries=8), Quantize(format="codebook", entries=8)):
        assert stage.estimate(model, model, given).time.parts[SOLVER] == pytest.approx(linears)
