"""What can happen to a file, and what a folder holds, as bytes to compare."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

# hold times, and may differ between two runs
TOLD = ("report.json", "report.html", "README.md", ".eval_results/llmcompress.yaml")


def flip(file: Path, draw: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, draw: random.Random) -> None:
    """Keep the head of the file alone."""
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(max(1, len(content)))])


def empty(file: Path, draw: random.Random) -> None:
    """Leave no byte."""
    file.write_bytes(b"")


def remove(file: Path, draw: random.Random) -> None:
    """Delete the file."""
    file.unlink()


def garble(file: Path, draw: random.Random) -> None:
    """Put random bytes in its place."""
    file.write_bytes(draw.randbytes(max(16, file.stat().st_size)))


def folder(file: Path, draw: random.Random) -> None:
    """Put a folder in its place."""
    file.unlink()
    file.mkdir()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, cut, empty, remove, garble, folder)


def content_of(folder: Path) -> dict[str, str]:
    """The hash of every file of an artefact by name, but for those that tell how long it took, and
    pictures."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    kept = {name: path for name, path in named.items() if name not in TOLD and path.suffix != ".png"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def clear(path: Path) -> None:
    """Delete whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
