"""Reports as tables on a terminal.

Each table is first built as rows of plain text (`rows.py`) and only then turned into a rich table, so the
words are the same at every width and names with brackets are never read as markup.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmcompress.io.units import NONE, amount, duration, measured_percent, number
from llmcompress.report.counted import WORDS, Counted, beside_base, shown
from llmcompress.report.rows import (
    CACHE_HEADER,
    Rows,
    before_after,
    cache_rows,
    cache_title,
    chosen_words,
    fidelity_rows,
    kept_rows,
    nats,
    time_rows,
    training_rows,
    with_interval,
    worst_rows,
)
from llmcompress.report.schema import (
    CacheFacts,
    Report,
)
from llmcompress.report.search_facts import width_words

if TYPE_CHECKING:
    from llmcompress.report.comparison import ComparedRow

WIDE = 100  # columns of a terminal


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
