"""What the tests ask of an artefact on disk: what it loads as, what it computes, and what the report measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress  # noqa: F401  (teaches from_pretrained our formats)
from llmcompress.ondisk import OnDisk
from llmcompress.walk import logits
from tests.bases import VOCABULARY

CPU = torch.device("cpu")
TOKENS = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> PreTrainedModel:
    model, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True))
    assert not any(set(info[kind]) - {"lm_head.weight"} for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return cast(PreTrainedModel, model)


@torch.no_grad()
def live(model: PreTrainedModel) -> Tensor:
    return cast(Tensor, model(TOKENS).logits).float()


def measured(folder: Path) -> Tensor:
    """The logits that a report is made of."""
    return torch.cat(list(logits(OnDisk(folder, CPU, quantized=True), TOKENS)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
