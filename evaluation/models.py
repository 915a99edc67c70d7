"""The models that are measured, and the text that calibrates and evaluates each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from evaluation.reference_models import FIRST_LAYERS, FOLDER, SMOLLM2, WIDE
from evaluation.results import ROOT
from llmcompress.data.sources import DataSpec

SHARED = ROOT.parent / "shared"  # models and texts beside the checkout; the demo model needs neither
WIKITEXT = str(SHARED / "data" / "wikitext-2")
LENGTH = 256  # tokens of a sequence, on the small models


class Subject(NamedTuple):
    """A model by name or folder, its text by name or folder, and the sequences that are taken from it."""

    base: str
    text: str
    length: int = LENGTH
    samples: int = 256
    evaluation_samples: int = 64
    long: bool = False  # whether perplexity on sequences of 2048 tokens is measured too

    def data(self) -> DataSpec:
        """The sequences, of text alone without BOS, as the rivals read them too."""
        return DataSpec(
            source=self.text,
            samples=self.samples,
            length=self.length,
            evaluation_samples=self.evaluation_samples,
            bos=False,
        )


MODELS = {
    SMOLLM2: Subject(str(FOLDER / SMOLLM2), WIKITEXT, 512, 64, 32, long=True),
    "demo": Subject("demo", "python-docs"),
    "wikilm-8m": Subject(str(SHARED / "models" / "wikilm-8m"), WIKITEXT),
    "stories260k": Subject(str(SHARED / "models" / "stories260K"), str(SHARED / "data" / "tinystories")),
}
# those too on which time and memory are measured
SUBJECTS = MODELS | {
    FIRST_LAYERS: Subject(str(FOLDER / FIRST_LAYERS), WIKITEXT, 512, 64, 32),
    WIDE: Subject(str(FOLDER / WIDE), WIKITEXT, 512, 64, 8),
}


def present() -> list[str]:
    """The names of the models that lie on this machine."""
    return [name for name, subject in MODELS.items() if name == "demo" or Path(subject.base).is_dir()]
