"""What a user's words name on this disk: the path, or one line that says why there can be no such path.

Python and the system refuse a name in many ways: a name that is too long or holds a null byte, `~nobody`, a
`~` where no home folder is known, bytes that are no text, a folder that may not be read. Each is the user's
to mend, whatever the name was for.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmcompress.errors import CompressError, first_line

SHOWN = 80  # characters of a name that are put into an error


def path_of(words: str | os.PathLike[str], what: str, error: type[CompressError] = CompressError) -> Path:
    """The path that `words` name, a leading `~` expanded; nothing need lie there.

    `what` is what the user gave: `base`, `--out`. Raises `error` for words that can name no path here.
    Afterwards `exists`, `is_dir` and `is_file` of the path answer.
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
    """Refuse a string that can't be written as UTF-8, as bytes of a command line that are no text or half a
    code point.

    Reports, recipes and configs are UTF-8, so such a string could be read and never be written.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise error(
            f"{what} {shortened(text)} is not Unicode text; rename it, or spell it in UTF-8"
        ) from None


def shortened(text: str) -> str:
    """A name as it stands in an error: whole if it is short, else its beginning and its length."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
