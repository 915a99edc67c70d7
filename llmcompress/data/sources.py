"""What text a user can name, and its two sides: one to calibrate on and one to evaluate on.

A side is a stream of pieces, texts and conversations, which are joined as they are. It is read lazily, so
that no more is read than used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer

from llmcompress import hub
from llmcompress.data.rows import TEXT, Piece
from llmcompress.errors import DataError
from llmcompress.io.safe_parsing import Unreadable, yaml_of
from llmcompress.io.user_paths import path_of

PYTHON_DOCS = "python-docs"
# characters tokenised as one string: long enough that the cuts do not matter, short enough to run in parallel
CHUNK = 1 << 16
# the fields of DataSpec that describe the sequences and not the text
SEQUENCES = ("samples", "length", "seed", "evaluation_samples", "bos")
LARGEST = 1 << 12  # bytes of a mapping on the command line
MOST = 10_000_000  # largest number of sequences, and of tokens per sequence
EXAMPLE = "'{source: user/name, config: en, column: text}'"
LONGEST = 2048  # tokens of a sequence, at most, where the number of sequences is given and no length


Effort = Literal["fast", "balanced", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "balanced", "best")  # the least work first
DEFAULT: Effort = "balanced"  # where nobody says anything


class Amount(NamedTuple):
    """How much text calibrates: a number of sequences, and the most tokens that each may have."""

    samples: int
    longest: int


# about 16, 64 and 256 thousand tokens; GPTQ is commonly calibrated on 128 sequences of 2048
AMOUNTS: Mapping[Effort, Amount] = {
    "fast": Amount(32, 512),
    "balanced": Amount(128, 512),
    "best": Amount(128, 2048),
}


class DataSpec(BaseModel):
    """Which text is used, and how much of it: the `data` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(
        default=PYTHON_DOCS,
        min_length=1,
        description="Hub data set id, file or folder; `python-docs` is the documentation that Python carries",
    )
    config: str | None = Field(default=None, description="configuration of a Hub data set")
    split: str = Field(default="train", description="Hub split to calibrate on")
    evaluation_split: str | None = Field(
        default=None,
        description="Hub split to evaluate on; default: validation, else test, else the first rows",
    )
    column: str = Field(
        default=TEXT,
        description="column that holds text, or messages for the chat template (Hub, .jsonl, .parquet); "
        "where there is no text, messages or conversations is read",
    )
    revision: str | None = Field(default=None, description="commit, branch or tag of a Hub data set")
    samples: int | None = Field(
        default=None, ge=1, le=MOST, description="number of calibration sequences; default: by `effort`"
    )
    length: int | None = Field(
        default=None,
        ge=2,
        le=MOST,
        description="tokens per sequence with BOS; default: the longest that fits, from 2048, or less by "
        "`effort`, down to 128",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="seed of the calibration sequences and of all random choices of the stages",
    )
    evaluation_samples: int = Field(default=64, ge=1, le=MOST, description="number of evaluation sequences")
    bos: Literal["auto"] | bool = Field(
        default="auto",
        description="whether each sequence begins with BOS; `auto`: where the tokenizer puts it by itself",
    )

    @model_serializer(mode="wrap")
    def _older_keys_alone_unless_bos_is_set(self, handler: Any) -> Any:
        """Leave out `bos: auto`, so that recipes keep the digests that they had before this key existed."""
        return {key: value for key, value in handler(self).items() if (key, value) != ("bos", "auto")}

    def amount(self, effort: Effort | None) -> Amount:
        """Return how much text calibrates. What is not set is as much as `effort` takes.

        Without an effort, a spec that sets neither samples nor length gets the default effort, and one that
        sets samples gets sequences of up to LONGEST tokens.
        """
        given = AMOUNTS[effort or DEFAULT]
        samples = self.samples or given.samples
        longest = LONGEST if effort is None and self.samples else given.longest
        return Amount(samples, self.length or longest)

    def with_text(self, text: str) -> DataSpec:
        """Return a spec for another text, with the sequences of this one.

        `text` is a source, with `user/name@revision` allowed, or a mapping of fields as in a recipe. Fields
        of the text that the mapping leaves out have their defaults; fields of the sequences keep their
        values. Errors: DataError.
        """
        given: Any = {"source": text}
        if text.lstrip().startswith("{"):
            try:
                given = yaml_of(text, largest=LARGEST)
            except Unreadable as error:
                raise DataError(f"data {error}; give a source, or a mapping like {EXAMPLE}") from None
        elif not path_of(text, "data", DataError).exists() and hub.is_id((split := hub.split(text))[0]):
            given = {"source": split[0], "revision": split[1]}
        return self.with_place(given)

    def with_place(self, given: Mapping[str, Any]) -> DataSpec:
        """Return a spec with the fields `given`, by name, and the sequences of this one. Errors:
        DataError."""
        try:
            return DataSpec.model_validate({name: getattr(self, name) for name in SEQUENCES} | dict(given))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key, known = ".".join(map(str, first["loc"])), ", ".join(DataSpec.model_fields)
            why = f"unknown key; use {known}" if first["type"] == "extra_forbidden" else first["msg"]
            raise DataError(f"data {str(given)[:200]}: {key}: {why}") from None


class Texts(NamedTuple):
    """The two sides of a source: pieces that are joined as they are.

    Both sides may be one iterator: evaluation is read first and calibration continues from there.
    """

    calibration: Iterable[Piece]
    evaluation: Iterable[Piece]
    revision: str | None = None  # the commit of a Hub data set
    evaluation_split: str | None = None  # of a Hub data set, if it is not the split that calibrates
