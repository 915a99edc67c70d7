"""Measure what a cache in fewer bits costs: the same model on the same text, with its cache stored plain and
as its config says.

The model is whole in memory, in float32, as it is measured everywhere else, and reads each sequence a few
tokens at a time. So each prediction reads earlier tokens as the cache holds them: as codes, but for the first
tokens, the window, and those of the same piece. Both caches are read in the same pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from llmcompress.errors import first_line
from llmcompress.integrations.kv_cache import CacheSettings, bytes_of_text, kv_cache
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.modeling.token_limit import first_sequences, free_memory
from llmcompress.report.metrics import Columns, columns, summary
from llmcompress.report.schema import CachedLengthFacts, CacheFacts
from llmcompress.stages.distill.student import whole

logger = logging.getLogger(__name__)

LENGTHS = (512, 2048)  # tokens of a text for which numbers are told, beside its whole length
TOKENS = 8192  # that are measured at least, if there are so many
PIECE = 32  # tokens that are read at once
AnyCache = TypeVar("AnyCache", bound=Cache)
SHARE = 0.5  # of the free memory: a larger model is not loaded whole only to measure its cache


def cache_facts(model: LayerwiseModel, sequences: Tensor, unscored: int, track: Track) -> CacheFacts | None:
    """Measure the cache of a model that is read layer by layer; None if its config stores it plain, or if the
    model is too large to be loaded whole."""
    settings = CacheSettings.of(model.config)
    if settings is None:
        return None
    if model.dtype.itemsize * model.parameters() > SHARE * free_memory(model.device):
        logger.warning("the model is too large to be loaded whole, so its KV cache is not measured")
        return None

    def loaded() -> PreTrainedModel:
        return whole(model)

    return _facts(loaded, model.config, settings, sequences, unscored, model.weight_dtype.itemsize, track)


def live_cache_facts(
    model: PreTrainedModel, sequences: Tensor, unscored: int, track: Track
) -> CacheFacts | None:
    """Measure the cache of a model in memory, as it runs; None if its config stores it plain."""
    settings = CacheSettings.of(model.config)
    if settings is None:
        return None
    return _facts(lambda: model, model.config, settings, sequences, unscored, model.dtype.itemsize, track)


def _facts(
    loaded: Callable[[], PreTrainedModel],
    config: PretrainedConfig,
    settings: CacheSettings,
    sequences: Tensor,
    unscored: int,
    itemsize: int,
    track: Track,
) -> CacheFacts | None:
    """Load and measure, or do without, so that hours of work are not lost."""
    try:
        model = loaded()
        return measured(model, first_sequences(sequences, TOKENS), settings, unscored, itemsize, track)
    except Exception as error:  # each family has a cache of its own
        logger.warning("the KV cache can't be measured: %s", first_line(error))
        return None


def measured(
    model: PreTrainedModel,
    sequences: Tensor,
    settings: CacheSettings,
    unscored: int,
    itemsize: int,
    track: Track,
) -> CacheFacts:
    """Measure a cache on token sequences [S, L], of which the first `unscored` positions are not scored.

    `itemsize` is that of the dtype in which the model keeps its states where it is used.
    """
    found, cache = read_with(lambda: kv_cache(model, settings), model, sequences, unscored, track)
    scored = sequences[:, unscored:]
    lengths = sorted({n for n in LENGTHS if n < scored.shape[1]} | {scored.shape[1]})
    return CacheFacts(
        bits=settings.bits,
        per=settings.per,
        tokens=scored.numel(),
        lengths=tuple(
            CachedLengthFacts(
                **losses_at(length, found),
                bytes_per_token=bytes_of_text(cache, length, itemsize, settings) / length,
                plain_bytes_per_token=bytes_of_text(cache, length, itemsize, None) / length,
            )
            for length in lengths
        ),
    )


@torch.no_grad()
@fast_float32_products()
def read_with(
    make: Callable[[], AnyCache],
    model: PreTrainedModel,
    sequences: Tensor,
    unscored: int = 0,
    track: Track = untracked,
) -> tuple[Columns, AnyCache]:
    """Read token sequences [S, L] with a cache that `make` makes anew for each, and with a plain one.

    Returns the columns of `report.metrics.columns`, each [S, L - unscored], and the cache of the last
    sequence.
    """
    training = model.training
    model.eval()
    used = list[AnyCache]()

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for sequence in track(sequences, "KV cache", len(sequences)):
            tokens = sequence[None].to(model.device)
            plain, stored = DynamicCache(config=model.config.get_text_config(decoder=True)), make()
            used[:] = [stored]
            for start in range(0, tokens.shape[1], PIECE):
                here = tokens[:, start : start + PIECE]
                theirs, ours = (
                    model(input_ids=here, past_key_values=cache, use_cache=True).logits
                    for cache in (plain, stored)
                )
                skipped = max(0, unscored - start)
                if skipped < here.shape[1]:
                    yield ours[:, skipped:], theirs[:, skipped:]

    scored = sequences[:, unscored:]
    try:
        parts = list(columns(pairs(), scored))
    finally:
        model.train(training)
    found = (torch.cat(column).view(scored.shape) for column in zip(*parts, strict=True))
    return tuple(found), used[0]


def losses_at(length: int, found: Columns) -> dict[str, Any]:
    """The losses over the first `length` positions of each sequence, by the names of CachedLengthFacts."""
    nll, plain_nll, kl, same = (column[:, :length].clone() for column in found)
    nll[:, -1] = plain_nll[:, -1] = 0  # what follows is beyond the length
    told = summary([(nll.flatten(), plain_nll.flatten(), kl.flatten(), same.flatten())], length)
    return {
        "length": length,
        "kl_nats_mean": told.kl_nats_mean,
        "perplexity": told.perplexity,
        "plain_perplexity": told.base_perplexity,
    }
