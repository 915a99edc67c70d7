"""Markdown tables, and the place between two marks where one stands in a file."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def between(text: str, name: str, made: str) -> str:
    """A text with what stands between `<!-- NAME -->` and `<!-- end NAME -->` made new."""
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    return f"{before}<!-- {name} -->\n{made}{end}{after}"
