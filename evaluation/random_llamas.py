"""Random Llamas of real shapes with a tokenizer of bytes, made on the spot and without a network.

Their losses mean nothing; seconds and memory do. A layer is a file of its own, drawn in bfloat16 on the GPU
if there is one and written by several threads, so that 16 GB take as long as the disk does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.cost import save_byte_tokenizer

WRITERS = 4  # threads
STD = 0.02  # of the weights, as transformers draws them


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv: int
    vocabulary: int
    tied: bool = False

    def config(self, length: int) -> LlamaConfig:
        """The config of a model for sequences of `length` tokens."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            max_position_embeddings=length,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )


def make(folder: Path, shape: Shape, length: int, device: torch.device) -> None:
    """Write a random model for sequences of `length` tokens, and its tokenizer."""
    folder.mkdir(parents=True)
    config = shape.config(length)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():  # a tied head comes once
        part = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    with ThreadPoolExecutor(WRITERS) as pool:
        written = [
            pool.submit(_write, folder / file, shapes, number, device)
            for number, (file, shapes) in enumerate(shards.items())
        ]
        sizes = [one.result() for one in written]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next process wants it
    places = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config.save_pretrained(folder)
    save_byte_tokenizer(folder)


def _write(file: Path, shapes: Mapping[str, torch.Size], seed: int, device: torch.device) -> int:
    """Draw the tensors of a file and write it. Returns its bytes."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {name: _drawn(shape, generator, device).cpu() for name, shape in shapes.items()}
    save_file(tensors, file, {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _drawn(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """The gain of a norm, which is one, or a random matrix."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return empty.normal_(std=STD, generator=generator)
