"""Arguments and options that several commands have, each with one name and one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import llmcompress

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="File (.yaml), folder with a recipe.yaml, name of a shipped recipe (see `recipes`), or Hub id.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, Hub id, or demo.", show_default=False)
]
Artefact = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `run` wrote.", show_default=False)]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"llmcompress {llmcompress.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL", help="Folder, Hub id, or demo; in place of the base in the recipe."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        help=(
            "Hub data set, .txt/.jsonl/.parquet file, folder of them, python-docs, or "
            "'{source: ..., config: ...}'."
        ),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda or cuda:N. Default: the first GPU, or the CPU where there is none."
    ),
]
OUT = typer.Option("--out", metavar="DIR", help="Folder for the result.")
Out = Annotated[Path, OUT]
OptionalOut = Annotated[Path | None, OUT]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
