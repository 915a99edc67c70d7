"""Estimate sharing: parameters and bytes exactly, memory and time approximately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.sequential import SAMPLE
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE
from llmcompress.stages.base import Estimate, Workload
from llmcompress.stages.cost import TRAINING
from llmcompress.stages.share import layer_groups
from llmcompress.stages.share.group_fitting import TOKENS

if TYPE_CHECKING:
    from llmcompress.stages.share.stage import Share


def of(stage: Share, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
    """Estimate the cost of finding the groups and of fitting what each shares."""
    groups, layers, inner = stage.groups_of(model), len(model.layers), model.inner_parameters()
    sharing = sum(map(len, groups))
    searched = stage.layers in ("auto", "kl")
    time = work.passes(2) + work.passes(5, TOKENS)
    if searched:
        given_up = layers - (stage.groups or layers)
        tried = given_up * layers * min(layers - 1, 2 * layer_groups.NEAR)
        time += work.passes(tried / 2, SAMPLE, what="search for the groups")
    time += work.passes(3, stage.steps * TOKENS_AT_ONCE * sharing / layers, what=TRAINING)
    floats = (max(map(len, groups)) + 5) * inner // layers + 2 * work.tokens * model.hidden_size
    note = "the run finds the layers that share with least loss; these numbers are for neighbours"
    return Estimate(
        stage=f"share ({' and '.join(stage.parts)} of {sharing} layers, {len(groups)} stored)",
        parameters=left.parameters(),
        size_bytes=work.size_bytes - model.stored_bytes() + left.stored_bytes(),
        peak_memory_bytes=4 * floats,
        time=time,
        notes=(note,) if searched else (),
    )
