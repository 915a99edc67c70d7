"""Llamas of llama.cpp with random weights, to be timed beside those of transformers.

The linears of the layers are in Q4_0 or Q8_0; embedding and head stay float32, as they do in the models
beside them. Layers have equal weights, each its own. What a weight is does not change what its product costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaConfig

from evaluation.llama_cpp import SILENT, Context, library

TYPES = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q8_0": "Q8_0"}


def write(config: LlamaConfig, type_: str, file: Path) -> None:
    """Write a GGUF file of a shape, without a vocabulary, its linears in a type of llama.cpp."""
    import gguf

    out, draw = gguf.GGUFWriter(file, "llama"), np.random.default_rng(0)
    heads, D = config.num_attention_heads, config.hidden_size
    kv = config.num_key_value_heads or heads
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(D)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_rope_dimension_count(D // heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")

    def random(R: int, C: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = draw.standard_normal((R, C), np.float32) / np.float32(C**0.5)
        return found

    shapes = {
        "attn_q": (D, D),
        "attn_k": (D // heads * kv, D),
        "attn_v": (D // heads * kv, D),
        "attn_output": (D, D),
        "ffn_gate": (config.intermediate_size, D),
        "ffn_up": (config.intermediate_size, D),
        "ffn_down": (D, config.intermediate_size),
    }
    kind = gguf.GGMLQuantizationType[type_]
    linears = {name: gguf.quants.quantize(random(*shape), kind) for name, shape in shapes.items()}
    for name in ("token_embd", "output"):
        out.add_tensor(f"{name}.weight", random(config.vocab_size, D))
    out.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for layer in range(config.num_hidden_layers):
        for name, coded in linears.items():
            out.add_tensor(f"blk.{layer}.{name}.weight", coded, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{name}.weight", np.ones(D, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def decoder(file: Path, batch: int, past: int, threads: int) -> Callable[[], NDArray[np.float32]]:
    """A call that reads one token of each of `batch` sequences after `past` others, and returns its logits,
    (sequence, vocabulary)."""
    library().llama_log_set(SILENT, None)
    context = Context(str(file), batch * (past + 1), threads, batch)
    draw = np.random.default_rng(0)
    tokens = draw.integers(context.size, size=(batch, past + 1)).tolist()
    context.read([each[:past] for each in tokens], 0)

    def decode() -> NDArray[np.float32]:
        found = context.read([each[past:] for each in tokens], past)
        context.forget(past)
        return found

    return decode
