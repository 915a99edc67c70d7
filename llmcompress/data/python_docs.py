"""The documentation text that every Python installation carries: English and code, without a network.

It is the `help()` topics and the docstrings of the standard library: about 2 MB to calibrate on and a tenth
of that to evaluate on. Sources are parsed with `ast` and never imported, so nothing is executed and no
dependency is needed. Parsing takes about four seconds, so the text is kept in the cache folder until one of
the sources changes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import logging
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmcompress.errors import DataError, OutputError, first_line
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import put

logger = logging.getLogger(__name__)
Sides = tuple[str, str]  # calibration and evaluation text


@functools.cache
def python_docs() -> Sides:
    """Return the documentation of this Python as (calibration, evaluation) text: about 2 MB and a tenth of
    that.

    A document is a `help()` topic or all docstrings of one standard library file. Documents are ordered by
    the hash of their name. The last tenth of the hash's range evaluates, so a document is on the same side on
    every Python version. A docstring that occurs twice counts once. Errors: DataError if the sources of the
    library are not installed.
    """
    library = Path(sysconfig.get_path("stdlib"))
    topics, sources = library / "pydoc_data" / "topics.py", _sources(library)
    try:
        kept = cache_folder() / "python-docs" / f"{_stamp([topics, *sources])}.json"
    except OutputError:  # no cache folder belongs to this user alone
        return _read(library, topics, sources)
    if (known := _known(kept)) is not None:
        return known
    sides = _read(library, topics, sources)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        put(kept, json.dumps({"sides": sides, "sha256": _digest(sides)}))
    except OSError as error:  # then it is parsed again the next time
        logger.debug("%s is not kept: %s", kept, first_line(error))
    return sides


def _sources(library: Path) -> list[Path]:
    """Return the files of the standard library by name, without tests and installed packages."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = sorted(library.rglob("*.py"))
    return [file for file in files if not left_out.intersection(file.relative_to(library).parts)]


def _stamp(files: Sequence[Path]) -> str:
    """Return a digest that changes with any of the files and with this module."""
    stamps = [
        (str(file), found.st_size, found.st_mtime_ns)
        for file in files
        if file.is_file() and (found := file.stat())
    ]
    return hashlib.sha256(Path(__file__).read_bytes() + repr(stamps).encode()).hexdigest()[:32]


def _digest(sides: Sides) -> str:
    return hashlib.sha256("\0".join(sides).encode()).hexdigest()


def _known(file: Path) -> Sides | None:
    """Return the text kept in a file; None if there is none or it is damaged."""
    try:
        found = json.loads(file.read_bytes())
        calibration, evaluation = found["sides"]
        return (calibration, evaluation) if _digest((calibration, evaluation)) == found["sha256"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read(library: Path, topics: Path, sources: Sequence[Path]) -> Sides:
    """Parse the text of both sides. Errors: DataError."""
    documents = dict(_topics(topics))
    documents.update(_docstrings(library, sources))
    sides: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for digest, name in sorted((hashlib.sha256(name.encode()).digest(), name) for name in documents):
        fresh = [text for text in documents[name] if text not in seen]
        seen.update(fresh)
        sides[int.from_bytes(digest[:4], "big") >= 0.9 * 2**32].extend(fresh)
    if not all(sides):
        raise DataError(
            f"python-docs: {library} holds no .py files with documentation; install them or name another "
            "source"
        )
    return "\n\n\n".join(sides[0]) + "\n", "\n\n\n".join(sides[1]) + "\n"


def _topics(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the topics of `help()` from a module of one literal dictionary, name -> text."""
    if not file.is_file():
        return
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign):
            for topic, text in ast.literal_eval(node.value).items():
                yield f"topic {topic}", [text.strip()]


def _docstrings(library: Path, sources: Sequence[Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield the docstrings of each file of the standard library, outer before inner."""
    for file in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources
                level: list[ast.AST] = [ast.parse(file.read_bytes())]
        except (SyntaxError, ValueError):  # a template, not Python
            continue
        texts: list[str] = []
        while level:
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts += [
                (ast.get_docstring(node) or "").strip() for node in level if isinstance(node, documented)
            ]
            level = [
                child
                for node in level
                if hasattr(node, "body") or hasattr(node, "cases")
                for child in _statements(node)
            ]
        yield file.relative_to(library).as_posix(), [text for text in dict.fromkeys(texts) if text]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Return the statements directly below a node. Expressions hold no docstrings and are most of the
    tree."""
    return (
        child
        for child in ast.iter_child_nodes(node)
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))
    )
