"""Widths for a search: priced once, chosen with the formats, and cut in a copy of the model, whose formats
are then priced and chosen again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from llmcompress.data.calibration import CalibrationData
from llmcompress.frontier import widths
from llmcompress.frontier.choice import Choice, Outer, best
from llmcompress.frontier.costs import Priced
from llmcompress.frontier.narrow import Narrow, least, narrow
from llmcompress.frontier.outside import lost
from llmcompress.frontier.ways import MIXED, Palette, ways_of
from llmcompress.frontier.widths import Part
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.io.scratch import scratch_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import Track
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE, first_sequences
from llmcompress.pipeline.between_stages import joint_folder, write_joint
from llmcompress.pipeline.outcome import Outcome
from llmcompress.pipeline.resolve import source_of
from llmcompress.pipeline.search_cache import SearchCache
from llmcompress.pipeline.stages import run_stages
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import ModelSource

PARTS = "parts"  # entry of the journal of a finished search
LOSSY = 0.05  # nats/token that formats alone must be expected to lose, so that widths are measured
LEAST_GAIN = 0.05  # share of the expected nats that widths must save, so that a narrower model is priced


class Priceable(Protocol):
    """What a search measured of a model: its linears in each way, and what is outside the layers."""

    @property
    def units(self) -> Sequence[Priced]: ...
    @property
    def outers(self) -> Sequence[Outer]: ...


class Parts(JournalFacts):
    """What each width of a model costs."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Narrowed:
    """A narrower model: the stages that make it, the units that each layer keeps, its loss in nats/token, and
    the formats that were chosen for its linears, which are priced in it."""

    stages: list[dict[str, Any]]
    counts: Mapping[str, tuple[int, ...]]
    nats: float
    units: Sequence[Priced]
    choice: Choice

    @property
    def expected(self) -> float:
        """The loss that is expected of the result."""
        return self.nats + self.choice.nats


@dataclass(frozen=True)
class Narrowing:
    """Finds the widths of one model for budgets. `price` measures what every format costs a model, given what
    opens it, and the linears whose costs are known."""

    base: Path
    opened: Callable[[], DiskModel]
    text: CalibrationData
    seed: int
    palettes: Sequence[Palette]
    prices: Priceable
    price: Callable[[Callable[[], DiskModel], Sequence[Priced]], Priceable]
    uniform: bool  # whether all layers are to keep the same number of units
    track: Track

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What every width costs, from an earlier search or measured now."""
        read = self.opened()
        ways = ways_of(self.palettes)
        cache = SearchCache.of(read, self.text, self.seed, ways)
        kept = cache.kept
        if not kept.has(PARTS, 0):
            with cache.context(read, self.text, self.seed, self.track) as context:
                found = widths.measured(read, context, self.prices.units, ways)
            kept.save(PARTS, 0, {}, Parts(parts=tuple(found)))
            cache.tidy()
        return kept.facts(PARTS, 0, Parts).parts

    @property
    def least(self) -> int:
        """The bytes of the smallest model with widths of its own."""
        return least(self.parts, self.palettes, self.prices.outers, uniform=self.uniform)

    def within(self, budget: int, alone: Choice | None) -> Narrowed | None:
        """The best narrower model in at most `budget` bytes, or None if none is expected to lose less than
        `alone`, the best without widths. They are not measured where that loses little."""
        if alone is not None and alone.nats < LOSSY:
            return None
        found = self._chosen(self.parts, budget)
        if found is None or not found.counts:
            return None
        if alone is not None and found.nats > (1 - LEAST_GAIN) * alone.nats:
            return None
        with ExitStack() as stack:
            cut = [
                (each, opened, self._lost(opened))
                for each in (found, *self._staying(found, budget))
                for opened in [stack.enter_context(self._cut(each))]
            ]
            found, opened, nats = min(cut, key=lambda each: each[0].nats - each[0].cut_nats + each[2])
            prices = self.price(opened, self._as_wide(found))
            palettes = self.palettes if opened().plain else (MIXED,)
        choice = best(prices.units, palettes, prices.outers, budget)
        if choice is None or (alone is not None and nats + choice.nats >= alone.nats):
            return None
        return Narrowed(found.stages(), found.counts, nats, prices.units, choice)

    def _chosen(self, parts: Sequence[Part], budget: int) -> Narrow | None:
        """The narrower model that is expected to lose least within a budget."""
        layers = len(self.opened().layers)
        return narrow(parts, self.palettes, self.prices.outers, budget, layers, uniform=self.uniform)

    def _staying(self, found: Narrow, budget: int) -> list[Narrow]:
        """The best model in which no part goes as a whole, if some do in `found`: several that are gone lose
        far more together than each alone, so both models are cut and measured."""
        if not any(0 in counts for counts in found.counts.values()):
            return []
        other = self._chosen([part.staying for part in self.parts], budget)
        return [] if other is None or other.counts == found.counts else [other]

    def _lost(self, opened: Callable[[], DiskModel]) -> float:
        """KL in nats/token of a model from the base, on the tokens on which widths are measured."""
        few = first_sequences(self.text.calibration, TOKENS_AT_ONCE)
        return lost(self.opened(), opened(), few, self.text.unscored)

    def _as_wide(self, found: Narrow) -> list[Priced]:
        """The linears that stay as wide as they are."""
        return [
            unit
            for part in self.parts
            if part.axis not in found.counts or found.counts[part.axis][part.layer] == part.whole.count
            for unit in part.whole.units
        ]

    @contextmanager
    def _cut(self, found: Narrow) -> Iterator[Callable[[], DiskModel]]:
        """Cut a copy of the model as the recipe will, and open it."""
        recipe = Recipe.of_entries({"stages": found.stages(), "data": {"seed": self.seed}})
        with scratch_folder() as place:
            store = CutStore(self.opened(), self.base, place)
            run_stages(recipe, store, store.teacher, self.text, self.track)
            yield partial(DiskModel, store.model.folder, store.model.device)


class CutStore:
    """A model that is cut in a folder for temporary files. Each process does it by itself, as others wait for
    what the first one finds, or find it in the cache."""

    shared = False

    def __init__(self, model: DiskModel, base: Path, place: Path) -> None:
        self.model, self.base, self.place = model, base, place

    def teacher(self, name: str | None) -> ModelSource:
        """The model that is cut."""
        return source_of(name or str(self.base), self.model.device)

    @contextmanager
    def working(self, number: int) -> Iterator[tuple[Journal, Path]]:
        """Yield the journal of a stage, and a folder for its temporary files."""
        scratch = self.place / f"{number}-scratch"
        scratch.mkdir()
        yield Journal(self.place / str(number), "search"), scratch

    def take_in(self, outcome: Outcome, *, last: bool) -> str | None:
        """Write what a stage left, and open it."""
        write_joint(outcome.journal, self.model, outcome, self.base)
        self.model = DiskModel(joint_folder(outcome.journal), self.model.device)
        return None
