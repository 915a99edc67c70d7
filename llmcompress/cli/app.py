"""The commands: what each is given, and what it prints; what a command does lies elsewhere.

Exit code 0 = done, 2 = the input is wrong (one line, no traceback), 3 = the result misses what the recipe
accepts, 1 = a bug, 130 = interrupted by Ctrl-C and 143 = by SIGTERM (one line). Packages that take long to
import are imported by the command that needs them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmcompress.cli import interrupt, logs, options
from llmcompress.cli.progress import track
from llmcompress.cli.terminal import err as err
from llmcompress.cli.terminal import out as out
from llmcompress.errors import AcceptError, CompressError, argument

if TYPE_CHECKING:
    from llmcompress.data.sources import Effort
    from llmcompress.recipe.recipe import Recipe
    from llmcompress.report.counted import Counted

logger = logging.getLogger(__name__)
FRONTIER = ("25%", "35%", "50%", "75%")  # sizes of `search --frontier`

app = typer.Typer(
    name="llmcompress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _whole(version: options.Version = False) -> None:
    """Make a causal language model small by a recipe, and say what that cost."""


@app.command()
def advise(
    model: options.ModelName,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Most bytes of the result, like 60MB, or a share of the base's, like 40%.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Literal["cpu", "gpu", "vllm", "llama.cpp"] | None,
        typer.Option("--for", help="Where the result runs. cpu and gpu rank formats by speed, too."),
    ] = None,
    time: options.TimeLimit = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Say which recipes suit a model, by its config and what was measured on others; run nothing."""
    from llmcompress.pipeline.advise import advise as find
    from llmcompress.report.console import print_advice

    found = find(model, size=size, target=target, time=time, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_advice(found.model, found.advice, found.notes, out, timed=time is not None)


@app.command()
def run(
    recipe: options.RecipeName,
    base: options.Base = None,
    data: options.Data = None,
    effort: options.EffortWord = None,
    time: options.TimeLimit = None,
    out_: options.Out = Path("compressed"),
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compress a model by a recipe and write the result. After a crash, the same command resumes."""
    from llmcompress.integrations import distributed
    from llmcompress.io import own_code
    from llmcompress.modeling.sequential import untracked
    from llmcompress.pipeline.export import beside
    from llmcompress.pipeline.run import run_recipe
    from llmcompress.recipe import shipped
    from llmcompress.report.console import print_report

    steps, shown = shipped.resolve(recipe), track if distributed.first() else untracked
    with own_code.permission(trust_remote_code):
        if time is not None:
            effort = _fitting(steps, effort, time, base, data, device)
        report = run_recipe(
            steps, out_, base=base, data=data, effort=effort, overwrite=overwrite, device=device, track=shown
        )
    if not distributed.first():
        return
    print_report(report, out)
    after = " after `import llmcompress`" if report.plug_in else ""
    code = ", trust_remote_code=True" if report.own_code else ""
    out.print(
        f"The compressed model lies in {out_}; load it{after} with "
        f"{report.auto_class or 'AutoModelForCausalLM'}.from_pretrained({str(out_)!r}{code})."
    )
    for to in steps.exports:
        out.print(f"The export to {to} lies in {beside(out_, to)}.", soft_wrap=True, highlight=False)


@app.command()
def plan(
    recipe: options.RecipeName,
    base: options.Base = None,
    data: options.Data = None,
    effort: options.EffortWord = None,
    time: options.TimeLimit = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Estimate what a run would give and cost from the model's config alone; run nothing."""
    from llmcompress.io import own_code
    from llmcompress.pipeline.plan import plan_recipe
    from llmcompress.recipe import shipped
    from llmcompress.report.console import print_plan

    steps = shipped.resolve(recipe)
    with own_code.permission(trust_remote_code):
        if time is not None:
            effort = _fitting(steps, effort, time, base, data, device)
        found = plan_recipe(steps, base=base, data=data, effort=effort, device=device)
    print_plan(found.rows, found.notes, out)


def _fitting(
    recipe: Recipe,
    effort: Effort | None,
    seconds: float,
    base: str | None,
    data: str | None,
    device: str | None,
) -> Effort:
    """Return the best effort that fits in a time, and print it. Errors: CompressError."""
    from llmcompress.integrations import distributed
    from llmcompress.io.units import duration
    from llmcompress.pipeline.plan import fitting

    if effort is not None:
        raise CompressError(f"{argument('effort')} and {argument('time')} both decide the effort; give one")
    if distributed.count() > 1:
        raise CompressError(
            f"{argument('time')} is for one process, as each of several may time the machine otherwise; "
            f"give the {argument('effort')} that `plan` finds"
        )
    found, words = fitting(recipe, seconds, base=base, data=data, device=device)
    err.print(
        f"in {duration(seconds)}: effort {found} ({words}); to resume the run, give --effort {found}",
        soft_wrap=True,
        highlight=False,
    )
    return found


@app.command()
def search(
    model: options.ModelName,
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Bytes of the result, like 60MB, or a share of the base's, like 40%. May be given again.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="In place of --size: bytes in memory with the cache of --context tokens, like 2GB or 40%.",
            show_default=False,
        ),
    ] = None,
    tokens_per_s: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens-per-s",
            metavar="SPEED",
            help="In place of --size: least speed of writing here, like 30, or 1.5x the base's.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens in the cache that --memory counts. Default: 2048."),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Also 25, 35, 50 and 75 % of the base's bytes.")
    ] = False,
    loads_with: Annotated[
        Literal["transformers", "llmcompress", "compressed-tensors", "gguf"],
        typer.Option("--loads-with", help="What is to load the result, or the export that is to hold it."),
    ] = "llmcompress",
    choose_among: Annotated[
        list[str] | None,
        typer.Option(
            "--choose-among",
            metavar="STAGE",
            help="What may be done to a layer: quantize, prune. May be given again. Default: both within a "
            "size, else quantize.",
            show_default=False,
        ),
    ] = None,
    data: options.Data = None,
    effort: options.EffortWord = None,
    out_: options.Out = Path("searched"),
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Find the best model within a size, a memory or a time per token, and write its recipe and a page.

    After a crash, the same command resumes.
    """
    from llmcompress.pipeline.budgets import CONTEXT
    from llmcompress.pipeline.search import search as find
    from llmcompress.pipeline.search import write
    from llmcompress.report.console import print_found
    from llmcompress.report.search_facts import PAGE

    of, budgets = _budgets([*(size or ()), *(FRONTIER if frontier else ())], memory, tokens_per_s)
    if context is not None and of != "memory":
        raise CompressError("--context is the length of the cache that --memory counts; leave it out")
    searched = find(
        model,
        budgets,
        of=of,
        context=context or CONTEXT,
        loads_with=loads_with,
        choose_among=choose_among,
        data=data,
        effort=effort,
        device=device,
        trust_remote_code=trust_remote_code,
        track=track,
    )
    write(searched, out_)
    for found in searched.found:
        print_found(found, of, searched.measure.base, out)
        out.print(f"llmcompress run {out_ / found.file}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"page: {out_ / PAGE}", soft_wrap=True, highlight=False, markup=False)


def _budgets(
    size: list[str], memory: list[str] | None, tokens_per_s: list[str] | None
) -> tuple[Counted, list[str]]:
    """What a search is to keep within what. Errors: CompressError unless exactly one kind is given."""
    kinds: dict[Counted, list[str] | None] = {"size": size, "memory": memory, "tokens_per_s": tokens_per_s}
    given = [(of, [*dict.fromkeys(asked)]) for of, asked in kinds.items() if asked]
    if not given:
        raise CompressError(
            "search needs --size, like --size 40%, or --frontier, or --memory, or --tokens-per-s"
        )
    if len(given) > 1:
        names = " and ".join(f"--{of.replace('_', '-')}" for of, _ in given)
        raise CompressError(f"a search is within one kind of budget, and got {names}; give one of them")
    return given[0]


@app.command()
def evaluate(
    model: options.ModelName,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="BASE", help="Base to compare with: KL, top-1 agreement."),
    ] = None,
    data: options.Data = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the numbers to this file as well."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=2, help="Tokens of a sequence. Default: up to 2048, as the model takes."
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences of text.")] = 64,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure a model: perplexity with its interval, bytes, tokens/s, and the distance from a base."""
    from llmcompress.data.sources import PYTHON_DOCS, DataSpec
    from llmcompress.io.destination import require_file, write_file
    from llmcompress.pipeline.evaluate import evaluate as measure
    from llmcompress.report.console import print_evaluation

    if json_file is not None:
        require_file(json_file, "--json")
    spec = DataSpec(length=length, samples=1, evaluation_samples=samples).with_text(data or PYTHON_DOCS)
    result = measure(
        model,
        against=against,
        data=spec,
        device=device,
        trust_remote_code=trust_remote_code,
        track=track,
    ).to_dict()
    print_evaluation(result, out)
    if json_file is not None:
        write_file(json_file, json.dumps(result, indent=2) + "\n", "--json")


@app.command()
def report(
    folder: options.Reported,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Print the report of a finished run or search, and write its page anew: report.html, or search.html."""
    from llmcompress.pipeline.compare import is_search, write_page, write_search_page
    from llmcompress.report.console import print_found, print_report
    from llmcompress.report.schema import Report
    from llmcompress.report.search_facts import SearchFacts

    searched = SearchFacts.of(folder) if is_search(folder) else None
    found, file = None if searched else Report.of(folder), None
    try:
        file = write_search_page(folder) if searched else write_page(folder)
    except CompressError as error:
        if open_:
            raise
        logger.warning("%s", error)
    if found is not None:
        print_report(found, out)
    if searched is not None:
        for each in searched.found:
            print_found(each, searched.counted, searched.base, out)
    if file is None:
        return
    out.print(f"page: {file}", soft_wrap=True, highlight=False, markup=False)
    if open_ and not webbrowser.open(file.resolve().as_uri()):
        logger.warning("no browser can be started here; open %s in one", file)


@app.command()
def compare(
    artefacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTEFACT...",
            help="Two or more folders that `run` wrote, or Hub ids, of one base.",
            show_default=False,
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the comparison to this file as a page."),
    ] = None,
) -> None:
    """Compare finished runs of one base: bytes, KL, perplexity, and which are beaten by another."""
    from llmcompress.pipeline.compare import compare as side_by_side
    from llmcompress.report.console import print_comparison

    print_comparison(side_by_side(artefacts, html), out)
    if html is not None:
        out.print(f"page: {html}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def push(
    folder: options.Artefact,
    repo: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Where it goes on the Hub.", show_default=False)
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.")] = None,
) -> None:
    """Share a finished run or export on the Hub in one commit. After a broken upload, run it again."""
    from llmcompress.pipeline.push import push as send

    pushed = send(folder, repo, private=private, message=message)
    out.print(
        f"{folder} is at {pushed.url}, commit {pushed.commit}", soft_wrap=True, highlight=False, markup=False
    )


@app.command()
def export(
    folder: options.Artefact,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET",
            help="Layout to write: compressed-tensors (vLLM) or gguf (llama.cpp).",
            show_default=False,
        ),
    ],
    out_: options.Out = Path("exported"),
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Repack a finished run for another engine, from its codes as they are: nothing is quantised again."""
    from llmcompress.pipeline.export import export as repack
    from llmcompress.report.console import print_exported

    made = repack(folder, to, out_, overwrite=overwrite, trust_remote_code=trust_remote_code).facts
    print_exported(made.target, (made.artefact_bytes, made.size_bytes), made.kinds, made.notes, out)
    out.print(f"The export lies in {out_}.", soft_wrap=True, highlight=False, markup=False)


@app.command()
def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Folder that `run` wrote, or user/name@revision on the Hub.",
            show_default=False,
        ),
    ],
    base: options.Base = None,
    data: options.Data = None,
    out_: options.OptionalOut = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run the recipe of a finished run again and compare: bit-equal, equal within tolerance, or what differs.

    Without --out, the second result is not kept.
    """
    from llmcompress.pipeline.reproduce import reproduce as run_again
    from llmcompress.report.console import print_reproduction

    found = run_again(
        name,
        base=base,
        data=data,
        out=out_,
        overwrite=overwrite,
        device=device,
        trust_remote_code=trust_remote_code,
        track=track,
    )
    print_reproduction(found.verdict, found.differences, found.reported, found.again, out)
    if found.verdict == "different":
        sys.exit(AcceptError.exit_code)


@app.command()
def recipes(as_json: options.AsJson = False) -> None:
    """List the shipped recipes by purpose: what each leaves, what it costs, and what loads the result."""
    from llmcompress.cli.recipe_list import print_entries
    from llmcompress.recipe import catalogue

    entries = catalogue.entries()
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in entries], indent=2))
    else:
        print_entries(entries)


@app.command()
def families(
    types: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TYPE]...", help="model_type of a config.json. Default: all.", show_default=False
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the types of models that transformers has, and what can be done to each. All take two minutes."""
    from llmcompress.pipeline.families import known_families
    from llmcompress.report.console import print_families

    found = known_families(types or (), track)
    if as_json:
        typer.echo(json.dumps([asdict(facts) for facts in found], indent=2))
    else:
        print_families(found, out)


@app.command()
def doctor(as_json: options.AsJson = False) -> None:
    """Show the installed packages, what the machine can do, and which kernels run here."""
    from llmcompress.cli.doctor import examine, print_facts

    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_facts(facts)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with which an editor completes and checks them."""
    from llmcompress.recipe.recipe import Recipe

    typer.echo(Recipe.json_schema(), nl=False)


def main() -> None:
    """The command `llmcompress`."""
    writes = os.environ.get("RANK", "0") == "0"  # other ranks log errors only
    with interrupt.one_line(), logs.shown_on(err, logging.INFO if writes else logging.ERROR):
        try:
            app()
        except CompressError as error:
            err.print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True, highlight=False)
            sys.exit(error.exit_code)


def _plain(error: CompressError) -> str:
    from rich.markup import escape

    return escape(error.on_command_line())
