"""How much faster is a model of fewer parameters? Random Llamas cut along each axis, beside the whole one.

    python -m evaluation pruned-speed [--threads 2]

Each way of cutting is a model of the widths that `prune` leaves (what a weight is does not change what it
costs). The models take turns in one process; the medians of reading a prompt and of decoding are held against
those of the whole model in the same turns. The bytes of the cache are counted in the cache itself and held
against what `plan` says. The result goes to results/pruned_speed.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from evaluation import machine, results
from evaluation.options import parser
from evaluation.results import PrunedSpeedRow
from evaluation.runs import known, layer_parameters
from llmcompress.architectures.resize import changed
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.plan import per_token
from llmcompress.stages.prune.stage import Prune

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
CUTS: dict[str, dict[str, object]] = {
    "whole": {},
    "layers": {"axis": "layer", "keep": 6},
    "ffn": {"axis": "ffn", "keep": 0.5},
    "hidden": {"axis": "hidden", "keep": 0.6, "score": "activation"},
    "kv heads": {"axis": "kv", "keep": 4},
}
PROMPT = 256  # tokens
TOKENS = 16  # decoded
TURNS = 9


@dataclass(frozen=True)
class Turn:
    """Seconds to read the prompt and to decode a token, and bytes of cache per token."""

    reading_s: float
    decoding_s: float
    cache_bytes: int


def shape_of(cut: dict[str, object]) -> MetaModel:
    """The shapes that a cut leaves."""
    config = LlamaConfig.from_dict({**SHAPE, "dtype": "float32"})
    whole = MetaModel(config, torch.device("cpu"), torch.float32)
    if not cut:
        return whole
    return MetaModel(changed(config, Prune.model_validate(cut).changes(whole)), whole.device, whole.dtype)


def build(outline: MetaModel) -> LlamaForCausalLM:
    """A random model of these shapes."""
    torch.manual_seed(0)
    return cast(
        LlamaForCausalLM, AutoModelForCausalLM.from_config(outline.config, dtype=torch.float32).eval()
    )


@torch.inference_mode()
def turn(model: LlamaForCausalLM, tokens: torch.Tensor) -> Turn:
    """Read the prompt [1, PROMPT], then decode."""
    cache, start = DynamicCache(config=model.config), time.perf_counter()
    model(tokens, past_key_values=cache)
    reading = time.perf_counter() - start
    held = 0
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        held += layer.keys.nbytes + layer.values.nbytes
    start = time.perf_counter()
    for _ in range(TOKENS):
        model(tokens[:, :1], past_key_values=cache)
    return Turn(reading, (time.perf_counter() - start) / TOKENS, held // PROMPT)


def row(
    name: str, outline: MetaModel, whole: MetaModel, turns: list[Turn], wholes: list[Turn]
) -> PrunedSpeedRow:
    """A cut beside the whole model in the same turns."""
    pairs = list(zip(turns, wholes, strict=True))
    (flops, cached), (flops_whole, _) = per_token(outline), per_token(whole)
    return PrunedSpeedRow(
        cut=name,
        block_parameters=layer_parameters(outline) / layer_parameters(whole),
        flops=flops / flops_whole,
        reading_time=median(ours.reading_s / theirs.reading_s for ours, theirs in pairs),
        decoding_time=median(ours.decoding_s / theirs.decoding_s for ours, theirs in pairs),
        reading_s=median(one.reading_s for one in turns),
        decoding_s=median(one.decoding_s for one in turns),
        kv_cache_bytes_per_token=turns[0].cache_bytes,
        kv_cache_bytes_per_token_planned=int(known(cached)),
    )


def main(argv: Sequence[str]) -> int:
    """Measure every cut and write the result."""
    machine.parse(parser("pruned-speed", __doc__), argv)
    outlines = {name: shape_of(cut) for name, cut in CUTS.items()}
    models = {name: build(outline) for name, outline in outlines.items()}
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    turns: dict[str, list[Turn]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            turns[name].append(turn(model, tokens))
    whole = outlines["whole"]
    rows = [row(name, outline, whole, turns[name], turns["whole"]) for name, outline in outlines.items()]
    for found in rows:
        print(found, flush=True)
    results.write("pruned_speed", machine.head(), {"shape": SHAPE, "prompt": PROMPT, "rows": rows})
    return 0
