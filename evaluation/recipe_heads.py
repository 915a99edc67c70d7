"""The measured lines in the head of each recipe, and the table of all recipes in recipes/README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.baselines import AGAINST, MEANING
from evaluation.markdown import between, table
from evaluation.results import FidelityRow, GgufRow, Loss, modern

Results = Mapping[str, Mapping[str, FidelityRow]]  # model -> recipe -> its row
FIRST = "# measured (evaluation/results/fidelity-*.json; small models):"
FIRST_GGUF = "# measured (evaluation/results/gguf.json; small models):"
LLAMA_CPP = "llama.cpp"  # who rounded the other rows of gguf.json
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


def gguf_head(recipe: str, rows: Sequence[GgufRow]) -> str:
    """The measured lines of the recipe of a llama.cpp format, which has its name; its seconds were not
    measured."""
    lines = []
    for row in _ours(recipe, rows):
        theirs = [other for other in rows if _same(other, row) and other.rounding == LLAMA_CPP]
        times = [f"{row.kl_nats_mean / other.kl_nats_mean:.3f} x llama.cpp's rounding" for other in theirs]
        loss = f"KL {row.kl_nats_mean:.5f} nats" + "".join(f" ({words} at the same bytes)" for words in times)
        lines.append(f"#   {row.model}: {loss}, perplexity {row.base_perplexity:.3f} -> {row.perplexity:.3f}")
    return "\n".join([FIRST_GGUF, *lines]) + "\n" if lines else ""


def _ours(recipe: str, rows: Sequence[GgufRow]) -> list[GgufRow]:
    return [row for row in rows if row.format == recipe and row.rounding != LLAMA_CPP]


def _same(one: GgufRow, other: GgufRow) -> bool:
    return (one.model, one.format) == (other.model, other.format)


def with_head(text: str, recipe: str, results: Results, gguf: Sequence[GgufRow] = ()) -> str:
    """A recipe's text with its measured lines replaced."""
    found = head(recipe, results) or gguf_head(recipe, gguf)
    return HEAD.sub(lambda above: above[1] + found, text)


def texts(folder: Path, results: Results, gguf: Sequence[GgufRow] = ()) -> dict[Path, str]:
    """What each recipe of a folder, and the table of them, should say."""
    files = sorted(folder.glob("*.yaml"))
    wanted = {file: with_head(file.read_text("utf-8"), modern(file.stem), results, gguf) for file in files}
    index = folder / "README.md"
    if index.is_file():
        wanted[index] = between(index.read_text("utf-8"), "recipes", _index(files, results, gguf))
    return wanted


def _index(files: Sequence[Path], results: Results, gguf: Sequence[GgufRow]) -> str:
    """A row for each recipe: what it does, and for each model its KL and bytes."""
    header = ["recipe", "what it does"]
    header += [f"{model}: KL, nats/token" for model in results]
    header += [f"{model}: MB" for model in results]
    lines = []
    for file in files:
        found = [rows.get(modern(file.stem)) for rows in results.values()]
        about = file.read_text("utf-8").splitlines()[0].removeprefix("# ")
        others: dict[str, Loss] = {row.model: row for row in _ours(file.stem, gguf)}
        lost = [row or others.get(model) for model, row in zip(results, found, strict=True)]
        losses = [f"{row.kl_nats_mean:.5f}" if row else "" for row in lost]
        sizes = [f"{row.size_bytes / 1e6:.2f}" if row else "" for row in found]
        lines.append([f"[{file.stem}]({file.name})", about, *losses, *sizes])
    return table(header, lines)
