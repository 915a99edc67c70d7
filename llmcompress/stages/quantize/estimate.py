"""Estimate a quantisation: the bytes of the codes exactly, memory and operations approximately."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmcompress.algorithms.logit_chunks import CPU_BYTES
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.sequential import TOKENS_AT_ONCE
from llmcompress.stages.base import Estimate, Workload
from llmcompress.stages.fisher import tokens_for
from llmcompress.stages.quantize.embedding import apart
from llmcompress.stages.quantize.sensitivity import spared

if TYPE_CHECKING:
    from llmcompress.stages.quantize.stage import Quantize


def of(stage: Quantize, model: MetaModel, work: Workload) -> Estimate:
    """Estimate the cost of moments and solvers, and the bytes of the codes."""
    chosen, kept = stage.choose(model)
    stored = {name: scheme for name, scheme in chosen.items() if name not in model.shared_linears}
    shapes = {name: shape for name, shape in model.matrices().items() if name in stored}
    solved = [name for name in shapes if name not in apart(model)]
    saved = 0.0
    for name, shape in shapes.items():
        spares = stage.protect if name in solved and spared(stored[name]) is None else 0.0
        scales = 0 if isinstance(stored[name], FourBitScheme) else 32 * shape[0]
        # bits more than in the base
        more = math.prod(shape) * (stored[name].bits - model.bits_of(name)) + scales
        saved -= more * (1 - spares) / 8
    formats = ", ".join(dict.fromkeys(scheme.format for scheme in stored.values()))
    reasons = "; ".join(sorted(set(kept.values())))
    return Estimate(
        stage=f"quantize ({formats}, {stage.rounding})",
        parameters=model.parameters(),
        size_bytes=int(work.size_bytes - saved),
        peak_memory_bytes=_memory(stage, model, work.tokens),
        seconds=_operations(stage, model, shapes, solved, work.tokens) / work.rate,
        notes=(f"{len(shapes)} linears are quantised, {len(kept)} kept ({reasons})",) if kept else (),
    )


def _memory(stage: Quantize, model: MetaModel, tokens: int) -> int:
    """Bytes held at once: the largest layer with its solver's matrices, the weights outside the layers, the
    hidden states."""
    inner = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    outer = sum(p.numel() for p in model.model.parameters()) - model.inner_parameters()
    # inputs and outputs, here and in the full model
    states = tokens * model.config.hidden_size * (2 if stage.rounding == "nearest" else 4)
    widest = max(columns for _, (_, columns) in model.linear_maps())
    # a layer in float32, before and after, and its codes as int64; if trained, also gradients, positions and
    # moments of Adam
    copies = {"nearest": 4, "gptq": 6, "learned": 11}[stage.rounding]
    floats = inner * copies + outer + states + 4 * widest * widest
    logits = min(4 * TOKENS_AT_ONCE * model.config.vocab_size, CPU_BYTES)
    return int(4 * floats + 2 * logits)


def _operations(
    stage: Quantize,
    model: MetaModel,
    shapes: Mapping[str, tuple[int, int]],
    solved: Sequence[str],
    tokens: int,
) -> float:
    """Multiplications and additions of the stage."""
    inner = model.inner_parameters()
    forward = 2.0 * inner * tokens
    total = 2 * forward  # one pass for the moments, one to advance the states
    if stage.rounding != "nearest":
        # the moments of one group of linears after another, in two streams; most passes end early
        total += 3 * forward
        total += sum(
            2.0 * rows * columns**2 * 13 + columns**3 for rows, columns in (shapes[name] for name in solved)
        )
    if stage.rounding == "learned" or stage.protect:
        total += 5 * 2.0 * inner * tokens_for(model.config.hidden_size)
    if stage.rounding == "learned":
        total += 3 * 2.0 * inner * stage.steps * TOKENS_AT_ONCE + 2 * forward
    return total
