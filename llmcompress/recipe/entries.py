"""The entries of a recipe's `stages`: which stage an entry is, by which of its schemas, and which may follow which."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from llmcompress.stages.codebook.stage import Codebook
from llmcompress.stages.distill.stage import Distill
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.prune.stage import Prune
from llmcompress.stages.quantize.stage import Quantize
from llmcompress.stages.share.stage import Share
from llmcompress.stages.sparsify.stage import Sparsify
from llmcompress.stages.tie.stage import Tie

Stage = Prune | Sparsify | Tie | Share | Codebook | LowRank | Distill | Quantize


def _prune_by(entry: Any) -> str:
    """Which schema of `prune` an entry is meant for: by whole units of an axis, or by a pattern of single weights."""
    if not isinstance(entry, dict):
        return PATTERN if isinstance(entry, Sparsify) else AXIS
    meant = difflib.get_close_matches("pattern", [key for key in entry if isinstance(key, str)], n=1, cutoff=0.7)
    return PATTERN if "pattern" in entry or (meant and "axis" not in entry) else AXIS


AXIS, PATTERN = "<axis>", "<pattern>"  # in the place of an error they are no keys
Pruning = Annotated[Annotated[Prune, Tag(AXIS)] | Annotated[Sparsify, Tag(PATTERN)], Discriminator(_prune_by)]


def _tie_by(entry: Any) -> str:
    """Which schema of `tie` an entry is meant for, by the key that only that one has."""
    if not isinstance(entry, dict):
        return next((tag for tag, schema in TIES.items() if isinstance(entry, schema)), "<weights>")
    for key, tag in TIE_KEYS.items():
        if key in entry or difflib.get_close_matches(key, [k for k in entry if isinstance(k, str)], n=1, cutoff=0.8):
            return tag
    return "<weights>"


TIES: dict[str, Any] = {"<weights>": Tie, "<layers>": Share, "<codebook>": Codebook, "<basis>": LowRank}
TIE_KEYS = {"weights": "<weights>", "codebook": "<codebook>", "basis": "<basis>", "layers": "<layers>", "pairs": "<layers>"}
Tying = Annotated[
    Annotated[Tie, Tag("<weights>")]
    | Annotated[Share, Tag("<layers>")]
    | Annotated[Codebook, Tag("<codebook>")]
    | Annotated[LowRank, Tag("<basis>")],
    Discriminator(_tie_by),
]


class StageEntry(BaseModel):
    """One entry of `stages`: the name of a stage and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prune: Pruning | None = None
    tie: Tying | None = None
    distill: Distill | None = None
    quantize: Quantize | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, entry: Any) -> Any:
        """`- quantize` is the stage with all defaults; `- quantize:` too."""
        if isinstance(entry, str):
            return {entry: {}}
        if not isinstance(entry, dict):
            return entry
        return {name: {} if settings is None else settings for name, settings in entry.items()}

    @model_validator(mode="after")
    def _one_stage(self) -> StageEntry:
        if len(self.model_fields_set) != 1:
            given = " and ".join(sorted(self.model_fields_set)) or "nothing"
            raise ValueError(f"an entry is one stage, this one has {given}; use one of {', '.join(STAGES)}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """One stage and no more, also by its bare name: what the two validators above do."""
        found = handler.resolve_ref_schema(handler(core))
        bare = [name for name in cls.model_fields if cls._needs_nothing(name)]
        settings = {
            name: {"anyOf": [kind for kind in schema["anyOf"] if name in bare or kind != {"type": "null"}]}
            for name, schema in found["properties"].items()
        }
        return {
            "anyOf": [
                {"enum": bare, "type": "string"},
                {
                    "type": "object",
                    "properties": settings,
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 1,
                },
            ],
            "description": found["description"],
        }

    @classmethod
    def _needs_nothing(cls, name: str) -> bool:
        """Whether a stage has a default for each of its settings."""
        try:
            cls.model_validate(name)
        except ValidationError:
            return False
        return True

    @model_serializer(mode="wrap")
    def _only_its_stage(self, handler: Any) -> Any:
        return {name: settings for name, settings in handler(self).items() if name in self.model_fields_set}

    @property
    def stage(self) -> Stage:
        """The stage itself."""
        stage = self.prune or self.tie or self.distill or self.quantize
        assert stage is not None
        return stage

    @property
    def others(self) -> dict[str, str]:
        """The models beside the base that the stage names, by their roles."""
        named = {role: getattr(self.distill, role, None) for role in ROLES}
        return {role: name for role, name in named.items() if name}


ROLES = ("teacher", "student")
STAGES = tuple(StageEntry.model_fields)


def require_order(steps: Sequence[StageEntry]) -> None:
    """Refuse stages that can't follow each other. Errors: ValueError, which says why."""
    quantized = shared = False
    coded: Codebook | None = None
    for number, step in enumerate(steps):
        lesson = step.distill
        if shared and step.prune:
            raise ValueError("prune comes before tie: weights that are shared, products or codes can't be cut any more")
        healed = any(before.distill for before in steps[:number])
        if healed and isinstance(step.tie, Tie | Share | LowRank) and not any(s.distill for s in steps[number:]):
            raise ValueError("distill heals what comes before it, and tie comes after the last one; put distill after tie")
        if coded and step.quantize and coded.skip == () and (step.quantize.head, step.quantize.embedding) == ("keep", "keep"):
            raise ValueError(
                "codebook and quantize are two codes for the same linears, and codebook takes all; give it skip, or leave one"
            )
        if quantized and (lesson is None or lesson.train == "lora"):
            raise ValueError(
                "a quantised model can't be changed again, but for what is not in codes: after the one quantize comes "
                "nothing, or distill with train: scales, norms or all"
            )
        if lesson and lesson.train == "scales" and not (quantized or coded):
            raise ValueError("train: scales is for what quantize or a codebook left; put one of them before it")
        if lesson and lesson.student and number:
            raise ValueError("a student takes the place of what the stages before it made; let its distill be the first")
        quantized = quantized or step.quantize is not None
        coded = step.tie if isinstance(step.tie, Codebook) else coded
        shared = shared or isinstance(step.tie, Share | Codebook | LowRank)
    for step, after in pairwise(steps):
        if isinstance(step.prune, Sparsify):
            why = "rounding would move its zeros" if after.quantize else "its zeros are stored by place"
            raise ValueError(f"prune with a pattern is the last stage: {why}; cut whole units before it, and quantise none")
