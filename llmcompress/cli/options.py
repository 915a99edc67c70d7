"""Arguments and options that several commands have, each with one name and one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import llmcompress
from llmcompress.errors import CompressError, argument
from llmcompress.io.units import seconds_of
from llmcompress.io.user_paths import shortened

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

Reported = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder that `run` or `search` wrote.", show_default=False),
]


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
EffortWord = Annotated[
    Literal["fast", "balanced", "best"] | None,
    typer.Option(
        "--effort",
        metavar="WORD",
        parser=str,  # the recipe refuses other words
        help="fast, balanced or best: how much text, rounding and steps, where the recipe does not say them. "
        "Default: the recipe's, else balanced.",
    ),
]


def _seconds(text: str) -> float:
    """Parse a duration. Raises CompressError for anything else, and for no time at all."""
    seconds = seconds_of(text)
    if not seconds:
        raise CompressError(
            f"{argument('time')} {shortened(text)} is no time; give one like 30m, 2h, 90s or 1h30m"
        )
    return seconds


TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time",
        metavar="TIME",
        parser=_seconds,
        help="30m, 2h, 90s or 1h30m: take the best effort that needs no more time on this machine.",
    ),
]
OUT = typer.Option("--out", metavar="DIR", help="Folder for the result.")
Out = Annotated[Path, OUT]
OptionalOut = Annotated[Path | None, OUT]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that the model brings along (auto_map in its configs). Read it first.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
