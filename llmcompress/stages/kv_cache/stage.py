"""Store the keys and values of earlier tokens in 8 or 4 bits when the model writes.

No weight changes. config.json says how the cache is stored (`integrations.kv_cache`), and `generate` makes it
so once llmcompress is imported; plain transformers loads the same artefact with an ordinary cache. Scales are
the ranges of what they cover, found when a block is rounded: static scales from calibration text lost two to
four times as much (evaluation/NOTES.md), so there is nothing to calibrate. What the cache costs in nats is
measured with the artefact (`pipeline.kv_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from llmcompress.architectures.spec import LINEARS
from llmcompress.integrations.kv_cache import FIELD, CacheSettings, require_growing
from llmcompress.io.journal import Journal
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.cost import Time

STAGE = "kv_cache"


class KVCache(Stage):
    """Stores the keys and values of earlier tokens in 8 or 4 bits."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "other"
    keeps_weights: ClassVar[bool] = True

    bits: Literal[8, 4] = Field(default=8, description="bits of a key or value")
    per: Literal["channel", "token"] = Field(
        default="channel",
        description="what a scale of keys is for: `channel`, a channel of a head over a block of tokens; "
        "`token`, up to 64 channels of one token, as that of values is",
    )
    block: int = Field(default=32, ge=8, le=1024, description="tokens that are rounded together")
    window: int = Field(
        default=32, ge=0, le=1 << 20, description="latest tokens that stay in the model's dtype"
    )
    sinks: int = Field(
        default=32, ge=0, le=1 << 20, description="first tokens that stay in the model's dtype"
    )

    @property
    def settings(self) -> CacheSettings:
        """What config.json says."""
        return CacheSettings(self.bits, self.per, self.block, self.window, self.sinks)

    @property
    def needs(self) -> int:
        """Nothing of the weights, so any model that is read."""
        return LINEARS

    @property
    def leaves(self) -> str:
        """What the cache becomes."""
        return f"a KV cache of {self.bits} bits"

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse another place than the last, which may be after `quantize`. Errors: ValueError."""
        if after:
            raise ValueError("kv_cache comes last, as it is about the model that the other stages leave")

    def require_possible(self, model: LayerwiseModel, before: Sequence[StageResult], seed: int) -> None:
        """Refuse a model without a cache that grows with the text. Errors: ModelError."""
        require_growing(model.config, type(model.model))

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """The config, which says how the cache is stored."""
        return StageResult(config={FIELD: self.settings.to_dict()})

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Parameters, bytes and time stay; `plan` prices the cache."""
        return Estimate(
            stage=f"kv_cache ({self.bits} bits)",
            parameters=left.parameters(),
            size_bytes=work.size_bytes,
            peak_memory_bytes=0,
            time=Time(),
        )

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Nothing is computed before the artefact is measured."""
        return Facts(STAGE, details=self.model_dump())
