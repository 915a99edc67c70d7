"""Estimate the cost of a distillation, approximately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE
from llmcompress.stages.base import Estimate, Workload
from llmcompress.stages.cost import TRAINING

if TYPE_CHECKING:
    from llmcompress.stages.distill.stage import Distill

PASSES = 4  # the student's forward and backward, and the teacher's forward


def of(stage: Distill, model: MetaModel, work: Workload) -> Estimate:
    """Estimate the cost of training, with a teacher as large as the student."""
    parameters, length = model.parameters(), stage.length or work.length
    what = stage.loss if stage.train == "all" else f"{stage.train}, {stage.loss}"
    # a gradient and two moments of every weight, or of next to none of them
    learning = 3 if stage.train == "all" else 0
    floats = parameters * ((1 if stage.cache else 2) + learning)
    floats += TOKENS_AT_ONCE * model.hidden_size * 16 * len(model.layers)
    tokens = stage.tokens(work.length)
    return Estimate(
        stage=f"distill ({what}, {stage.steps} steps of {stage.batch} x {length} tokens)",
        parameters=parameters,
        size_bytes=model.stored_bytes() if stage.student else work.size_bytes,
        peak_memory_bytes=4 * floats,
        time=work.passes(PASSES, tokens, half=work.half, what=TRAINING)
        + work.heads(PASSES, tokens, what=TRAINING),
    )
