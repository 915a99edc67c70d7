"""The journal of a stage that several processes run together: rank 0 writes, all read, and all agree on what
is done."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmcompress.integrations import distributed
from llmcompress.integrations.distributed import Processes
from llmcompress.io.journal import NO_FACTS, Journal, JournalFacts


class DividedJournal(Journal):
    """A journal of which every process has the same view.

    What an earlier run finished is what rank 0 finds. After that an entry is finished once `save` has
    returned. All processes must call `save` for the same entries in the same order.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal.folder, journal.key)
        self.damaged |= journal.damaged
        found = self._sound_files() if distributed.first() else set()
        self._done: set[str] = Processes.all("batch").agreed(found)

    def _sound_files(self) -> set[str]:
        """The names of the files that are sound; each is read."""
        found = set[str]()
        for file in self.folder.glob("*.safetensors"):
            stage, _, layer = file.stem.rpartition(".")
            if layer.isdecimal() and layer.isascii() and super().has(stage, int(layer)):
                found.add(self.file(stage, int(layer)).name)
        return found

    def has(self, stage: str, layer: int) -> bool:
        """Whether a layer of a stage is finished, for all processes alike."""
        return self.file(stage, layer).name in self._done

    def save(
        self, stage: str, layer: int, tensors: Mapping[str, Tensor], facts: JournalFacts = NO_FACTS
    ) -> None:
        """Write the layer as rank 0 has it; the others wait for that."""
        distributed.wait()  # none may find it finished while another still asks
        if distributed.first():
            super().save(stage, layer, tensors, facts)
        distributed.wait()
        self._done.add(self.file(stage, layer).name)
