"""The command line: parsing, progress bars and exit codes; what a command does lies elsewhere.

Exit code 0 = done, 2 = the input is wrong (one line, no traceback), 3 = the result misses what the recipe
accepts, 1 = a bug, 130 = interrupted by Ctrl-C and 143 = by SIGTERM (one line).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llmcompress.cli import interrupt
from llmcompress.errors import AcceptError, CompressError

app = typer.Typer(
    name="llmcompress",
    help="Make a causal language model small by a recipe, and say what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

Recipe = Annotated[
    str,
    typer.Argument(help="Recipe file (.yaml), folder with a recipe.yaml, or Hub id.", show_default=False),
]
BaseModel = Annotated[
    str | None, typer.Option("--base", help="Folder or Hub id of the model, in place of the recipe's.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=(
            "Hub data set, .txt/.jsonl/.parquet file, folder of them, python-docs; or "
            "'{source: ..., config: ...}'."
        ),
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; the first GPU where there is one.")
]


def track(things: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """A progress bar on stderr while `things` go by; a line at the end where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield from progress.track(things, total=count, description=what)


@app.command()
def run(
    recipe: Recipe,
    out_: Annotated[Path, typer.Option("--out", help="Folder for the result.")] = Path("compressed"),
    base: BaseModel = None,
    data: Data = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result.")] = False,
    device: Device = None,
) -> None:
    """Compress a model: run a recipe and write the result. After a crash, the same command goes on where it
    was."""
    from llmcompress.integrations import distributed
    from llmcompress.modeling.sequential import untracked
    from llmcompress.pipeline.run import run_recipe
    from llmcompress.recipe.recipe import Recipe
    from llmcompress.report.console import print_report

    steps, shown = Recipe.from_pretrained(recipe), track if distributed.first() else untracked
    report = run_recipe(steps, out_, base=base, data=data, overwrite=overwrite, device=device, track=shown)
    if not distributed.first():
        return
    print_report(report, out)
    out.print(
        f"The compressed model lies in {out_}; load it with "
        f"AutoModelForCausalLM.from_pretrained({str(out_)!r})."
    )


@app.command()
def plan(recipe: Recipe, base: BaseModel = None, device: Device = None) -> None:
    """Say what a run would give and cost (parameters, bytes, memory, time) from the model's shapes alone; run
    nothing."""
    from llmcompress.pipeline.plan import plan_recipe
    from llmcompress.recipe.recipe import Recipe
    from llmcompress.report.console import print_plan

    plan = plan_recipe(Recipe.from_pretrained(recipe), base=base, device=device)
    print_plan(plan.rows, plan.notes, out)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.", show_default=False)],
    against: Annotated[
        str | None, typer.Option("--against", help="Base to compare with: KL, top-1 agreement.")
    ] = None,
    data: Data = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file as well.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens in a window.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of text.")] = 64,
    device: Device = None,
) -> None:
    """Measure a model: perplexity with its interval, bytes, tokens/s, and the distance from a base."""
    from llmcompress.data.sources import PYTHON_DOCS, DataSpec
    from llmcompress.io.destination import require_file, write_file
    from llmcompress.pipeline.evaluate import evaluate as measure
    from llmcompress.report.console import print_evaluation

    if json_file is not None:
        require_file(json_file, "--json")
    spec = DataSpec(length=length, samples=1, evaluation_samples=samples).with_text(data or PYTHON_DOCS)
    result = measure(model, against=against, data=spec, device=device, track=track)
    print_evaluation(result.to_dict(), out)
    if json_file is not None:
        write_file(json_file, json.dumps(result.to_dict(), indent=2) + "\n", "--json")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `run` wrote.", show_default=False)],
) -> None:
    """Print the report of a finished run."""
    from llmcompress.report.console import print_report
    from llmcompress.report.schema import Report

    print_report(Report.of(folder), out)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that `run` wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Where it goes: user/name.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.")] = None,
) -> None:
    """Share a finished run on the Hub: weights, card, report and recipe in one commit. After a broken upload,
    run it again."""
    from llmcompress.pipeline.push import push as send

    pushed = send(folder, repo, private=private, message=message)
    out.print(
        f"{folder} is at {pushed.url}, commit {pushed.commit}", soft_wrap=True, highlight=False, markup=False
    )


@app.command()
def reproduce(
    name: Annotated[
        str, typer.Argument(help="A folder that `run` wrote, or user/name@revision.", show_default=False)
    ],
    base: BaseModel = None,
    data: Data = None,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Keep the second artefact in this folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result there.")] = False,
    device: Device = None,
) -> None:
    """Run the recipe of a finished run again and say what came out: bit-equal, equal within tolerance, or
    what differs."""
    from llmcompress.pipeline.reproduce import reproduce as run_again
    from llmcompress.report.console import print_reproduction

    found = run_again(name, base=base, data=data, out=out_, overwrite=overwrite, device=device, track=track)
    print_reproduction(found.verdict, found.differences, found.reported, found.again, out)
    if found.verdict == "different":
        sys.exit(AcceptError.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with which an editor completes and checks them."""
    from llmcompress.recipe.recipe import Recipe

    print(Recipe.json_schema(), end="")


def main() -> None:
    """The command `llmcompress`."""
    with interrupt.one_line():
        try:
            app()
        except CompressError as error:
            err.print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True, highlight=False)
            sys.exit(error.exit_code)


def _plain(error: CompressError) -> str:
    from rich.markup import escape

    return escape(str(error))
