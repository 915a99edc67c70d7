"""User input turned into paths: the path, or a one-line error that says why there can be no such path.

Python and the system refuse a name for many reasons: it is too long or holds a null byte, `~nobody`, a `~`
where no home folder is known, bytes that are not text, a folder that may not be read. The user can fix each
of them, whatever the name was for.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmcompress.errors import CompressError, first_line

SHOWN = 80  # characters of a name that are shown in an error


def path_of(words: str | os.PathLike[str], what: str, error: type[CompressError] = CompressError) -> Path:
    """Return the path that `words` name, with a leading `~` expanded; it need not exist.

    `what` is what the user gave: `base`, `--out`. Raises `error` if `words` can't name a path here. `exists`,
    `is_dir` and `is_file` of the returned path do not raise.
    """
    text = os.fspath(words)
    require_text(text, what, error)
    if "\0" in text:
        raise error(f"{what} {shortened(text)} holds a null byte, which no path has; correct the name")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise error(
            f"{what} {shortened(text)} begins with ~, and no such home folder is known; give the whole path"
        ) from None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as why:
        reason = why.strerror or first_line(why)
        raise error(
            f"{what} {shortened(text)} is no path that can be read ({reason}); give another"
        ) from None
    return path


def require_text(text: str, what: str, error: type[CompressError] = CompressError) -> None:
    """Raise `error` for a string that can't be written as UTF-8, such as command-line bytes that are not text
    or half a code point.

    Reports, recipes and configs are UTF-8, so such a string could be read but never written.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise error(
            f"{what} {shortened(text)} is not Unicode text; rename it, or spell it in UTF-8"
        ) from None


def shortened(text: str) -> str:
    """A name as it is shown in an error: complete if it is short, else its beginning and its length."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
