"""The sha256 of each file of a folder, written beside them, to check later that the files are as they were
written.

It reveals disk damage and truncated writes; it does not protect against anyone who may write there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "sha256.json"
PIECE = 1 << 24  # bytes read at a time


def file_digest(file: Path) -> str:
    """Return the sha256 of the content of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def manifest_of(folder: Path) -> str:
    """Return the manifest of a folder as text: every file in it and below it, by name."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir() and file != folder / MANIFEST)
    return (
        json.dumps({file.relative_to(folder).as_posix(): file_digest(file) for file in files}, indent=2)
        + "\n"
    )


def is_sound(folder: Path) -> bool:
    """Whether a folder holds a manifest, the files that it names as they were written, and no other files;
    reads all of them."""
    try:
        return (folder / MANIFEST).read_bytes() == manifest_of(folder).encode()
    except OSError:
        return False
