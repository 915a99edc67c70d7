"""A family that came after the derivation was written: names, layouts and a layer of its own, and no line of
the package knows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import configuration_auto, modeling_auto

from llmcompress import compress, plan
from llmcompress.derivation.derive import anatomy_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import logits
from llmcompress.report.schema import Report
from tests.artefacts import CPU, TOKENS, distance
from tests.bases import VOCABULARY, byte_tokenizer, staged_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")


class BraidConfig(PretrainedConfig):
    """Two words of its own: `num_query_groups` and `ffn_dim`."""

    model_type = "braid"

    def __init__(
        self,
        vocab_size: int = VOCABULARY,
        hidden_size: int = 96,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 8,
        num_query_groups: int = 4,
        head_dim: int = 16,
        ffn_dim: int = 160,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_query_groups = num_attention_heads, num_query_groups
        self.head_dim, self.ffn_dim = head_dim, ffn_dim
        super().__init__(**{"tie_word_embeddings": False, **others})


class Gain(nn.Module):
    """An RMS norm whose gain is one more than its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


class BraidLayer(nn.Module):
    """Keys, values and queries lie group by group in one projection, gate and up neuron by neuron in another;
    attention and neurons read the same norm, and the layer returns a tuple."""

    def __init__(self, config: BraidConfig) -> None:
        super().__init__()
        D, self.groups, self.d = config.hidden_size, config.num_query_groups, config.head_dim
        self.each = config.num_attention_heads // self.groups
        self.before = Gain(D)
        self.braid = nn.Linear(D, self.groups * (self.each + 2) * self.d)
        self.gather = nn.Linear(self.groups * self.each * self.d, D)
        self.split = nn.Linear(D, 2 * config.ffn_dim, bias=False)
        self.merge = nn.Linear(config.ffn_dim, D, bias=False)

    def forward(self, stream: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        B, L, _ = stream.shape
        x = self.before(stream)
        braid = self.braid(x).view(B, L, self.groups, self.each + 2, self.d).transpose(1, 2)
        q, k, v = braid.split([self.each, 1, 1], 3)
        scores = torch.einsum("bglqd,bgmxd->bgqlm", q, k) / math.sqrt(self.d) + mask
        mixed = torch.einsum("bgqlm,bgmxd->blgqd", scores.softmax(-1), v)
        gate, up = self.split(x).unflatten(-1, (-1, 2)).unbind(-1)
        return stream + self.gather(mixed.flatten(2)) + self.merge(F.silu(gate) * up), None


class BraidBase(PreTrainedModel):
    config_class = BraidConfig
    base_model_prefix = "trunk"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.1)


class BraidModel(BraidBase):
    def __init__(self, config: BraidConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.strands = nn.ModuleList(BraidLayer(config) for _ in range(config.num_hidden_layers))
        self.last = Gain(config.hidden_size)
        cast(Any, self).post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        stream = self.words(input_ids)
        L = input_ids.shape[1]
        mask = torch.full((L, L), -torch.inf, dtype=stream.dtype).triu(1)
        for strand in self.strands:
            stream, _ = strand(stream, mask)
        return cast(Tensor, self.last(stream))


class BraidForCausalLM(BraidBase):
    def __init__(self, config: BraidConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = {"speak.weight": "trunk.words.weight"}
        self.trunk = BraidModel(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cast(Any, self).post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.speak(self.trunk(input_ids)))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A random Braid on disk, which transformers knows for the length of a test."""
    AutoConfig.register("braid", BraidConfig)
    AutoModelForCausalLM.register(BraidConfig, BraidForCausalLM)
    torch.manual_seed(0)
    BraidForCausalLM(BraidConfig()).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    yield tmp_path / "base"
    configuration_auto.CONFIG_MAPPING._extra_content.pop("braid")
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(BraidConfig)


def test_its_anatomy_is_found(base: Path) -> None:
    found = anatomy_of(AutoModelForCausalLM.from_pretrained(base))
    assert found.layers == "trunk.strands" and found.norm == "trunk.last" and found.form.returned_items == 2
    assert found.consumers == (("braid", "split"), ("gather",), ("merge",))
    assert found.layer == {
        "before.weight": "hidden",
        "braid.weight": "(kv (q d | d | d)) hidden",
        "braid.bias": "(kv (q d | d | d))",
        "gather.weight": "hidden (kv q d)",
        "gather.bias": "hidden",
        "split.weight": "(ffn (1 | 1)) hidden",
        "merge.weight": "hidden ffn",
    }
    assert found.scale_pairs == {
        "before": ("braid", "split"),
        "braid[2]": ("gather",),
        "split[1]": ("merge",),
    }
    assert found.cuts == frozenset({"ffn", "kv", "q", "hidden"}) and found.turns == frozenset({"r1", "r2"})
    assert found.sizes == {
        "ffn": "ffn_dim",
        "kv": "num_query_groups",
        "q": "num_attention_heads",
        "hidden": "hidden_size",
    }
    assert found.norm_offset == 1.0


@pytest.mark.parametrize(
    "stages",
    [
        [
            {"prune": {"axis": ["ffn", "kv"], "keep": 0.5, "multiple": 1}},
            {"prune": {"axis": "hidden", "keep": 64}},
        ],
        [
            {
                "quantize": {
                    "format": "w8a8",
                    "activations": "none",
                    "smooth": {"method": "smoothquant"},
                    "rotate": True,
                }
            }
        ],
        [{"share": {"layers": "adjacent", "groups": 1, "steps": 2, "parts": ["attention", "ffn"]}}],
        ["tie", {"quantize": {"format": "w8a16"}}],
    ],
)
def test_every_stage_takes_it(base: Path, stages: list[Any], tmp_path: Path) -> None:
    recipe = staged_recipe(write_text(tmp_path / "text.txt"), base, *stages)
    assert plan(str(base), recipe).rows
    report = compress(str(base), recipe, str(tmp_path / "out"))
    assert isinstance(report, Report) and report.compressed.size_bytes is not None
    assert report.base.size_bytes is not None and report.compressed.size_bytes < report.base.size_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    walk = DiskModel(tmp_path / "out", CPU, quantized=True)
    with torch.no_grad():
        assert distance(model(TOKENS).logits, torch.cat([*logits(walk, TOKENS)])) < 1e-3
