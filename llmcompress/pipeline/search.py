"""`search`: the recipe of the best model within a size, found by measuring what each format costs each
linear."""

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
from llmcompress.frontier.choice import Outer, Uniform, best, counted, least, uniform
from llmcompress.frontier.costs import Priced, measured
from llmcompress.frontier.outside import outers
from llmcompress.frontier.spelling import stages_of
from llmcompress.frontier.ways import KEPT, Loader, Palette, Way, palettes
from llmcompress.integrations import distributed
from llmcompress.io import own_code
from llmcompress.io.journal import JournalFacts
from llmcompress.io.local_names import short_name
from llmcompress.io.safetensors_writer import put, writing
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.io.units import amount
from llmcompress.io.user_paths import path_of, shortened
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.pipeline.narrowing import Narrowing
from llmcompress.pipeline.resolve import (
    Base,
    bytes_within,
    calibration_data,
    config_of,
    data_of,
    find_base,
    pick_device,
    require_computable,
)
from llmcompress.pipeline.search_cache import SearchCache
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.budget.stage import CHOICES, Budget

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
    """The best choice within a size: its recipe, the bytes of its files, its expected loss in nats/token, and
    what becomes of the weights outside the layers and of the linears."""

    asked: str  # the size that was asked for
    recipe: Recipe
    base_bytes: int
    size_bytes: int
    expected_nats: float
    outside: str
    rows: tuple[WayRow, ...]
    widths: Mapping[str, tuple[int, ...]]  # units that each layer keeps, of the axes that are cut

    @property
    def file(self) -> str:
        """The name of its recipe's file."""
        return f"{self.asked.strip().replace('%', ' percent').replace(' ', '-')}.yaml"

    def to_dict(self) -> dict[str, Any]:
        """What stands in search.json."""
        facts = {key: value for key, value in vars(self).items() if key not in ("recipe", "rows")}
        stages = self.recipe.model_dump(mode="json", exclude_unset=True)
        return facts | {"rows": [asdict(row) for row in self.rows], "recipe": stages}


@dataclass(frozen=True)
class Searched:
    """What a search found, by rising size, and the models of one way beside it."""

    model: str
    found: tuple[Found, ...]
    uniform: tuple[Uniform, ...]

    def to_dict(self) -> dict[str, Any]:
        """What stands in search.json."""
        return {
            "model": self.model,
            "found": [each.to_dict() for each in self.found],
            "uniform": [asdict(each) for each in self.uniform],
        }


class Prices(JournalFacts):
    """What a search measured: enough to choose for any size."""

    units: tuple[Priced, ...]
    outers: tuple[Outer, ...]


@fast_float32_products()
def search(
    model: str | os.PathLike[str],
    sizes: Sequence[str],
    *,
    loads_with: Loader = "llmcompress",
    choose_among: Sequence[str] = CHOICES,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> Searched:
    """Find, for each size, the recipe of the best model whose files are no larger.

    What each format costs each linear is measured once, and kept in the cache: a search that was interrupted
    goes on, and another size takes seconds.

    Args:
        model: Hub id, folder, or `demo`.
        sizes: bytes of the files, like `60MB`, or a share of the base's, like `40%`.
        loads_with: `transformers` for a result that loads without llmcompress, or `llmcompress` for all
            formats.
        choose_among: what may be done to a layer: `quantize`, or also `prune`.
        data: the text, as a `DataSpec` or as `--data` takes it.
        effort: how much text is read, as for `compress`; the recipe has it too.
        device: `cpu` or `cuda`; the first GPU where there is one.
        trust_remote_code: whether the model may run code of its own.
        track: shows progress, as for `compress`.

    Raises:
        CompressError: model, size or text can't be read, or no choice is so small; the message says how small
            the smallest is.
    """
    with own_code.permission(trust_remote_code):
        base = find_base(os.fspath(model))
        own_code.trust(base.folder)
        return _searched(base, sizes, loads_with, choose_among, data, effort, device, track)


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
        searched = _searched(
            base, [budget.size], budget.loads_with, budget.choose_among, spec, word, device, track
        )
    return recipe.model_copy(update={"stages": (*searched.found[0].recipe.stages, *recipe.stages[1:])})


def _searched(
    base: Base,
    sizes: Sequence[str],
    loads_with: Loader,
    choose_among: Sequence[str],
    data: str | DataSpec | None,
    effort: Effort | None,
    device: str | None,
    track: Track,
) -> Searched:
    if unknown := [word for word in choose_among if word not in CHOICES]:
        raise CompressError(
            f"{argument('choose_among')} {shortened(unknown[0])} is no choice; use {' or '.join(CHOICES)}"
        )
    if "quantize" not in choose_among:
        raise CompressError(
            f"{argument('choose_among')} {' '.join(choose_among)} has no quantize; add it, or prune alone "
            "with a recipe, as prune: {axis: ffn, size: ...}"
        )
    where = pick_device(device)
    config_of(base.folder, base=True)
    spec = DataSpec().with_text(data) if isinstance(data, str) else data or DataSpec()
    opened = partial(DiskModel, base.folder, where)
    read = opened()
    whole = read.checkpoint.size_bytes
    budgets = {size: bytes_within(size, whole) for size in sizes}
    require_computable(read)
    text = calibration_data(read, spec, tokenizer_of(base.folder), effort=effort)
    # the widths of all layers are one number where plain transformers, or one field of the config, says them
    alike = loads_with == "transformers" or read.anatomy.cuts is not None
    del read  # the model is opened anew to be measured
    offered = palettes(loads_with)

    def price(opened: Callable[[], DiskModel], known: Sequence[Priced] = ()) -> Prices:
        return prices_of(opened, text, spec.seed, ways_of(offered), track, known)

    prices = price(opened)
    narrowing = None
    if "prune" in choose_among:
        narrowing = Narrowing(
            base.folder, opened, text, spec.seed, offered, prices, price, uniform=alike, track=track
        )
    found = []
    for size, budget in sorted(budgets.items(), key=lambda each: each[1]):
        alone = best(prices.units, offered, prices.outers, budget)
        narrowed = narrowing.within(budget, alone) if narrowing else None
        choice, units = (narrowed.choice, narrowed.units) if narrowed else (alone, prices.units)
        if choice is None:
            smallest = narrowing.least if narrowing else least(prices.units, offered, prices.outers)
            raise CompressError(
                f"{argument('size')} {shortened(size)} is less than any choice of "
                f"{'formats and widths' if narrowing else 'formats'} leaves; the smallest that loads with "
                f"{loads_with} has {amount(smallest, 'B')}"
                f"{'' if narrowing else ', and less with prune among the choices'}"
            )
        stages = [*(narrowed.stages if narrowed else []), *stages_of(units, choice)]
        recipe = _recipe(base, data, effort, stages)
        rows = tuple(WayRow(*row) for row in counted(units, choice))
        nats = narrowed.expected if narrowed else choice.nats
        widths = narrowed.counts if narrowed else {}
        found.append(Found(size, recipe, whole, choice.size_bytes, nats, choice.outer.name, rows, widths))
    beside = uniform(prices.units, offered, prices.outers)
    return Searched(base.name, tuple(found), tuple(beside))


def write(searched: Searched, out: Path) -> None:
    """Write the recipes of what was found into a folder, with `search.json` and the picture `frontier.png`.

    Errors: OutputError.
    """
    from llmcompress.report.plots import frontier

    folder = path_of(out, argument("out"), OutputError)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for found in searched.found:
            put(folder / found.file, found.recipe.to_yaml())
        put(folder / "search.json", json.dumps(searched.to_dict(), indent=2) + "\n")
        frontier(
            f"Within a size: {short_name(searched.model)}",
            [(found.asked, found.size_bytes, found.expected_nats) for found in searched.found],
            [(each.way, each.outside != KEPT, each.size_bytes, each.nats) for each in searched.uniform],
            folder / "frontier.png",
        )


def ways_of(offered: Sequence[Palette]) -> list[Way]:
    """All ways of some palettes, once."""
    return list({way.name: way for palette in offered for way in palette.ways}.values())


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


def _recipe(
    base: Base, data: str | DataSpec | None, effort: Effort | None, stages: list[dict[str, Any]]
) -> Recipe:
    """The recipe of what was found, on the same base and text."""
    entries: dict[str, Any] = {"base": base.name}
    if base.revision:
        entries["revision"] = base.revision
    if data is not None:
        spec = DataSpec().with_text(data) if isinstance(data, str) else data
        entries["data"] = spec.model_dump(exclude_unset=True)
    if effort is not None:
        entries["effort"] = effort
    return Recipe.of_entries({**entries, "stages": stages})
