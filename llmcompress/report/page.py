"""The page of a report, report.html of an artefact, and that of a search: one file that needs no network and
runs no script.

Every number comes from the report, or from search.json. Text of models and of others is escaped by the
templates, and characters that show nothing are spelled out. Equal reports give equal bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress import hub
from llmcompress.io.local_names import short_name
from llmcompress.io.units import amount, asked_percent, duration, measured_percent, number
from llmcompress.report import charts
from llmcompress.report.comparison import ComparedRow, compared, warning_of
from llmcompress.report.counted import WORDS, beside_base, shown
from llmcompress.report.model_card import install_command, loading_code
from llmcompress.report.redaction import for_others
from llmcompress.report.rows import (
    CACHE_HEADER,
    before_after,
    cache_rows,
    cache_title,
    change,
    chosen_words,
    fidelity_rows,
    kept_rows,
    nats,
    time_rows,
    training_rows,
)
from llmcompress.report.schema import ContinuationFacts, Guesses, ParagraphFacts, Report
from llmcompress.report.search_facts import FoundFacts, SearchFacts, UniformFacts, width_words
from llmcompress.report.visible import visible

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
WIDE, NARROW = 680, 340  # pixels: each picture is drawn for both
LINEARS = 300  # rows of the table of linears, largest error first
# nats from which a token has the next colour
HEAT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Subject:
    """One artefact on a page: its report as it is shared, the recipe's YAML if it is known, and its id on the
    Hub."""

    name: str
    report: Report
    recipe: str | None = None
    repo: str | None = None


def page(report: Report, recipe_yaml: str | None, repo: str | None = None) -> str:
    """Return the page of one artefact as HTML.

    `repo` is its id on the Hub, once it is there. Pass the recipe in its shared form, from
    `Recipe.for_others`.
    """
    shared = for_others(report, repo)
    subject = Subject(short_name(repo or shared.compressed.model), shared, recipe_yaml, repo)
    return _rendered([subject], None)


def comparison_page(reports: Sequence[tuple[str, Report]]) -> str:
    """Return the page of several named artefacts of one base as HTML."""
    short = [short_name(name) for name, _ in reports]
    names = [name if short.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(short)]
    shared = [for_others(report) for _, report in reports]
    subjects = [Subject(name, report) for name, report in zip(names, shared, strict=True)]
    return _rendered(subjects, warning_of([(each.name, each.report) for each in subjects]))


def search_page(facts: SearchFacts, recipes: Mapping[str, str]) -> str:
    """Return the page of a search as HTML. `recipes` are the YAML of what was found by the name of its file;
    pass them in their shared form."""
    base, words = short_name(facts.model), WORDS[facts.counted]
    return (
        _environment()
        .get_template("search.html")
        .render(
            title=f"Searched: {base}",
            lead=_lead(facts),
            axis=words.axis.capitalize(),
            column=words.column,
            within=words.within,
            single="one format, no slower" if facts.counted == "tokens_per_s" else "one format, no larger",
            picture=_both(lambda width: charts.frontier(facts, base, width)),
            picture_words=f"{words.axis.capitalize()} against expected KL; the table below has the numbers",
            rows=[_found_row(facts, each) for each in facts.found],
            uniform=[
                (each.way, each.outside, shown(facts.counted, each.reached), number(each.nats))
                for each in sorted(facts.uniform, key=lambda each: each.reached)
            ],
            note=NOTES[facts.counted].format(context=facts.context),
            found=[_found_view(facts, each, recipes[each.file]) for each in facts.found],
        )
    )


NOTES = {
    "size": "Bytes are those of the safetensors files. The expected KL is a sum over the linears, in "
    "nats/token; a run measures the true one.",
    "memory": "Memory is that of the loaded model's tensors, with the keys and values of {context} tokens. "
    "The expected KL is a sum over the linears, in nats/token; a run measures the true one.",
    "tokens_per_s": "Speed is that of writing, one token at a time, on the machine that searched: it follows "
    "from the times of the linears and of the rest of a token. The expected KL is a sum over the linears, in "
    "nats/token. A run measures both.",
}


def _lead(facts: SearchFacts) -> str:
    base = f"{short_name(facts.model)} ({shown(facts.counted, facts.base)})"
    return f"The format of each linear with the least expected loss within a budget, for {base}."


def _single(model: UniformFacts) -> str:
    return model.way if model.outside == charts.OUTSIDE_KEPT else f"{model.way}, {model.outside}"


def _found_row(facts: SearchFacts, found: FoundFacts) -> dict[str, str]:
    """A row of the table of what was found, beside the model of one format that loses least within it."""
    at_least = facts.counted == "tokens_per_s"
    fitting = [
        each
        for each in facts.uniform
        if (each.reached >= found.reached if at_least else each.reached <= found.reached) and each.nats > 0
    ]
    single = min(fitting, key=lambda each: each.nats, default=None)
    return {
        "asked": found.asked,
        "reached": shown(facts.counted, found.reached),
        "share": beside_base(facts.counted, found.reached, facts.base),
        "bytes": amount(found.size_bytes, "B"),
        "kl": number(found.expected_nats),
        "single": _single(single) if single else "none",
        "single_kl": number(single.nats if single else None),
    }


def _found_view(facts: SearchFacts, found: FoundFacts, recipe: str) -> dict[str, Any]:
    """What the template shows of one model that was found."""
    words = WORDS[facts.counted]
    reached, disk = shown(facts.counted, found.reached), amount(found.size_bytes, "B")
    of_base = beside_base(facts.counted, found.reached, facts.base)
    linears = [(name, way, number(facts.bits[way])) for name, way in found.ways.items()]
    return {
        "head": f"{words.within.capitalize()} {found.asked}",
        "words": f"{reached}, {of_base} of the base{'' if facts.counted == 'size' else f', {disk} on disk'}; "
        f"expected KL {nats(found.expected_nats)}. Outside the layers: {found.outside}.",
        "widths": width_words(found.widths),
        "rows": [
            (row.way, f"{row.linears:,}", amount(row.size_bytes, "B"), number(row.nats)) for row in found.rows
        ],
        "grid": _both(lambda width: charts.ways_grid(facts, found, width)),
        "grid_words": "Bits of each linear, layers from top to bottom: "
        f"{', '.join(f'{row.linears} in {row.way}' for row in found.rows)}; a table below has all",
        "linears": linears[:LINEARS],
        "more_linears": len(linears) - len(linears[:LINEARS]),
        "file": found.file,
        "recipe": recipe,
    }


def _rendered(subjects: Sequence[Subject], warning: str | None) -> str:
    rows = compared([(subject.name, subject.report) for subject in subjects])
    order = [row.name for row in rows]
    subjects = sorted(subjects, key=lambda subject: order.index(subject.name))
    first = subjects[0].report
    pictures = [
        charts.scatter(rows, short_name(first.base.model), first.base.size_bytes, width)
        for width in (WIDE, NARROW)
    ]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=subjects[0].name if len(subjects) == 1 else f"{len(subjects)} artefacts compared",
            base=first.base,
            base_link=_hub_link(first.base.model, first.base.revision),
            rows=[_row_words(row, order) for row in rows],
            scatter=pictures,
            warning=warning,
            subjects=[_view(subject, place) for place, subject in enumerate(subjects)],
            heat=HEAT,
        )
    )


@functools.cache
def _environment() -> Environment:
    """Jinja2 with our templates: what is printed is escaped, and odd characters are spelled out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _shown(value: Any) -> Any:
    """A value as a template prints it; what is markup already stays."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _hub_link(name: str, revision: str | None) -> str | None:
    """The address of a model on the Hub; None of a folder."""
    return f"https://huggingface.co/{name}/tree/{revision}" if revision and hub.is_id(name) else None


def _row_words(row: ComparedRow, order: Sequence[str]) -> dict[str, str]:
    """A row of the comparison in words; who beats it is told by number."""
    return {
        "name": row.name,
        "bytes": amount(row.size_bytes, "B"),
        "share": measured_percent(row.share),
        "kl": number(row.kl_nats_mean),
        "perplexity": number(row.perplexity),
        "top1": measured_percent(row.top1_agreement),
        "loads": row.loads_with[-1],
        "time": duration(row.seconds),
        "beaten": f"{order.index(row.beaten_by) + 1}" if row.beaten_by else "",
    }


def _view(subject: Subject, place: int) -> dict[str, Any]:
    """What the template shows of one artefact."""
    report, samples = subject.report, subject.report.samples
    spread, linears = report.fidelity.kl_nats_distribution, report.linears
    worst = sorted(linears, key=lambda linear: -linear.relative_error)[:LINEARS]
    return {
        "id": place,
        "name": subject.name,
        "repo": subject.repo,
        "report": report,
        "stages": [stage.name for stage in report.stages],
        "tiles": _tiles(report),
        "recipe": subject.recipe,
        "effort": chosen_words(report.effort) if report.effort else None,
        "install": install_command(report),
        "code": loading_code(report, subject.repo),
        "histogram": _both(lambda width: charts.histogram(spread, report.fidelity.kl_nats_mean, width))
        if spread
        else None,
        "tokens": sum(spread.counts) if spread else 0,
        "errors": _both(lambda width: charts.error_lines(report, width)) if linears else None,
        "bits": _both(lambda width: charts.bits_grid(report, width)) if linears else None,
        "linears": [
            (linear.name, linear.format, number(linear.bits), measured_percent(linear.relative_error))
            for linear in worst
        ],
        "more_linears": len(linears) - len(worst),
        "paragraph": _paragraph(samples.paragraph) if samples and samples.paragraph else None,
        "continuations": [_continuation(each) for each in samples.continuations] if samples else [],
        "left_out": samples.left_out if samples else None,
        "before_after": before_after(report),
        "fidelity": fidelity_rows(report),
        "cache_header": (f"{cache_title(report.kv_cache)}: {CACHE_HEADER[0]}", *CACHE_HEADER[1:]),
        "cache": cache_rows(report.kv_cache),
        "trainings": training_rows(report),
        "times": time_rows(report),
        "kept": kept_rows(report),
        "notes": [f"{stage.name}: {note}" for stage in report.stages for note in stage.notes],
        "versions": sorted(report.environment.versions.items()),
        "memory": amount(report.cost.peak_memory_bytes, "B"),
    }


def _both(draw: Callable[[int], Any]) -> list[Any]:
    """A picture at both widths."""
    return [draw(WIDE), draw(NARROW)]


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The numbers at the head of a page: what, value, and what it is beside."""
    base, small, facts = report.base, report.compressed, report.fidelity
    share = small.size_bytes / base.size_bytes if small.size_bytes is not None and base.size_bytes else None
    of = f"{asked_percent(share)} of {amount(base.size_bytes, 'B')}" if share is not None else ""
    ratio = change(base.perplexity, small.perplexity).replace(" ", "\N{NO-BREAK SPACE}")
    return [
        ("bytes on disk", amount(small.size_bytes, "B"), of),
        ("KL from the base", number(facts.kl_nats_mean), "nats/token, mean"),
        ("perplexity", number(small.perplexity), f"base {number(base.perplexity)}, {ratio}"),
        ("top-1 agreement", measured_percent(facts.top1_agreement), "same first choice as the base"),
    ]


def _paragraph(facts: ParagraphFacts) -> dict[str, Any]:
    """The paragraph for the template: its first token, and for each other its text, colour, KL and what both
    models rank first."""
    first, *texts = _with_ends(facts.tokens)
    predicted = zip(texts, facts.tokens[1:], facts.kl_nats, facts.base, facts.compressed, strict=True)
    return {
        "first": first,
        "tokens": [
            {
                "text": text,
                "word": _in_line(token),
                "heat": sum(kl >= edge for edge in HEAT),
                "kl": nats(kl),
                "differs": bool(base and small and base[0][0] != small[0][0]),
                "base": _guesses(base),
                "compressed": _guesses(small),
            }
            for text, token, kl, base, small in predicted
        ],
    }


def _guesses(guesses: Guesses) -> list[tuple[str, str]]:
    return [(_in_line(text), f"{100 * share:.1f} %") for text, share in guesses]


def _with_ends(tokens: Sequence[str]) -> list[str]:
    """Tokens in the paragraph: ends of lines are seen, empty lines take no place, and a part of a character
    is a dot."""
    found = []
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        shown = re.sub("\n+", lambda ends: f"{'↵' * len(ends[0])}\n", visible(token))
        found.append((shown.removesuffix("\n") if following.startswith("\n") else shown) or "·")
    return found


def _in_line(text: str) -> str:
    """A token in one line, with its spaces seen."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "·"


def _continuation(facts: ContinuationFacts) -> dict[str, Any]:
    """A continuation for the template, each text divided after the first word that differs."""
    return {
        "facts": facts,
        "prompt": _squeezed(facts.prompt),
        "shared": _squeezed(facts.shared),
        "same": facts.shared_tokens == facts.tokens,
        "base": _after_first_word(facts.base),
        "compressed": _after_first_word(facts.compressed),
    }


def _after_first_word(text: str) -> tuple[str, str]:
    text = _squeezed(text)
    found = re.match(r"\s*\S+", text)
    end = found.end() if found else len(text)
    return text[:end].replace("\n", "↵"), text[end:]


def _squeezed(text: str) -> str:
    """A text without several empty lines in a row."""
    return re.sub(r"\n{3,}", "\n\n", text)
