"""Would `search` lose less if it could write linears as products of low rank, or leave sublayers out?

    python -m evaluation other-choices [--models demo wikilm-8m] [--rows low-rank sublayers sizes]

`low-rank`: each linear is also written as a product of low rank that takes the bytes of a format of the
search, with factors in bfloat16 as the stage `low_rank` stores them, and with factors in int8 and nf4, which
no stage stores. It costs what a format does: the error of its layer's output under the output Fisher matrix,
corrected by what a layer of such products alone loses. Counted are the linears in which a product loses less
than the format, and those in which it is a corner of the lower convex hull of bytes and nats of all formats
and products.

`sublayers`: each attention and feed-forward part is left out alone. The KL of the predictions is what that
costs. The slope is that from which a part is better left out: what a byte is worth where its formats cost as
much, with their bytes, as the part that is missing.

`sizes`: the least nats that are expected within each size among formats, with products beside them, with
widths, and with the widths of zero that the search offers since.

Of SmolLM2 four layers are priced. The results go to results/other_choices-low_rank.json,
other_choices-sublayers.json and other_choices-sizes.json, a row at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from evaluation import machine, results
from evaluation.models import MODELS
from evaluation.options import parser
from evaluation.reference_models import SMOLLM2
from evaluation.results import Facts, LowRankRow, OtherChoicesRow, SublayerRow
from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.low_rank import coefficients, shared_basis
from llmcompress.data.calibration import CalibrationData
from llmcompress.formats import registry
from llmcompress.formats.schemes import QuantScheme
from llmcompress.frontier.choice import Choice, best
from llmcompress.frontier.costs import SAMPLE, TOKENS, Cost, Priced, header_bytes, measured
from llmcompress.frontier.narrow import Narrow, narrow
from llmcompress.frontier.ways import KEEP, MIXED, Palette, Way, palettes, ways_of
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import divergences, untracked, walk, without_each
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE, first_sequences
from llmcompress.pipeline.narrowing import Narrowing
from llmcompress.pipeline.resolve import calibration_data, find_base
from llmcompress.pipeline.search import prices_of
from llmcompress.pipeline.search_cache import SearchCache
from llmcompress.stages.base import Context
from llmcompress.stages.fisher import find_fisher, fisher
from llmcompress.stages.prune.sublayer_dropping import PARTS, candidates
from llmcompress.stages.quantize.config import FormatConfig
from llmcompress.stages.quantize.sensitivity import nats

NAME = "other_choices"
LOW_RANK, SUBLAYERS, SIZES = "low-rank", "sublayers", "sizes"
LEVELS = ("w8a16", "nf4, double", "codebook of 8", "codebook of 4")  # formats whose bytes products take
FACTORS: Mapping[str, QuantScheme | None] = {
    "bf16": None,
    "int8": FormatConfig(format="w8a16").coding(torch.bfloat16),
    "nf4": FormatConfig(format="nf4").coding(torch.bfloat16),
}
BITS = {"bf16": 16.0, "int8": 8.0, "nf4": 4.5}  # per weight of a factor, without scales of whole rows
LAYERS = {SMOLLM2: (1, 10, 20, 29)}  # that are priced, if not all
SAMPLES = {SMOLLM2: 8}  # sequences that calibrate, if fewer than those of other measurements
PERCENT = (12, 15, 17.5, 20, 25, 35, 50)  # of the bytes
WAYS = ways_of(palettes("llmcompress"))


class Subject:
    """A model, its text, and the layers that are priced."""

    def __init__(self, model: str) -> None:
        self.model, subject = model, MODELS[model]
        self.folder = find_base(subject.base).folder
        spec = subject.data()
        if model in SAMPLES:
            spec = spec.model_copy(update={"samples": SAMPLES[model], "evaluation_samples": 1})
        self.seed = spec.seed
        self.text: CalibrationData = calibration_data(self.opened(), spec, tokenizer_of(self.folder))

    def opened(self) -> DiskModel:
        """The model anew."""
        return DiskModel(self.folder, torch.device("cpu"))

    def is_priced(self, index: int) -> bool:
        """Whether the linears of a layer are priced."""
        return self.model not in LAYERS or index in LAYERS[self.model]

    @cached_property
    def units(self) -> list[Priced]:
        """What each format costs the linears of the layers that are priced."""
        if self.model not in LAYERS:
            return list(prices_of(self.opened, self.text, self.seed, WAYS, untracked).units)
        model = self.opened()
        free = {KEEP.name: Cost(nats=0.0, foretold=0.0, own_bytes=0, native_bytes=0)}
        others = [
            f"{model.layer_name(index)}." for index in range(len(model.layers)) if not self.is_priced(index)
        ]
        known = [
            Priced(linears=(name,), costs=free)
            for name in model.layer_linears
            if name.startswith(tuple(others))
        ]
        with self.context(model) as context:
            return [unit for unit in measured(model, context, WAYS, known) if len(unit.costs) > 1]

    @cached_property
    def products(self) -> dict[str, dict[Tried, float]]:
        """The nats that products of low rank cost these linears."""
        return products(self, {unit.linears[0]: unit for unit in self.units})

    @contextmanager
    def context(self, model: DiskModel) -> Iterator[Context]:
        """What layers are measured with."""
        cache = SearchCache.of(model, self.text, self.seed, WAYS)
        with cache.context(model, self.text, self.seed, untracked) as context:
            yield context


def rounded(factor_KN: Tensor, coding: QuantScheme | None) -> Tensor:
    """A factor as it is stored; one whose rows no groups fit stays in bfloat16."""
    if coding is None or coding.refusal((len(factor_KN), factor_KN.shape[1])):
        return factor_KN.bfloat16().float()
    return registry.dequantize(coding.nearest(factor_KN)).float()


def rank_within(size: int, linear: str, shape: tuple[int, int], factors: str) -> int:
    """The rank of a product in so many bytes; the scales of nf4 are in its bits, int8 has one per row."""
    rows, columns = shape
    headers = header_bytes(f"{linear}.weight", (1, *shape)) + header_bytes(f"{linear}.weight_right", shape)
    each = (rows + columns) * BITS[factors] / 8 + (8 if factors == "int8" else 0)
    return max(1, min(rows, columns, int((size - headers) / each)))


def product(W_RC: Tensor, moments: Moments, basis_KC: Tensor, rank: int, factors: str) -> Tensor:
    """The best product of a rank with factors so stored; the first solves for the second as it is read."""
    right_KC = rounded(basis_KC[:rank], FACTORS[factors])
    left_RK = coefficients(W_RC, moments.H_CC, right_KC)
    return rounded(left_RK.T.contiguous(), FACTORS[factors]).T @ right_KC


def as_product(level: str) -> str:
    """The name of a product in the bytes of a format."""
    return f"product in the bytes of {level}"


PRODUCTS = Palette((*MIXED.ways, *(Way(as_product(level)) for level in LEVELS)), native=False)
Tried = tuple[str, str]  # the format whose bytes a product takes, and how its factors are stored


def products(subject: Subject, units: Mapping[str, Priced]) -> dict[str, dict[Tried, float]]:
    """The nats that products cost each linear."""
    model = subject.opened()
    with subject.context(model) as context:
        return _products(subject, model, context, units)


def _products(
    subject: Subject, model: DiskModel, context: Context, units: Mapping[str, Priced]
) -> dict[str, dict[Tried, float]]:
    find_fisher(model, context)
    foretold: dict[int, dict[str, dict[Tried, float]]] = {}
    streams: dict[tuple[int, Tried], list[Tensor]] = {}
    tokens = max(TOKENS, 8 * model.hidden_size)
    for layer in walk(model, first_sequences(subject.text.calibration, tokens), through=True, half=True):
        last = layer
        streams = {key: layer.outputs(states) for key, states in streams.items()}
        if layer.index == len(model.layers) or not subject.is_priced(layer.index):
            continue
        found, leaving = _layer_products(layer, units, fisher(context, layer.index))
        foretold[layer.index] = found
        streams |= {(layer.index, tried): [states] for tried, states in leaving.items()}
    full = last.limit.units(last.inputs)[:SAMPLE]
    lost = divergences(model, full, streams, subject.text.unscored)
    corrected: dict[str, dict[Tried, float]] = {}
    for (index, tried), loss in lost.items():
        whole = sum(each[tried] for each in foretold[index].values())
        for linear, each in foretold[index].items():
            corrected.setdefault(linear, {})[tried] = each[tried] * loss / whole
    return corrected


@torch.no_grad()
def _layer_products(
    layer: DecoderLayer, units: Mapping[str, Priced], F_DD: Tensor
) -> tuple[dict[str, dict[Tried, float]], dict[Tried, Tensor]]:
    """The nats that products are foretold to cost the linears of a layer, by full name, and the states that
    leave it if all of its linears are such products."""
    sample, read = layer.limit.units(layer.inputs)[:SAMPLE], layer.moments()
    aims = layer.outputs_with(sample, {}, layer.device)
    found: dict[str, dict[Tried, float]] = {}
    whole: dict[Tried, dict[str, Tensor]] = {}
    for linear, moments in read.items():
        W_RC, name = layer.weight(linear), f"{layer.name}.{linear}"
        shape = (len(W_RC), W_RC.shape[1])
        _, basis_KC = shared_basis([W_RC], [moments.H_CC], min(shape))
        for level in LEVELS:
            for factors in FACTORS:
                rank = rank_within(units[name].costs[level].own_bytes, name, shape, factors)
                made_RC = product(W_RC, moments, basis_KC, rank, factors).to(W_RC)
                given = {f"{linear}.weight": layer.oriented(linear, made_RC)}
                whole.setdefault((level, factors), {}).update(given)
                lost = nats(layer, layer.outputs_with(sample, given, layer.device), aims, F_DD)
                found.setdefault(name, {})[level, factors] = max(0.0, lost)
    return found, {
        tried: torch.cat(layer.outputs_with(sample, given, layer.device)) for tried, given in whole.items()
    }


def corners(points: Sequence[tuple[int, float]]) -> set[tuple[int, float]]:
    """The corners of the lower convex hull of bytes and nats, without those that a smaller one beats."""
    hull: list[tuple[int, float]] = []
    for size, lost in sorted(points):
        if hull and (lost >= hull[-1][1] or size == hull[-1][0]):
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (size, lost)):
            hull.pop()
        hull.append((size, lost))
    return set(hull)


def _above(left: tuple[int, float], middle: tuple[int, float], right: tuple[int, float]) -> bool:
    """Whether a point is on or above the line between two others."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def low_rank(subject: Subject) -> None:
    """Measure the products of a model."""
    units, found = {unit.linears[0]: unit for unit in subject.units}, subject.products
    for factors in FACTORS:
        taken: dict[str, list[tuple[float, float, bool]]] = {level: [] for level in LEVELS}
        for linear, of in found.items():
            costs = units[linear].costs
            ours = {level: (costs[level].own_bytes, of[level, factors]) for level in LEVELS}
            hull = corners([*((cost.own_bytes, cost.nats) for cost in costs.values()), *ours.values()])
            for level, point in ours.items():
                taken[level].append((point[1], costs[level].nats, point in hull))
        for level, each in taken.items():
            row = LowRankRow(
                model=subject.model,
                factors=factors,
                format=level,
                linears=len(each),
                better=sum(ours < theirs for ours, theirs, _ in each),
                on_hull=sum(on_hull for _, _, on_hull in each),
                median_ratio=median(ours / max(theirs, 1e-12) for ours, theirs, _ in each),
                commit=machine.commit(),
            )
            write("low_rank", ("model", "factors", "format"), row)


def losses(subject: Subject, model: DiskModel) -> dict[tuple[int, str], float]:
    """KL in nats/token of the model without each part, by layer and axis."""
    reader = {axis: model.anatomy.consumer_of(axis) for axis in PARTS}
    parts = {(index, reader[axis]): (index, axis) for index, axis in candidates(model)}
    streams = without_each(model, first_sequences(subject.text.calibration, TOKENS_AT_ONCE), list(parts))
    full = streams.pop(None)
    gone = {part: states for part, states in streams.items() if part is not None}
    return {parts[key]: lost for key, lost in divergences(model, full, gone, subject.text.unscored).items()}


def slope_from(lost: float, units: Sequence[Priced]) -> float:
    """What a byte is worth, in nats, where linears cost as much, with their bytes, as it costs to leave them
    out."""

    def kept(slope: float) -> float:
        return sum(min(cost.nats + slope * cost.own_bytes for cost in unit.costs.values()) for unit in units)

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) > lost else (middle, high)
    return high


def along(model: DiskModel, units: Sequence[Priced], index: int, axis: str) -> list[Priced]:
    """The linears of a layer that go with a part."""
    reader = str(model.anatomy.consumer_of(axis))
    module = f"{model.layer_name(index)}.{reader.rpartition('.')[0]}."
    return [unit for unit in units if unit.linears[0].startswith(module)]


def sublayers(subject: Subject) -> None:
    """Measure what a model loses without each of its parts."""
    units, model = subject.units, subject.opened()
    lost = losses(subject, model)
    for (index, axis), loss in lost.items():
        here = along(model, units, index, axis)
        row = SublayerRow(
            model=subject.model,
            layer=index,
            part=PARTS[axis],
            kl_nats_mean=loss,
            slope=slope_from(loss, here) if here else None,
            commit=machine.commit(),
        )
        write("sublayers", ("model", "layer", "part"), row)


def with_products(
    units: Sequence[Priced], found: Mapping[str, Mapping[Tried, float]], factors: str
) -> list[Priced]:
    """The linears with products as more of their ways."""
    made = []
    for unit in units:
        costs = dict(unit.costs)
        for level in LEVELS:
            size, lost = costs[level].own_bytes, found[unit.linears[0]][level, factors]
            costs[as_product(level)] = Cost(nats=lost, foretold=lost, own_bytes=size, native_bytes=size)
        made.append(Priced(linears=unit.linears, costs=costs))
    return made


def sizes(subject: Subject) -> None:
    """Measure what is expected within each size."""
    offered, model = palettes("llmcompress"), subject.opened()
    prices = prices_of(subject.opened, subject.text, subject.seed, WAYS, untracked)
    narrowing = Narrowing(
        subject.folder,
        subject.opened,
        subject.text,
        subject.seed,
        offered,
        prices,
        lambda opened, known: prices,
        uniform=False,
        track=untracked,
    )
    zero, layers = narrowing.parts, len(model.layers)
    some = [part.staying for part in zero]
    made = {factors: with_products(prices.units, subject.products, factors) for factors in FACTORS}
    for percent in PERCENT:
        budget = int(percent * model.checkpoint.size_bytes / 100)
        alone = best(prices.units, offered, prices.outers, budget)
        wide, gone = (
            narrow(each, offered, prices.outers, budget, layers, uniform=False) for each in (some, zero)
        )
        row = OtherChoicesRow(
            model=subject.model,
            size=f"{percent:g} %",
            formats=nats_of(alone),
            products={
                factors: nats_of(best(units, [PRODUCTS], prices.outers, budget))
                for factors, units in made.items()
            },
            widths=nats_of(wide),
            sublayers=nats_of(gone),
            gone=sum(counts.count(0) for counts in gone.counts.values()) if gone else 0,
            commit=machine.commit(),
        )
        write("sizes", ("model", "size"), row)


def nats_of(choice: Choice | Narrow | None) -> float | None:
    """What a choice is expected to lose, if there is one."""
    return choice.nats if choice else None


def write(file: str, key: Sequence[str], row: Facts) -> None:
    """Write a row, in place of the one of the same key."""
    print(row, flush=True)
    name = f"{NAME}-{file}"
    results.write(name, machine.head(), {"rows": results.merge(name, key, row)})


ROWS: Mapping[str, Callable[[Subject], None]] = {LOW_RANK: low_rank, SUBLAYERS: sublayers, SIZES: sizes}


def main(argv: Sequence[str]) -> int:
    """Measure the rows of every model."""
    options = parser("other-choices", __doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    given = machine.parse(options, argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LLMCOMPRESS_CACHE", folder)
        for model in given.models:
            subject = Subject(model)
            for rows in given.rows:
                if rows != SIZES or model not in LAYERS:  # a choice needs the prices of all layers
                    ROWS[rows](subject)
    return 0
