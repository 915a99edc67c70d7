"""Is the model that `search` finds better than any single method at the same bytes?

    python -m evaluation search [--models demo wikilm-8m] [--rows ...] [--configurations 30]

For each model the search is asked for 25, 35, 50 and 75 % of the base's bytes, and the recipes that it
finds among formats alone are run, and those among formats and widths (`widths`), which also go down to 15 and
20 %. Beside them are run the recipe of one format that is expected to lose least within each size,
with or without int8 outside the layers; both with the same training of scales and levels (`healed`);
pruning to the size; and choices of the search's formats drawn at random. Each row has the loss that the
search expected of it. With --configurations so many more random choices are run on the demo model, for the
rank correlation of their loss with the expected one, to second order alone and corrected by measured
layers. The result goes to results/search.json, a row at a time.

    python -m evaluation search --models demo --autoscheme 3.3 6

runs AutoRound's AutoScheme with so many bits on average, and the search within the bytes of its result. Its
environment is that of `evaluation rivals`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evaluation import machine, results
from evaluation.models import MODELS, Subject
from evaluation.options import parser
from evaluation.results import ROOT, SearchRow
from evaluation.rivals import sequences
from evaluation.rivals.environments import Environment
from evaluation.rivals.quantizers import GROUP_SIZES
from evaluation.runs import known, losses, run
from llmcompress.frontier.choice import Choice, Uniform
from llmcompress.frontier.spelling import stages_of
from llmcompress.frontier.ways import KEPT, MIXED, Way, palettes, ways_of
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.io.units import share_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import untracked
from llmcompress.pipeline.resolve import calibration_data, find_base
from llmcompress.pipeline.search import Found, Prices, Searched, prices_of, search
from llmcompress.recipe.recipe import Recipe

NAME = "search"
SIZES = ("25%", "35%", "50%", "75%")
WIDTHS = "widths"
WIDE_SIZES = ("15%", "17.5%", "20%", "25%", "35%")  # at which widths are searched too; more takes none
FOUND, SINGLE, HEALED, RANDOM, DRAWN = "found", "single", "healed", "random", "drawn"
RIVAL, BESIDE = "rival", "beside a rival"
PRUNED = ("50%", "75%")  # sizes to which models are pruned; less is out of reach
HEALING_SIZES = ("25%", "35%")  # at which scales and levels are trained too
HEALING = {"distill": {"train": "scales", "steps": 200, "batch": 4, "learning_rate": 1e-3}}
FORMATS = ("quantize",)
ROWS = (FOUND, WIDTHS, SINGLE, HEALED, "pruned", RANDOM)


def prices(subject: Subject) -> Prices:
    """What every way costs on a model."""
    folder = find_base(subject.base).folder
    opened = partial(DiskModel, folder, torch.device("cpu"))
    text = calibration_data(opened(), subject.data(), tokenizer_of(folder))
    return prices_of(opened, text, subject.data().seed, ways_of(palettes("llmcompress")), untracked)


def best_single(searched: Searched, budget: float) -> Uniform:
    """The model of one format, with or without int8 outside the layers, that is expected to lose least within
    a budget."""
    within = [each for each in searched.uniform if each.size_bytes <= budget and each.way != KEPT]
    return min(within, key=lambda each: each.nats)


def named(single: Uniform) -> str:
    """The name of a model of one format."""
    return single.way if single.outside == KEPT else f"{single.way}, {single.outside}"


def stage_of(single: Uniform, found: Prices) -> dict[str, Any]:
    """The stage that makes a model of one format."""
    way = next(way for palette in palettes("llmcompress") for way in palette.ways if way.name == single.way)
    outer = next(outer for outer in found.outers if outer.name == single.outside)
    return {"quantize": {**way.settings, **outer.settings, "overrides": dict(outer.overrides)}}


def stages_in(found: Found) -> list[dict[str, Any]]:
    """The stages of a recipe that was found."""
    stages: list[dict[str, Any]] = found.recipe.model_dump(mode="json", exclude_unset=True)["stages"]
    return stages


def drawn(found: Prices, budget: float, seed: int) -> Choice:
    """A choice of ways drawn at random, as large as a budget allows: linears take ways in random order, the
    cheapest first, and then better ones while there is room."""
    draw, outer = random.Random(seed), found.outers[-1]
    by_size = {
        number: sorted(
            (unit.costs[way.name].own_bytes, place)
            for place, way in enumerate(MIXED.ways)
            if way.name in unit.costs
        )
        for number, unit in enumerate(found.units)
    }
    taken = {number: sizes[0] for number, sizes in by_size.items()}
    room = budget - outer.size_bytes - sum(size for size, _ in taken.values())
    for number in draw.sample(sorted(by_size), len(by_size)):
        fitting = [each for each in by_size[number] if each[0] - taken[number][0] <= room]
        chosen = draw.choice(fitting)
        room -= chosen[0] - taken[number][0]
        taken[number] = chosen
    ways = tuple(MIXED.ways[taken[number][1]] for number in sorted(taken))
    return chosen_as(found, ways)


def chosen_as(found: Prices, ways: tuple[Way, ...]) -> Choice:
    """The choice of these ways, with an int8 embedding if there can be one."""
    outer = found.outers[-1]
    costs = [unit.costs[way.name] for unit, way in zip(found.units, ways, strict=True)]
    nats = outer.nats + sum(cost.nats for cost in costs)
    return Choice(MIXED, outer, ways, nats, outer.size_bytes + sum(cost.own_bytes for cost in costs))


def second_order(found: Prices, choice: Choice) -> float:
    """The loss that a choice is expected to have to second order alone."""
    costs = [unit.costs[way.name] for unit, way in zip(found.units, choice.ways, strict=True)]
    return choice.outer.nats + sum(cost.foretold for cost in costs)


class Measurement:
    """The rows of one model, written as they are measured."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.subject, self.folder = model, MODELS[model], folder

    def row(
        self,
        kind: str,
        row: str,
        stages: Sequence[Mapping[str, Any]],
        expected: float | None = None,
        foretold: float | None = None,
    ) -> None:
        """Run the stages on the model, and write what was measured."""
        recipe = Recipe.of_entries({"stages": list(stages)})
        report = run(recipe, self.folder / "out", self.subject.base, self.subject.data(), overwrite=True)
        size = report.compressed.size_bytes
        facts = {
            **losses(report),
            "size_bytes": size,
            "share_of_bytes": known(size) / known(report.base.size_bytes),
            "expected_nats": expected,
            "second_order_nats": foretold,
            "seconds": report.cost.seconds,
        }
        self.write(kind, row, facts)

    def write(self, kind: str, row: str, facts: Mapping[str, Any]) -> None:
        """Write what was measured of a row."""
        head = machine.head()
        measured = SearchRow.model_validate(
            {
                "model": self.model,
                "kind": kind,
                "row": row,
                **facts,
                "commit": head.commit,
                "hardware": head.hardware,
            }
        )
        print(
            f"{self.model}: {kind}, {row}: {measured.share_of_bytes:.4f} of the bytes, KL "
            f"{measured.kl_nats_mean:.5f}, expected {measured.expected_nats}",
            flush=True,
        )
        merged = results.merge(NAME, ("model", "kind", "row"), measured)
        results.write(NAME, head, {"rows": merged})


def measure(model: str, rows: Sequence[str], sizes: Sequence[str], configurations: int) -> None:
    """Measure the rows of a model."""
    subject = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMCOMPRESS_CACHE"] = folder
        to = Measurement(model, Path(folder))
        if WIDTHS in rows:
            for size in [size for size in WIDE_SIZES if size in sizes]:
                (found,) = search(subject.base, [size], data=subject.data()).found
                to.row(WIDTHS, size, stages_in(found), found.expected_nats)
        sizes = [size for size in sizes if size in SIZES]
        if not sizes:
            return
        searched = search(subject.base, sizes, choose_among=FORMATS, data=subject.data())
        whole, known_prices = searched.found[0].base_bytes, prices(subject)
        if FOUND in rows:
            for found in searched.found:
                to.row(FOUND, found.asked, stages_in(found), found.expected_nats)
        if SINGLE in rows:
            for size in sizes:
                single = best_single(searched, known(share_of(size)) * whole)
                to.row(SINGLE, named(single), [stage_of(single, known_prices)], single.nats)
        if HEALED in rows:
            for found in [each for each in searched.found if each.asked in HEALING_SIZES]:
                single = best_single(searched, known(share_of(found.asked)) * whole)
                single_stage = stage_of(single, known_prices)
                to.row(HEALED, f"found, {found.asked}", [*stages_in(found), HEALING])
                to.row(HEALED, f"single, {found.asked}", [single_stage, HEALING])
        if "pruned" in rows:
            for size in {*PRUNED} & {*sizes}:
                within = {"axis": ["ffn", "kv"], "size": int(known(share_of(size)) * whole)}
                to.row(SINGLE, f"pruned, {size}", [{"prune": within}])
        if RANDOM in rows:
            for size in sizes:
                random_choice(to, known_prices, RANDOM, size, known(share_of(size)) * whole, 0)
        smallest, largest = searched.found[0].size_bytes, whole // 2
        for seed in range(configurations if model == "demo" else 0):
            budget = smallest + (largest - smallest) * random.Random(f"budget {seed}").random()
            random_choice(to, known_prices, DRAWN, str(seed), budget, seed)


def beside_autoscheme(model: str, bits: float, threads: int) -> None:
    """Measure AutoScheme at so many bits on average, and what the search finds within its bytes."""
    work, subject = ROOT / "out" / "rivals", MODELS[model]
    files = sequences.write(model, work / "sequences")
    environment = Environment(work / "venvs" / "autoround", "autoround", threads)
    place = work / "out" / f"{model}-autoscheme-{bits:g}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    facts, scores, log = place / "facts.json", place / "score.json", place / "log.txt"
    paths = ["--base", files.base, "--calibration", files.calibration, "--out", place / "model"]
    given = ["--facts", facts, "--group", GROUP_SIZES[model], "--bits", bits]
    environment.run("rival_autoscheme", [*paths, *given], log)
    made = json.loads(facts.read_text("utf-8"))
    written = place / "model" / made["folder"]
    judged = ["--base", files.base, "--model", written, "--evaluation", files.evaluation, "--json", scores]
    environment.run("score", judged, log)
    scored = json.loads(scores.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMCOMPRESS_CACHE"] = folder
        to = Measurement(model, Path(folder))
        loss = {key: scored[key] for key in ("kl_nats_mean", "perplexity", "base_perplexity", "size_bytes")}
        share = scored["size_bytes"] / scored["base_size_bytes"]
        row = f"AutoScheme, {bits:g} bits"
        to.write(RIVAL, row, {**loss, "share_of_bytes": share, "seconds": made["seconds"]})
        within = [str(scored["size_bytes"])]
        (found,) = search(subject.base, within, choose_among=FORMATS, data=subject.data()).found
        to.row(BESIDE, row, stages_in(found), found.expected_nats)


def random_choice(to: Measurement, found: Prices, kind: str, row: str, budget: float, seed: int) -> None:
    """Run a choice that is drawn at random."""
    choice = drawn(found, budget, seed)
    to.row(kind, row, stages_of(found.units, choice), choice.nats, second_order(found, choice))


def main(argv: Sequence[str]) -> int:
    """Measure the rows of every model."""
    options = parser(NAME, __doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    every = sorted({*SIZES, *WIDE_SIZES})
    options.add_argument("--sizes", nargs="+", choices=every, default=every)
    options.add_argument("--configurations", type=int, default=0, metavar="N")
    options.add_argument("--autoscheme", nargs="+", type=float, metavar="BITS", help="only this")
    given = machine.parse(options, argv)
    for model in given.models:
        print(f"{model} ...", file=sys.stderr, flush=True)
        for bits in given.autoscheme or ():
            beside_autoscheme(model, bits, given.threads)
        if given.autoscheme:
            continue
        measure(model, given.rows, given.sizes, given.configurations)
    return 0
