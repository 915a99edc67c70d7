"""The table of all types in `docs/families.md`: `python -m tests.families_page` writes it, in a minute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers

from llmcompress.io.units import measured_percent
from llmcompress.pipeline.families import FamilyFacts, known_families
from llmcompress.report.console import LEVELS, ROTATIONS

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- types: written by `python -m tests.families_page` -->", "<!-- end of types -->"
LONGEST = 110  # characters of a reason


def section(facts: Sequence[FamilyFacts]) -> str:
    """The table and the sentence above it."""
    walked = sum(of.level > 0 for of in facts)
    axes = sum(of.level == 3 for of in facts)
    lines = [
        f"transformers {transformers.__version__} has {len(facts)} types of causal language models. {walked} "
        f"of them can be compressed, and the axes of {axes} are known.",
        "",
        "| `model_type` | known | of the layers' weights | `prune` | `rotate` | kept, or what is missing |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(row, facts)])


def row(of: FamilyFacts) -> str:
    """The line of one type."""
    share = measured_percent(of.share) if of.level else ""
    why = "; ".join(of.why).replace("|", r"\|")
    why = why if len(why) <= LONGEST else f"{why[:LONGEST]} ..."
    turns = ", ".join(ROTATIONS[turn] for turn in of.turns)
    cells = [f"`{of.model_type}`", LEVELS[of.level], share, ", ".join(of.axes), turns, why]
    return f"| {' | '.join(cells)} |"


def rows() -> dict[str, str]:
    """The lines of the page, by type."""
    table = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines[1:]}


def written(facts: Sequence[FamilyFacts]) -> str:
    """The page with the table of these facts."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section(facts)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(known_families()), "utf-8")
