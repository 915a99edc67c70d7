"""The pictures of the page as geometry: where bars, lines, points and their labels lie, in pixels.

A template turns them into SVG. Each picture is made for a width, as text in a picture that is scaled to a
phone can't be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

from llmcompress.io.units import amount, number
from llmcompress.report.comparison import ComparedRow
from llmcompress.report.counted import WORDS, shown
from llmcompress.report.depth import by_kind, depth_of, placed_at
from llmcompress.report.schema import DistributionFacts, Report
from llmcompress.report.search_facts import FoundFacts, SearchFacts

LETTER = 6.4  # pixels that a letter of a label takes at most, on average
BARS = 150.0  # pixels of the tallest bar of a histogram
LINE = 15.0  # pixels between two lines of labels
DISC = 20.0  # pixels between the centres of two discs
SERIES = 8  # colours and markers; further kinds begin anew
FLOOR = 1e-6  # nats: what is less is drawn as this much
OUTSIDE_KEPT = "kept"  # of a search's models: nothing outside the layers is coded


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and its words."""

    at: float
    label: str


@dataclass(frozen=True)
class Label:
    """Words at a place; `anchor` is SVG's text-anchor."""

    x: float
    y: float
    text: str
    anchor: str = "start"


@dataclass(frozen=True)
class Frame:
    """The drawing area of a picture and its axes."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()


@dataclass(frozen=True)
class Point:
    """A model, or the base: a number in a disc, which may stand beside its place, or a dot without one, and a
    label."""

    x: float
    y: float
    at: tuple[float, float]  # its place
    mark: str
    label: Label
    title: str
    base: bool = False
    beaten: bool = False
    coded: bool = False  # whether a dot is hollow


@dataclass(frozen=True)
class Scatter:
    """Bytes, or what else is counted, against KL; `line` joins points, as SVG's polyline has them."""

    frame: Frame
    points: tuple[Point, ...]
    across: str = "bytes on disk"
    up: str = "KL from the base, nats/token"
    line: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value, with its label above."""

    x: float
    label: Label


@dataclass(frozen=True)
class Histogram:
    """How many tokens have which KL."""

    frame: Frame
    bars: tuple[Bar, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Line:
    """One kind of linear over depth; `series` is its colour and marker."""

    kind: str
    series: int
    points: tuple[tuple[float, float, str], ...]  # x, y, title

    @property
    def path(self) -> str:
        """The points as SVG's polyline has them."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


@dataclass(frozen=True)
class Lines:
    """Values of linears over depth."""

    frame: Frame
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Cell:
    """A linear in the grid of bits: `level` is its colour, None if it was kept."""

    x: float
    y: float
    level: int | None
    text: str
    title: str


@dataclass(frozen=True)
class Grid:
    """Bits of linears: a row for each kind and a column for each layer, or the other way round."""

    frame: Frame
    side: tuple[float, float]  # width and height of a cell
    cells: tuple[Cell, ...]
    rows: tuple[Label, ...]
    levels: tuple[tuple[int, str], ...] = field(default=())  # colours and what they stand for


def scatter(rows: Sequence[ComparedRow], base: str, base_bytes: int | None, width: int) -> Scatter | None:
    """Draw bytes and KL of artefacts, numbered in their order, and the base, whose KL is 0; None if nothing
    was measured."""
    placed = [
        (place, row.size_bytes, row.kl_nats_mean)
        for place, row in enumerate(rows)
        if row.size_bytes is not None and row.kl_nats_mean is not None
    ]
    if not placed:
        return None
    most = max(base_bytes or 0, *(size for _, size, _ in placed), 1)
    plane = _plane(
        most, [kl for *_, kl in placed], width, 300.0 if len(placed) > 1 else 220.0, partial(amount, unit="B")
    )
    frame, x, y = plane.frame, plane.x, plane.y
    places = [(x(size), y(kl)) for _, size, kl in placed]
    if base_bytes is not None:
        places.append((x(base_bytes), plane.foot))
    discs = _apart_discs(places)
    taken = [_box(*disc) for disc in discs]
    points = []
    for (place, size, kl), at, disc in zip(placed, places, discs, strict=False):
        row = rows[place]
        label = _free_label(*disc, row.name, frame, taken)
        title = f"{row.name}: {amount(size, 'B')}, {number(kl)} nats/token"
        points.append(Point(*disc, at, str(place + 1), label, title, beaten=row.beaten_by is not None))
    if base_bytes is not None:
        label = _free_label(*discs[-1], base, frame, taken)
        points.append(
            Point(*discs[-1], places[-1], "", label, f"{base}: {amount(base_bytes, 'B')}", base=True)
        )
    return Scatter(frame, tuple(points))


@dataclass(frozen=True)
class _Plane:
    """A drawing area with a linear axis from 0 and one of powers of ten, where 0 stands at the `foot`."""

    frame: Frame
    x: Callable[[float], float]
    y: Callable[[float], float]
    foot: float


def _plane(
    most: float, values: Sequence[float], width: int, height: float, words: Callable[[float], str]
) -> _Plane:
    """Axes for numbers up to `most`, in `words`, and for losses in nats."""
    left, right, top, bottom = 52.0, width - 14.0, 16.0, height - 46.0
    most = 1.06 * most
    low, high = _decades([max(value, FLOOR) for value in values])
    foot = bottom - 16.0  # below the decades, as 0 has no logarithm
    lowest = foot - 20.0

    def x(value: float) -> float:
        return left + (right - left) * value / most

    def y(value: float) -> float:
        return lowest - (lowest - top) * (math.log10(max(value, FLOOR)) - low) / (high - low)

    x_ticks = tuple(Tick(x(value), words(value)) for value in _round_steps(most, max(2, width // 130)))
    decades = tuple(Tick(y(10.0**power), _power(power)) for power in range(low, high + 1))
    frame = Frame(width, height, left, right, top, bottom, x_ticks, (*decades, Tick(foot, "0")))
    return _Plane(frame, x, y, foot)


def frontier(facts: SearchFacts, base: str, width: int) -> Scatter:
    """Draw what a search found, numbered and joined by a line, the models of one format as dots, and the
    base. Models of one format without any loss are the base itself and are left out."""
    beside = [each for each in facts.uniform if each.nats > 0]
    most = max([facts.base, *(each.reached for each in facts.found), *(each.reached for each in beside)])
    losses = [*(each.expected_nats for each in facts.found), *(each.nats for each in beside)]
    plane = _plane(most, losses, width, 380.0 if width > 400 else 320.0, partial(shown, facts.counted))
    places = [(plane.x(each.reached), plane.y(each.expected_nats)) for each in facts.found]
    places.append((plane.x(facts.base), plane.foot))
    discs = _apart_discs(places)
    spots = [(plane.x(each.reached), plane.y(each.nats)) for each in beside]
    taken = [_box(*disc) for disc in discs] + [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    points = [
        Point(
            *disc, at, f"{place + 1}", _free_label(*disc, each.asked, plane.frame, taken), _told(facts, each)
        )
        for place, (each, at, disc) in enumerate(zip(facts.found, places, discs, strict=False))
    ]
    words = f"{base}: {shown(facts.counted, facts.base)}"
    label = _free_label(*discs[-1], base, plane.frame, taken)
    points.append(Point(*discs[-1], places[-1], "", label, words, base=True))
    dots = []
    for each, at in zip(beside, spots, strict=True):
        coded = each.outside != OUTSIDE_KEPT
        label = Label(*at, "") if coded else _free_label(*at, each.way, plane.frame, taken)
        outside = f", {each.outside} outside the layers" if coded else ""
        words = f"{each.way}{outside}: {shown(facts.counted, each.reached)}, {number(each.nats)} nats/token"
        dots.append(Point(*at, at, "", label, words, beaten=True, coded=coded))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(places[:-1]))
    across = WORDS[facts.counted].axis
    return Scatter(plane.frame, (*dots, *points), across, "expected KL, nats/token", line)


def _told(facts: SearchFacts, found: FoundFacts) -> str:
    """What is told of a model that was found when someone points at it."""
    reached, loss = shown(facts.counted, found.reached), number(found.expected_nats)
    return f"{WORDS[facts.counted].within} {found.asked}: {reached}, {loss} nats/token"


def _apart_discs(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places moved until no two discs overlap, or for some rounds."""
    discs = [*places]
    for _ in range(200):
        moved = False
        for i, j in combinations(range(len(discs)), 2):
            (x, y), (u, v) = discs[i], discs[j]
            gap = math.hypot(u - x, v - y)
            if gap >= DISC:
                continue
            # two at one place part from left to right
            along = ((u - x) / gap, (v - y) / gap) if gap > 0.01 else (1.0, 0.0)
            push = (DISC - gap) / 2 + 0.1
            discs[i] = (x - along[0] * push, y - along[1] * push)
            discs[j] = (u + along[0] * push, v + along[1] * push)
            moved = True
        if not moved:
            break
    return discs


def _box(x: float, y: float) -> tuple[float, float, float, float]:
    """The place that a point takes."""
    return (x - 10, y - 10, x + 10, y + 10)


def _free_label(
    x: float, y: float, text: str, frame: Frame, taken: list[tuple[float, float, float, float]]
) -> Label:
    """A place for a label beside a point that no other label or point has; no text if there is none."""
    text = text if len(text) <= 28 else f"{text[:27]}…"
    long = LETTER * len(text)
    tries = [
        (x + 14, y + 4, "start"),
        (x - 14, y + 4, "end"),
        (x, y - 15, "middle"),
        (x, y + 24, "middle"),
        (x + 12, y - 12, "start"),
        (x - 12, y - 12, "end"),
        (x + 12, y + 20, "start"),
        (x - 12, y + 20, "end"),
    ]
    for at, line, anchor in tries:
        begin = at - {"start": 0.0, "middle": long / 2, "end": long}[anchor]
        box = (begin, line - 11, begin + long, line + 4)
        inside = box[0] >= frame.left and box[2] <= frame.width and box[1] >= 0 and box[3] <= frame.bottom
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return Label(at, line, text, anchor)
    return Label(x, y, "")


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def histogram(spread: DistributionFacts, mean: float | None, width: int) -> Histogram:
    """Draw how many tokens have which KL, with the quantiles."""
    filled = [place for place, count in enumerate(spread.counts) if count]
    first, last = max(filled[0], 0), filled[-1]
    left, right = 14.0, width - 14.0
    shown = spread.counts[first : last + 1]
    step = (right - left) / len(shown)
    tallest, tokens = max(shown), sum(spread.counts)

    def x(value: float) -> float:
        edges, place = spread.edges, _bin(spread.edges, value)
        if not 0 < place < len(edges):  # beyond the edges
            inner = 0.5
        else:
            low, high = math.log(edges[place - 1]), math.log(edges[place])
            inner = (math.log(value) - low) / (high - low)
        return left + step * (place - first + inner)

    ticks = [
        Tick(left + step * (place + 1 - first), _power(round(math.log10(edge))))
        for place, edge in enumerate(spread.edges)
        if abs(math.log10(edge) - round(math.log10(edge))) < 1e-6 and first <= place + 1 <= last + 1
    ]
    values = [("median", spread.p50), ("90 %", spread.p90), ("99 %", spread.p99), ("largest", spread.largest)]
    values += [("mean", mean)] if mean is not None else []
    marks = _marks(values, x, width)
    top = max(mark.label.y for mark in marks) + 8
    bottom = top + BARS
    bars = [
        Bar(
            left + step * place + 0.5,
            bottom - (bottom - top) * count / tallest,
            max(0.5, step - 1),
            (bottom - top) * count / tallest,
            f"{_range(spread.edges, first + place)} nats: {count:,} of {tokens:,} tokens",
        )
        for place, count in enumerate(shown)
    ]
    frame = Frame(width, bottom + 40, left, right, top, bottom, _apart(ticks, 34.0))
    return Histogram(frame, tuple(bars), marks)


def _bin(edges: Sequence[float], value: float) -> int:
    return sum(edge <= value for edge in edges)


def _range(edges: Sequence[float], place: int) -> str:
    if place == 0:
        return f"less than {edges[0]:g}"
    return f"{edges[place - 1]:g} to {edges[place]:g}" if place < len(edges) else f"{edges[-1]:g} or more"


def _marks(
    values: Sequence[tuple[str, float]], x: Callable[[float], float], width: float
) -> tuple[Mark, ...]:
    """Lines at values, with labels in as many rows as they need; no line crosses a label."""
    ends: list[float] = []  # where each row of labels ends
    marks = []
    for words, value in sorted(values, key=lambda item: item[1]):
        at, text = x(value), f"{words} {number(value)}"
        begin = max(0.0, min(at - 3, width - LETTER * len(text)))
        # a line goes down from its row, so all rows below must end before it
        row = next((place for place in range(len(ends)) if max(ends[place:]) + 8 <= begin), len(ends))
        ends[row : row + 1] = [begin + LETTER * len(text)]
        marks.append(Mark(at, Label(begin, 12 + LINE * row, text)))
    return tuple(marks)


def error_lines(report: Report, width: int) -> Lines:
    """Draw the relative error of each kind of linear over depth."""
    depth = depth_of(linear.name for linear in report.linears)
    errors = by_kind(((linear.name, 100 * linear.relative_error) for linear in report.linears), depth)
    outside = any(depth in points for points in errors.values())
    columns = depth + outside
    height, left, right, top, bottom = 250.0, 46.0, width - 14.0, 12.0, 250.0 - 40.0
    most = max((value for points in errors.values() for value in points.values()), default=0.0) or 1.0
    steps = _round_steps(most * 1.05, 4)

    def x(layer: float) -> float:
        return (left + right) / 2 if columns == 1 else left + 8 + (right - left - 16) * layer / (columns - 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / (most * 1.05)

    lines = [
        Line(
            kind,
            place % SERIES,
            tuple(
                (x(layer), y(value), f"{kind}, {_layer(layer, depth)}: {value:.2f} %")
                for layer, value in points.items()
            ),
        )
        for place, (kind, points) in enumerate(errors.items())
    ]
    ticks = [Tick(x(layer), str(layer)) for layer in range(depth)] + ([Tick(x(depth), "other")] * outside)
    y_ticks = tuple(Tick(y(value), f"{value:g} %") for value in steps)
    frame = Frame(width, height, left, right, top, bottom, _apart(ticks, 26.0), y_ticks)
    return Lines(frame, tuple(lines))


def bits_grid(report: Report, width: int) -> Grid:
    """Draw the bits of each kind of linear in each layer, and which were kept."""
    names = [linear.name for linear in report.linears] + [linear.name for linear in report.kept]
    depth = depth_of(names)
    bits = by_kind(((linear.name, linear.bits) for linear in report.linears), depth)
    kept = by_kind(((linear.name, 0.0) for linear in report.kept), depth)
    kinds = list(dict.fromkeys([*bits, *kept]))
    columns = depth + any(placed_at(name)[0] is None for name in names)
    words = _short_kinds(kinds)
    left = 8 + LETTER * max(len(word) for word in words)
    step_x, step_y = min(56.0, (width - left - 2) / columns), 22.0
    gap = 2.0 if step_x > 8 else 0.5
    values = sorted({round(value, 2) for points in bits.values() for value in points.values()})
    colours = {value: _level(value, values) for value in values}
    cells = []
    for row, kind in enumerate(kinds):
        for layer in range(columns):
            place = (left + step_x * layer, step_y * row + 2)
            title = f"{kind}, {_layer(layer, depth)}"
            if (value := bits.get(kind, {}).get(layer)) is not None:
                text = f"{round(value, 2):g}" if step_x >= 30 else ""
                cells.append(
                    Cell(*place, colours[round(value, 2)], text, f"{title}: {value:.3g} bits per weight")
                )
            elif layer in kept.get(kind, {}):
                cells.append(Cell(*place, None, "", f"{title}: kept as it was"))
    bottom = step_y * len(kinds) + 4
    ticks = [Tick(left + step_x * (layer + 0.5), str(layer)) for layer in range(depth)]
    ticks += [Tick(left + step_x * (depth + 0.5), "other")] * (columns > depth)
    frame = Frame(
        width,
        bottom + 22,
        left,
        left + step_x * columns,
        0,
        bottom,
        _apart(ticks, 30.0 if columns > 1 else 0),
    )
    rows = tuple(Label(left - 8, step_y * row + 16, word, "end") for row, word in enumerate(words))
    shown = values if len(values) <= 6 else [values[0], values[len(values) // 2], values[-1]]
    levels = tuple((colours[value], f"{value:g} bits") for value in shown)
    return Grid(frame, (step_x - gap, step_y - 2), tuple(cells), rows, levels)


def ways_grid(facts: SearchFacts, found: FoundFacts, width: int) -> Grid:
    """Draw which way each linear of a model that was found takes: a row for each layer, a column for each
    kind of linear, coloured by bits. Experts of one layer are one cell."""
    cells_of = {placed_at(linear): way for linear, way in found.ways.items()}
    layers: list[int | None] = [*sorted({layer for layer, _ in cells_of if layer is not None})]
    layers += [None] * any(layer is None for layer, _ in cells_of)
    kinds = list(dict.fromkeys(kind for _, kind in cells_of))
    words = [word.removesuffix("_proj") for word in _short_kinds(kinds)]
    names = ["other" if layer is None else str(layer) for layer in layers]
    left = 12 + LETTER * max(3, *(len(name) for name in names))
    step_x, step_y = min(72.0, (width - left - 2) / max(1, len(kinds))), 20.0 if len(layers) <= 40 else 12.0
    heads = _staggered(words, left, step_x)
    top = max(head.y for head in heads) + 8
    values = sorted({round(facts.bits[way], 2) for way in found.ways.values()})
    cells = []
    for (layer, kind), way in cells_of.items():
        bits, of = facts.bits[way], "outside the layers" if layer is None else f"layer {layer}"
        place = (left + step_x * kinds.index(kind), top + step_y * layers.index(layer))
        text = f"{round(bits, 1):g}" if step_x >= 26 and step_y >= 16 else ""
        title = f"{kind}, {of}: {way}, {bits:.3g} bits per weight"
        cells.append(Cell(*place, _level(round(bits, 2), values), text, title))
    bottom = top + step_y * len(layers)
    every = math.ceil(14 / step_y)
    rows = [
        Label(left - 8, top + step_y * (row + 0.5) + 3, name, "end")
        for row, name in enumerate(names)
        if row % every == 0
    ]
    frame = Frame(width, bottom + 4, left, left + step_x * len(kinds), top, bottom)
    levels = {way: _level(round(facts.bits[way], 2), values) for way in dict.fromkeys(found.ways.values())}
    told = sorted(levels, key=lambda way: facts.bits[way])
    keys = tuple((levels[way], f"{way}: {facts.bits[way]:.3g} bits") for way in told)
    return Grid(frame, (step_x - 2, step_y - 2), tuple(cells), (*rows, *heads), keys)


def _staggered(words: Sequence[str], left: float, step: float) -> list[Label]:
    """Words above columns, in as many lines as keep them apart."""
    ends: list[float] = []
    found = []
    for place, word in enumerate(words):
        long, middle = LETTER * len(word), left + step * (place + 0.5)
        line = next((row for row, end in enumerate(ends) if end + 4 <= middle - long / 2), len(ends))
        ends[line : line + 1] = [middle + long / 2]
        found.append(Label(middle, 12 + LINE * line, word, "middle"))
    return found


def _level(value: float, values: Sequence[float]) -> int:
    """One of five colours for bits, dark for few."""
    if len(values) <= 5:
        return values.index(value)
    return min(4, int(5 * (value - values[0]) / (values[-1] - values[0])))


def _short_kinds(kinds: Sequence[str]) -> list[str]:
    """The last part of each kind, or more where two have the same."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [
        short if last.count(short) == 1 else ".".join(kind.split(".")[-2:])
        for short, kind in zip(last, kinds, strict=True)
    ]


def _layer(layer: int, depth: int) -> str:
    return f"layer {layer}" if layer < depth else "outside the layers"


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten around values, at least one apart."""
    powers = [math.log10(value) for value in values] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    return (low, high) if high > low else (low - 1, high + 1)


def _power(power: int) -> str:
    """A power of ten as people write it: 0.01, 1, 1e-6."""
    return f"{10.0**power:g}" if -4 <= power <= 4 else f"1e{power}"


def _round_steps(most: float, count: int) -> list[float]:
    """Round values from 0 to `most`, about `count` of them."""
    rough = most / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= 0.8 * rough)
    return [float(f"{step * place:.12g}") for place in range(int(most / step) + 1)]


def _apart(ticks: Sequence[Tick], least: float) -> tuple[Tick, ...]:
    """Those of ticks whose labels have so many pixels each; the last stays if it has words."""
    found: list[Tick] = []
    for tick in ticks:
        if not found or tick.at - found[-1].at >= least:
            found.append(tick)
    if ticks and found[-1] is not ticks[-1] and not ticks[-1].label.isdigit():
        found[-1:] = [ticks[-1]]
    return tuple(found)
