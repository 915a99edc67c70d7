"""Where what other runs may read too is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LLMCOMPRESS_CACHE, else ~/.cache/llmcompress."""
    return Path(os.environ.get("LLMCOMPRESS_CACHE") or Path.home() / ".cache" / "llmcompress")
