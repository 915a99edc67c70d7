"""What a model is worth, and how far it is from its base: `llmcompress evaluate`.

Both models are read from disk one layer at a time and computed in float32, 4-bit codes as the weights that they stand for, so
that two numbers differ by the weights and by nothing else. What others quantised, in formats that only transformers reads, is
loaded whole and runs by its own forward (`foreign`). Speed is measured on the model as from_pretrained loads it, with
the kernels that it will run on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.data.sources import DataSpec
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.foreign import WholeModel, foreign_method
from llmcompress.modeling.from_disk import DiskModel, no_progress_bar
from llmcompress.modeling.model_config import defaults, load_config
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.modeling.sequential import logits as walked
from llmcompress.pipeline.resolve import calibration_data, config_of, find_base, pick_device
from llmcompress.report.metrics import Speed, fidelity, speed

SHARE = 0.5  # of the free memory: a larger model is not loaded whole only to be timed


def evaluate(
    model: str,
    *,
    against: str | None = None,
    data: DataSpec | None = None,
    device: str | None = None,
    track: Track = untracked,
) -> dict[str, Any]:
    """Perplexity with its interval, size and speed of a model by folder or Hub id; against a base also KL and top-1 agreement.

    The keys are those of `evaluate --json`; `bos` is there, and true, where each window begins with the BOS token. Raises
    CompressError where model, base or data can't be read.
    """
    where = pick_device(device)
    subject = _opened(model, where)
    sequences = calibration_data(subject, data or DataSpec(), tokenizer_of(subject.folder))
    windows, unscored = sequences.evaluation, sequences.unscored
    base = None
    if against is not None:
        base = _logits(_opened(against, where), windows, track, unscored)
    measured = fidelity(_logits(subject, windows, track, unscored), sequences.scored, base)
    fast = speed(subject.model, windows) if isinstance(subject, WholeModel) else speed_of(subject.folder, windows, where)
    result: dict[str, Any] = {
        "model": model,
        "perplexity": measured.perplexity,
        "perplexity_ci95": list(measured.perplexity_ci95),
        "tokens": measured.tokens,
        "size_bytes": subject.size_bytes if isinstance(subject, WholeModel) else subject.checkpoint.size_bytes,
        "tokens_per_s": fast and fast.prefill_tokens_per_s,
    }
    if against is not None:
        result |= {key: getattr(measured, key) for key in ("kl_nats_mean", "kl_nats_p99", "top1_agreement")}
    if unscored:
        result["bos"] = True
    return result


def _opened(name: str, device: torch.device) -> DiskModel | WholeModel:
    folder = find_base(name, wanted="model").folder
    config_of(folder)
    method = foreign_method(folder)
    return DiskModel(folder, device, quantized=True) if method is None else WholeModel(folder, device, method)


def _logits(model: DiskModel | WholeModel, windows: Tensor, track: Track, unscored: int) -> Iterator[Tensor]:
    if isinstance(model, WholeModel):
        return model.logits(windows, track, unscored)
    return walked(model, windows, track, unscored)


def speed_of(folder: Path, windows: Tensor, device: torch.device) -> Speed | None:
    """Tokens per second of the model as from_pretrained loads it; None for one too large to load whole."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if Checkpoint.open(folder, base=False).size_bytes > SHARE * free:
        return None
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(folder, config=defaults(load_config(folder)), device_map={"": device})
    return speed(model, windows)
