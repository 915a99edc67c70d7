"""Temporary folders, with a one-line error that names TMPDIR if they can't be made or written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcompress.errors import OutputError

PREFIX = "llmcompress-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder in TMPDIR or the system's default place; it is deleted at the end. Errors:
    OutputError."""
    try:
        made = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    except OSError as error:
        raise no_scratch(error) from error
    with made as folder:
        yield Path(folder)


def is_scratch(path: Path) -> bool:
    """Whether a path is in a folder of `scratch_folder`."""
    return any(part.startswith(PREFIX) for part in path.parts) and path.is_relative_to(tempfile.gettempdir())


def no_scratch(error: OSError) -> OutputError:
    """The error for a temporary file that can't be made."""
    asked = os.environ.get("TMPDIR")
    where = (
        f"TMPDIR, which is {asked},"
        if asked
        else "the system's folder of temporary files (TMPDIR is not set)"
    )
    why = " ".join(str(error.strerror or error).split())
    return OutputError(f"can't write to {where} ({why}); free space there or set TMPDIR to another folder")
