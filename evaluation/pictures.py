"""Draw the pictures of the README from the result files, as SVG for light and for dark pages.

    python -m evaluation pictures [--check] [--png DIR]

`pictures/kl-against-bytes-*.svg`: the loss of recipes, of stock bitsandbytes and of other quantisers on
wikilm-8m against their bytes. `pictures/speed-*.svg`: the speed of the formats over that of floats, on three
processors. Equal results give equal files where matplotlib is the same; --check compares the hash of the
drawn numbers, which stands in each file, and not the file. --png also draws them on the colour of the page.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from evaluation.options import parser
from evaluation.results import ROOT, Fidelity, Rival, Rivals, Speed
from evaluation.tables import Results

MODEL = "wikilm-8m"
OURS, STOCK, OTHERS = "llmcompress", "stock bitsandbytes", "others"
MARKERS = {OURS: "o", STOCK: "s", OTHERS: "D"}
SIZES = {OURS: 6.5, STOCK: 6.0, OTHERS: 5.5}


@dataclass(frozen=True)
class Theme:
    """Colours of a page; those of the series are safe for the colour-blind (Okabe and Ito 2008)."""

    name: str
    page: str
    ink: str
    faint: str
    rule: str
    ours: str
    stock: str
    others: str

    def of(self, kind: str) -> str:
        """The colour of a series."""
        return {OURS: self.ours, STOCK: self.stock, OTHERS: self.others}[kind]


LIGHT = Theme("light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0072b2", "#c8500a", "#6e7781")
DARK = Theme("dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#56b4e9", "#e69f00", "#9198a1")


@dataclass(frozen=True)
class Point:
    """A model: its share of the base's bytes and its KL in nats/token."""

    name: str
    kind: str
    share: float
    kl: float


@dataclass(frozen=True)
class Bar:
    """A format: its speed over that of the reference, decoding a token and reading a prompt."""

    name: str
    kind: str
    decode: float
    prompt: float


@dataclass(frozen=True)
class Panel:
    """The formats on one processor."""

    title: str
    model: str
    reference: str
    bars: list[Bar]


@dataclass(frozen=True)
class Label:
    """A label, in points to the right of and above its point; an end of it, left or right, stands there."""

    text: str
    x: float = 9
    y: float = -3.5
    side: str = "left"


RECIPES = {  # what is drawn of a model's recipes, and whose it is
    "nf4-learned": OURS,
    "nf4-learned-double": OURS,
    "nf4-gptq": OURS,
    "nf4-gptq-double": OURS,
    "fp4-gptq": OURS,
    "w4a8": OURS,
    "nf4-int8-mixed": OURS,
    "codebook-16": OURS,
    "w8a8": OURS,
    "int8-smooth": OURS,
    "nf4-nearest": STOCK,
    "nf4-nearest-double": STOCK,
    "fp4-nearest": STOCK,
    "int8-nearest": STOCK,
    "int8-nearest-6": STOCK,
}
PAIRS = (
    ("nf4-learned", "nf4-learned-double"),
    ("nf4-gptq", "nf4-gptq-double"),
    ("nf4-nearest", "nf4-nearest-double"),
)
LABELS = {
    "nf4-learned": Label("nf4-learned", 9, -8.5),
    "nf4-gptq": Label("nf4-gptq", 8, -10.5),
    "fp4-gptq": Label("fp4-gptq"),
    "w4a8": Label("w4a8", -9, side="right"),
    "nf4-int8-mixed": Label("nf4-int8-mixed", -9, side="right"),
    "codebook-16": Label("codebook-16"),
    "w8a8": Label("w8a8", -9, -6.5, "right"),
    "int8-smooth": Label("int8-smooth", 9, -6),
    "nf4-nearest": Label("nf4"),
    "fp4-nearest": Label("fp4"),
    "int8-nearest": Label("int8"),
    "int8-nearest-6": Label("int8, threshold 6", -9, 0, "right"),
    "autoround": Label("AutoRound", -9, side="right"),
    "gptqmodel": Label("GPTQModel", 8, -1.5),
    "llmcompressor": Label("llm-compressor", -9, side="right"),
}
FORMATS = {  # candidate of speed.py -> its label, and whose it is
    "w8a8": ("w8a8", OURS),
    "w4a8": ("w4a8", OURS),
    "int8": ("int8", OURS),
    "nf4": ("nf4", OURS),
    "bitsandbytes int8": ("int8", STOCK),
    "bitsandbytes int8, threshold 6": ("int8, threshold 6", STOCK),
    "bitsandbytes nf4": ("nf4", STOCK),
    "torchao int8": ("torchao int8", OTHERS),
    "bfloat16": ("bfloat16", OTHERS),
}
PROCESSORS = {  # result -> title, model, tokens of the prompt
    "speed-avx2": ("CPU with AVX2", "111M model", 128),
    "speed-avx512": ("CPU with AVX-512", "111M model", 128),
    "speed-cuda": ("H100", "8B model", 2048),
}


def points(results: Results) -> list[Point]:
    """What is drawn of bytes and loss: recipes and rivals, measured on the same sequences."""
    fidelity, rivals = results.load(f"fidelity-{MODEL}", Fidelity), results.load(f"rivals-{MODEL}", Rivals)
    if fidelity is None or rivals is None:
        return []
    measured = {name: rival for name, rival in rivals.rivals.items() if isinstance(rival, Rival)}
    base = next(iter(measured.values())).base_size_bytes
    rows = {row.recipe: row for row in fidelity.rows}
    found = [
        Point(name, kind, rows[name].size_bytes / base, rows[name].kl_nats_mean)
        for name, kind in RECIPES.items()
        if name in rows
    ]
    found += [Point(name, OTHERS, row.size_bytes / base, row.kl_nats_mean) for name, row in measured.items()]
    return found


def panels(results: Results) -> list[Panel]:
    """What is drawn of speed: for each processor its formats, at the 10th percentile of seconds."""
    found = []
    for name, (title, model, prompt) in PROCESSORS.items():
        if (result := results.load(name, Speed)) is None:
            continue
        rows = {
            (row.candidate, row.tokens): row.speedup_p10
            for row in result.rows
            if row.what == model and row.batch == 1
        }
        bars = [
            Bar(label, kind, rows[candidate, 1], rows[candidate, prompt])
            for candidate, (label, kind) in FORMATS.items()
            if (candidate, 1) in rows and candidate != result.reference
        ]
        found.append(Panel(title, model, result.reference, bars))
    return found


def plain(axes: Axes, theme: Theme) -> None:
    """Axes without a frame, in the colours of the page."""
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=theme.faint)
    axes.set_facecolor("none")


def frame(figure: Figure, theme: Theme, title: str, about: str) -> None:
    """Title, what is drawn, and the series by mark and name, in two lines at the top."""
    width, height = (float(side) for side in figure.get_size_inches())
    left, line = 0.1 / width, 0.31 / height
    top = 1 - 0.25 / height
    figure.text(left, top, title, color=theme.ink, fontsize=13, fontweight="bold", va="center_baseline")
    figure.text(1 - left, top, about, color=theme.faint, fontsize=9.5, ha="right", va="center_baseline")
    renderer = FigureCanvasAgg(figure).get_renderer()
    x, y = left + 0.05 / width, top - line
    for kind in (OURS, STOCK, OTHERS):
        mark = Line2D([x], [y], marker=MARKERS[kind], color=theme.of(kind), markersize=SIZES[kind])
        figure.add_artist(mark)
        words = figure.text(x + 0.12 / width, y, kind, color=theme.of(kind), fontsize=10.5, fontweight="bold")
        words.set_verticalalignment("center_baseline")
        extent = words.get_window_extent(renderer)
        x += (extent.width / figure.dpi + 0.4) / width


def draw_losses(found: Sequence[Point], theme: Theme) -> Figure:
    """Bytes to the right, loss upwards: what is lower and further left is better."""
    figure = Figure(figsize=(8.0, 5.0))
    axes = figure.add_axes((0.075, 0.115, 0.9, 0.7))
    plain(axes, theme)
    axes.set_yscale("log")
    axes.set_xlim(35.5, 74)
    axes.set_ylim(5.5e-5, 1.3e-2)
    axes.xaxis.set_major_locator(FixedLocator([40, 45, 50, 55, 60, 65, 70]))
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.yaxis.set_major_locator(FixedLocator([1e-4, 1e-3, 1e-2]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "bytes of the checkpoint, as a share of the 16-bit base", color=theme.faint, fontsize=10, labelpad=7
    )
    where = {point.name: (100 * point.share, point.kl) for point in found}
    for pair in PAIRS:
        if all(name in where for name in pair):
            (x1, y1), (x2, y2) = (where[name] for name in pair)
            kind = RECIPES[pair[0]]
            axes.plot([x1, x2], [y1, y2], color=theme.of(kind), linewidth=1.4, alpha=0.6)
    for point in found:
        colour, double = theme.of(point.kind), point.name.endswith("-double")
        x, y = where[point.name]
        face = theme.page if double else colour
        axes.plot(x, y, MARKERS[point.kind], color=colour, markersize=SIZES[point.kind], markerfacecolor=face)
        if (label := LABELS.get(point.name)) is not None:
            axes.annotate(
                label.text,
                (x, y),
                (label.x, label.y),
                textcoords="offset points",
                ha=label.side,
                color=colour,
                fontsize=9.5,
            )
    for x, words in ((45.6, "4-bit formats"), (64.2, "8-bit formats")):
        axes.text(x, 1.35e-2, words, color=theme.faint, fontsize=9.5, ha="center")
    about = f"nats/token, {MODEL} on WikiText-2; hollow: double quantisation"
    frame(figure, theme, "KL to the base against bytes", about)
    return figure


def draw_speeds(found: Sequence[Panel], theme: Theme) -> Figure:
    """A panel for each processor, a line for each format, from decoding to reading a prompt."""
    figure = Figure(figsize=(8.0, 4.6))
    rows = placed([bar for panel in found for bar in panel.bars])
    for column, panel in enumerate(found):
        axes = figure.add_axes((0.168 + 0.283 * column, 0.075, 0.255, 0.655))
        plain(axes, theme)
        axes.set_xscale("log")
        axes.set_xlim(0.035, 6)
        axes.set_ylim(max(rows.values()) + 0.6, -0.6)
        axes.xaxis.set_major_locator(FixedLocator([0.1, 0.5, 1, 2, 4]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks([])
        axes.axvline(1, color=theme.faint, linewidth=1.0, zorder=1)
        axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=10.5, pad=18, fontweight="bold")
        about = f"{panel.model}, 1 = {panel.reference}"
        axes.text(0, 1.032, about, transform=axes.transAxes, color=theme.faint, fontsize=9)
        bars = {(bar.name, bar.kind): bar for bar in panel.bars}
        for (name, kind), row in rows.items():
            axes.axhline(row, color=theme.rule, linewidth=0.8, zorder=0)
            if column == 0:
                _name(axes, row, name, theme.of(kind))
            if (bar := bars.get((name, kind))) is not None:
                _dumbbell(axes, row, bar, theme)
            else:
                words = "the reference" if name == panel.reference else "not measured"
                axes.text(0.04, row, words, color=theme.faint, fontsize=8, va="bottom")
    about = "times as fast as floats; filled: decoding a token, hollow: reading a prompt"
    frame(figure, theme, "Speed of the formats", about)
    return figure


def placed(bars: Sequence[Bar]) -> dict[tuple[str, str], float]:
    """The line of each format, with a gap between series."""
    rows: dict[tuple[str, str], float] = {}
    line, last = 0.0, OURS
    for name, kind in dict.fromkeys((bar.name, bar.kind) for bar in bars):
        line += 0.45 if kind != last else 0.0
        rows[name, kind] = line
        line, last = line + 1, kind
    return rows


def _name(axes: Axes, row: float, name: str, colour: str) -> None:
    """The name of a format, left of its line."""
    where = axes.get_yaxis_transform()
    axes.text(-0.05, row, name, transform=where, ha="right", va="center_baseline", fontsize=9.5, color=colour)


def _dumbbell(axes: Axes, row: float, bar: Bar, theme: Theme) -> None:
    """Two marks on a line: full for decoding, hollow for reading."""
    colour, marker, size = theme.of(bar.kind), MARKERS[bar.kind], SIZES[bar.kind]
    axes.plot([bar.decode, bar.prompt], [row, row], color=colour, linewidth=1.6, alpha=0.55)
    axes.plot(bar.prompt, row, marker, color=colour, markersize=size, markerfacecolor=theme.page)
    axes.plot(bar.decode, row, marker, color=colour, markersize=size)


@dataclass(frozen=True)
class Picture:
    """A picture: its name, the hash of its numbers, and how it is drawn for a page."""

    name: str
    digest: str
    draw: Callable[[Theme], Figure]

    @property
    def mark(self) -> str:
        """What its file says of its numbers."""
        return f"numbers: sha256 {self.digest}"


def pictures(results: Results) -> list[Picture]:
    """All whose results are there."""
    losses, speeds = points(results), panels(results)
    found = []
    if losses:
        found.append(Picture("kl-against-bytes", _digest(losses), lambda theme: draw_losses(losses, theme)))
    if speeds:
        found.append(Picture("speed", _digest(speeds), lambda theme: draw_speeds(speeds, theme)))
    return found


def _digest(numbers: Sequence[Point] | Sequence[Panel]) -> str:
    return hashlib.sha256(json.dumps([asdict(each) for each in numbers]).encode()).hexdigest()[:16]


def save(picture: Picture, theme: Theme, file: Path) -> None:
    """Write an SVG with a transparent page, its text as outlines, without a date."""
    with rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        metadata = {"Date": None, "Creator": None, "Description": picture.mark}
        picture.draw(theme).savefig(file, format="svg", transparent=True, metadata=metadata)


def save_png(picture: Picture, theme: Theme, file: Path) -> None:
    """Write a PNG on the page's colour."""
    figure = picture.draw(theme)
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=150, facecolor=theme.page)


def stale(found: Sequence[Picture], folder: Path) -> list[Path]:
    """The files that were not drawn from these numbers."""
    files = [
        (picture, folder / f"{picture.name}-{theme.name}.svg") for picture in found for theme in (LIGHT, DARK)
    ]
    return [
        file for picture, file in files if not file.is_file() or picture.mark not in file.read_text("utf-8")
    ]


def main(argv: Sequence[str]) -> int:
    """Draw all pictures, or with --check say which are stale and return 1."""
    options = parser("pictures", __doc__)
    options.add_argument("--check", action="store_true", help="draw nothing; exit 1 where a picture is stale")
    options.add_argument("--png", type=Path, help="a folder for PNGs to look at")
    options.add_argument("--root", type=Path, default=ROOT, help="the checkout; default: this one")
    given = options.parse_args(argv)
    folder = given.root / "evaluation" / "pictures"
    found = pictures(Results(given.root / "evaluation" / "results"))
    if given.check:
        files = stale(found, folder)
        if files:
            names = ", ".join(str(file.relative_to(given.root)) for file in files)
            print(
                f"not drawn from results/*.json: {names}; run python -m evaluation pictures", file=sys.stderr
            )
        return int(bool(files))
    folder.mkdir(parents=True, exist_ok=True)
    for picture in found:
        for theme in (LIGHT, DARK):
            file = folder / f"{picture.name}-{theme.name}.svg"
            save(picture, theme, file)
            print(f"written: {file.relative_to(given.root)}")
            if given.png:
                given.png.mkdir(parents=True, exist_ok=True)
                save_png(picture, theme, given.png / f"{picture.name}-{theme.name}.png")
    return 0
