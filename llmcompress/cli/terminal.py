"""The two consoles of the command line, and how it prints tables.

Results go to stdout, and progress, notes and errors to stderr.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """Print rows of plain text on stdout; the first column is never folded, and columns in `right` are
    right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        header_style="dim",
        show_header=any(header),
        box=box.SIMPLE_HEAD,
    )
    for place, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if place in right else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
