"""The documentation text that every Python installation carries: English and code, no network, the same
everywhere.

It is the `help()` topics and the docstrings of the standard library, about 2 MB to calibrate on and a tenth
of it to evaluate on. Sources are parsed with `ast` and never imported, so nothing runs and nothing is missed
for want of a dependency; that costs about four seconds, once a process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmcompress.errors import DataError


@functools.cache
def python_docs() -> tuple[str, str]:
    """The documentation that this Python carries, as (calibration, evaluation) text: about 2 MB and a tenth
    of it.

    A document is a `help()` topic or all docstrings of one standard library file. Documents are ordered by
    the hash of their name and the last tenth of the hash's range evaluates, so a document is on the same side
    on every Python version. A docstring that occurs twice counts once. Errors: DataError where the library's
    sources are not installed.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = dict(_topics(library / "pydoc_data" / "topics.py"))
    documents.update(_docstrings(library))
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
    """The topics of `help()`: one literal dictionary, name -> text."""
    if not file.is_file():
        return
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign):
            for topic, text in ast.literal_eval(node.value).items():
                yield f"topic {topic}", [text.strip()]


def _docstrings(library: Path) -> Iterator[tuple[str, list[str]]]:
    """The docstrings of each file of the standard library, outer before inner; tests and installed packages
    left out."""
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if {"test", "tests", "idle_test", "site-packages", "dist-packages"}.intersection(name.parts):
            continue
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
        yield name.as_posix(), [text for text in dict.fromkeys(texts) if text]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements right below a node: expressions hold no docstring and are most of the tree."""
    return (
        child
        for child in ast.iter_child_nodes(node)
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))
    )
