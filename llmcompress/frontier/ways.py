"""What a linear may become: formats of `quantize` that can stand beside each other in one model.

A palette is a set of such ways. Linears in bitsandbytes' 4-bit layout stand beside each other and beside
plain ones, whatever their groups, and so do those in LLM.int8's, but not the two layouts. The plug-in mixes
all of its formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmcompress.formats.schemes import QuantScheme
from llmcompress.stages.budget.stage import Loader
from llmcompress.stages.quantize.config import FormatConfig

KEPT = "kept"


@dataclass(frozen=True, eq=False)
class Way:
    """One way: its name, and the settings of `quantize` that it stands for; without any the linear stays."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def coding(self, dtype: torch.dtype) -> QuantScheme | None:
        """The scheme of a linear in a model stored in `dtype`, or None if it stays."""
        return FormatConfig(**self.settings).coding(dtype) if self.settings else None


@dataclass(frozen=True)
class Palette:
    """Ways that can stand beside each other, by falling size; `native` if plain transformers loads them."""

    ways: tuple[Way, ...]
    native: bool


KEEP = Way(KEPT)
NF4 = {"format": "nf4", "double_quant": True}
FOUR_BITS = (
    Way("nf4, groups of 32", {"format": "nf4", "group_size": 32}),
    Way("nf4", {"format": "nf4"}),
    Way("nf4, double", NF4),
    Way("nf4, double, groups of 256", {**NF4, "group_size": 256}),
)
INT8 = Way("int8", {"format": "int8"})
NATIVE = (Palette((KEEP, *FOUR_BITS), native=True), Palette((KEEP, INT8), native=True))
EIGHT_BITS = Way("w8a16", {"format": "w8a16"})
MIXED = Palette(
    (
        KEEP,
        EIGHT_BITS,
        *FOUR_BITS[:3],
        *(Way(f"codebook of {size}", {"format": "codebook", "entries": size}) for size in (16, 8, 4)),
    ),
    native=False,
)


EXPORTED = {
    "gguf": Palette(
        (KEEP, EIGHT_BITS, *(Way(name, {"format": name}) for name in ("iq4_nl", "q4_0"))), native=False
    ),
    "compressed-tensors": Palette(
        (
            KEEP,
            EIGHT_BITS,
            *(
                Way(f"w4a16, groups of {size}", {"format": "w4a16", "group_size": size})
                for size in (32, 64, 128)
            ),
        ),
        native=False,
    ),
}


def palettes(loads_with: Loader) -> tuple[Palette, ...]:
    """The palettes that a loader allows; what plain transformers loads, the plug-in loads too, and an export
    holds what the plug-in mixes."""
    if loads_with in EXPORTED:
        return (EXPORTED[loads_with],)
    return NATIVE if loads_with == "transformers" else (*NATIVE, MIXED)


def ways_of(offered: Sequence[Palette]) -> list[Way]:
    """All ways of some palettes, once."""
    return list({way.name: way for palette in offered for way in palette.ways}.values())
