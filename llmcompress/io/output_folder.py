"""The artefact in the making: shards in a hidden folder beside the target, which appears by one rename, whole
or not at all.

Everything happens in `.NAME.partial` beside the target: `artifact/` becomes the target, `journal/` holds the
finished blocks of the first stage, `journal-1/` those of the second, and so on; who holds the `lock` works
there, and nobody else. A shard is complete on disk before the next begins, so memory is one tensor whatever
the model's size.
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
from llmcompress.io.checkpoint import INDEX
from llmcompress.io.companion_files import CONFIG, kept, shareable
from llmcompress.io.destination import appear, resolved, seen
from llmcompress.io.lock import Lock
from llmcompress.io.safetensors_writer import Shard, discard, elsewhere, sync, sync_folder, writing
from llmcompress.io.tokenizer import vocabulary_files
from llmcompress.io.units import amount

SHARD_BYTES = 5_000_000_000


def require_space(folder: Path, need: int) -> None:
    """Refuse to start what can't be finished: `need` bytes must be free where `folder` is or will be. Errors:
    OutputError."""
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
    out = resolved(out)  # beside the real folder, so that both are on one disk
    return resolved(out.with_name(f".{out.name}.partial"))


def journal_folder(partial: Path, stage: int) -> Path:
    """Where in that folder the journal of a stage is, by its number in the recipe."""
    return partial / (f"journal-{stage}" if stage else "journal")


class Writer:
    """An artefact in the making: `add` tensors, `close` for a loadable folder under way, `publish` for the
    one rename.

    Everything happens in `partial_folder(out)`, on the disk of `out`: `artifact/` becomes `out`, the journals
    are the run's. It is held by a lock from the start until the end. As a context it drops what an error
    leaves behind; only a journal that holds a finished layer stays, to go on from, and a result that could
    not be published. Errors: OutputError where another process works there, where `out` exists (unless
    overwrite), is or holds the base, or lacks `size_bytes` of space.
    """

    def __init__(
        self,
        out: str | Path,
        base: str | Path,
        *,
        size_bytes: int,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.partial, self.out = partial_folder(out), resolved(out)
        self.base, self.overwrite = Path(base), overwrite
        self.artifact, self._replaced = self.partial / "artifact", self.partial / "replaced"
        self.ties: dict[
            str, str
        ] = {}  # tensor -> the one that it is tied to; known before the first is added
        self.shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._weights: dict[str, int] = {}  # name -> number of its shard
        self._whole = False  # a result that could not be published
        with writing(self.out):
            # the innermost first
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
                # which goes
                left = sum(file.stat().st_size for file in self.artifact.rglob("*") if file.is_file())
                # artefact, one shard's spools
                require_space(self.partial, size_bytes + min(size_bytes, shard_bytes) - left)
                self._before = seen(self.out)
                discard(self.artifact)
                self.artifact.mkdir()
            except BaseException:
                self._leave(kept=earlier)  # what a run before has left is not ours to take
                raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._leave(kept=self._whole or self._replaced.exists())

    def _leave(self, *, kept: bool) -> None:
        """Drop what can't be gone on from, and the folders that were made for it."""
        if not kept:
            discard(self.artifact)
        if not kept and not any(self.partial.glob("journal*/**/*.safetensors")):
            self._empty()
        self._lock.release()
        self._tidy()

    def _tidy(self) -> None:
        """Have the folders gone that were made to work in, as far as nothing is in them."""
        for folder in (self.partial, *self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _empty(self) -> None:
        """Have all that is in the partial folder gone but the lock, which goes when nothing of ours is left
        there."""
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
        if not (out / "config.json").is_file():
            raise OutputError(
                f"{argument('out')} {self.out} holds other things than a model, which stay as they are; "
                f"choose another {argument('out')}"
            )

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors by name, tied ones left out; a new shard begins where one would pass
        `shard_bytes`."""
        with writing(self.out):
            for name, tensor in sorted(tensors.items()):
                if name in self._weights:
                    raise ValueError(f"{name} was written already")
                if name not in self.ties:
                    self._room_for(tensor.nbytes).add(name, tensor)
                    self._weights[name] = len(self._shards) - 1

    def _room_for(self, size: int) -> Shard:
        """The shard that takes the next `size` bytes."""
        if not self._shards or self._shards[-1].size_bytes + size > self.shard_bytes:
            if self._shards:
                self._shards[-1].close({"format": "pt"})
            self._shards.append(Shard(self.artifact / f"shard-{len(self._shards) + 1:05}"))
        return self._shards[-1]

    def close(self, config: Mapping[str, Any]) -> Path:
        """Finish the weights, write config.json and the base's small files; the folder returned loads with
        from_pretrained."""
        untied = sorted(source for source in self.ties.values() if source not in self._weights)
        if untied or not self._shards:
            raise ValueError(
                f"{untied[0]}, the source of a tie, was never written" if untied else "no tensor was written"
            )
        with writing(self.out):
            self._shards[-1].close({"format": "pt"})
            self._name_shards(len(self._shards))
            for name, content in kept(self.base, vocabulary_files(self.base)).items():
                self._put(name, content)
            self._put(CONFIG, _json(shareable(config)))
        return self.artifact

    def _name_shards(self, total: int) -> None:
        """Give the shards their names, now that their number is known, and write the index."""
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
        """Add files (report, card, recipe) and let the artefact appear at `out`; only then the old one
        goes."""
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
            self._empty()  # the journal too: it has served
            self._made = []
            self._leave(kept=True)
        return self.out


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
