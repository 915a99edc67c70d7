"""Plots for the model card: where the error is, what the compression changed, and how a training went.

Drawn with matplotlib's object interface on its Agg canvas, so a caller's pyplot state and backend are not
touched and no display is needed. The files carry no date or version, so equal reports give equal bytes. Each
takes half a second, most of it text layout.
"""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from llmcompress.io.local_names import short_name
from llmcompress.io.units import amount, number
from llmcompress.report.counted import WORDS, shown
from llmcompress.report.depth import Points, by_kind, depth_of, placed_at
from llmcompress.report.rows import change
from llmcompress.report.schema import Interval, Report, TrainingFacts
from llmcompress.report.search_facts import SearchFacts

# distinguishable with colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#444444")
MARKERS = "os^Dv<>P"
BEFORE, AFTER, BEST, INK, RULE = "#9AA5B1", "#0072B2", "#D55E00", "#222222", "#E3E3E3"
WIDE = 20  # ratio of the largest to the least value from which an axis is logarithmic


def error_per_layer(report: Report, path: Path) -> None:
    """Draw the relative error of each linear over depth to a PNG at `path`, one line per kind of linear; a
    strip below marks kept ones.

    Several linears of one kind in one layer (experts) are drawn as their mean. Linears outside the layers,
    such as the head, stand right of the last layer. Without any linear, the picture says so.
    """
    names = [linear.name for linear in report.linears] + [linear.name for linear in report.kept]
    depth = depth_of(names)
    errors = by_kind(((linear.name, 100 * linear.relative_error) for linear in report.linears), depth)
    kept = by_kind(((linear.name, 0.0) for linear in report.kept), depth)
    kinds = {kind: place for place, kind in enumerate(dict.fromkeys([*errors, *kept]))}

    figure = Figure(figsize=(9.0, 4.4 + 0.22 * len(kept)), dpi=150, layout="constrained")
    heights = [4.0, 0.15 + 0.22 * len(kept)] if kept else [4.0]
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _lines(rows[0], errors, kinds)
    if kept:
        _strip(rows[1], kept, kinds)
    outside = [kind for layer, kind in map(placed_at, names) if layer is None]
    _depth_ticks(rows[-1], depth, outside)
    rows[0].set_title(
        f"Error of each linear over depth: {short_name(report.compressed.model)}", loc="left", color=INK
    )
    _save(figure, path)


def _depth_ticks(axes: Axes, depth: int, outside: list[str]) -> None:
    """Label at most 13 layers by number, and one more tick for linears outside them, by name if there is only
    one."""
    step = max(1, -(-depth // 12))
    ticks = [(x, str(x)) for x in range(0, depth, step) if not outside or depth - x >= step]
    if outside:
        ticks.append((depth, outside[0] if len(set(outside)) == 1 else "others"))
    axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    axes.set_xlim(-0.5, max(depth - 0.5, 0.5) + (0.5 + 0.02 * depth if outside else 0.0))
    axes.set_xlabel("layer")


def _lines(axes: Axes, errors: Points, kinds: dict[str, int]) -> None:
    for kind, points in errors.items():
        place = kinds[kind] % len(COLOURS)
        x, y = list(points), list(points.values())
        axes.plot(
            x, y, label=kind, color=COLOURS[place], marker=MARKERS[place], markersize=4.5, linewidth=1.4
        )
    _plain(axes)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.set_ylabel("relative error")
    if errors:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no stage changed a linear", transform=axes.transAxes, ha="center", color=INK)
        axes.set_yticks([])


def _strip(axes: Axes, kept: Points, kinds: dict[str, int]) -> None:
    """Draw one row per kind of linear, with a cross at each layer whose linear was kept."""
    for row, (kind, points) in enumerate(kept.items()):
        axes.plot(
            list(points),
            [row] * len(points),
            "x",
            color=COLOURS[kinds[kind] % len(COLOURS)],
            markeredgewidth=1.8,
        )
    _plain(axes)
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_yticks(range(len(kept)), [f"kept: {kind}" for kind in kept], fontsize=8)


def before_after(report: Report, path: Path) -> None:
    """Draw bytes on disk, perplexity with its 95 % interval, and tokens per second, before and after, to a
    PNG at `path`."""
    base, small = report.base, report.compressed
    figure = Figure(figsize=(10.0, 3.6), dpi=150, layout="constrained")
    size, perplexity, reading, writing = figure.subplots(1, 4)
    _bars(size, "bytes on disk", base.size_bytes, small.size_bytes, lambda value: amount(value, "B"))
    _intervals(
        perplexity,
        "perplexity, 95 % interval",
        [(base.perplexity, base.perplexity_ci95), (small.perplexity, small.perplexity_ci95)],
    )
    _bars(reading, "tokens/s, reading", base.tokens_per_s, small.tokens_per_s, amount)
    _bars(writing, "tokens/s, writing", base.decode_tokens_per_s, small.decode_tokens_per_s, amount)
    figure.suptitle(f"{short_name(base.model)} before and after", x=0.01, ha="left", color=INK)
    _save(figure, path)


def _bars(
    axes: Axes, title: str, before: float | None, after: float | None, words: Callable[[float], str]
) -> None:
    if not _panel(axes, title, before, after):
        return
    for place, (value, colour) in enumerate(((before, BEFORE), (after, AFTER))):
        if value is not None:
            axes.bar(place, value, width=0.62, color=colour)
            axes.annotate(
                words(value),
                (place, value),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=INK,
            )
    axes.set_ylim(0, 1.15 * max(before or 0, after or 0) or 1)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)


def _intervals(axes: Axes, title: str, values: list[tuple[float | None, Interval | None]]) -> None:
    """Draw points rather than bars: a difference of one percent is invisible on an axis that starts at
    zero."""
    if not _panel(axes, title, *(value for value, _ in values)):
        return
    for place, ((value, interval), colour) in enumerate(zip(values, (BEFORE, AFTER), strict=True)):
        if value is None:
            continue
        low, high = interval or (value, value)
        axes.errorbar(
            place,
            value,
            [[max(0.0, value - low)], [max(0.0, high - value)]],
            fmt="o",
            color=colour,
            capsize=5,
            linewidth=2,
        )
        axes.annotate(
            number(value),
            (place, value),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.margins(y=0.15)
    axes.ticklabel_format(axis="y", useOffset=False)


def _panel(axes: Axes, title: str, before: float | None, after: float | None) -> bool:
    """Set the title and ticks of one before-and-after panel; returns False if there is nothing to draw."""
    _plain(axes)
    difference = change(before, after)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xticks(
        (0, 1),
        ("base", f"compressed\n{difference}" if before is not None and after is not None else "compressed"),
    )
    axes.set_xlim(-0.6, 1.75)
    if before is None and after is None:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=9, color=INK)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        return False
    return True


def training_curves(report: Report, path: Path) -> None:
    """Draw KL on held-out text over steps to a PNG at `path`, one panel per stage that trained. Raises
    ValueError if none did.

    A line begins at step 0 with the untrained student and leaves out evaluations that gave no number. All
    panels share one axis in nats/token, which is logarithmic if values are far apart.
    """
    trainings = report.trainings
    figure = Figure(figsize=(max(9.0, 3.2 * len(trainings)), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(trainings), sharey=True, squeeze=False)[0]
    for axes, training in zip(panels, trainings, strict=True):
        _curve(axes, training)
    values = [kl for training in trainings for _, kl in training.points]
    if 0 < WIDE * min(values) < max(values):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].minorticks_off()
    else:
        panels[0].set_ylim(0, 1.1 * max(0.0, *values) or 1)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("KL on held-out text, nats/token")
    figure.suptitle(f"Training: {short_name(report.compressed.model)}", x=0.01, ha="left", color=INK)
    _save(figure, path)


def _curve(axes: Axes, training: TrainingFacts) -> None:
    """Draw one line; the start and, if it differs, the step whose weights were kept are marked and named in
    the legend."""
    points, best = training.points, training.best
    axes.plot(*zip(*points, strict=True), color=AFTER, marker="o", markersize=4.5, linewidth=1.4)
    start = "before" if best[0] else "before, which is kept"
    axes.plot(*points[0], "o", color=BEFORE, markersize=9, label=f"{start}: {number(points[0][1])}")
    if best[0]:
        axes.plot(
            *best,
            "D",
            color=BEST,
            markersize=7.5,
            label=f"step {best[0]:,}, which is kept: {number(best[1])}",
        )
    _plain(axes)
    axes.set_title(training.loss, fontsize=10, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.legend(loc="best", frameon=False, fontsize=9)


def frontier(facts: SearchFacts, base: str, path: Path) -> None:
    """Draw KL over bytes, or what else is counted, to a PNG at `path`: the models that a search found on a
    line, and beside it those of one format. Models without any loss are left out."""
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for coded, label in ((False, "one format"), (True, "one format, int8 outside the layers")):
        dots = [each for each in facts.uniform if (each.outside != "kept") == coded and each.nats > 0]
        if not dots:
            continue
        x, y = [each.reached for each in dots], [each.nats for each in dots]
        axes.plot(
            x, y, "o", color=BEFORE, markerfacecolor="none" if coded else BEFORE, markersize=6, label=label
        )
        for each in dots if not coded else ():
            at = (each.reached, each.nats)
            axes.annotate(each.way, at, (7, 3), textcoords="offset points", fontsize=7, color=INK)
    found = [each for each in facts.found if each.expected_nats > 0]
    if found:
        x, y = [each.reached for each in found], [each.expected_nats for each in found]
        axes.plot(x, y, color=AFTER, marker="D", markersize=6, label="found by search")
    axes.legend(frameon=False, fontsize=9)
    for one in found:
        at = (one.reached, one.expected_nats)
        axes.annotate(
            one.asked, at, (-6, -10), textcoords="offset points", ha="right", fontsize=9, color=AFTER
        )
    _plain(axes)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(facts.counted, value)))
    axes.set_xlabel(WORDS[facts.counted].axis)
    axes.set_ylabel("expected KL, nats/token")
    axes.set_title(f"Found for {base}", loc="left", color=INK)
    _save(figure, path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Software": None})
