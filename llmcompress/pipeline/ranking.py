"""The order in which `advise` puts the recipes that fit a model: which beat which, and which come first.

`pipeline/advise.py` has the rule in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmcompress.data.sources import Effort
from llmcompress.pipeline.engines import VLLM_THEN
from llmcompress.recipe.catalogue import MODELS, PLUGIN, Measured
from llmcompress.recipe.speeds import Speed

ASKING = (PLUGIN, VLLM_THEN)  # what is more to ask for than transformers, or an engine as it is
LEAST, MOST = 3, 5  # recipes that are advised


@dataclass(frozen=True)
class Candidate:
    """A shipped recipe on a model: what decides its place."""

    name: str
    purpose: str
    size_bytes: int
    measured: tuple[Measured, ...]  # the model nearest to this one in parameters first
    loads_with: str
    learns: bool  # whether it trains, which takes most of the time
    memory_bytes: int = 0  # that the run holds at once
    engine: str | None = None  # the target of the export that an engine needs
    format: str | None = None  # if its linears have one
    speed: Speed | None = None  # of that format, where speed counts and was measured
    effort: Effort | None = None  # the best one within the time that was given
    seconds: float | None = None  # with that effort

    @property
    def model(self) -> str:
        """The measured model that is nearest to this one."""
        return self.measured[0].model

    @property
    def loss(self) -> float:
        """The KL on the nearest model."""
        return self.measured[0].kl_nats

    @property
    def rank(self) -> float:
        """The speed in one digit; zero if it was not measured."""
        return self.speed.rank if self.speed else 0.0


def nearest(measured: Sequence[Measured], parameters: int) -> tuple[Measured, ...]:
    """Measurements, the one on the model nearest in parameters, by their ratio, first."""
    return tuple(sorted(measured, key=lambda one: distance(one.model, parameters)))


def distance(model: str, parameters: int) -> float:
    """How far a measured model is from one of so many parameters: the logarithm of their ratio."""
    return abs(math.log(parameters / MODELS[model]))


def beats(other: Candidate, one: Candidate) -> bool:
    """Whether `other` leaves no more bytes and loses no more than `one`, and asks for no more."""
    theirs = {each.model: each.kl_nats for each in other.measured}
    both = [(theirs[each.model], each.kl_nats) for each in one.measured if each.model in theirs]
    if not both:
        return False
    asks_more = (
        (other.learns and not one.learns)
        or (other.loads_with in ASKING and one.loads_with not in ASKING)
        or other.rank < one.rank
    )
    here, there = (other.size_bytes, both[0][0]), (one.size_bytes, both[0][1])
    return not asks_more and here != there and here[0] <= there[0] and here[1] <= there[1]


def ranked(found: Sequence[Candidate], parameters: int) -> list[Candidate]:
    """The recipes that no other beats, in the order in which they are advised for a model of so many
    parameters, five at most."""
    best = in_order([one for one in found if not any(beats(other, one) for other in found)], parameters)
    first = {one.purpose: one for one in reversed(best)}
    return sorted(best, key=lambda one: first[one.purpose] is not one)[:MOST]


def in_order(found: Iterable[Candidate], parameters: int) -> list[Candidate]:
    """Recipes by what reads them, by how near the model is on which they were measured, by speed, then by
    loss."""
    return sorted(
        found,
        key=lambda one: (
            one.loads_with == VLLM_THEN,
            distance(one.model, parameters),
            -one.rank,
            one.loss,
            one.size_bytes,
        ),
    )


def filled(
    chosen: Sequence[Candidate], within: Sequence[Candidate], others: Sequence[Candidate]
) -> list[Candidate]:
    """Recipes that are chosen, and after them others up to three in all, if none of those `within` the same
    bounds beats them."""
    unbeaten = [one for one in others if not any(beats(better, one) for better in within)]
    return [*chosen, *unbeaten[: max(0, LEAST - len(chosen))]]


def least_loss(chosen: Sequence[Candidate]) -> list[Candidate]:
    """The one of the least loss on the nearest model, if there is one."""
    near = [one for one in chosen if one.model == chosen[0].model]
    return [min(near, key=lambda one: one.loss)] if near else []
