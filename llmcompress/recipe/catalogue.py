"""What each shipped recipe is for, read from its file: the comment at its head and its stages.

The head says what the recipe does and what was measured of it. What is left of a model and what loads the
result follow from the stages alone. No model is read, so what depends on one is said as it is for most: a
linear that a format cannot take keeps its dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmcompress.errors import RecipeError
from llmcompress.io.safe_parsing import Unreadable, yaml_of
from llmcompress.recipe import shipped
from llmcompress.recipe.recipe import LARGEST

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
TRANSFORMERS, NATIVE, PLUGIN = "transformers", "transformers and bitsandbytes", "import llmcompress"
NATIVE_FORMATS = ("nf4", "fp4", "int8")
UNITS = {
    "ffn": "feed-forward neurons",
    "kv": "key-value heads",
    "q": "query heads",
    "expert": "experts",
    "hidden": "hidden channels",
    "layer": "layers",
    "sublayer": "attentions and feed-forward parts",
}
INNER = {"ffn", "kv", "q"}  # axes that can have a width of their own in each layer
PARTS = {"ffn": "feed-forward", "attention": "attention"}
NESTED = 8 + 32 / 256  # bits of a scale with double_quant: 8, and a float32 for 256 of them
MEASURED = re.compile(
    r"#\s+(?P<model>\S+): KL (?P<kl>[0-9.]+) nats(?: \((?P<against>.*)\))?, "
    r"perplexity (?P<before>[0-9.]+) -> (?P<after>[0-9.]+), (?P<seconds>[0-9.]+) s"
)
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a recipe cost on one model, as its head says: KL in nats/token, perplexities, seconds."""

    model: str
    kl_nats: float
    base_perplexity: float
    perplexity: float
    seconds: float
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
        """The entry as JSON has it."""
        return asdict(self)


def entries() -> list[Entry]:
    """All shipped recipes, by purpose and then by name. Errors: RecipeError."""
    found = [entry(name, shipped.path_of(name).read_text("utf-8")) for name in shipped.names()]
    return sorted(found, key=lambda one: (PURPOSES.index(one.purpose), one.name))


def entry(name: str, text: str) -> Entry:
    """What the text of a recipe says of it. Errors: RecipeError."""
    try:
        fields = yaml_of(text, largest=LARGEST)
    except Unreadable as error:
        raise RecipeError(f"shipped recipe {name} {error}; install llmcompress again") from None
    does, measured = _head(text)
    stages = [_stage(given) for given in fields["stages"]]
    left = [words for words in (_left(*stage) for stage in stages) if words]
    return Entry(
        name=name,
        purpose="first try" if "base" in fields else _purpose(stages),
        does=does,
        stages=tuple(stage for stage, _ in stages),
        leaves="; ".join(left) or "the whole model",
        loads_with=_loads_with(stages),
        measured=measured,
    )


def _head(text: str) -> tuple[str, tuple[Measured, ...]]:
    """What the comment at the head says: in words, and measured."""
    words, measured = list[str](), list[Measured]()
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if found := MEASURED.fullmatch(line):
            kl, before, after, seconds = (
                float(found[group]) for group in ("kl", "before", "after", "seconds")
            )
            measured.append(Measured(found["model"], kl, before, after, seconds, found["against"]))
        elif not line.startswith(("# measured", "# yaml-language-server")):
            words.append(line.lstrip("# "))
    return " ".join(words), tuple(measured)


def _stage(given: str | Mapping[str, Settings | None]) -> tuple[str, Settings]:
    """The name of a stage and its settings."""
    if isinstance(given, str):
        return given, {}
    name, settings = next(iter(given.items()))
    return name, settings or {}


def _purpose(stages: list[tuple[str, Settings]]) -> str:
    """The section of the list that a recipe stands in."""
    settings = dict(stages)
    bits = max((_bits(*stage)[0] for stage in stages if stage[0] in ("quantize", "codebook")), default=None)
    smaller = settings.keys() & {"prune", "sparsify", "share", "low_rank", "tie"}
    if bits is not None:
        return "prune and quantise" if smaller else "8 bits per weight" if bits >= 8 else "4 bits per weight"
    if "sparsify" in smaller:
        return "sparse weights"
    if smaller & {"share", "low_rank", "tie"}:
        return "shared or factorised weights"
    return "fewer parameters" if smaller else "distillation"


def _bits(stage: str, settings: Settings) -> tuple[float, float]:
    """The least and the most bits per weight of the linears that a stage quantises, scales included."""
    if stage == "codebook":
        bits = math.ceil(math.log2(settings.get("entries", 16)))
        return bits, bits
    own = settings.get("format", "nf4")
    layouts = [settings]
    for override in settings.get("overrides", {}).values():
        same = override.get("format", own) == own  # one that names another format has that format's defaults
        layouts.append({**settings, **override} if same else override)
    bits_of = [_bits_of(layout) for layout in layouts]
    return min(bits_of), max(bits_of)


def _bits_of(layout: Settings) -> float:
    """Bits per weight of a linear in a format of `quantize`."""
    format, group = layout.get("format", "nf4"), layout.get("group_size") or 64
    if format in ("nf4", "fp4"):
        return 4 + (NESTED if layout.get("double_quant") else 32) / group
    return 4 + 8 / group if format.startswith("w4") else 8


def _left(stage: str, settings: Settings) -> str:
    """What a stage leaves of the model, in words; nothing where it changes no size."""
    if stage == "prune":
        return _left_of_units(settings)
    if stage == "sparsify":
        kept = settings.get("keep", 0.5)
        pattern = settings.get("pattern", "unstructured")
        return f"{_percent(kept)} of the weights" + ("" if pattern == "unstructured" else f", {pattern}")
    if stage == "tie":
        return "one matrix for embedding and head"
    if stage == "share":
        parts = " and ".join(PARTS[part] for part in settings.get("parts", ["ffn"]))
        if "pairs" in settings:
            groups = len(settings["pairs"])
            return f"one set of {parts} weights in {groups} group{'s' if groups > 1 else ''} of layers"
        return f"{settings.get('groups', 'fewer')} sets of {parts} weights"
    if stage == "low_rank":
        rank = settings.get("rank")
        return (
            f"linears of rank {rank}"
            if rank
            else f"{_percent(settings.get('keep', 0.75))} of the parameters of linears"
        )
    if stage == "codebook":
        return (
            f"{settings.get('entries', 16)} values per {settings.get('per', 'row')}, "
            f"{_bits(stage, settings)[0]:g} bits per weight"
        )
    if stage != "quantize":
        return ""
    least, most = _bits(stage, settings)
    words = (
        f"{_short(least)} bits per weight"
        if least == most
        else f"{_short(least)} to {_short(most)} bits per weight"
    )
    if settings.get("protect") and settings.get("format", "nf4") in NATIVE_FORMATS:
        words += f", {_percent(settings['protect'])} of the weights kept in their dtype"
    return words + (", embedding in 8 bits" if settings.get("embedding") == "int8" else "")


def _left_of_units(settings: Settings) -> str:
    """What `prune` leaves."""
    if "parameters" in settings:
        share = settings["parameters"]
        return f"{_percent(share)} of the parameters" if share <= 1 else f"{share} parameters"
    if "size" in settings:
        return f"{settings['size']} before quantisation"
    axis = settings.get("axis", ())
    units = " and ".join(UNITS[one] for one in ([axis] if isinstance(axis, str) else axis))
    kept = settings.get("keep", 1.0)
    return f"{_percent(kept)} of the {units}" if kept < 1 else f"{kept} {units}"


def _loads_with(stages: list[tuple[str, Settings]]) -> str:
    """What must be imported to load the result."""
    for stage, settings in stages:
        if stage in ("sparsify", "share", "low_rank", "codebook") or (stage == "prune" and _uneven(settings)):
            return PLUGIN
    quantized = [settings for stage, settings in stages if stage == "quantize"]
    if not quantized:
        return TRANSFORMERS
    formats = {_native(settings.get("format", "nf4")) for settings in quantized}
    for settings in quantized:
        overrides = settings.get("overrides", {}).values()
        formats |= {_native(override["format"]) for override in overrides if "format" in override}
    whole = all(settings.get("embedding", "keep") == "keep" for settings in quantized)
    return NATIVE if whole and len(formats) == 1 and None not in formats else PLUGIN


def _native(format: str) -> str | None:
    """The layout of bitsandbytes that a format has; None for formats of llmcompress."""
    return None if format not in NATIVE_FORMATS else "int8" if format == "int8" else "4 bit"


def _uneven(settings: Settings) -> bool:
    """Whether `prune` gives each layer a width of its own, or takes parts of single layers."""
    axis = settings.get("axis", ())
    axes = {axis} if isinstance(axis, str) else set(axis)
    budget = "parameters" in settings or "size" in settings
    sensitive = settings.get("allocation", "sensitivity" if budget else "uniform") == "sensitivity"
    return "sublayer" in axes or (sensitive and axes <= INNER)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _short(bits: float) -> str:
    """Bits per weight with at most three decimals."""
    return f"{bits:.3f}".rstrip("0").rstrip(".")
