"""The model between two stages: a checkpoint in the first stage's journal, verified before a later run reuses
it."""

from __future__ import annotations

from pathlib import Path

from llmcompress.io.journal import Journal
from llmcompress.io.manifest import MANIFEST, is_sound, manifest_of
from llmcompress.io.output_folder import Writer, partial_folder
from llmcompress.io.safetensors_writer import discard, writing
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.outcome import Outcome, write_weights

REMADE = (
    "the model that this stage left was damaged on the disk after an earlier run, and was written again "
    "from the journal"
)


def joint_folder(journal: Journal) -> Path:
    """Return the folder of the model that the stage with this journal left."""
    return journal.folder / "joint"


def write_joint(journal: Journal, model: DiskModel, outcome: Outcome, base: Path) -> str | None:
    """Write the model that a stage left to the stage's journal folder, where it lives as long as the journal.

    A model from an earlier run is read whole and compared with its manifest. If it is damaged, it is written
    again and a note for the report is returned; otherwise the result is None.
    """
    folder, damaged = joint_folder(journal), False
    with writing(folder):
        if folder.exists() or folder.is_symlink():
            if is_sound(folder):
                return None
            damaged = True
            discard(folder)
        discard(partial_folder(folder))
    with Writer(folder, base, size_bytes=model.checkpoint.size_bytes) as writer:
        writer.publish({MANIFEST: manifest_of(write_weights(writer, model, outcome))})
    return REMADE if damaged else None
