"""The measured lines in the head of each recipe, and the table of all recipes in recipes/README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.baselines import AGAINST, MEANING
from evaluation.markdown import between, table
from evaluation.results import FidelityRow, modern

Results = Mapping[str, Mapping[str, FidelityRow]]  # model -> recipe -> its row
FIRST = "# measured (evaluation/results/fidelity-*.json; small models):"
HEAD = re.compile(r"\A((?:#(?! measured).*\n)+)(?:# measured.*\n(?:#.*\n)*)?")


def ratio(rows: Mapping[str, FidelityRow], name: str) -> str:
    """The KL of a recipe over that of its baseline, or nothing where it has none."""
    base = AGAINST.get(name, "")
    return f"{rows[name].kl_nats_mean / rows[base].kl_nats_mean:.3f} x" if base in rows else ""


def _against(rows: Mapping[str, FidelityRow], name: str) -> str:
    """The ratio in words: to which baseline, at which bytes."""
    if not (times := ratio(rows, name)):
        return ""
    base = AGAINST[name]
    bytes_ratio = rows[name].size_bytes / rows[base].size_bytes
    size = "at the same bytes" if abs(bytes_ratio - 1) < 0.01 else f"at {bytes_ratio:.2f} x the bytes"
    return f" ({times} {MEANING[base]} {size})"


def head(recipe: str, results: Results) -> str:
    """The measured lines of a recipe's head; nothing where it was not measured."""
    lines = []
    for model, rows in results.items():
        if (row := rows.get(recipe)) is not None:
            loss = f"KL {row.kl_nats_mean:.5f} nats{_against(rows, recipe)}"
            perplexity = f"perplexity {row.base_perplexity:.3f} -> {row.perplexity:.3f}"
            lines.append(f"#   {model}: {loss}, {perplexity}, {row.seconds:.0f} s")
    return "\n".join([FIRST, *lines]) + "\n" if lines else ""


def with_head(text: str, recipe: str, results: Results) -> str:
    """A recipe's text with its measured lines replaced."""
    return HEAD.sub(lambda found: found[1] + head(recipe, results), text)


def texts(folder: Path, results: Results) -> dict[Path, str]:
    """What each recipe of a folder, and the table of them, should say."""
    files = sorted(folder.glob("*.yaml"))
    wanted = {file: with_head(file.read_text("utf-8"), modern(file.stem), results) for file in files}
    index = folder / "README.md"
    if index.is_file():
        wanted[index] = between(index.read_text("utf-8"), "recipes", _index(files, results))
    return wanted


def _index(files: Sequence[Path], results: Results) -> str:
    """A row for each recipe: what it does, and for each model its KL and bytes."""
    header = ["recipe", "what it does"]
    header += [f"{model}: KL, nats/token" for model in results]
    header += [f"{model}: MB" for model in results]
    lines = []
    for file in files:
        found = [rows.get(modern(file.stem)) for rows in results.values()]
        about = file.read_text("utf-8").splitlines()[0].removeprefix("# ")
        losses = [f"{row.kl_nats_mean:.5f}" if row else "" for row in found]
        sizes = [f"{row.size_bytes / 1e6:.2f}" if row else "" for row in found]
        lines.append([f"[{file.stem}]({file.name})", about, *losses, *sizes])
    return table(header, lines)
