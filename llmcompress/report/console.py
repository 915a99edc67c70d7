"""Reports as tables on a terminal: how much smaller and how much worse the model is, what took the time, what
was kept.

Each table is first built as rows of plain text and only then turned into a rich table, so the words are the
same at every width and names with brackets are never read as markup. The formatters are public: the model
card and the plots use the same units.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompress.io.units import NONE, amount, duration, measured_percent, number
from llmcompress.report.counted import WORDS, Counted, beside_base, shown
from llmcompress.report.schema import (
    CacheFacts,
    EffortFacts,
    Interval,
    ModelFacts,
    Report,
    TrainingFacts,
)
from llmcompress.report.search_facts import width_words

if TYPE_CHECKING:
    from llmcompress.report.comparison import ComparedRow

WORST = 5
WIDE = 100  # columns of a terminal
KEPT_SHOWN = 12  # rows; the rest of a long list is only counted

Rows = Sequence[tuple[str, ...]]


def nats(value: float | None) -> str:
    """Format a KL divergence: 0.002010 nats/token."""
    return NONE if value is None else f"{number(value)} nats/token"


def with_interval(value: float | None, interval: Interval | None) -> str:
    """Format a value and its interval: 12.34 [12.10, 12.60]."""
    return number(value) + (
        f" [{number(interval[0])}, {number(interval[1])}]" if interval is not None else ""
    )


def change(before: float | None, after: float | None) -> str:
    """Format the change from `before` to `after` in percent: -53.6 %, +0.3 %, =."""
    if before is None or after is None or before == 0:
        return NONE
    return "=" if before == after else f"{100 * (after / before - 1):+.3g} %"


def before_after(report: Report) -> Rows:
    """Rows (what, base, compressed, change), which are also the table of the model card."""
    base, small = report.base, report.compressed
    bits = [
        8 * m.size_bytes / m.parameters if m.size_bytes is not None and m.parameters else None
        for m in (base, small)
    ]
    texts = [with_interval(m.perplexity, m.perplexity_ci95) for m in (base, small)]
    return [
        (
            "bytes on disk",
            amount(base.size_bytes, "B"),
            amount(small.size_bytes, "B"),
            change(base.size_bytes, small.size_bytes),
        ),
        (
            "parameters",
            amount(base.parameters),
            amount(small.parameters),
            change(base.parameters, small.parameters),
        ),
        *_active(base, small),
        ("bits per parameter", number(bits[0]), number(bits[1]), change(*bits)),
        ("perplexity [95 %]", *texts, change(base.perplexity, small.perplexity)),
        (
            "bytes in memory",
            amount(base.memory_bytes, "B"),
            amount(small.memory_bytes, "B"),
            change(base.memory_bytes, small.memory_bytes),
        ),
        ("tokens/s, reading", *_pair(base.tokens_per_s, small.tokens_per_s)),
        ("tokens/s, writing", *_pair(base.decode_tokens_per_s, small.decode_tokens_per_s)),
    ]


def _active(base: ModelFacts, small: ModelFacts) -> Rows:
    """The row of what a token goes through, if that is not all of a model."""
    counts = base.active_parameters, small.active_parameters
    return [("of these for a token", *map(amount, counts), change(*counts))] if any(counts) else []


def _pair(before: float | None, after: float | None) -> tuple[str, str, str]:
    return amount(before), amount(after), change(before, after)


def fidelity_rows(report: Report) -> Rows:
    """Rows (what, value) of the distance between the two models."""
    facts = report.fidelity
    return [
        ("KL(base || compressed), mean", nats(facts.kl_nats_mean)),
        ("KL, 99th percentile", nats(facts.kl_nats_p99)),
        ("top-1 agreement", measured_percent(facts.top1_agreement)),
        ("perplexity ratio [95 %]", with_interval(facts.perplexity_ratio, facts.perplexity_ratio_ci95)),
    ]


CACHE_HEADER = ("tokens of text", "bytes per token", "plain", "KL from plain", "perplexity", "plain")


def cache_rows(facts: CacheFacts | None) -> Rows:
    """Rows under CACHE_HEADER of the model with its KV cache as stored, beside itself with a plain one; none
    if it was not measured."""
    return [
        (
            f"{at.length:,}",
            amount(at.bytes_per_token, "B"),
            amount(at.plain_bytes_per_token, "B"),
            nats(at.kl_nats_mean),
            number(at.perplexity),
            number(at.plain_perplexity),
        )
        for at in (facts.lengths if facts else ())
    ]


def cache_title(facts: CacheFacts | None) -> str:
    """What stands above the rows."""
    return f"KV cache in {facts.bits} bits" if facts else ""


def kept_rows(report: Report, shown: int = KEPT_SHOWN) -> Rows:
    """Rows (linear, why it was kept); a last row counts those beyond `shown`."""
    kept = report.kept
    more = [(f"... and {len(kept) - shown} more", "")] if len(kept) > shown else []
    return [(linear.name, linear.why) for linear in kept[:shown]] + more


def worst_rows(report: Report, shown: int = WORST) -> Rows:
    """Rows (linear, format, bits, relative error), largest error first."""
    worst = sorted(report.linears, key=lambda linear: -linear.relative_error)[:shown]
    return [
        (linear.name, linear.format, number(linear.bits), measured_percent(linear.relative_error))
        for linear in worst
    ]


def training_rows(report: Report) -> Rows:
    """Rows (loss, steps, KL on held-out text before and after, share recovered) for each stage that
    trained."""
    return [
        (
            training.loss,
            steps(training),
            nats(training.kl_before),
            nats(training.kl_after),
            measured_percent(training.recovered),
        )
        for training in report.trainings
    ]


def steps(training: TrainingFacts) -> str:
    """Format the number of steps: 1,000, or 300 of 1,000 if the training ended early."""
    asked, done = training.steps, training.steps_done
    return f"{asked:,}" if done == asked else f"{done:,} of {asked:,}"


def chosen_words(effort: EffortFacts) -> str:
    """What an effort chose: effort balanced: data.samples 128, data.length 512."""
    return f"effort {effort.level}: {', '.join(f'{key} {value}' for key, value in effort.chosen.items())}"


def time_rows(report: Report) -> Rows:
    """Rows (stage, seconds, share of the run); the time outside stages is loading, measuring and writing."""
    whole = report.cost.seconds
    times = [(stage.name, stage.seconds) for stage in report.stages]
    times.append(("load, measure, write", max(0.0, whole - sum(seconds for _, seconds in times))))
    return [
        (name, duration(seconds), measured_percent(seconds / whole) if whole else NONE)
        for name, seconds in [*times, ("all", whole)]
    ]


def print_report(report: Report, console: Console) -> None:
    """Print the whole report: before and after, fidelity, training, time, kept linears, the worst linears,
    notes, and the machine."""
    revision = f" @ {report.base.revision[:12]}" if report.base.revision else ""
    console.print(Text(f"{report.base.model}{revision} -> {report.compressed.model}", style="bold"))
    _print(console, "before and after", ("", "base", "compressed", "change"), before_after(report))
    _print(console, "distance from the base", ("", "value"), fidelity_rows(report))
    _print(console, cache_title(report.kv_cache), CACHE_HEADER, cache_rows(report.kv_cache))
    _print(
        console,
        "training",
        ("loss", "steps", "held-out KL before", "after", "recovered"),
        training_rows(report),
    )
    _print(console, "where the time went", ("stage", "time", "share"), time_rows(report))
    _print(console, "kept as they were", ("linear", "why"), kept_rows(report))
    _print(console, "largest errors", ("linear", "format", "bits", "relative error"), worst_rows(report))
    notes = [f"{stage.name}: {note}" for stage in report.stages for note in stage.notes]
    data, cost = report.data, report.cost
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.environment.versions.items()))
    read = f"{data.calibration_tokens:,} tokens calibrated, {data.evaluation_tokens:,} evaluated"
    read += "; each sequence begins with BOS, where nothing is scored" if data.bos else ""
    for line in (
        *notes,
        *([chosen_words(report.effort)] if report.effort else ()),
        f"text: {data.source} (sha256 {data.sha256[:12]}), {read}",
        f"peak memory: {amount(cost.peak_memory_bytes, 'B')}; on {report.environment.device}; {versions}",
        f"recipe {report.recipe_digest[:12]}",
    ):
        console.print(Text(line, style="dim"))


def print_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print what `evaluate --json` writes; keys that are absent or null are left out."""
    get = evaluation.get
    rows = [
        ("perplexity [95 %]", with_interval(get("perplexity"), get("perplexity_ci95"))),
        ("evaluated tokens", f"{get('tokens'):,}" if get("tokens") is not None else NONE),
        ("each sequence begins with", "BOS, not scored" if get("bos") else NONE),
        ("bytes on disk", amount(get("size_bytes"), "B")),
        ("tokens/s, reading", amount(get("tokens_per_s"))),
        ("tokens/s, writing", amount(get("decode_tokens_per_s"))),
        ("KL(base || model), mean", nats(get("kl_nats_mean"))),
        ("KL, 99th percentile", nats(get("kl_nats_p99"))),
        ("top-1 agreement", measured_percent(get("top1_agreement"))),
    ]
    _print(console, str(get("model", "")), ("", "value"), [row for row in rows if row[1] != NONE])
    cached = CacheFacts.model_validate(get("kv_cache")) if get("kv_cache") else None
    _print(console, cache_title(cached), CACHE_HEADER, cache_rows(cached))


def print_reproduction(
    verdict: str, differences: Iterable[str], reported: Report, again: Report, console: Console
) -> None:
    """Print the comparison of a second run with the report of the first."""
    rows = [
        ("perplexity", number(reported.compressed.perplexity), number(again.compressed.perplexity)),
        ("KL, mean", nats(reported.fidelity.kl_nats_mean), nats(again.fidelity.kl_nats_mean)),
        (
            "top-1 agreement",
            measured_percent(reported.fidelity.top1_agreement),
            measured_percent(again.fidelity.top1_agreement),
        ),
        (
            "bytes on disk",
            amount(reported.compressed.size_bytes, "B"),
            amount(again.compressed.size_bytes, "B"),
        ),
    ]
    _print(console, f"{reported.compressed.model}: {verdict}", ("", "report", "again"), rows)
    for line in differences:
        console.print(f"- {line}", soft_wrap=True, highlight=False, markup=False)


def print_exported(
    target: str, sizes: tuple[int, int], kinds: Mapping[str, int], notes: Iterable[str], console: Console
) -> None:
    """Print what an export wrote: `sizes` are the bytes of the artefact and of the export, `kinds` how many
    matrices became what."""
    before, after = (amount(size, "B") for size in sizes)
    console.print(Text(f"{target}: {before} -> {after}", style="bold"))
    _print(
        console, "matrices", ("written as", "number"), [(kind, str(count)) for kind, count in kinds.items()]
    )
    for note in notes:
        console.print(Text(note, style="dim"))


def print_comparison(rows: Sequence["ComparedRow"], console: Console) -> None:
    """Print several artefacts side by side by number, and which of them another one beats. On a narrow
    terminal, what is words stands below the table."""
    names, wide = [row.name for row in rows], console.width >= WIDE
    folders = {name.rpartition("/")[0] for name in names}
    shown = [name.rpartition("/")[2] or name for name in names] if len(folders) == 1 else names
    header = ["", "bytes", "share", "KL, nats", "perplexity", "top-1", "beaten by"]
    words = ["time", "loads with", "artefact"] if wide else []
    table = Table(header_style="dim", box=box.SIMPLE_HEAD)
    for name in (*header, *words):
        left = name in words[1:]
        table.add_column(
            Text(name), justify="left" if left else "right", overflow="fold", no_wrap=name != "artefact"
        )
    for place, row in enumerate(rows):
        numbers = [
            f"{place + 1}",
            amount(row.size_bytes, "B"),
            measured_percent(row.share),
            number(row.kl_nats_mean),
            number(row.perplexity),
            measured_percent(row.top1_agreement),
            f"{names.index(row.beaten_by) + 1}" if row.beaten_by else "",
        ]
        more = [duration(row.seconds), row.loads_with[-1], shown[place]] if wide else []
        table.add_row(*map(Text, (*numbers, *more)))
    console.print(table)
    for place, row in enumerate(rows if not wide else ()):
        line = f"{place + 1:3} {row.name}: {duration(row.seconds)}, loads with {row.loads_with[-1]}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)


class PlanRow(Protocol):
    """A row of a plan; None is a value that can't be predicted."""

    @property
    def stage(self) -> str: ...
    @property
    def parameters(self) -> int | None: ...
    @property
    def size_bytes(self) -> int | None: ...
    @property
    def peak_memory_bytes(self) -> int | None: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def flops_per_token(self) -> int | None: ...
    @property
    def kv_cache_bytes_per_token(self) -> int | None: ...


def print_plan(rows: Sequence[PlanRow], notes: Iterable[str], console: Console) -> None:
    """Print `plan`: the expected parameters, bytes, peak memory and seconds per stage."""
    cells = [
        (
            row.stage,
            amount(row.parameters),
            amount(row.size_bytes, "B"),
            amount(row.peak_memory_bytes, "B"),
            duration(row.seconds),
            amount(row.flops_per_token, "FLOP"),
            amount(row.kv_cache_bytes_per_token, "B"),
        )
        for row in rows
    ]
    header = ("stage", "parameters", "bytes on disk", "peak memory", "time", "a token", "its KV cache")
    _print(console, "to expect", header, cells)
    for note in notes:
        console.print(Text(note, style="dim"))


class AdviceLine(Protocol):
    """A recipe or a search that suits a model; None is what is not known."""

    @property
    def recipe(self) -> str | None: ...
    @property
    def why(self) -> str: ...
    @property
    def command(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def kl_nats(self) -> float | None: ...
    @property
    def measured_on(self) -> str | None: ...
    @property
    def loads_with(self) -> str: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def seconds(self) -> float | None: ...


def print_advice(
    model: str, rows: Sequence[AdviceLine], notes: Iterable[str], console: Console, *, timed: bool
) -> None:
    """Print `advise`: a table by number, and below it why each is advised and the command to run. The time
    is shown if it was estimated."""
    header = ("recipe", "bytes", "share", "KL, nats", "memory")
    cells = []
    for place, row in enumerate(rows, 1):
        most = "" if row.recipe else "<= "
        cells.append(
            (
                f"{place} {row.recipe or 'search'}",
                most + amount(row.size_bytes, "B"),
                measured_percent(row.share),
                number(row.kl_nats),
                amount(row.memory_bytes, "B"),
                *((duration(row.seconds),) if timed else ()),
            )
        )
    _print(console, f"for {model}", (*header, "time") if timed else header, cells)
    for place, row in enumerate(rows, 1):
        on = f" (KL on {row.measured_on})" if row.measured_on else ""
        words = f"{place} {row.why}{on}; loads with {row.loads_with}"
        console.print(words, soft_wrap=True, highlight=False, markup=False)
        console.print(f"  {row.command}", soft_wrap=True, highlight=False, markup=False)
    for note in notes:
        console.print(Text(note, style="dim"))


class WayLine(Protocol):
    """How many linears take a way, as a search found it."""

    @property
    def way(self) -> str: ...
    @property
    def linears(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def nats(self) -> float: ...


class FoundModel(Protocol):
    """The best model within a budget, as a search found it."""

    @property
    def asked(self) -> str: ...
    @property
    def base_bytes(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def reached(self) -> float: ...
    @property
    def expected_nats(self) -> float: ...
    @property
    def outside(self) -> str: ...
    @property
    def rows(self) -> Sequence[WayLine]: ...
    @property
    def widths(self) -> Mapping[str, Sequence[int]]: ...


def print_found(model: FoundModel, counted: Counted, base: float, console: Console) -> None:
    """Print what a search found for one budget: the ways, their bytes, and what each is expected to cost.
    `base` is what the base has of what is counted."""
    cells = [(row.way, str(row.linears), amount(row.size_bytes, "B"), nats(row.nats)) for row in model.rows]
    _print(
        console,
        f"{WORDS[counted].within} {model.asked}",
        ("way", "linears", "bytes on disk", "expected KL"),
        cells,
    )
    share = measured_percent(model.size_bytes / model.base_bytes)
    reached = f"{shown(counted, model.reached)}, {beside_base(counted, model.reached, base)} of the base"
    on_disk = f"{amount(model.size_bytes, 'B')} on disk, {share} of the base"
    kind = WORDS[counted].column
    told = on_disk if counted == "size" else f"{kind}: {reached}; {on_disk}"
    console.print(
        f"{told}; expected KL {nats(model.expected_nats)}; outside the layers: {model.outside}",
        highlight=False,
    )
    for line in width_words(model.widths):
        console.print(line, highlight=False)


# what is known of a model at each level of its anatomy
LEVELS = ("nothing", "linears", "scales", "axes")
KNOWN = (
    "linears: quantize, codebook, sparsify, low_rank, distill; scales: also smooth; axes: also prune, share, "
    "tie"
)
ROTATIONS = {"r1": "hidden", "r2": "heads"}  # what `rotate` turns


class FamilyRow(Protocol):
    """A type of models, as `families` finds it."""

    @property
    def model_type(self) -> str: ...
    @property
    def level(self) -> int: ...
    @property
    def derived(self) -> bool: ...
    @property
    def share(self) -> float: ...
    @property
    def axes(self) -> Sequence[str]: ...
    @property
    def turns(self) -> Sequence[str]: ...
    @property
    def why(self) -> Sequence[str]: ...


def print_families(rows: Sequence[FamilyRow], console: Console) -> None:
    """Print `families`: what is known of each type of model, and how much of its layers that reaches."""
    cells = [
        (
            row.model_type,
            LEVELS[row.level],
            ("derived" if row.derived else "table") if row.level else "",
            measured_percent(row.share) if row.level else "",
            " ".join(row.axes),
            " ".join(ROTATIONS[turn] for turn in row.turns),
            "; ".join(row.why),
        )
        for row in rows
    ]
    header = ("model_type", "known", "from", "of the layers' weights", "prune", "rotate", "why")
    _print(console, "families", header, cells)
    console.print(Text(KNOWN, style="dim"))


def _print(console: Console, title: str, header: Sequence[str], rows: Rows) -> None:
    if not rows:
        return
    table = Table(
        title=Text(title, style="bold"), title_justify="left", header_style="dim", box=box.SIMPLE_HEAD
    )
    for place, name in enumerate(header):
        words = place == 0 or name == "why"
        table.add_column(Text(name), justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
