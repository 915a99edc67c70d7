"""The journal of a run: what it has finished, a file a block, to go on from after it was killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from llmcompress.checkpoint import opened
from llmcompress.errors import ModelError
from llmcompress.shard import Shard, put, sync_folder, tensors_digest, writing


class Journal:
    """What a run has finished, one file a block, under the digest of everything that decides the result.

    Another key discards what is there. A file that is cut short, damaged or of another key counts as not done.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        with writing(folder):
            stored = folder / "key"
            if not stored.is_file() or stored.read_text() != key:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                put(stored, key)

    def get(self, stage: str, block: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished block's tensors and facts; None where it isn't finished or not sound. Reads the whole file."""
        if not (file := self.file(stage, block)).is_file():
            return None
        try:
            handle = opened(file)
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
            sound = metadata["key"] == self.key and metadata["sha256"] == tensors_digest(tensors, metadata["facts"])
        except (ModelError, SafetensorError, OSError, KeyError, TypeError):
            return None
        return (tensors, json.loads(metadata["facts"])) if sound else None

    def has(self, stage: str, block: int) -> bool:
        """Whether a block of a stage is finished and sound; reads the whole file."""
        return self.get(stage, block) is not None

    def load(self, stage: str, block: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished block's tensors and facts. Errors: KeyError where `has` is False."""
        if (found := self.get(stage, block)) is None:
            raise KeyError(f"{stage} {block}")
        return found

    def save(self, stage: str, block: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a finished block, whole or not at all; facts must be JSON values."""
        with writing(self.folder):
            shard = Shard(self.folder / f"writing-{os.getpid()}")
            for name, tensor in sorted(tensors.items()):
                shard.add(name, tensor)
            text = json.dumps(dict(facts), sort_keys=True)
            shard.close({"key": self.key, "facts": text, "sha256": tensors_digest(tensors, text)})
            shard.file.replace(self.file(stage, block))
            sync_folder(self.folder)

    def file(self, stage: str, block: int) -> Path:
        """Where a finished block is."""
        return self.folder / f"{stage}.{block:05}.safetensors"
