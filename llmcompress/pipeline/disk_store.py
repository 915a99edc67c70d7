"""A model on disk between two stages: a checkpoint in the journal of the first, opened by the next like
any base."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from llmcompress.data.calibration import CalibrationData
from llmcompress.integrations import distributed
from llmcompress.io.journal import Journal
from llmcompress.io.output_folder import journal_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.between_stages import joint_folder, write_joint
from llmcompress.pipeline.outcome import Outcome
from llmcompress.pipeline.resolve import source_of
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import ModelSource

SOURCES = ("*.py", "*.c", "*.h")  # of this package


class DiskStore:
    """The model of a run on disk.

    `model` is what the next stage is done to, and after the last one still what that was done to: what it
    left, `left`, is yet to be written. Of several processes the first writes, and the others read what it
    wrote.
    """

    shared = True

    def __init__(
        self, recipe: Recipe, model: DiskModel, base: Path, text: CalibrationData, place: Path
    ) -> None:
        self.recipe, self.model, self.base, self.text, self.place = recipe, model, base, text, place
        self._left: Outcome | None = None
        others = (None, *recipe.teachers) if recipe.student else recipe.teachers  # else the base is the model
        self._fingerprints = [model.fingerprint(), *(self.teacher(name).fingerprint() for name in others)]

    def teacher(self, name: str | None) -> ModelSource:
        """A model by its name; without one, the base."""
        return source_of(name or str(self.base), self.model.device)

    @contextmanager
    def working(self, number: int) -> Iterator[tuple[Journal, Path]]:
        """The journal of a stage, which keeps what an earlier run has finished, and a folder for temporary
        files."""
        folder = journal_folder(self.place, number)
        key = _key(self.recipe, number, self._fingerprints, self.text)
        with distributed.first_alone() as writes:
            journal = Journal(folder, key) if writes else None
        with tempfile.TemporaryDirectory(dir=self.place) as scratch:
            yield journal or Journal(folder, key), Path(scratch)

    def take_in(self, outcome: Outcome, *, last: bool) -> str | None:
        """Write what a stage left, unless it is the last; what is there from an earlier run is checked."""
        self._left, note = outcome, None
        if last:
            return None
        with distributed.first_alone() as writes:
            if writes:
                note = write_joint(outcome.journal, self.model, outcome, self.base)
        coded = bool(outcome.schemes) or self.model.has_codes
        self.model = DiskModel(joint_folder(outcome.journal), self.model.device, quantized=coded)
        return note

    @property
    def left(self) -> Outcome:
        """What the last stage made of `model`."""
        assert self._left is not None, "a recipe has a stage"
        return self._left


def _key(recipe: Recipe, number: int, fingerprints: Sequence[str], text: CalibrationData) -> str:
    """Digest of all that decides what a stage makes of a layer: what is done, to which weights, on which
    tokens, by what."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "bitsandbytes")}
    stages = recipe.model_dump(mode="json")["stages"][: number + 1]
    made_of = [
        *fingerprints,
        text.sha256,
        text.training_sha256,
        versions,
        source_digest(Path(__file__).parents[1]),
    ]
    said = json.dumps([stages, recipe.data.seed, made_of], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


@functools.cache
def source_digest(folder: Path) -> str:
    """Digest of the source of a package, in which its version is too: an editable one changes under the same
    version."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in folder.rglob(pattern)):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
