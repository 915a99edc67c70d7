"""The list of shipped recipes, as `llmcompress recipes` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from llmcompress.cli.terminal import out, print_table
from llmcompress.io.units import NONE, duration
from llmcompress.recipe.catalogue import NATIVE, PLUGIN, TRANSFORMERS, Entry, Measured

HEADER = ("recipe", "leaves", "KL", "time", "also needs")
MODEL = "demo"  # the model whose numbers are shown, if a recipe has them
NEEDS = {TRANSFORMERS: NONE, NATIVE: "bitsandbytes", PLUGIN: "llmcompress"}
NOTE = (
    f"KL(base || compressed) in nats/token and time are those of the small model {MODEL}, or of the one that "
    "is named. They compare recipes and do not predict a larger model; `llmcompress plan RECIPE --base "
    "MODEL` estimates yours. `also needs` is what loads the result beside transformers; llmcompress must be "
    "imported first."
)


def print_entries(entries: Sequence[Entry]) -> None:
    """Print one table per purpose."""
    for purpose, group in groupby(entries, key=lambda entry: entry.purpose):
        print_table(purpose, HEADER, [_row(entry) for entry in group], right=(2, 3))
    out.print(Text(NOTE, style="dim"))


def _row(entry: Entry) -> tuple[str, ...]:
    measured, needs = _shown(entry.measured), NEEDS[entry.loads_with]
    if measured is None:
        return entry.name, entry.leaves, NONE, NONE, needs
    where = "" if measured.model == MODEL else f" ({measured.model})"
    return entry.name, entry.leaves, f"{measured.kl_nats:.5f}{where}", duration(measured.seconds), needs


def _shown(measured: Sequence[Measured]) -> Measured | None:
    """The measurement that is shown: that of MODEL, else the first."""
    return next((one for one in measured if one.model == MODEL), measured[0] if measured else None)
