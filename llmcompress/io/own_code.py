"""The code that a model brings along: which files it is, and whether the user allows it to run.

The configs of a model can name classes that transformers lacks, in `auto_map`; they lie in .py files beside
the configs. Such code runs only if the user says so, and then only that of the model which the user gives:
the permission is for the bytes of its files. So it holds for the copies that a run makes, from the model
between two stages to the artefact, and not for a teacher with other code, which a recipe may name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from re import ASCII, fullmatch
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_imports

from llmcompress.errors import ModelError, argument
from llmcompress.io.checkpoint import read_json
from llmcompress.io.companion_files import CONFIGS, MAP, is_inside

LARGEST = 1 << 22  # bytes of a file of code
REFERENCE = r"([A-Za-z_][\w-]*)\.([A-Za-z_]\w*)"  # file.Class
_allowed: ContextVar[set[str] | None] = ContextVar("allowed", default=None)  # files of code
_classes: dict[tuple[str, str], type] = {}  # imported in this process, by digest and reference


@contextmanager
def permission(given: bool) -> Iterator[None]:
    """Whether models may run code of their own within the context; `trust` says which."""
    before = _allowed.set(set() if given else None)
    try:
        yield
    finally:
        _allowed.reset(before)


def is_given() -> bool:
    """Whether the user allows code of models."""
    return _allowed.get() is not None


def trust(folder: Path) -> None:
    """Let the code of this model run, if the user allows code. Errors: ModelError if it can't be had whole
    from the folder."""
    allowed = _allowed.get()
    if allowed is not None:
        allowed |= _told(files_of(folder))


def runs(folder: Path) -> bool:
    """Whether a model has code of its own that may run."""
    allowed = _allowed.get()
    if not allowed:
        return False
    try:
        files = files_of(folder)
    except ModelError:  # what can't be had whole was never trusted
        return False
    return bool(files) and _told(files) <= allowed


def refusal(where: Path | str, reference: Any) -> ModelError:
    """The error for a model that needs code of its own, which the user has not allowed."""
    named = str(reference)[:80]
    if is_given():
        return ModelError(
            f"{where} has code of its own ({named}), and {argument('trust_remote_code', 'True')} is for that "
            "of the model that is compressed or measured; give one that has the same code, or none"
        )
    return ModelError(
        f"{where} has code of its own ({named}), which llmcompress does not run unasked; read it, then add "
        f"{argument('trust_remote_code', 'True')}"
    )


def class_of(folder: Path, reference: str) -> type:
    """The class `file.Class` from the code beside a model, imported once for the same code as transformers
    does it. The code must be allowed. Errors: ModelError if it can't be imported."""
    assert runs(folder), "code runs only if the user allows it"
    key = str(digest_of(folder)), reference
    if key not in _classes:
        try:
            _classes[key] = get_class_from_dynamic_module(reference, folder)
        except Exception as error:  # whatever the code raises
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(
                f"{folder} has code of its own that can't be imported ({reference}: {why}); mend it, or "
                "install what it needs"
            ) from error
    return _classes[key]


def carried(folder: Path) -> dict[str, bytes]:
    """The files of code that a copy of the model needs, by name: all of its code, if it runs."""
    return files_of(folder) if runs(folder) else {}


def digest_of(folder: Path) -> str | None:
    """A digest of the code beside a model; None if it has none. Errors: ModelError as for `files_of`."""
    told = _told(files_of(folder))
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest() if told else None


def _told(files: Mapping[str, bytes]) -> set[str]:
    """Each file by its name and the hash of its bytes."""
    return {f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in files.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of code that the configs of a model name, and those that they import relatively, by name.

    Errors: ModelError for a name that is no file beside the configs, or a file that lies elsewhere.
    """
    found = dict[str, bytes]()
    wanted = [(f"{_file_of(folder, named)}.py", named) for named in references(folder)]
    while wanted:
        name, needed_by = wanted.pop()
        if name not in found:
            found[name] = _read(folder, name, needed_by)
            wanted += [(f"{module}.py", name) for module in _imported(folder, name)]
    return found


def references(folder: Path) -> list[str]:
    """What `auto_map` names in the configs of a model: `file.Class`, or anything else that stands there."""
    listed = [read_json(folder / name).get(MAP) for name in CONFIGS if (folder / name).is_file()]
    return [one for named in listed if named for one in _each(named)]


def _each(named: Any) -> Iterator[str]:
    """The classes in an `auto_map`: each entry is one, or a list of a tokenizer's slow and fast one."""
    entries = named.values() if isinstance(named, Mapping) else [named]
    for entry in entries:
        yield from (str(one) for one in (entry if isinstance(entry, list) else [entry]) if one)


def _file_of(folder: Path, named: str) -> str:
    """The name of the file in a reference, without `.py`. Errors: ModelError."""
    if "--" in named:
        repository, _, reference = named.partition("--")
        raise ModelError(
            f"{folder} names code of another repository in auto_map ({named[:80]}), at no commit; put "
            f"{reference.partition('.')[0][:40]}.py beside its config.json, and take {repository[:40]}-- out"
        )
    if (parts := fullmatch(REFERENCE, named, ASCII)) is None:
        raise ModelError(
            f"{folder} names {named[:80]!r} in auto_map, which is no class in a file beside its config; "
            "correct it to file.Class"
        )
    return parts[1]


def _read(folder: Path, name: str, needed_by: str) -> bytes:
    """Read a file of code. Errors: ModelError."""
    file = folder / name
    if not file.is_file():
        raise ModelError(f"{folder} has no {name}, which {needed_by} needs; fetch the model again, whole")
    if not is_inside(file, folder):
        raise ModelError(f"{file} is a link that leaves the folder; put the file itself in its place")
    with file.open("rb") as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ModelError(f"{file} has more than {LARGEST} bytes, which no code has; fetch the model again")
    return content


def _imported(folder: Path, name: str) -> list[str]:
    """The modules that a file of code imports relatively, as transformers finds them. Errors: ModelError."""
    try:
        modules = get_relative_imports(folder / name)
    except UnicodeDecodeError:
        raise ModelError(f"{folder / name} is no text in UTF-8; fetch the model again") from None
    for module in modules:
        if fullmatch(r"\w+", module, ASCII) is None:
            raise ModelError(
                f"{folder / name} imports .{module[:40]}, which is no file beside it; put it there, as "
                "transformers copies no folders"
            )
    return sorted(modules)
