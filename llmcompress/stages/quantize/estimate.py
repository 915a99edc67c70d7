"""Estimate a quantisation: the bytes of the codes exactly, memory and time approximately."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmcompress.algorithms.logit_chunks import CPU_BYTES
from llmcompress.algorithms.smoothing import EXPONENTS
from llmcompress.algorithms.two_sided import PASSES, TOGETHER
from llmcompress.formats.schemes import QuantScheme
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.token_limit import TOKENS_AT_ONCE
from llmcompress.stages import fisher
from llmcompress.stages.base import Estimate, Time, Workload
from llmcompress.stages.cost import ERRORS, IN_TURN, SOLVER, TRAINING
from llmcompress.stages.quantize import sensitivity, smoothing
from llmcompress.stages.quantize.embedding import apart
from llmcompress.stages.quantize.sensitivity import spared
from llmcompress.stages.quantize.smoothing import Smooth
from llmcompress.stages.routed_experts import moments_bytes

if TYPE_CHECKING:
    from llmcompress.stages.quantize.stage import Quantize

READS = 2  # how often an input is rounded: as it is read for the next linears, and on the way out
INPUTS, SEARCH = "rounded inputs", "searches before the rounding"
# the shape [R, C] and scheme of each linear, and the share of the tokens that it reads
Schemes = Sequence[tuple[tuple[int, int], QuantScheme, float]]


def of(stage: Quantize, model: MetaModel, work: Workload) -> Estimate:
    """Estimate the cost of moments and solvers, and the bytes of the codes."""
    chosen, kept = stage.choose(model)
    stored = {name: scheme for name, scheme in chosen.items() if name not in model.shared_linears}
    shapes = {name: shape for name, shape in model.matrices().items() if name in stored}
    solved = [name for name in shapes if name not in apart(model)]
    saved = 0.0
    for name, shape in shapes.items():
        spares = stage.protect if name in solved and spared(stored[name]) is None else 0.0
        scheme = stored[name]
        # bits more than in the base
        more = math.prod(shape) * (scheme.bits_of(shape) - model.bits_of(name)) + scheme.row_bits * shape[0]
        saved -= more * (1 - spares) / 8
    formats = ", ".join(dict.fromkeys(scheme.format for scheme in stored.values()))
    reasons = "; ".join(sorted(set(kept.values())))
    return Estimate(
        stage=f"quantize ({formats}, {stage.rounding})",
        parameters=model.parameters(),
        size_bytes=int(work.size_bytes - saved),
        peak_memory_bytes=_memory(stage, model, work.tokens) + moments_bytes(model, chosen),
        time=_time(stage, work, [(shapes[name], chosen[name], model.used_share(name)) for name in solved]),
        notes=(f"{len(shapes)} linears are quantised, {len(kept)} kept ({reasons})",) if kept else (),
    )


def _memory(stage: Quantize, model: MetaModel, tokens: int) -> int:
    """Bytes held at once: the largest layer with its solver's matrices, the weights outside the layers, the
    hidden states."""
    inner = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    inside = f"{model.anatomy.layers}."
    outer = sum(p.numel() for name, p in model.model.named_parameters() if not name.startswith(inside))
    # inputs and outputs, here and in the full model, and what each token has of its own in a layer
    streams = (2 if stage.rounding == "nearest" else 4) + model.anatomy.arguments_by_batch
    # and what layers hand on, which is no wider than the states, for as many models
    if model.anatomy.form.handed_on:
        streams += 1 if stage.rounding == "nearest" else 2
    states = tokens * model.hidden_size * streams
    widest = max(columns for _, (_, columns) in model.linear_maps())
    # a layer in float32, before and after, and its codes as int64; if trained, also gradients, positions and
    # moments of Adam
    copies = {"nearest": 4, "gptq": 6, "learned": 11}[stage.rounding]
    floats = inner * copies + outer + states + 4 * widest * widest
    if stage.two_sided:
        rows = [rows for name, (rows, _) in model.linear_maps() if name not in model.expert_linears]
        floats += sum(R * min(R, TOGETHER) for R in rows) // len(model.layers)
    logits = min(4 * TOKENS_AT_ONCE * model.text_config.vocab_size, CPU_BYTES)
    return int(4 * floats + 2 * logits)


def _time(stage: Quantize, work: Workload, schemes: Schemes) -> Time:
    """The time of the whole stage; `schemes` are those of the linears that are solved."""
    time = _walk(stage, work, schemes)
    if (schemes and (stage.rounding == "learned" or stage.two_sided)) or stage.protect:
        time += fisher.time_of(work, stage.fisher_tokens)
    if stage.two_sided:
        # experts, which read a share of the tokens, are solved as ever
        weighed = [shape for shape, _, share in schemes if share == 1]
        time += _two_sided(stage, work, weighed)
    if stage.protect:
        work = replace(work, tokens=min(work.tokens, sensitivity.TOKENS))
        time += _protection(stage, work, schemes)
    if stage.smooth is not None:
        # beside the full model, or in the walk that finds what to protect
        half = work.half and (stage.protect > 0 or stage.rounding != "nearest")
        time += _smoothing(stage.smooth, work, schemes, streams=1 if stage.protect else 2, half=half)
    return time


def _two_sided(stage: Quantize, work: Workload, shapes: Sequence[tuple[int, int]]) -> Time:
    """The Fisher matrices of the outputs of linears [R, C], and the descent under them."""
    tokens = min(work.tokens, fisher.tokens_for(work.model.hidden_size, stage.fisher_tokens))
    summed = sum(work.machine.product(tokens, (R, min(R, TOGETHER))) for R, _ in shapes)
    within = sum(work.machine.product(C, (R, min(R, TOGETHER))) for R, C in shapes)
    time = Time({fisher.WHAT: summed, SOLVER: PASSES * within})
    return time + work.products(2 * PASSES, shapes)


def _walk(stage: Quantize, work: Workload, schemes: Schemes) -> Time:
    """The walk through the layers in which each linear is rounded."""
    machine = work.machine
    shapes = [shape for shape, _, _ in schemes]
    rounded = sum(machine.rounding(work.tokens * share, C, scheme) for (_, C), scheme, share in schemes)
    time = Time({INPUTS: READS * rounded})
    time += work.products(2, shapes, what=ERRORS)
    if stage.rounding == "nearest":
        nearest = sum(machine.nearest(shape, scheme) for shape, scheme, _ in schemes)
        return time + work.passes(2) + work.moments(1) + work.routed(1) + Time({SOLVER: nearest})
    half = work.half
    time += work.passes(IN_TURN, half=half) + work.moments(2, half=half) + work.factors(1)
    time += work.routed(2, half=half, factors=1)
    time += Time({SOLVER: sum(machine.solver(shape, scheme) for shape, scheme, _ in schemes)})
    time += work.products(3, shapes)  # the corrected weight
    if stage.rounding != "learned":
        return time
    steps = stage.steps * sum(machine.learning(shape, scheme) for shape, scheme, _ in schemes)
    # the losses before and after
    time += Time({TRAINING: steps}) + work.passes(2, half=work.half_is_fast)
    return time + work.passes(3, stage.steps * work.batch, half=work.half_is_fast, what=TRAINING)


def _smoothing(smooth: Smooth, work: Workload, schemes: Schemes, streams: int, half: bool) -> Time:
    """The search for channel scales: each candidate is tried on a few batches."""
    machine, model = work.machine, work.model
    candidates = len(EXPONENTS) + 2 if smooth.alpha == "auto" else 1
    pairs = len(model.anatomy.smooth_pairs)
    tokens = min(work.tokens, smoothing.SAMPLE * work.batch)
    finalists = smoothing.FINALISTS + 1
    if candidates > finalists:  # all are tried on a quarter
        time = work.passes((candidates - 1) * pairs, tokens / smoothing.QUARTER, what=SEARCH)
        time += work.passes(finalists * pairs, tokens, what=SEARCH)
    else:
        time = work.passes(candidates * pairs, tokens, what=SEARCH)
    tried = sum(
        machine.nearest(shape, scheme) + machine.rounding(tokens * share, shape[1], scheme)
        for shape, scheme, share in schemes
    )
    fits = sum(machine.smoothing(smoothing.TOKENS, smoothing.ROWS, C) for C in work.inputs.values())
    fitted = len(model.layers) * fits if smooth.alpha == "auto" else 0.0
    time += Time({SEARCH: candidates * tried + fitted})
    return time + work.passes(streams, half=half) + work.moments(streams, half=half)


def _protection(stage: Quantize, work: Workload, schemes: Schemes) -> Time:
    """The search for the linears that suffer most: each is rounded alone, and runs as it would be spared."""
    tokens = min(work.tokens, sensitivity.SAMPLE * work.batch)
    trials, rounded = 0.0, 0.0
    for shape, scheme, share in schemes:
        if share < 1:  # experts are not tried
            continue
        kinds = [one for one in (scheme, spared(scheme)) if one]
        trials += len(kinds) / len(work.model.layers)
        rounded += sum(work.machine.nearest(shape, one) for one in kinds)
    return work.passes(1, half=work.half) + work.passes(trials, tokens, what=SEARCH) + Time({SEARCH: rounded})
