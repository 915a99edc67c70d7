"""A model with code of its own, made on the spot: a config, a model and a norm in three files, with names and
layouts that no family of transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.bases import VOCABULARY, byte_tokenizer

CONFIG = """
from transformers import PretrainedConfig


class WeftConfig(PretrainedConfig):
    model_type = "weft"

    def __init__(self, vocab_size=256, hidden_size=96, num_hidden_layers=2, num_attention_heads=8,
                 num_query_groups=4, head_dim=16, ffn_dim=160, **others):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_query_groups = num_attention_heads, num_query_groups
        self.head_dim, self.ffn_dim = head_dim, ffn_dim
        super().__init__(**{"tie_word_embeddings": False, **others})
"""
GAIN = """
import torch
import torch.nn.functional as F
from torch import nn


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)
"""
MODEL = """
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_weft import WeftConfig
from .weft_gain import Gain


class WeftLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.groups, self.d = config.hidden_size, config.num_query_groups, config.head_dim
        self.each = config.num_attention_heads // self.groups
        self.before = Gain(D)
        self.weave = nn.Linear(D, self.groups * (self.each + 2) * self.d, bias=False)
        self.gather = nn.Linear(self.groups * self.each * self.d, D, bias=False)
        self.split = nn.Linear(D, 2 * config.ffn_dim, bias=False)
        self.merge = nn.Linear(config.ffn_dim, D, bias=False)

    def forward(self, stream, mask):
        B, L, _ = stream.shape
        x = self.before(stream)
        weave = self.weave(x).view(B, L, self.groups, self.each + 2, self.d).transpose(1, 2)
        q, k, v = weave.split([self.each, 1, 1], 3)
        scores = torch.einsum("bglqd,bgmxd->bgqlm", q, k) / math.sqrt(self.d) + mask
        mixed = torch.einsum("bgqlm,bgmxd->blgqd", scores.softmax(-1), v)
        gate, up = self.split(x).unflatten(-1, (-1, 2)).unbind(-1)
        return stream + self.gather(mixed.flatten(2)) + self.merge(F.silu(gate) * up), None


class WeftBase(PreTrainedModel):
    config_class = WeftConfig
    base_model_prefix = "cloth"

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.1)


class WeftModel(WeftBase):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.threads = nn.ModuleList(WeftLayer(config) for _ in range(config.num_hidden_layers))
        self.last = Gain(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, **_):
        stream, L = self.words(input_ids), input_ids.shape[1]
        mask = torch.full((L, L), -torch.inf, dtype=stream.dtype).triu(1)
        for thread in self.threads:
            stream, _ = thread(stream, mask)
        return self.last(stream)


class WeftForCausalLM(WeftBase):
    _tied_weights_keys = {"speak.weight": "cloth.words.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.cloth = WeftModel(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.cloth.words

    def get_output_embeddings(self):
        return self.speak

    def forward(self, input_ids, output_hidden_states=False, **_):
        last = self.cloth(input_ids)
        return CausalLMOutputWithPast(
            logits=self.speak(last), hidden_states=(last,) if output_hidden_states else None
        )
"""
AUTO_MAP = {
    "AutoConfig": "configuration_weft.WeftConfig",
    "AutoModelForCausalLM": "modeling_weft.WeftForCausalLM",
}
FILES = {"configuration_weft.py": CONFIG, "modeling_weft.py": MODEL, "weft_gain.py": GAIN}
FIELDS = {
    "model_type": "weft",
    "architectures": ["WeftForCausalLM"],
    "auto_map": AUTO_MAP,
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 16,
    "ffn_dim": 160,
}


def save_own_base(folder: Path, **fields: Any) -> Path:
    """A random Weft with its code and tokenizer. No code is run for it."""
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps(FIELDS | fields))
    torch.manual_seed(0)
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return folder


def _weights() -> dict[str, Tensor]:
    shapes = {"cloth.words": (VOCABULARY, 96), "speak": (VOCABULARY, 96)}
    gains = ["cloth.last"]
    for index in range(2):
        layer = f"cloth.threads.{index}"
        linears = {"weave": (256, 96), "gather": (96, 128), "split": (320, 96), "merge": (96, 160)}
        shapes |= {f"{layer}.{name}": shape for name, shape in linears.items()}
        gains.append(f"{layer}.before")
    found = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    return found | {f"{name}.weight": torch.randn(96) * 0.1 for name in gains}
