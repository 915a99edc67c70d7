"""Temporary folders: where they can't be made or written, that is one line which names TMPDIR."""

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
    """A temporary folder that goes with the context, in TMPDIR or where the system has them. Errors:
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
    """What to say where there can be no temporary file."""
    asked = os.environ.get("TMPDIR")
    where = (
        f"TMPDIR, which is {asked},"
        if asked
        else "the system's folder of temporary files (TMPDIR is not set)"
    )
    why = " ".join(str(error.strerror or error).split())
    return OutputError(f"can't write to {where} ({why}); free space there or set TMPDIR to another folder")
