"""The models that are measured, and the text that calibrates and evaluates each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from evaluation.results import ROOT

SHARED = ROOT.parent / "shared"  # models and texts beside the checkout; the demo model needs neither
LENGTH = 256  # tokens of a sequence


class Subject(NamedTuple):
    """A model by name or folder, and its text by name or folder."""

    base: str
    text: str


MODELS = {
    "demo": Subject("demo", "python-docs"),
    "wikilm-8m": Subject(str(SHARED / "models" / "wikilm-8m"), str(SHARED / "data" / "wikitext-2")),
    "stories260k": Subject(str(SHARED / "models" / "stories260K"), str(SHARED / "data" / "tinystories")),
}


def present() -> list[str]:
    """The names of the models that lie on this machine."""
    return [name for name, subject in MODELS.items() if name == "demo" or Path(subject.base).is_dir()]
