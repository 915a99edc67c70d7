"""The sha256 of each file of a folder, written beside them, so that what is read later is what was written.

A damage of the disk or a write that was cut short shows; it is no protection from whoever may write there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "sha256.json"
PIECE = 1 << 24  # bytes that are read at a time


def file_digest(file: Path) -> str:
    """sha256 of what is in a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def manifest_of(folder: Path) -> str:
    """The text of the manifest of a folder: every file in it, and below it, by name."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir() and file != folder / MANIFEST)
    return (
        json.dumps({file.relative_to(folder).as_posix(): file_digest(file) for file in files}, indent=2)
        + "\n"
    )


def is_sound(folder: Path) -> bool:
    """Whether a folder holds a manifest, the files that it names as they were written, and no others; reads
    all of them."""
    try:
        return (folder / MANIFEST).read_bytes() == manifest_of(folder).encode()
    except OSError:
        return False
