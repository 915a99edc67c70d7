"""The place where a result appears: what is there now, and one rename that loses nothing written there
meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from llmcompress.errors import OutputError, argument
from llmcompress.io.safetensors_writer import put
from llmcompress.io.user_paths import path_of, shortened

# per entry: name, device, inode, mode, bytes, nanoseconds of change
Seen = tuple[tuple[str, int, int, int, int, int], ...]
# errors of a rename onto a place that is not empty
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def resolved(out: str | Path) -> Path:
    """The real folder that a user means by `out`, which need not exist. Errors: OutputError if there can be
    none."""
    path = path_of(out, argument("out"), OutputError)
    if path.is_symlink() and not path.exists():
        raise OutputError(
            f"{argument('out')} {shortened(str(path))} is a link to nothing; delete the link or give the "
            "name of a folder"
        )
    found = path_of(path.resolve(), argument("out"), OutputError)
    if not found.name:
        raise OutputError(f"{argument('out')} {found} is the root of a disk; give the name of a folder")
    return found


def seen(folder: Path) -> Seen:
    """A snapshot of what is at a place, to compare with later; empty if there is nothing or an empty
    folder."""
    if not os.path.lexists(folder):
        return ()
    inside = sorted(folder.rglob("*")) if folder.is_dir() and not folder.is_symlink() else []
    if not inside and folder.is_dir() and not folder.is_symlink():
        return ()
    found = []
    for path in (folder, *inside):
        about = path.lstat()
        size, changed = (0, 0) if path == folder else (about.st_size, about.st_mtime_ns)
        name = str(path.relative_to(folder))
        found.append((name, about.st_dev, about.st_ino, about.st_mode, size, changed))
    return tuple(found)


def appear(fresh: Path, out: Path, before: Seen, aside: Path) -> None:
    """Rename the folder `fresh` to `out`, where `before` was seen. What was there is first moved `aside`, and
    deleted at the end.

    Errors: FileExistsError if something else is there now; it stays, and so does `fresh`.
    """
    other = FileExistsError(errno.EEXIST, "is not what it was", str(out))
    now = seen(out)
    if now not in (before, ()):
        raise other
    if now:
        out.rename(aside)
        if seen(aside) != now:  # it changed after it was seen
            aside.rename(out)
            raise other
    try:
        fresh.rename(out)  # rename replaces nothing but an empty folder
    except OSError as error:
        if error.errno in TAKEN:
            raise other from None
        if now:
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def require_file(file: Path, option: str) -> None:
    """Raise OutputError, which names the option, if `write_file` could not write to this place."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_stream(file):
            with tempfile.TemporaryFile(dir=file.resolve().parent):
                pass
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(file, option, error) from None


def write_file(file: Path, text: str, option: str) -> None:
    """Write a text file completely or not at all; anything that is not a file (/dev/stdout, a pipe) is
    written to directly. Errors: OutputError."""
    try:
        if _is_stream(file):
            file.write_text(text, "utf-8")
        else:
            put(file.resolve(), text)  # replaces the target of a link, not the link
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(file, option, error) from None


def _is_stream(file: Path) -> bool:
    return (
        (file.exists() and not file.is_file()) or file.is_relative_to("/dev") or file.is_relative_to("/proc")
    )


def _unwritable(file: Path, option: str, error: Exception) -> OutputError:
    name = str(file) if len(str(file)) <= 200 else f"{str(file)[:100]} ..."
    return OutputError(
        f"can't write {name} ({getattr(error, 'strerror', None) or error}); give another {option} file"
    )
