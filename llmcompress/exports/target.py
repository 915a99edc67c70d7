"""The interface of a target: what it takes of an artefact, and what it writes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from transformers import PretrainedConfig

from llmcompress.exports.artefact import Artefact
from llmcompress.io.output_folder import Writer

TargetName = Literal["compressed-tensors", "gguf"]  # those of `registry.TARGETS`, for recipes and options


@dataclass(frozen=True)
class Written:
    """What a target wrote.

    `tensors` says of each module whose weight is stored in another form than before what that form is, by
    full name. `notes` are sentences for the card and the report: what was converted, and what differs when
    it runs.
    """

    tensors: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Target(Protocol):
    """A layout of another engine. A target is a file of this room with an instance in `registry.TARGETS`."""

    @property
    def name(self) -> str:
        """What `--to` takes."""

    @property
    def extra(self) -> str:
        """The extra of llmcompress that installs what reads the result in Python."""

    @property
    def loads_with(self) -> str:
        """What runs the result, for the card: a noun phrase."""

    @property
    def loading(self) -> str:
        """Code that loads the result, for the card; `{name}` stands for the folder."""

    @property
    def loading_from_hub(self) -> str:
        """The same from a repository on the Hub, whose id `{name}` stands for."""

    @property
    def language(self) -> str:
        """The language of `loading`, as a code block names it."""

    def missing(self) -> str | None:
        """Return what this machine lacks for writing the target, and how to get it; or None."""

    def unsupported(self, config: PretrainedConfig) -> str | None:
        """Return why no model of a config can be written, whatever its formats; or None."""

    def refusal(self, artefact: Artefact) -> str | None:
        """Return why this artefact can't be written without quantising again, naming the linear; or None.

        Only names, shapes, layouts and the config are looked at, so it takes no time.
        """

    def unfit(self, artefact: Artefact) -> str | None:
        """Return what of `refusal` needs no package and no tokenizer, so that it can be asked of a
        `PlannedArtefact`."""

    def weight_bytes(self, artefact: Artefact) -> int:
        """The bytes of the tensors alone, also of a `PlannedArtefact`."""

    def size_bytes(self, artefact: Artefact) -> int:
        """The bytes that `write` will need on the disk, or a few more."""

    def write(self, artefact: Artefact, writer: Writer) -> Written:
        """Write the artefact into `writer.artifact`, one matrix in memory at a time.

        Safetensors go through `writer.add` and `writer.close`, other files straight into `writer.artifact`.
        Errors: CompressError.
        """
