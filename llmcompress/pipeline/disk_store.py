"""A run's model on disk: between two stages it is a checkpoint in the first stage's journal, which the next
stage opens like any base."""

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
from llmcompress.io import own_code
from llmcompress.io.journal import Journal
from llmcompress.io.output_folder import journal_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.between_stages import joint_folder, write_joint
from llmcompress.pipeline.divided_journal import DividedJournal
from llmcompress.pipeline.outcome import Outcome
from llmcompress.pipeline.resolve import source_of
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import ModelSource

SOURCES = ("*.py", "*.c", "*.h")  # files of this package that its digest covers


class DiskStore:
    """The model of a run on disk.

    `model` is the input of the next stage. After the last stage it is still that stage's input, and `left` is
    the outcome, which is yet to be written. With several processes, rank 0 writes and the others read what it
    wrote.
    """

    shared = True

    def __init__(
        self, recipe: Recipe, model: DiskModel, base: Path, text: CalibrationData, place: Path
    ) -> None:
        self.recipe, self.model, self.base, self.text, self.place = recipe, model, base, text, place
        self._left: Outcome | None = None
        # None is the base, which without a student is `model`
        others = (None, *recipe.teachers) if recipe.student else recipe.teachers
        self._fingerprints = [model.fingerprint(), *(self.teacher(name).fingerprint() for name in others)]

    def teacher(self, name: str | None) -> ModelSource:
        """Return a model by its name, or the base if no name is given."""
        return source_of(name or str(self.base), self.model.device)

    @contextmanager
    def working(self, number: int) -> Iterator[tuple[Journal, Path]]:
        """Yield the journal of a stage, with what an earlier run finished, and a folder for temporary
        files."""
        folder = journal_folder(self.place, number)
        code = own_code.digest_of(self.base) if own_code.runs(self.base) else None
        read = [*self._fingerprints, *([code] if code else [])]
        key = _key(self.recipe, number, read, self.text)
        with distributed.first_alone() as writes:
            journal = Journal(folder, key) if writes else None
        journal = journal or Journal(folder, key)
        if distributed.count() > 1 and self.recipe.stages[number].divides:
            journal = DividedJournal(journal)
        with tempfile.TemporaryDirectory(dir=self.place) as scratch:
            yield journal, Path(scratch)

    def take_in(self, outcome: Outcome, *, last: bool) -> str | None:
        """Write what a stage left, unless it is the last stage. Returns a note for the report, or None.

        A model that an earlier run wrote is checked, and written again if it is damaged.
        """
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
    """Digest of everything that decides what a stage makes of a layer: the stages, the weights, the tokens,
    and the versions and source of the code."""
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
    """Digest of a package's source, which includes its version. An editable install changes under one
    version."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in folder.rglob(pattern)):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
