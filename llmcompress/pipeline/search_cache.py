"""Where a search keeps what it has measured: in the cache folder, under a digest of all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmcompress.data.calibration import CalibrationData
from llmcompress.frontier.costs import Priced
from llmcompress.frontier.ways import Way
from llmcompress.integrations.distributed import ALONE
from llmcompress.io.cache import cache_folder
from llmcompress.io.journal import Journal
from llmcompress.io.safetensors_writer import discard
from llmcompress.io.scratch import scratch_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import Track
from llmcompress.pipeline.disk_store import source_digest
from llmcompress.pipeline.resolve import source_of
from llmcompress.stages.base import Context, naming_layer


@dataclass(frozen=True)
class SearchCache:
    """The folder of one search, and the digest of its model, text, seed, ways and code."""

    place: Path
    key: str

    @classmethod
    def of(
        cls,
        read: DiskModel,
        text: CalibrationData,
        seed: int,
        ways: Sequence[Way],
        known: Sequence[Priced] = (),
    ) -> SearchCache:
        """The folder of the search for these ways in a model, beside linears whose costs are `known`."""
        said = [
            read.fingerprint(),
            text.sha256,
            seed,
            source_digest(Path(__file__).parents[1]),
            [[way.name, dict(way.settings)] for way in ways],
            *([unit.model_dump(mode="json") for unit in known]),
        ]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return cls(cache_folder() / "searches" / key[:32], key)

    @property
    def kept(self) -> Journal:
        """What a finished search found."""
        return Journal(self.place, self.key, shared=True)

    @contextmanager
    def context(self, read: DiskModel, text: CalibrationData, seed: int, track: Track) -> Iterator[Context]:
        """What the layers are measured with; its journal has those that are done."""
        with scratch_folder() as scratch, naming_layer("search"):
            yield Context(
                teacher=lambda name: source_of(name or str(read.folder), read.device),
                origin=range(len(read.layers)),
                data=text,
                journal=Journal(self.place / "layers", self.key, shared=True),
                scratch=scratch,
                cache=cache_folder(),
                seed=seed,
                track=track,
                processes=ALONE,
            )

    def tidy(self) -> None:
        """Remove the layers of a finished search, which needs what they add up to alone."""
        discard(self.place / "layers")
