"""Odd words on the command line and in recipes: one line each, and nothing left behind."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from tests.campaign.bench import Bench, Count
from tests.campaign.forked import Ended, run

ODD = (
    *(
        "",
        " ",
        "~nobody/x",
        "~nobody",
        "~",
        "x" * 5000,
        "a/" * 2000,
        "nul\0byte",
        "\udcff\udcfe",
        "\ud800",
        "../..",
        "/",
    ),
    *(
        "-1",
        "1e999",
        "{",
        "[" * 10_000,
        "{source: [}",
        "user/name@",
        "@",
        "user/name@x@y",
        "\x1b[31m",
        "\n",
        "CON",
        ".",
    ),
)
NUMBERS = (
    "0",
    "-1",
    "1" + "0" * 400,
    ".inf",
    ".nan",
    "1.0e+400",
    "nope",
    "[]",
    "{}",
    "true",
    "null",
    '"\\ud800"',
)
FIELDS = (
    *(
        "data.samples",
        "data.length",
        "data.seed",
        "data.evaluation_samples",
        "data.source",
        "data.column",
        "data.config",
    ),
    *("prune.axis", "prune.keep", "prune.parameters", "prune.size", "prune.multiple", "prune.score"),
    *(
        "distill.steps",
        "distill.batch",
        "distill.learning_rate",
        "distill.loss",
        "distill.length",
        "distill.trackers",
    ),
    *(
        "quantize.format",
        "quantize.group_size",
        "quantize.rounding",
        "quantize.protect",
        "quantize.overrides",
        "quantize.threshold",
    ),
    *("accept.kl_nats", "tie.codebook", "tie.basis", "tie.groups", "schema", "base", "revision"),
)


def words(bench: Bench, tries: int) -> Count:
    """Draw `tries` of the pairs of a place on the command line, or a field of a recipe, and an odd word."""
    count = Count("words")
    cases = [*product(PLACES, ODD), *product(FIELDS, NUMBERS)]
    for place, (where, word) in zip(
        bench.places("word", tries), bench.draw.sample(cases, k=min(tries, len(cases))), strict=False
    ):
        ended = run(
            bench.folder,
            *_spelled(bench, place, where, word),
            env={"LLMCOMPRESS_CACHE": str(bench.folder / "cache")},
        )
        fault = ended.crashed or _left(place, ended)
        count.ended(f"code {ended.code}", f"{where} {word[:40]!r}: {fault}" if fault else None)
    return count


PLACES = (
    "recipe",
    "--base",
    "--data",
    "--out",
    "--device",
    "evaluate",
    "--against",
    "--json",
    "report",
    "compare",
    "--html",
    "reproduce",
    "push",
)


def _spelled(bench: Bench, place: Path, where: str, word: str) -> tuple[str, ...]:
    """The command line that has an odd word at a place."""
    out, base, text = str(place / "out"), str(bench.folder / "base"), str(bench.folder / "facts.txt")
    recipe, artefact = str(bench.folder / "short.yaml"), str(bench.folder / "expected-short")
    run_it = {"recipe": recipe, "--base": base, "--data": text, "--out": out, "--device": "cpu"}
    if where in run_it:
        said = run_it | {where: _inside(place, word) if where == "--out" else word}
        return ("run", said.pop("recipe"), *(part for pair in said.items() for part in pair))
    if where == "evaluate":
        return ("evaluate", word, "--data", text, "--length", "24", "--samples", "2")
    if where in ("--against", "--json"):
        word = _inside(place, word) if where == "--json" else word
        return ("evaluate", base, "--data", text, "--length", "24", "--samples", "2", where, word)
    if where == "report":
        return ("report", word)
    if where == "compare":
        return ("compare", artefact, word)
    if where == "--html":
        return ("compare", artefact, str(place), where, _inside(place, word))
    if where == "reproduce":
        return ("reproduce", word, "--out", out)
    if where == "push":
        return ("push", artefact, word)
    (place / "recipe.yaml").write_text(_recipe(text, where, word))
    return ("run", str(place / "recipe.yaml"), "--base", base, "--out", out)


def _inside(place: Path, word: str) -> str:
    """The word as a path below a place, so that nothing is written elsewhere."""
    return f"{place}/{word}"


def _recipe(text: str, field: str, word: str) -> str:
    """A recipe with an odd value in one field."""
    stage, _, key = field.partition(".")
    data = {"source": json.dumps(text), "samples": "8", "length": "24", "evaluation_samples": "4"}
    stages = {"prune": {"axis": "ffn", "keep": "0.5"}, "distill": {"steps": "2"}, "tie": {}}.get(
        stage, {"format": "nf4"}
    )
    if stage == "data":
        data[key] = word
    elif stage in ("prune", "distill", "tie", "quantize"):
        stages[key] = word
    name = stage if stage in ("prune", "distill", "tie") else "quantize"
    lines = [f"data: {_mapping(data)}", f"stages: [{{{name}: {_mapping(stages)}}}]"]
    if stage == "accept":
        lines.append(f"accept: {{{key}: {word}}}")
    elif not key:
        lines.append(f"{stage}: {word}")
    return "\n".join(lines) + "\n"


def _mapping(entries: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in entries.items()) + "}"


def _left(place: Path, ended: Ended) -> str | None:
    """What a refused command left behind, where it worked or in its TMPDIR."""
    left = sorted(path.name for path in place.iterdir() if path.name != "recipe.yaml")
    if ended.code == 2 and left:
        return f"a refused command left {left}"
    return f"{ended.left} left in TMPDIR" if ended.left else None
