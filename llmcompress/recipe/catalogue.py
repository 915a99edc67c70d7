"""What each shipped recipe is for, read from its file: the comment at its head and its stages.

The head says what the recipe does and what was measured. What is left of a model and what loads the result
follow from the stages alone. No model is read, so facts that depend on a model are given for the usual case:
a linear that a format can't store keeps its dtype.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmcompress.errors import RecipeError
from llmcompress.recipe import shipped
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import Stage

PURPOSES = (
    "first try",
    "8 bits per weight",
    "4 bits per weight",
    "prune and quantise",
    "fewer parameters",
    "sparse weights",
    "shared or factorised weights",
    "distillation",
)
TRAINED = "distillation"
TRANSFORMERS, NATIVE, PLUGIN = "transformers", "transformers and bitsandbytes", "import llmcompress"
MODELS = {  # the measured models by their parameters
    "stories260k": 260_032,
    "demo": 1_894_464,
    "wikilm-8m": 8_392_960,
    "smollm2-135m": 134_515_008,
}
MEASURED = re.compile(
    r"#\s+(?P<model>\S+): KL (?P<kl>[0-9.]+) nats(?: \((?P<against>.*)\))?, "
    r"perplexity (?P<before>[0-9.]+) -> (?P<after>[0-9.]+)(?:, (?P<seconds>[0-9.]+) s)?"
)


@dataclass(frozen=True)
class Measured:
    """The measured cost of a recipe on one model, from its head: KL in nats/token, perplexities, seconds."""

    model: str
    kl_nats: float
    base_perplexity: float
    perplexity: float
    seconds: float | None  # None where they were not measured
    against: str | None  # the KL relative to a baseline, in words


@dataclass(frozen=True)
class Entry:
    """One shipped recipe."""

    name: str
    purpose: str  # one of PURPOSES
    does: str
    stages: tuple[str, ...]
    leaves: str  # what is left of the model
    loads_with: str
    measured: tuple[Measured, ...]

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON-compatible values."""
        return asdict(self)


def entries() -> list[Entry]:
    """All shipped recipes, sorted by purpose and then by name. Errors: RecipeError."""
    found = [entry(name, shipped.path_of(name).read_text("utf-8")) for name in shipped.names()]
    return sorted(found, key=lambda one: (PURPOSES.index(one.purpose), one.name))


def entry(name: str, text: str) -> Entry:
    """Return the entry for the text of a recipe. Errors: RecipeError."""
    try:
        recipe = Recipe.parse(text)
    except RecipeError as error:
        raise RecipeError(
            f"shipped recipe {name} can't be read ({error}); install llmcompress again"
        ) from None
    does, measured = _head(text)
    return Entry(
        name=name,
        purpose="first try" if recipe.base is not None else _purpose(recipe.stages),
        does=does,
        stages=tuple(stage.name for stage in recipe.stages),
        leaves="; ".join(stage.leaves for stage in recipe.stages if stage.leaves) or "the whole model",
        loads_with=_loads_with(recipe.stages),
        measured=measured,
    )


def _head(text: str) -> tuple[str, tuple[Measured, ...]]:
    """Split the comment at the head into its description and its measurements."""
    words, measured = list[str](), list[Measured]()
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if found := MEASURED.fullmatch(line):
            kl, before, after = (float(found[group]) for group in ("kl", "before", "after"))
            seconds = float(found["seconds"]) if found["seconds"] else None
            measured.append(Measured(found["model"], kl, before, after, seconds, found["against"]))
        elif not line.startswith(("# measured", "# yaml-language-server")):
            words.append(line.lstrip("# "))
    return " ".join(words), tuple(measured)


def _purpose(stages: Sequence[Stage]) -> str:
    """The section of the list in which a recipe appears."""
    coded = [stage.weight_bits[0] for stage in stages if stage.weight_bits is not None]
    sections = [stage.section for stage in stages if stage.weight_bits is None and stage.section != TRAINED]
    if coded and sections:
        return "prune and quantise"
    if coded:
        return "8 bits per weight" if max(coded) >= 8 else "4 bits per weight"
    return next((section for section in PURPOSES[::-1] if section in sections), TRAINED)


def _loads_with(stages: Sequence[Stage]) -> str:
    """The packages that must be imported to load the result."""
    if any(stage.needs_plugin for stage in stages):
        return PLUGIN
    return NATIVE if any(stage.quantizes for stage in stages) else TRANSFORMERS
