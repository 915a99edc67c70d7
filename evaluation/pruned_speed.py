"""How much faster is a model of fewer parameters? Random-weight Llamas cut to 60 % of their layers, beside the whole one.

    python evaluation/pruned_speed.py [--threads 2]

Each way of cutting is a model of the widths that `prune` leaves (what a weight is does not change what it costs). The models
take turns in one process; the medians of reading a prompt and of decoding are held against those of the whole model in the same
turns. The bytes of the cache are counted in the cache itself and held against what `plan` says. The result goes to
evaluation/results/pruned_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import head
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from llmcompress.architectures.resize import changed
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.plan import per_token
from llmcompress.stages.prune.stage import Prune

FILE = Path(__file__).parent / "results" / "pruned_speed.json"
SHAPE = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "layers": {"axis": "layer", "keep": 6},
    "ffn": {"axis": "ffn", "keep": 0.5},
    "hidden": {"axis": "hidden", "keep": 0.6, "score": "activation"},
    "kv heads": {"axis": "kv", "keep": 4},
}
PROMPT, TOKENS, TURNS = 256, 16, 9


def build(cut: dict[str, Any]) -> tuple[Any, MetaModel]:
    outline = MetaModel(LlamaConfig(**SHAPE, **HEADS, dtype="float32"), torch.device("cpu"), torch.float32)
    if cut:
        config = changed(outline.config, Prune.model_validate(cut).changes(outline))
        outline = MetaModel(config, outline.device, outline.dtype)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(outline.config, dtype=torch.float32).eval(), outline


@torch.inference_mode()
def turn(model: LlamaForCausalLM, tokens: torch.Tensor) -> tuple[float, float, int]:
    """Seconds to read the prompt, seconds to decode a token, and bytes of cache a token."""
    cache, start = DynamicCache(config=model.config), time.perf_counter()
    model(tokens, past_key_values=cache)
    read = time.perf_counter() - start
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    start = time.perf_counter()
    for _ in range(TOKENS):
        model(tokens[:, :1], past_key_values=cache)
    return read, (time.perf_counter() - start) / TOKENS, held // PROMPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    models = {name: build(cut) for name, cut in CUTS.items()}
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, (model, _) in models.items():
            times[name].append(turn(model, tokens))
    rows, whole = [], models["whole"][1]
    inner = sum(p.numel() for layer in whole.layers for p in layer.parameters())
    for name, (_, outline) in models.items():
        left = sum(p.numel() for layer in outline.layers for p in layer.parameters())
        ratios = [median(ours[i] / theirs[i] for ours, theirs in zip(times[name], times["whole"], strict=True)) for i in (0, 1)]
        told = per_token(outline)
        rows.append(
            {
                "cut": name,
                "block_parameters": left / inner,
                "flops": told["flops_per_token"] / per_token(whole)["flops_per_token"],
                "reading_time": ratios[0],
                "decoding_time": ratios[1],
                "reading_s": median(t[0] for t in times[name]),
                "decoding_s": median(t[1] for t in times[name]),
                "kv_cache_bytes_per_token": times[name][0][2],
                "kv_cache_bytes_per_token_planned": told["kv_cache_bytes_per_token"],
            }
        )
        print(rows[-1], flush=True)
    FILE.write_text(json.dumps({**head(), "shape": {**SHAPE, **HEADS}, "prompt": PROMPT, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
