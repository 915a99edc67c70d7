"""The journal of a run: one file per finished layer, from which a killed run resumes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from llmcompress.errors import ModelError
from llmcompress.io.checkpoint import opened
from llmcompress.io.safetensors_writer import Shard, discard, put, sync_folder, tensors_digest, writing

KEY = "key"  # the file that holds the key
Stamp = tuple[int, int, int]  # of a file: size, time of the last change in nanoseconds, inode


class JournalFacts(BaseModel):
    """The facts of an entry beside its tensors; each kind of entry declares its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


NO_FACTS = JournalFacts()
Kind = TypeVar("Kind", bound=JournalFacts)


class Journal:
    """The finished layers of a run, one file per layer, under the digest of everything that decides the
    result.

    A journal with another key is discarded. A file that is truncated, damaged or of another key counts as not
    done; `damaged` holds the names of those files. Only one process at a time may write to a journal, unless
    it is `shared`: then nothing is discarded, and if several processes finish the same layer, the last write
    stays.

    A file is hashed once, when it is first read, or never if this process wrote it. After that, `has` only
    checks that it is still the same file, by size, time and inode.
    """

    def __init__(self, folder: Path, key: str, *, shared: bool = False) -> None:
        self.folder, self.key, self.damaged = folder, key, set[str]()
        self._sound: dict[str, Stamp] = {}
        with writing(folder):
            if shared:
                folder.mkdir(parents=True, exist_ok=True)
                return
            stored = folder / KEY
            found = stored.read_bytes() if stored.is_file() else b""
            if found != key.encode():
                # every key is alphanumeric, so this file is damaged
                if folder.exists() and not found.isalnum():
                    self.damaged.add(KEY)
                discard(folder)
                folder.mkdir(parents=True, exist_ok=True)
                put(stored, key)

    def get(self, stage: str, layer: int) -> dict[str, Tensor] | None:
        """A finished layer's tensors; None if the layer is not finished or its file is damaged."""
        file = self.file(stage, layer)
        if not os.path.lexists(file):
            return None
        try:
            handle = opened(file)
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
            if self._is_known(file):
                return tensors
            digest = tensors_digest(tensors, metadata["facts"])
            json.loads(metadata["facts"])
            if metadata["key"] == self.key and metadata["sha256"] == digest:
                self._sound[file.name] = _stamp(file)
                return tensors
        except (ModelError, SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
            pass  # damaged, in whatever way
        self.damaged.add(file.name)
        return None

    def has(self, stage: str, layer: int) -> bool:
        """Whether a layer of a stage is finished and its file is sound; the file is read once per process for
        that."""
        return self._is_known(self.file(stage, layer)) or self.get(stage, layer) is not None

    def _is_known(self, file: Path) -> bool:
        """Whether this process wrote the file or has found it sound."""
        try:
            return self._sound.get(file.name) == _stamp(file)
        except OSError:
            return False

    def load(self, stage: str, layer: int) -> dict[str, Tensor]:
        """A finished layer's tensors. Errors: KeyError if `has` is False."""
        if (found := self.get(stage, layer)) is None:
            raise KeyError(f"{stage} {layer}")
        return found

    def facts(self, stage: str, layer: int, kind: type[Kind]) -> Kind:
        """A finished layer's facts, of the `kind` that was saved; its tensors are not read again.

        Errors: KeyError if `has` is False.
        """
        if not self.has(stage, layer):
            raise KeyError(f"{stage} {layer}")
        return kind.model_validate_json(opened(self.file(stage, layer)).metadata()["facts"])

    def save(
        self, stage: str, layer: int, tensors: Mapping[str, Tensor], facts: JournalFacts = NO_FACTS
    ) -> None:
        """Write a finished layer, completely or not at all."""
        with (
            writing(self.folder),
            tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch,
        ):
            shard = Shard(Path(scratch) / "layer")
            for name, tensor in sorted(tensors.items()):
                shard.add(name, tensor)
            text = json.dumps(facts.model_dump(), sort_keys=True)
            shard.close({"key": self.key, "facts": text, "sha256": tensors_digest(tensors, text)})
            file = self.file(stage, layer)
            if file.is_dir():
                discard(file)
            shard.file.replace(file)
            self._sound[file.name] = _stamp(file)
            sync_folder(self.folder)

    def file(self, stage: str, layer: int) -> Path:
        """The path of a finished layer."""
        return self.folder / f"{stage}.{layer:05}.safetensors"


def _stamp(file: Path) -> Stamp:
    found = file.lstat()
    return found.st_size, found.st_mtime_ns, found.st_ino
