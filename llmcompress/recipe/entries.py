"""The entries of a recipe's `stages`: which stage an entry names, and whether it may stand at its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from llmcompress.stages.base import Stage
from llmcompress.stages.budget.stage import Budget
from llmcompress.stages.codebook.stage import Codebook
from llmcompress.stages.distill.stage import Distill
from llmcompress.stages.kv_cache.stage import KVCache
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.prune.stage import Prune
from llmcompress.stages.quantize.stage import Quantize
from llmcompress.stages.share.stage import Share
from llmcompress.stages.sparsify.stage import Sparsify
from llmcompress.stages.tie.stage import Tie

STAGES: dict[str, type[Stage]] = {
    kind.name: kind
    for kind in (
        Prune,
        Sparsify,
        Tie,
        Share,
        LowRank,
        Codebook,
        Distill,
        Quantize,
        KVCache,
        Budget,
    )
}


class _Entry(BaseModel):
    """One entry of `stages`: the name of a stage and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_settings(cls, entry: Any) -> Any:
        """Expand short forms: `- quantize` and `- quantize:` mean the stage with all defaults; a stage object
        means itself."""
        if isinstance(entry, Stage):
            return {entry.name: entry}
        if isinstance(entry, str):
            return {entry: {}}
        if not isinstance(entry, dict):
            return entry
        return {name: {} if settings is None else settings for name, settings in entry.items()}

    @model_validator(mode="after")
    def _one_stage(self) -> _Entry:
        if len(self.model_fields_set) != 1:
            given = " and ".join(sorted(self.model_fields_set)) or "nothing"
            raise ValueError(f"an entry is one stage, this one has {given}; use one of {', '.join(STAGES)}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of the two validators above: exactly one stage, which may also be given by its bare
        name."""
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
        """Whether each setting of a stage has a default."""
        try:
            cls.model_validate(name)
        except ValidationError:
            return False
        return True

    @property
    def stage(self) -> Stage:
        """The stage itself."""
        (name,) = self.model_fields_set
        stage: Stage = getattr(self, name)
        return stage


FIELDS: dict[str, Any] = {name: (kind | None, None) for name, kind in STAGES.items()}
StageEntry = create_model("StageEntry", __base__=_Entry, __doc__=_Entry.__doc__, **FIELDS)


class _FromEntry:
    """Reads an entry of a recipe as the stage that it names, and writes a stage as such an entry."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of an entry, with the stage object as its value."""

        def stage_of(entry: _Entry) -> Stage:
            return entry.stage

        def entry_of(stage: Stage, info: SerializationInfo) -> Mapping[str, Any]:
            return {stage.name: stage.model_dump(mode=info.mode, exclude_unset=info.exclude_unset)}

        written = core_schema.plain_serializer_function_ser_schema(entry_of, info_arg=True)
        return core_schema.no_info_after_validator_function(
            stage_of, handler.generate_schema(StageEntry), serialization=written
        )


AnyStage = Annotated[Stage, _FromEntry]


def require_order(stages: Sequence[Stage]) -> None:
    """Raise ValueError, which says why, if the stages can't follow each other."""
    for number, stage in enumerate(stages):
        stage.require_place(stages[:number], stages[number + 1 :])
