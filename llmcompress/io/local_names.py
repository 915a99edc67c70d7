"""Local names, which must not be shared: how file and folder names of this machine are recognised, and what
replaces them.

Shared text gives only the last name of a path. A known path (a base, a text, a teacher) may have any
spelling. In free text, only paths that begin at the root of a disk or in a home folder are recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_PART = r"[^\s/\\'\"`,;:()|<>*?]+"
_STARTS = rf"file:/+{_PART}|~[\w.-]*[/\\]+{_PART}|[A-Za-z]:[/\\]+{_PART}|[/\\]{_PART}[/\\]+{_PART}"
_PATHS = re.compile(rf"(?<![\w:/\\.~<%-])(?:{_STARTS})(?:[/\\]+{_PART})*[/\\]?")
_WHOLE = re.compile(
    r"file:|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\.{1,2}[/\\]|[/\\]{1,2}[^/\\\s][^/\\\n]*[/\\]+[^/\\\n]", re.ASCII
)


def short_name(name: str) -> str:
    """The last name of a Hub id or a path, with either kind of slash."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return last if last.strip(".") else "model"


def is_path(text: str) -> bool:
    """Whether a whole text is a path: it begins at the root of a disk, at a home folder or at a folder, or it
    contains the user's home."""
    return "\n" not in text and (_WHOLE.match(text) is not None or _in_home(text))


def _in_home(text: str) -> bool:
    try:
        home = str(Path.home())
    except RuntimeError:  # the user has no home
        return False
    return len(home) > 1 and f"{home}/" in text


def without(text: str, known: Iterable[str]) -> str:
    """Return a text in which each `known` path is replaced by its last name, and the folders that hold one
    are removed."""
    names = {
        name for name in known if short_name(name) != name and name.rstrip("/\\").endswith(short_name(name))
    }
    holders = {
        f"{holder}/"
        for name in names
        for holder in Path(name).parents
        if name[0] in "/~" and len(holder.parts) > 2
    }
    for name in sorted(names | holders, key=len, reverse=True):
        text = text.replace(name, "" if name in holders else short_name(name))
    return text


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """The same for absolute paths too, which are recognised by their beginning."""
    return _PATHS.sub(lambda found: short_name(found[0]), without(text, known))
