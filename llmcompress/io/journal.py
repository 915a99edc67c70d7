"""The journal of a run: what it has finished, a file a layer, to go on from after it was killed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from llmcompress.errors import ModelError
from llmcompress.io.checkpoint import opened
from llmcompress.io.safetensors_writer import Shard, discard, put, sync_folder, tensors_digest, writing

KEY = "key"  # the file that holds it


class Journal:
    """What a run has finished, one file a layer, under the digest of everything that decides the result.

    Another key discards what is there. A file that is cut short, damaged or of another key counts as not
    done; `damaged` are the names of those that were found so. Only one process at a time may write there,
    unless it is `shared`: then nothing is discarded, and several that finish the same layer leave what the
    last one wrote.
    """

    def __init__(self, folder: Path, key: str, *, shared: bool = False) -> None:
        self.folder, self.key, self.damaged = folder, key, set[str]()
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

    def get(self, stage: str, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished layer's tensors and facts; None where it isn't finished or not sound. Reads the whole
        file."""
        file = self.file(stage, layer)
        if not os.path.lexists(file):
            return None
        try:
            handle = opened(file)
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
            if metadata["key"] == self.key and metadata["sha256"] == tensors_digest(
                tensors, metadata["facts"]
            ):
                return tensors, json.loads(metadata["facts"])
        except (ModelError, SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
            pass  # in whatever way it is damaged
        self.damaged.add(file.name)
        return None

    def has(self, stage: str, layer: int) -> bool:
        """Whether a layer of a stage is finished and sound; reads the whole file."""
        return self.get(stage, layer) is not None

    def load(self, stage: str, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished layer's tensors and facts. Errors: KeyError where `has` is False."""
        if (found := self.get(stage, layer)) is None:
            raise KeyError(f"{stage} {layer}")
        return found

    def save(self, stage: str, layer: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a finished layer, whole or not at all; facts must be JSON values."""
        with (
            writing(self.folder),
            tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch,
        ):
            shard = Shard(Path(scratch) / "layer")
            for name, tensor in sorted(tensors.items()):
                shard.add(name, tensor)
            text = json.dumps(dict(facts), sort_keys=True)
            shard.close({"key": self.key, "facts": text, "sha256": tensors_digest(tensors, text)})
            file = self.file(stage, layer)
            if file.is_dir():
                discard(file)
            shard.file.replace(file)
            sync_folder(self.folder)

    def file(self, stage: str, layer: int) -> Path:
        """Where a finished layer is."""
        return self.folder / f"{stage}.{layer:05}.safetensors"
