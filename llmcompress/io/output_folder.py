"""The artefact in the making: shards in a hidden folder beside the target, published by one rename,
completely or not at all.

Everything happens in `.NAME.partial` beside the target: `artifact/` becomes the target, `journal/` holds the
finished layers of the first stage, `journal-1/` those of the second, and so on. Only the process that holds
the `lock` works there. A shard is complete on disk before the next begins, so memory is one tensor, whatever
the size of the model.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.errors import OutputError, argument
from llmcompress.io import own_code
from llmcompress.io.checkpoint import INDEX
from llmcompress.io.companion_files import CONFIG, kept, shareable
from llmcompress.io.destination import appear, resolved, seen
from llmcompress.io.lock import Lock
from llmcompress.io.safetensors_writer import Shard, discard, elsewhere, sync, sync_folder, writing
from llmcompress.io.tokenizer import vocabulary_files
from llmcompress.io.units import amount

SHARD_BYTES = 5_000_000_000


def require_space(folder: Path, need: int) -> None:
    """Raise OutputError unless `need` bytes are free where `folder` is or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise OutputError(
            f"{folder} needs {amount(need, 'B')}, {amount(free, 'B')} are free; make space or "
            f"{elsewhere(folder)}"
        )


def partial_folder(out: str | Path) -> Path:
    """The hidden folder beside `out` in which a run works, the same for every run with this `out`. Errors:
    OutputError."""
    out = resolved(out)  # the real folder, so that both are on one disk
    return resolved(out.with_name(f".{out.name}.partial"))


def journal_folder(partial: Path, stage: int) -> Path:
    """The journal folder of a stage inside `partial`, by the stage's number in the recipe."""
    return partial / (f"journal-{stage}" if stage else "journal")


class Writer:
    """An artefact in the making: `add` tensors, `close` for a loadable folder, `publish` for the final
    rename.

    Everything happens in `partial_folder(out)`, on the disk of `out`: `artifact/` becomes `out`, and the
    journals belong to the run. A lock protects the folder from start to end. As a context manager, it deletes
    what an error leaves behind, except a journal with a finished layer, from which a run can resume, and a
    result that could not be published. Errors: OutputError if another process works there, if `out` exists
    (unless overwrite), if it is or holds the base, or if `size_bytes` of space are not free.
    """

    def __init__(
        self,
        out: str | Path,
        base: str | Path,
        *,
        size_bytes: int,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        mark: str = CONFIG,
    ) -> None:
        """`mark` is the file that a folder holds which `overwrite` may replace."""
        self._mark = mark
        self.partial, self.out = partial_folder(out), resolved(out)
        self.base, self.overwrite = Path(base), overwrite
        self.artifact, self._replaced = self.partial / "artifact", self.partial / "replaced"
        # tensor -> the tensor that it is tied to; known before the first is added
        self.ties: dict[str, str] = {}
        self.shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._weights: dict[str, int] = {}  # name -> number of its shard
        self._whole = False  # whether a result is complete but could not be published
        with writing(self.out):
            # innermost first
            self._made = [folder for folder in self.partial.parents if not folder.exists()]
            earlier = self.partial.exists()
            try:
                self._lock = Lock(
                    self.partial / "lock",
                    f"{argument('out')} {self.out}",
                    f"wait for it, or choose another {argument('out')}",
                )
            except BaseException:
                self._tidy()
                raise
            try:
                if self._replaced.exists() and not self.out.exists():
                    self._replaced.rename(self.out)  # a run died between the two renames of `publish`
                self._refuse()
                # bytes of an earlier attempt, which is deleted below
                left = sum(file.stat().st_size for file in self.artifact.rglob("*") if file.is_file())
                # space for the artefact and for one shard's spools
                require_space(self.partial, size_bytes + min(size_bytes, shard_bytes) - left)
                self._before = seen(self.out)
                discard(self.artifact)
                self.artifact.mkdir()
            except BaseException:
                self._leave(kept=earlier)  # keeps what an earlier run left
                raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._leave(kept=self._whole or self._replaced.exists())

    def _leave(self, *, kept: bool) -> None:
        """Delete what can't be resumed from, and the folders that were made for it."""
        if not kept:
            discard(self.artifact)
        if not kept and not any(self.partial.glob("journal*/**/*.safetensors")):
            self._empty()
        self._lock.release()
        self._tidy()

    def _tidy(self) -> None:
        """Remove the folders that were made for the work, if they are empty."""
        for folder in (self.partial, *self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _empty(self) -> None:
        """Delete everything in the partial folder except the lock, which is deleted when it is released."""
        for inside in list(self.partial.iterdir()):
            if inside != self._lock.file:
                discard(inside)

    def _refuse(self) -> None:
        out, base = self.out, self.base.resolve()
        if base.is_relative_to(out):
            raise OutputError(
                f"{argument('out')} {self.out} is or holds the base {self.base}, which stays as it is; "
                f"choose another {argument('out')}"
            )
        if out.is_file():
            raise OutputError(f"{argument('out')} {self.out} is a file; give the name of a folder")
        if not out.exists() or not any(out.iterdir()):
            return
        if not self.overwrite:
            other, replace = argument("out"), argument("overwrite", "True")
            raise OutputError(
                f"{argument('out')} {self.out} exists; choose another {other} or pass {replace}"
            )
        if not (out / self._mark).is_file():
            kind = "a model" if self._mark == CONFIG else f"a result with {self._mark}"
            raise OutputError(
                f"{argument('out')} {self.out} holds other things than {kind}, which stay as they are; "
                f"choose another {argument('out')}"
            )

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors by name, except tied ones; a new shard begins where the current one would exceed
        `shard_bytes`."""
        with writing(self.out):
            for name, tensor in sorted(tensors.items()):
                if name in self._weights:
                    raise ValueError(f"{name} was written already")
                if name not in self.ties:
                    self._room_for(tensor.nbytes).add(name, tensor)
                    self._weights[name] = len(self._shards) - 1

    def _room_for(self, size: int) -> Shard:
        """Return the shard that takes the next `size` bytes."""
        if not self._shards or self._shards[-1].size_bytes + size > self.shard_bytes:
            if self._shards:
                self._shards[-1].close({"format": "pt"})
            self._shards.append(Shard(self.artifact / f"shard-{len(self._shards) + 1:05}"))
        return self._shards[-1]

    def close(self, config: Mapping[str, Any]) -> Path:
        """Finish the weights and write config.json and the base's small files; returns a folder that
        from_pretrained loads."""
        untied = sorted(source for source in self.ties.values() if source not in self._weights)
        if untied or not self._shards:
            raise ValueError(
                f"{untied[0]}, the source of a tie, was never written" if untied else "no tensor was written"
            )
        with writing(self.out):
            self._shards[-1].close({"format": "pt"})
            self._name_shards(len(self._shards))
            code = own_code.carried(self.base)
            files = kept(self.base, vocabulary_files(self.base), code=bool(code))
            for name, content in (code | files).items():
                self._put(name, content)
            self._put(CONFIG, _json(shareable(config, code=bool(code))))
        return self.artifact

    def _name_shards(self, total: int) -> None:
        """Rename the shards, now that their number is known, and write the index."""
        if total == 1:
            self._shards[0].file.replace(self.artifact / "model.safetensors")
            return
        files = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
        for shard, file in zip(self._shards, files, strict=True):
            shard.file.replace(self.artifact / file)
        weight_map = {name: files[shard] for name, shard in sorted(self._weights.items())}
        size = sum(shard.size_bytes for shard in self._shards)
        self._put(INDEX, _json({"metadata": {"total_size": size}, "weight_map": weight_map}))

    def _put(self, name: str, content: str | bytes) -> None:
        target = self.artifact / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            sync(file)

    def publish(self, files: Mapping[str, str | bytes]) -> Path:
        """Add files (report, card, recipe) and rename the artefact to `out`; only then is the old one
        deleted."""
        with writing(self.out):
            for name, content in sorted(files.items()):
                self._put(name, content)
            for folder in {path.parent for path in self.artifact.rglob("*")}:
                sync_folder(folder)
            discard(self._replaced)
            try:
                appear(self.artifact, self.out, self._before, self._replaced)
            except FileExistsError:
                self._whole = True
                raise OutputError(
                    f"{argument('out')} {self.out} is not what it was when the run began, and stays as it "
                    f"is; the result is whole in {self.artifact}: move {self.out} away and give the same "
                    "command again, or take the result from there"
                ) from None
            sync_folder(self.out.parent)
            self._empty()  # the journal is not needed any more either
            self._made = []
            self._leave(kept=True)
        return self.out


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
