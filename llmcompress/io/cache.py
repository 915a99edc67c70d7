"""The folder of caches that several runs share."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from llmcompress.errors import OutputError

ADVICE = "set LLMCOMPRESS_CACHE to a folder"


def cache_folder() -> Path:
    """Return $LLMCOMPRESS_CACHE, else ~/.cache/llmcompress, else a folder of this user's own among the
    temporary files.

    The last is for a user without a home, as in containers. Raises OutputError if another user has made that
    folder, because compiled code is loaded from it.
    """
    if named := os.environ.get("LLMCOMPRESS_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "llmcompress"
    except RuntimeError:  # no $HOME, and the user is not in the user database
        return _temporary()


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"llmcompress-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise OutputError(
            f"no home folder is known and {folder} can't be made ({error.strerror}); {ADVICE}"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise OutputError(f"no home folder is known and {folder} is not this user's alone; {ADVICE}")
    return folder
