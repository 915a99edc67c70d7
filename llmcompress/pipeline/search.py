"""`search`: the recipe of the best model within a size, a memory or a time per token, found by measuring what
each format costs each linear."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.data.calibration import CalibrationData
from llmcompress.data.sources import DataSpec, Effort
from llmcompress.errors import CompressError, OutputError, argument
from llmcompress.frontier.choice import Outer, Uniform, best, counted, least, taken, uniform
from llmcompress.frontier.costs import Priced, measured
from llmcompress.frontier.joined import joined
from llmcompress.frontier.outside import outers
from llmcompress.frontier.spelling import stages_of
from llmcompress.frontier.ways import Palette, Way, palettes, ways_of
from llmcompress.integrations import distributed
from llmcompress.io import own_code
from llmcompress.io.journal import JournalFacts
from llmcompress.io.local_names import short_name
from llmcompress.io.safetensors_writer import put, writing
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.io.user_paths import path_of
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.pipeline.budgets import CONTEXT, Measure, of_memory, of_size, of_speed
from llmcompress.pipeline.export import require_possible
from llmcompress.pipeline.narrowing import Narrowing
from llmcompress.pipeline.resolve import (
    Base,
    calibration_data,
    config_of,
    data_of,
    find_base,
    pick_device,
    require_computable,
)
from llmcompress.pipeline.search_cache import SearchCache
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.counted import Counted
from llmcompress.report.page import search_page
from llmcompress.report.search_facts import FILE, PAGE, SearchFacts
from llmcompress.stages.budget.stage import EXPORTED, Budget, Loader, choices, unfit

PRICES = "prices"  # entry of the journal of a finished search


@dataclass(frozen=True)
class WayRow:
    """How many linears are stored in a way, their bytes, and their expected loss in nats/token."""

    way: str
    linears: int
    size_bytes: int
    nats: float


@dataclass(frozen=True)
class Found:
    """The best choice within a budget: its recipe, the bytes of its files, its expected loss in nats/token,
    and what becomes of the weights outside the layers and of the linears. `reached` is in what is `counted`:
    bytes on disk, bytes in memory, or expected tokens/s."""

    asked: str  # what was asked for
    recipe: Recipe
    base_bytes: int
    size_bytes: int
    expected_nats: float
    outside: str
    rows: tuple[WayRow, ...]
    counted: Counted
    reached: float
    ways: Mapping[str, str]  # by linear
    widths: Mapping[str, tuple[int, ...]]  # units that each layer keeps, of the axes that are cut

    @property
    def file(self) -> str:
        """The name of its recipe's file."""
        words = self.asked.strip().replace("%", " percent").replace(" ", "-")
        names = {"size": "{}", "memory": "memory-{}", "tokens_per_s": "{}-tokens-per-s"}
        return f"{names[self.counted].format(words)}.yaml"

    def to_dict(self) -> dict[str, Any]:
        """What stands in search.json."""
        left_out = ("recipe", "rows", "counted", "ways")
        facts = {key: value for key, value in vars(self).items() if key not in left_out}
        stages = self.recipe.model_dump(mode="json", exclude_unset=True)
        rows = [asdict(row) for row in self.rows]
        return {"file": self.file} | facts | {"rows": rows, "ways": dict(self.ways), "recipe": stages}


@dataclass(frozen=True)
class Searched:
    """What a search found, the tightest budget first, the models of one way beside it, what the base has of
    what is counted, and the bits of each way."""

    model: str
    found: tuple[Found, ...]
    uniform: tuple[Uniform, ...]
    measure: Measure
    bits: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """What stands in search.json."""
        measure, uniform = self.measure, list[dict[str, Any]]()
        for each in self.uniform:
            facts = asdict(each)
            uniform.append(facts | {"reached": measure.reached(facts.pop("taken"))})
        return {
            "model": self.model,
            "counted": measure.counted,
            "context": measure.context,
            "base": measure.base,
            "bits": dict(self.bits),
            "found": [each.to_dict() for each in self.found],
            "uniform": uniform,
        }


@dataclass(frozen=True)
class Question:
    """What a search of a model is asked."""

    budgets: Sequence[str]
    of: Counted
    context: int
    loads_with: Loader
    choose_among: Sequence[str] | None
    data: str | DataSpec | None
    effort: Effort | None
    device: str | None
    track: Track

    @property
    def spec(self) -> DataSpec:
        """Which text is read."""
        return DataSpec().with_text(self.data) if isinstance(self.data, str) else self.data or DataSpec()

    @property
    def choices(self) -> Sequence[str]:
        """What may be done to a layer."""
        return choices(self.choose_among, self.of, self.loads_with)


class Prices(JournalFacts):
    """What a search measured: enough to choose for any size."""

    units: tuple[Priced, ...]
    outers: tuple[Outer, ...]


@fast_float32_products()
def search(
    model: str | os.PathLike[str],
    budgets: Sequence[str],
    *,
    of: Counted = "size",
    context: int = CONTEXT,
    loads_with: Loader = "llmcompress",
    choose_among: Sequence[str] | None = None,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> Searched:
    """Find, for each budget, the recipe of the best model within it.

    What each format costs each linear is measured once, and kept in the cache: a search that was interrupted
    goes on, and another budget takes seconds.

    Args:
        model: Hub id, folder, or `demo`.
        budgets: of `size` and `memory` the most bytes, like `60MB`, or a share of the base's, like `40%`; of
            `tokens_per_s` the least, like `30`, or a multiple of the base's, like `1.5x`.
        of: `size` of the files, `memory` of the loaded model with its cache, or `tokens_per_s`, the speed of
            writing at batch size 1 on this machine.
        context: tokens in the cache that `memory` counts.
        loads_with: `transformers` for a result that loads without llmcompress, `llmcompress` for all
            formats, or the `export` that is to hold the result, which the recipe then asks for.
        choose_among: what may be done to a layer: `quantize`, or also `prune`, which `of="size"` alone takes,
            and no export; by default all that is possible.
        data: the text, as a `DataSpec` or as `--data` takes it.
        effort: how much text is read, as for `compress`; the recipe has it too.
        device: `cpu` or `cuda`; the first GPU where there is one.
        trust_remote_code: whether the model may run code of its own.
        track: shows progress, as for `compress`.

    Raises:
        CompressError: model, budget or text can't be read, or no choice is within it; the message says what
            can be had.
    """
    with own_code.permission(trust_remote_code):
        base = find_base(os.fspath(model))
        own_code.trust(base.folder)
        asked = Question(budgets, of, context, loads_with, choose_among, data, effort, device, track)
        return _searched(base, asked)


def expanded(
    recipe: Recipe,
    base: Base,
    data: str | DataSpec | None,
    effort: Effort | None,
    device: str | None,
    track: Track,
) -> Recipe:
    """Return a recipe with what a search found in place of its `budget`, if it has one. Errors: CompressError
    as for `search`."""
    budget = recipe.stages[0]
    if not isinstance(budget, Budget):
        return recipe
    spec, word = data_of(recipe, data), effort or recipe.effort
    with distributed.first_alone():  # the others find what it measured
        asked = Question(
            [budget.asked],
            budget.counted,
            budget.context or CONTEXT,
            budget.loads_with,
            budget.choose_among,
            spec,
            word,
            device,
            track,
        )
        searched = _searched(base, asked)
    return recipe.model_copy(update={"stages": (*searched.found[0].recipe.stages, *recipe.stages[1:])})


def _searched(base: Base, asked: Question) -> Searched:
    if wrong := unfit(asked.choices, asked.of, asked.loads_with):
        raise CompressError(f"{argument('choose_among')} {wrong}")
    where = pick_device(asked.device)
    config = config_of(base.folder, base=True)
    if asked.loads_with in EXPORTED:
        require_possible(asked.loads_with, config)
    spec = asked.spec
    opened = partial(DiskModel, base.folder, where)
    read = opened()
    whole, dtype, offered = read.checkpoint.size_bytes, read.weight_dtype, palettes(asked.loads_with)
    if asked.of == "size":  # a wrong one is refused before anything is computed
        of_size(whole).limits(asked.budgets)
    require_computable(read)
    text = calibration_data(read, spec, tokenizer_of(base.folder), effort=asked.effort)
    measure = _measure(asked, read, offered, text)
    limits = measure.limits(asked.budgets)
    # the widths of all layers are one number where plain transformers, or one field of the config, says them
    alike = asked.loads_with == "transformers" or read.anatomy.cuts is not None
    del read  # the model is opened anew to be measured

    def price(opened: Callable[[], DiskModel], known: Sequence[Priced] = ()) -> Prices:
        return prices_of(opened, text, spec.seed, ways_of(offered), asked.track, known)

    prices = price(opened)
    if asked.loads_with == "compressed-tensors":  # its engines join linears, and take no int8 embedding
        outside = tuple(outer for outer in prices.outers if outer.native)
        prices = Prices(units=tuple(joined(prices.units, opened())), outers=outside)
    narrowing = None
    if "prune" in asked.choices:
        narrowing = Narrowing(
            base.folder, opened, text, spec.seed, offered, prices, price, uniform=alike, track=asked.track
        )
    found = []
    for words, limit in limits:
        alone = best(prices.units, offered, prices.outers, limit, measure.quantity)
        narrowed = narrowing.within(limit, alone) if narrowing else None
        choice, units = (narrowed.choice, narrowed.units) if narrowed else (alone, prices.units)
        if choice is None:
            smallest = (
                narrowing.least
                if narrowing
                else least(prices.units, offered, prices.outers, measure.quantity)
            )
            raise measure.out_of_reach(words, smallest, asked.loads_with, widths=narrowing is not None)
        stages = [*(narrowed.stages if narrowed else []), *stages_of(units, choice)]
        found.append(
            Found(
                asked=words,
                recipe=_recipe(base, asked, stages),
                base_bytes=whole,
                size_bytes=choice.size_bytes,
                expected_nats=narrowed.expected if narrowed else choice.nats,
                outside=choice.outer.name,
                rows=tuple(WayRow(*row) for row in counted(units, choice)),
                counted=asked.of,
                reached=measure.reached(taken(units, choice, measure.quantity)),
                ways={
                    linear: way.name
                    for unit, way in zip(units, choice.ways, strict=True)
                    for linear in unit.linears
                },
                widths=narrowed.counts if narrowed else {},
            )
        )
    beside = uniform(prices.units, offered, prices.outers, measure.quantity)
    codings = {way.name: way.coding(dtype) for way in ways_of(offered)}
    bits = {
        name: float(8 * dtype.itemsize if coding is None else coding.bits) for name, coding in codings.items()
    }
    return Searched(base.name, tuple(found), tuple(beside), measure, bits)


def _measure(asked: Question, model: DiskModel, offered: Sequence[Palette], text: CalibrationData) -> Measure:
    """What the budget is of, on this model."""
    if asked.of == "memory":
        return of_memory(model, offered, asked.context)
    if asked.of == "tokens_per_s":
        return of_speed(model, offered, text, asked.track)
    return of_size(model.checkpoint.size_bytes)


def write(searched: Searched, out: Path) -> None:
    """Write the recipes of what was found into a folder, with `search.json`, the page `search.html` and the
    picture `frontier.png`.

    Errors: OutputError.
    """
    from llmcompress.report.plots import frontier

    folder = path_of(out, argument("out"), OutputError)
    facts = SearchFacts.model_validate(searched.to_dict())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for found in searched.found:
            put(folder / found.file, found.recipe.to_yaml())
        put(folder / FILE, json.dumps(searched.to_dict(), indent=2) + "\n")
        put(folder / PAGE, page_of(facts))
        frontier(facts, short_name(searched.model), folder / "frontier.png")


def page_of(facts: SearchFacts) -> str:
    """The page of a search, in which recipes have their shared form. Errors: RecipeError."""
    recipes = {each.file: Recipe.of_entries(each.recipe).for_others().to_yaml() for each in facts.found}
    return search_page(facts, recipes)


def prices_of(
    opened: Callable[[], DiskModel],
    text: CalibrationData,
    seed: int,
    ways: Sequence[Way],
    track: Track,
    known: Sequence[Priced] = (),
) -> Prices:
    """What every way costs, from an earlier search of the same model and text or measured now, except for
    linears whose costs are `known`. `opened` gives the model anew each time."""
    read = opened()
    cache = SearchCache.of(read, text, seed, ways, known)
    kept = cache.kept
    if kept.has(PRICES, 0):
        return kept.facts(PRICES, 0, Prices)
    with cache.context(read, text, seed, track) as context:
        read.divide_experts()
        units = measured(read, context, ways, known)
        outside = outers(read, units, opened, text.calibration, text.unscored)
    found = Prices(units=tuple(units), outers=tuple(outside))
    kept.save(PRICES, 0, {}, found)
    cache.tidy()
    return found


def _recipe(base: Base, asked: Question, stages: list[dict[str, Any]]) -> Recipe:
    """The recipe of what was found, on the same base and text."""
    entries: dict[str, Any] = {"base": base.name}
    if base.revision:
        entries["revision"] = base.revision
    if asked.data is not None:
        entries["data"] = asked.spec.model_dump(exclude_unset=True)
    if asked.effort is not None:
        entries["effort"] = asked.effort
    if asked.loads_with in EXPORTED:
        entries["export"] = asked.loads_with
    return Recipe.of_entries({**entries, "stages": stages})
