"""The journal of a run: what it has finished, a file a layer, to go on from after it was killed."""

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

KEY = "key"  # the file that holds it
Stamp = tuple[int, int, int]  # of a file: size, time of the last change in nanoseconds, inode


class JournalFacts(BaseModel):
    """What an entry holds beside its tensors; each kind of entry declares its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


NO_FACTS = JournalFacts()
Kind = TypeVar("Kind", bound=JournalFacts)


class Journal:
    """What a run has finished, one file a layer, under the digest of everything that decides the result.

    Another key discards what is there. A file that is cut short, damaged or of another key counts as not
    done; `damaged` are the names of those that were found so. Only one process at a time may write there,
    unless it is `shared`: then nothing is discarded, and several that finish the same layer leave what the
    last one wrote.

    A file is hashed once: when it is first read, or never where this process wrote it. After that `has` only
    asks whether it is still the same file, by size, time and inode.
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
                if folder.exists() and not found.isalnum():  # which every key is
                    self.damaged.add(KEY)
                discard(folder)
                folder.mkdir(parents=True, exist_ok=True)
                put(stored, key)

    def get(self, stage: str, layer: int) -> dict[str, Tensor] | None:
        """A finished layer's tensors; None where it isn't finished or not sound."""
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
            pass  # in whatever way it is damaged
        self.damaged.add(file.name)
        return None

    def has(self, stage: str, layer: int) -> bool:
        """Whether a layer of a stage is finished and sound; a file is read once a process for that."""
        return self._is_known(self.file(stage, layer)) or self.get(stage, layer) is not None

    def _is_known(self, file: Path) -> bool:
        """Whether a file is one that was found sound, or written, by this process."""
        try:
            return self._sound.get(file.name) == _stamp(file)
        except OSError:
            return False

    def load(self, stage: str, layer: int) -> dict[str, Tensor]:
        """A finished layer's tensors. Errors: KeyError where `has` is False."""
        if (found := self.get(stage, layer)) is None:
            raise KeyError(f"{stage} {layer}")
        return found

    def facts(self, stage: str, layer: int, kind: type[Kind]) -> Kind:
        """A finished layer's facts, which were saved as such a `kind`; its tensors are not read again.

        Errors: KeyError where `has` is False.
        """
        if not self.has(stage, layer):
            raise KeyError(f"{stage} {layer}")
        return kind.model_validate_json(opened(self.file(stage, layer)).metadata()["facts"])

    def save(
        self, stage: str, layer: int, tensors: Mapping[str, Tensor], facts: JournalFacts = NO_FACTS
    ) -> None:
        """Write a finished layer, whole or not at all."""
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
        """Where a finished layer is."""
        return self.folder / f"{stage}.{layer:05}.safetensors"


def _stamp(file: Path) -> Stamp:
    found = file.lstat()
    return found.st_size, found.st_mtime_ns, found.st_ino
