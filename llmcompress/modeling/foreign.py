"""A model that others quantised, in a format that only transformers reads: loaded whole, run by its own
forward.

Formats of llmcompress and bitsandbytes are read layer by layer (`from_disk`). For every other format
transformers decides whether it can be loaded here: it names a missing package, or asks for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.algorithms.logit_chunks import pieces, positions_at_once
from llmcompress.architectures.auto_classes import auto_class
from llmcompress.errors import ModelError
from llmcompress.integrations.transformers_compat import AUTO_QUANTIZATION_CONFIG_MAPPING
from llmcompress.integrations.transformers_quantizer import METHOD
from llmcompress.io.checkpoint import read_json
from llmcompress.io.units import amount
from llmcompress.modeling.from_disk import no_progress_bar
from llmcompress.modeling.model_config import load_config
from llmcompress.modeling.sequential import EVALUATE, Track
from llmcompress.modeling.token_limit import batches_of
from llmcompress.report.metrics import size_bytes

OWN = (METHOD, "bitsandbytes")  # methods that are read layer by layer


def foreign_method(folder: Path) -> str | None:
    """The method by which others quantised a model; None for a model that is read layer by layer. Errors:
    ModelError."""
    said = read_json(folder / "config.json").get("quantization_config")
    # an old bitsandbytes config
    if not isinstance(said, Mapping) or said.get("load_in_4bit") or said.get("load_in_8bit"):
        return None
    method = said.get("quant_method")
    return None if method in OWN else str(method)


class WholeModel:
    """A model whole in memory, run by its own forward."""

    def __init__(self, model: PreTrainedModel, device: torch.device, size_bytes: int) -> None:
        self.model, self.device, self.size_bytes = model, device, size_bytes

    @classmethod
    def load(cls, folder: Path, device: torch.device, method: str) -> WholeModel:
        """Load a model from a folder with from_pretrained. Errors: ModelError if it can't be loaded here."""
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise ModelError(
                f"{folder} is quantised by {method!r}, which transformers {transformers.__version__} does "
                "not know; update transformers, or give the model that it was made from"
            )
        size = size_bytes(folder)
        _require_memory(folder, size, device)
        options: dict[str, Any] = {"device_map": {"": device}} if device.type != "cpu" else {}
        config = load_config(folder)
        try:
            with no_progress_bar():
                model, info = auto_class(config).from_pretrained(
                    folder, config=config, use_safetensors=True, output_loading_info=True, **options
                )
            _first_forward(model.eval())
        except Exception as error:  # each method raises its own errors; all say that it can't be loaded here
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"{folder} is quantised by {method}, and transformers can't load it here: {why}"
            ) from None
        if wrong := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
            raise ModelError(
                f"{folder} has no tensor for {wrong[0]} ({len(wrong)} missing); it is incomplete, fetch it "
                "again"
            )
        return cls(model, device, size)

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    def logits(self, sequences: Tensor, track: Track, unscored: int = 0) -> Iterator[Tensor]:
        """Yield logits of token sequences [S, L] without the first `unscored` positions, in pieces as
        `sequential.logits` does."""
        batches = batches_of(sequences)
        at_once = positions_at_once(self.config.vocab_size, self.device)
        for tokens in track(batches, EVALUATE, len(batches)):
            tokens = tokens.to(self.device)
            # closed before the yield: a generator dropped half way must not leave it open
            with torch.no_grad():
                found = self.model.get_decoder()(input_ids=tokens, use_cache=False)
            tokens, states = tokens[:, unscored:], found.last_hidden_state[:, unscored:]
            for here in pieces(len(tokens), tokens.shape[1], at_once):
                with torch.no_grad(), self._decoded(replace(found, last_hidden_state=states[here])):
                    scores: Tensor = self.model(input_ids=tokens[here], use_cache=False).logits
                yield scores
                del scores  # freed before the next piece is computed

    @contextmanager
    def _decoded(self, found: Any) -> Iterator[None]:
        """Let the decoder return `found` within the context, so that the model runs its head alone."""
        decoder = self.model.get_decoder()
        before = vars(decoder).get("forward")
        decoder.forward = lambda *args, **kwargs: found
        try:
            yield
        finally:
            del decoder.forward
            if before is not None:
                decoder.forward = before


@torch.no_grad()
def _first_forward(model: PreTrainedModel) -> None:
    """Let a method finish loading: compressed-tensors turns codes into floats at the first forward of the
    whole model, which does not come if its decoder is run alone."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _require_memory(folder: Path, size: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if size > free:
        raise ModelError(
            f"{folder} has {amount(size, 'B')} of weights, which are loaded whole, and {amount(free, 'B')} "
            "of memory are free; use a larger machine"
        )
