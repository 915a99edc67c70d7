"""Characters that show nothing, or steer what shows them, spelled out: controls and marks of direction."""

from __future__ import annotations

import unicodedata

KEPT = "\n\t\u200c\u200d"  # the last two join or part letters, and are needed to spell some languages
SPELLED_OUT = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode


def visible(text: str) -> str:
    """The text with such characters as their numbers, as in ⟨U+202E⟩."""
    return "".join(_spelled(character) for character in text)


def _spelled(character: str) -> str:
    if character in KEPT or unicodedata.category(character) not in SPELLED_OUT:
        return character
    return f"⟨U+{ord(character):04X}⟩"
