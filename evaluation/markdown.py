"""Markdown tables, and the place between two marks of a file where one stands."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every row has as many cells as the header."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def between(text: str, name: str, content: str) -> str:
    """The text with `content` between `<!-- NAME -->` and `<!-- end NAME -->`; unchanged without them."""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    return f"{before}{begin}{content}{end}{after}" if begin and end else text
