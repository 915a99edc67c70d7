"""What a run would give and cost, from the model's config alone: no weight is read and nothing is run.

Sizes follow from shapes and formats and are exact, headers apart. Memory is the sum of what is held at once. Time is work
over speed: the multiplications that a stage does, at the rate at which this machine multiplies matrices now (timed for a
moment), so it is right to a factor of about two.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.registry import AnyLayout
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.modeling.from_disk import meta_model
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.sequential import SAMPLE, TOKENS_AT_ONCE
from llmcompress.pipeline.outcome import outline_after
from llmcompress.pipeline.resolve import config_of, find_base, pick_device, pin_commits
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.codebook.stage import Codebook
from llmcompress.stages.distill.stage import Distill
from llmcompress.stages.fisher import tokens_for
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.prune import sublayer_dropping
from llmcompress.stages.prune.stage import Prune
from llmcompress.stages.quantize.embedding import apart
from llmcompress.stages.quantize.sensitivity import spared
from llmcompress.stages.quantize.stage import Quantize
from llmcompress.stages.share.layer_groups import NEAR
from llmcompress.stages.share.stage import TOKENS, Share
from llmcompress.stages.sparsify.stage import Sparsify
from llmcompress.stages.tie.stage import Tie

Row = dict[str, Any]  # stage, parameters, size_bytes, peak_memory_bytes, seconds


def plan_recipe(recipe: Recipe, *, base: str | None = None, device: str | None = None) -> tuple[list[Row], list[str]]:
    """Rows for the base and for each stage, and notes in words; raises CompressError as `run_recipe` would for the same input."""
    recipe.require_own_names(base=base)
    found = find_base(base or recipe.base, recipe.revision if base is None else None, weights=False)
    config, recipe = config_of(found.folder, base=True), pin_commits(recipe)
    model = meta_model(found.folder, config, pick_device(device))
    length = recipe.data.length or min(2048, getattr(model.config, "max_position_embeddings", 2048))
    tokens, rate = recipe.data.samples * length, _rate(model.device)
    whole = {"parameters": model.parameters(), "size_bytes": model.stored_bytes()}
    rows: list[Row] = [{"stage": "base", **whole, **per_token(model)}]
    notes: list[str] = []
    for step in recipe.stages:
        stage, said = step.stage, list[str]()
        if isinstance(stage, Distill):
            stage.require_packages()
            if stage.student:
                folder = find_base(stage.student, weights=False, wanted="student").folder
                model = meta_model(folder, config_of(folder, base=True), model.device)
            row = _distill(model, stage, length, rate, rows[-1]["size_bytes"])
        else:
            left = outline_after(stage, model)
            left.model.tie_weights()
            if isinstance(stage, Prune):
                row, said = _prune(model, stage, left, tokens, rate)
            elif isinstance(stage, Sparsify):
                row, said = _sparsify(model, stage, tokens, rate)
            elif isinstance(stage, Quantize):
                row, said = _quantize(model, stage, tokens, rate, rows[-1]["size_bytes"])
            else:
                row, said = _tie(model, stage, left, tokens, rate, rows[-1]["size_bytes"])
            model = left
        notes += said
        rows.append(row | per_token(model))
    return rows, [*notes, f"calibration: {recipe.data.samples} windows of {length} tokens, on {model.device}"]


def per_token(model: MetaModel) -> Row:
    """Operations of the matrices for one token, and the bytes that it adds to the cache of keys and values.

    Operations of attention among tokens are not in it: they grow with the text.
    """
    weights = sum(_multiplied(model.layouts.get(name), shape) for name, shape in model.linear_maps())
    for index, layer in enumerate(model.layers):
        for name in model.anatomy.experts:
            share = model.config.num_experts_per_tok / model.sizes_of(index)["expert"]
            weights += int(layer.get_parameter(name).numel() * share)
    sizes = [model.sizes_of(index) for index in range(len(model.layers))]
    cached = sum(2 * size["kv"] * size["d"] for size in sizes) * model.weight_dtype.itemsize
    return {"flops_per_token": 2 * weights, "kv_cache_bytes_per_token": cached}


def _bits(model: MetaModel, linear: str) -> int:
    """Bits in which a weight of a linear is stored."""
    return 8 * model.dtype_of(f"{linear}.weight").itemsize


def _multiplied(layout: AnyLayout | None, shape: tuple[int, int]) -> int:
    """Weights that one token is multiplied by; those of a product are two matrices."""
    whole = math.prod(shape)
    if not isinstance(layout, FactoredLayout):
        return whole
    return layout.rank * sum(shape) + (whole if layout.format == "shared" else 0)


def _prune(model: MetaModel, stage: Prune, left: MetaModel, tokens: int, rate: float) -> tuple[Row, list[str]]:
    """The row of a cut that leaves `left`, and notes in words."""
    cut = stage.cut(model)
    layers, notes = len(model.layers), list[str]()
    inner = sum(p.numel() for layer in model.layers for p in layer.parameters())
    C = 0
    if stage.of_layers:
        spoken = f"layer, {layers - len(cut.gone)} of {layers}"
        work = 2.0 * inner * SAMPLE * layers * len(cut.gone) / 2
    elif stage.of_parts:
        every, gone = sublayer_dropping.candidates(model), sublayer_dropping.guess(model, stage)
        spoken = f"sublayer, {len(every) - len(gone)} of {len(every)}"
        work = 2.0 * inner * SAMPLE * len(every) * len(gone) / 2
        notes.append("the run finds the sublayers that lose least; what stands here is without the last ones")
    else:
        maps, sizes = dict(model.linear_maps()), stage.sizes(model)
        consumers = [f"{model.layer_name(0)}.{model.anatomy.consumer_of(axis)}" for axis in stage.axes]
        C = max(maps[reader][1] if reader in maps else model.config.hidden_size for reader in consumers)
        solved = layers * (4.0 * C**2 * tokens + 8.0 * C**3)  # moments and removal
        work = 4 * 2.0 * inner * tokens + solved
        if stage.sensitive or stage.worth in ("obs", "taylor"):
            work += 5 * 2.0 * inner * tokens_for(model.config.hidden_size)
        spoken = "; ".join(f"{axis}, {cut.widths[axis][0]} of {sizes[axis][0]}" for axis in stage.axes)
        if stage.sensitive:
            work += 2 * 2.0 * inner * tokens + solved
            spoken += " in the mean"
            notes.append("the run finds a width for each layer, where it loses least; what stands here is for layers all alike")
    states = (
        layers * SAMPLE if stage.of_layers else 2 * layers * SAMPLE if stage.of_parts else 4 * tokens
    ) * model.config.hidden_size
    floats = 4 * inner // layers + states + 8 * C * C
    row = {
        "stage": f"prune ({spoken})",
        "parameters": left.parameters(),
        "size_bytes": left.stored_bytes(),
        "peak_memory_bytes": 4 * floats,
        "seconds": work / rate,
    }
    return row, notes


def _tie(
    model: MetaModel, stage: Tie | Share | Codebook | LowRank, left: MetaModel, tokens: int, rate: float, size: int
) -> tuple[Row, list[str]]:
    """The row of what is shared, which begins at `size` bytes, and notes in words."""
    inner = sum(p.numel() for layer in model.layers for p in layer.parameters())
    parameters, notes = left.parameters(), list[str]()
    size -= model.stored_bytes() - left.stored_bytes()
    if isinstance(stage, Tie):
        outer = model.config.vocab_size * model.config.hidden_size
        spoken, work = "embedding and head", (2 * tokens + 12 * SAMPLE) * 2.0 * (inner + outer)
        floats = 4 * outer + inner // len(model.layers) + 2 * tokens * model.config.hidden_size
    elif isinstance(stage, Share):
        spoken, work, floats, notes = _share(model, stage, inner, tokens)
    else:
        spoken, work, saved, notes = _rewrite(model, stage, inner, tokens)
        size -= saved
        widest = max(C for _, (_, C) in model.linear_maps())
        floats = 4 * inner // len(model.layers) + 4 * tokens * model.config.hidden_size + 6 * widest**2
    row = {
        "stage": f"tie ({spoken})",
        "parameters": parameters,
        "size_bytes": size,
        "peak_memory_bytes": 4 * floats,
        "seconds": work / rate,
    }
    return row, notes


def _share(model: MetaModel, stage: Share, inner: int, tokens: int) -> tuple[str, float, int, list[str]]:
    """What layers that share are called, the work, the floats held at once, and notes in words."""
    groups, layers = stage.groups_of(model), len(model.layers)
    spoken = f"{' and '.join(stage.parts)} of {sum(map(len, groups))} layers, {len(groups)} stored"
    searched = stage.layers in ("auto", "kl")
    swaps = (layers - (stage.groups or layers)) * layers * min(layers - 1, 2 * NEAR) if searched else 0
    work = 2.0 * inner * (2 * tokens + 5 * TOKENS) + inner * SAMPLE * swaps
    work += 6.0 * inner / layers * TOKENS_AT_ONCE * stage.steps * sum(map(len, groups))
    floats = (max(map(len, groups)) + 5) * inner // layers + 2 * tokens * model.config.hidden_size
    found = ["the run finds the layers that share with least loss; what stands here is for neighbours"]
    return spoken, work, floats, found if searched else []


def _rewrite(model: MetaModel, stage: Codebook | LowRank, inner: int, tokens: int) -> tuple[str, float, int, list[str]]:
    """What linears that are written anew are called, the work, bytes saved by codes, and notes in words."""
    (chosen, kept), saved = stage.choose(model), 0
    shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
    layouts = {name: layout for name, layout in chosen.items() if isinstance(layout, CodebookLayout)}
    work = 2.0 * inner * tokens * (7 if isinstance(stage, LowRank) and stage.basis > 1 else 5)
    if isinstance(stage, Codebook):
        spoken = f"codebook of {stage.codebook}"
        bits = {name: _bits(model, name) - layout.bits(shapes[name]) for name, layout in layouts.items()}
        saved = int(sum(math.prod(shapes[name]) * fewer for name, fewer in bits.items()) / 8)
        work += sum(2.0 * R * C**2 * 9 + 6.0 * C**3 for R, C in shapes.values())
    else:
        spoken, work = f"basis of {stage.basis}", work + sum(12.0 * C**3 + 4.0 * R * C**2 for R, C in shapes.values())
    said = f"{len(shapes)} linears are rewritten, {len(kept)} kept ({'; '.join(sorted(set(kept.values())))})"
    return spoken, work, saved, [said] if kept else []


def _sparsify(model: MetaModel, stage: Sparsify, tokens: int, rate: float) -> tuple[Row, list[str]]:
    """The row of weights that become zero, and notes in words."""
    chosen, kept = stage.choose(model)
    shapes = {name: shape for name, shape in model.linear_maps() if name in chosen}
    parameters = model.parameters()
    saved = sum(math.prod(shape) * (_bits(model, name) - chosen[name].bits(shape)) for name, shape in shapes.items()) / 8
    layers, calibrated = len(model.layers), stage.score != "magnitude"
    inner = sum(p.numel() for layer in model.layers for p in layer.parameters())
    work = 2.0 * inner * tokens * (5 if calibrated else 3)  # passes, partly in two streams: moments, and on
    work += sum(2.0 * C**2 * tokens for C in {shape[1] for shape in shapes.values()}) * layers
    if stage.score == "sparsegpt":
        work += sum(6.0 * R * C**2 + 4.0 * C**3 for R, C in shapes.values())
    states = tokens * model.config.hidden_size * (4 if calibrated else 2)
    outer, widest = parameters - inner, max(C for _, C in shapes.values())
    row = {
        "stage": f"prune ({stage.pattern}, {stage.score})",
        "parameters": parameters - sum(R * (C - chosen[name].kept(C)) for name, (R, C) in shapes.items()),
        "size_bytes": int(model.stored_bytes() - saved),
        "peak_memory_bytes": 4 * (4 * inner // layers + outer + states + 4 * widest**2),
        "seconds": work / rate,
    }
    reasons = "; ".join(sorted(set(kept.values())))
    return row, [f"{len(shapes)} linears lose weights, {len(kept)} are kept ({reasons})"] if kept else []


def _distill(model: MetaModel, stage: Distill, length: int, rate: float, size: int) -> Row:
    """The row of a training that begins at `size` bytes; the teacher is taken to be as large as the student."""
    parameters, tokens = model.parameters(), stage.tokens(length)
    what = stage.loss if stage.train == "all" else f"{stage.train}, {stage.loss}"
    learning = 3 if stage.train == "all" else 0  # a gradient and two moments of every weight, or of next to none
    kept = 4 * parameters * ((1 if stage.cache else 2) + learning)
    return {
        "stage": f"distill ({what}, {stage.steps} steps of {stage.batch} x {stage.length or length} tokens)",
        "parameters": parameters,
        "size_bytes": model.stored_bytes() if stage.student else size,
        "peak_memory_bytes": kept + 4 * TOKENS_AT_ONCE * model.config.hidden_size * 16 * len(model.layers),
        "seconds": tokens * 2.0 * parameters * 4 / rate,  # forward and backward of the one, forward of the other
    }


def _quantize(model: MetaModel, stage: Quantize, tokens: int, rate: float, size: int) -> tuple[Row, list[str]]:
    """The row of a quantisation that begins at `size` bytes, and notes in words."""
    chosen, kept = stage.choose(model)
    chosen = {
        name: coding for name, coding in chosen.items() if name not in model.shared_linears
    }  # what is shared is stored once
    shapes = {name: shape for name, shape in model.matrices().items() if name in chosen}
    solved = [name for name in shapes if name not in apart(model)]
    parameters = model.parameters()
    left = {name: stage.protect if name in solved and spared(chosen[name]) is None else 0.0 for name in shapes}
    bits = {
        name: math.prod(shape) * (chosen[name].bits - _bits(model, name)) for name, shape in shapes.items()
    }  # over the base's
    rows_of = {
        name: 0 if isinstance(chosen[name], FourBitScheme) else 32 * shape[0] for name, shape in shapes.items()
    }  # scales
    saved = -sum((bits[name] + rows_of[name]) * (1 - left[name]) for name in shapes) / 8
    formats = ", ".join(dict.fromkeys(coding.format for coding in chosen.values()))
    row = {
        "stage": f"quantize ({formats}, {stage.rounding})",
        "parameters": parameters,
        "size_bytes": int(size - saved),
        "peak_memory_bytes": _memory(model, stage, tokens),
        "seconds": _work(model, stage, shapes, solved, tokens) / rate,
    }
    reasons = sorted(set(kept.values()))
    return row, [f"{len(shapes)} linears are quantised, {len(kept)} kept ({'; '.join(reasons)})"] if kept else []


def _memory(model: MetaModel, stage: Quantize, tokens: int) -> int:
    """Bytes held at once: the largest layer with its solver's matrices, what lies outside the sequences, and the hidden states."""
    inner = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    every = sum(p.numel() for p in model.model.parameters())
    outer = every - sum(p.numel() for layer in model.layers for p in layer.parameters())
    D = model.config.hidden_size
    streams = tokens * D * (2 if stage.rounding == "nearest" else 4)  # inputs and outputs, here and in the full model
    widest = max(columns for _, (_, columns) in model.linear_maps())
    # a layer in float32, as it was and as it becomes, its codes as int64; gradients, positions and moments of Adam if trained
    copies = {"nearest": 4, "gptq": 6, "learned": 11}[stage.rounding]
    floats = inner * copies + outer + streams + 4 * widest * widest
    return int(4 * floats + TOKENS_AT_ONCE * model.config.vocab_size * 8)


def _work(model: MetaModel, stage: Quantize, shapes: dict[str, tuple[int, int]], chosen: list[str], tokens: int) -> float:
    """Multiplications and additions of a stage."""
    inner = sum(p.numel() for layer in model.layers for p in layer.parameters())
    forward = 2.0 * inner * tokens
    total = 2 * forward  # one pass for the moments, one to go on
    if stage.rounding != "nearest":
        total += 3 * forward  # the moments of one group of linears after another, in two streams; most passes end early
        total += sum(2.0 * rows * columns**2 * 13 + columns**3 for rows, columns in (shapes[name] for name in chosen))
    if stage.rounding == "learned" or stage.protect:
        total += 5 * 2.0 * inner * tokens_for(model.config.hidden_size)
    if stage.rounding == "learned":
        total += 3 * 2.0 * inner * stage.steps * TOKENS_AT_ONCE + 2 * forward
    return total


def _rate(device: torch.device) -> float:
    """Operations per second of a float32 matrix product here, timed for a moment."""
    X = torch.rand(1024, 1024, device=device)
    (X @ X).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (X @ X).sum().item()
        count += 1
    return 0.6 * count * 2 * 1024**3 / (time.perf_counter() - start)  # layers run at about 0.6 of a bare product
