"""Cache folders of a test's own, in which no C kernel has to be compiled again."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmcompress.io.cache import cache_folder


def own_cache(folder: Path) -> Path:
    """Make `folder` a cache that holds nothing but the kernels that this user's cache has, as copies.

    A kernel takes seconds to compile, in every process that finds none. Those that the user's cache lacks are
    compiled into `folder`, as anywhere.
    """
    kernels = cache_folder() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    if kernels.is_dir() and not (folder / "kernels").exists():
        shutil.copytree(kernels, folder / "kernels", ignore=_unfinished)
    return folder


def _unfinished(folder: str, names: list[str]) -> list[str]:
    """All but finished kernels: another process may be compiling there."""
    return [name for name in names if not name.endswith(".so")]
