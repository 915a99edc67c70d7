"""Measure a model, and how far it is from its base: `llmcompress evaluate`.

Both models are read from disk one layer at a time and computed in float32. 4-bit codes are turned into the
weights that they stand for, so two results differ by the weights and by nothing else. A plain model in memory
is computed in the same way from its state dict. A model that others quantised, in a format that only
transformers reads, is loaded whole and runs its own forward, as does a quantised model in memory. Speed is
measured on the model as from_pretrained loads it, with the kernels that it will run on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.architectures.auto_classes import auto_class
from llmcompress.data.sources import DataSpec
from llmcompress.errors import first_line
from llmcompress.integrations.own_classes import let_build
from llmcompress.io import own_code
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.foreign import WholeModel, foreign_method
from llmcompress.modeling.from_disk import DiskModel, no_progress_bar
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.modeling.model_config import defaults, load_config
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.modeling.sequential import logits as walked
from llmcompress.pipeline.kv_cache import cache_facts, live_cache_facts
from llmcompress.pipeline.resolve import (
    calibration_data,
    config_of,
    find_base,
    name_of,
    pick_device,
    require_tokenizer,
)
from llmcompress.report.metrics import Speed, continued, fidelity, speed
from llmcompress.report.schema import CacheFacts

logger = logging.getLogger(__name__)

WRITES_S = 20  # seconds; a model that needs longer writes no sample of text
SHARE = 0.5  # share of the free memory; a larger model is not loaded whole only to be timed


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a model. Losses are per token; KL is KL(base || model) in nats; None means not
    measured."""

    model: str
    perplexity: float
    perplexity_ci95: tuple[float, float]
    tokens: int
    size_bytes: int
    tokens_per_s: float | None
    kl_nats_mean: float | None = None
    kl_nats_p99: float | None = None
    top1_agreement: float | None = None
    bos: bool = False  # whether each sequence begins with the BOS token, which is not scored
    kv_cache: CacheFacts | None = None  # of a model whose config stores it in fewer bits

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of `evaluate --json`. Those of a comparison are present if a base was given, `bos`
        if it is true, and `kv_cache` if the cache was measured."""
        found = {
            key: value for key, value in asdict(self).items() if value is not None or key == "tokens_per_s"
        }
        if self.kv_cache is not None:
            found["kv_cache"] = self.kv_cache.model_dump(mode="json")
        found["perplexity_ci95"] = list(self.perplexity_ci95)
        return found if self.bos else {key: value for key, value in found.items() if key != "bos"}


@dataclass(frozen=True)
class _Subject:
    """A model to be measured."""

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    size_bytes: int
    logits: Callable[[Tensor, Track, int], Iterator[Tensor]]
    speed: Callable[[Tensor], Speed | None]
    cache: Callable[[Tensor, int, Track], CacheFacts | None]


@fast_float32_products()
def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    against: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | DataSpec | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> Evaluation:
    """Measure a model: perplexity with its interval, size and speed; against a base also KL and top-1
    agreement.

    Args:
        model: Hub id, folder, or a `PreTrainedModel` in memory, quantised or not.
        against: the base to compare with, given in the same ways.
        tokenizer: the tokenizer of a model in memory; a model given by name brings its own.
        data: the text, as a `DataSpec` or as `--data` takes it.
        device: `cpu` or `cuda`; a quantised model in memory runs where it is.
        trust_remote_code: let model and base run code of their own, which lies beside their weights.
        track: shows progress, as for `compress`.

    Raises:
        CompressError: model, base or text can't be read.
    """
    with own_code.permission(trust_remote_code):
        return _measured(model, against, tokenizer, data, pick_device(device), track)


def _measured(
    model: str | os.PathLike[str] | PreTrainedModel,
    against: str | os.PathLike[str] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: str | DataSpec | None,
    where: torch.device,
    track: Track,
) -> Evaluation:
    """Measure a model on a device, as `evaluate` says."""
    subject = _opened(model, where)
    words = require_tokenizer(tokenizer or subject.tokenizer)
    spec = DataSpec().with_text(data) if isinstance(data, str) else data or DataSpec()
    text = calibration_data(subject, spec, words)
    sequences, unscored = text.evaluation, text.unscored
    base = None if against is None else _opened(against, where).logits(sequences, track, unscored)
    measured = fidelity(subject.logits(sequences, track, unscored), text.scored, base)
    cached = subject.cache(sequences, unscored, track)
    fast = subject.speed(sequences)
    compared = against is not None
    return Evaluation(
        model=subject.name,
        perplexity=measured.perplexity,
        perplexity_ci95=measured.perplexity_ci95,
        tokens=measured.tokens,
        size_bytes=subject.size_bytes,
        tokens_per_s=fast.prefill_tokens_per_s if fast else None,
        kl_nats_mean=measured.kl_nats_mean if compared else None,
        kl_nats_p99=measured.kl_nats_p99 if compared else None,
        top1_agreement=measured.top1_agreement if compared else None,
        bos=bool(unscored),
        kv_cache=cached,
    )


def _opened(model: str | os.PathLike[str] | PreTrainedModel, device: torch.device) -> _Subject:
    """Open a model by name or in memory for measuring. Errors: ModelError."""
    if isinstance(model, PreTrainedModel):
        return _of_live(model, device)
    name = os.fspath(model)
    folder = find_base(name, wanted="model").folder
    own_code.trust(folder)
    config_of(folder)
    method = foreign_method(folder)
    if method is None:
        read = DiskModel(folder, device, quantized=True)
        timed = partial(speed_of, folder, device=device)
        return _Subject(
            name,
            read.config,
            tokenizer_of(folder),
            read.checkpoint.size_bytes,
            _walked(read),
            timed,
            partial(cache_facts, read),
        )
    whole = WholeModel.load(folder, device, method)
    return _of_whole(name, whole, tokenizer_of(folder))


def _of_live(model: PreTrainedModel, device: torch.device) -> _Subject:
    """Wrap a model in memory: a plain one is computed layer by layer as from disk, a quantised one by its own
    forward."""
    let_build(model)
    name = name_of(model)
    stored = {(t.data_ptr(), t.shape): t.nbytes for t in model.state_dict().values()}
    size = sum(stored.values())
    if getattr(model.config, "quantization_config", None) is not None:
        return _of_whole(name, WholeModel(model, model.device, size), None)
    read = InMemoryModel(model.config, dict(model.state_dict()), device)
    return _Subject(
        name, model.config, None, size, _walked(read), partial(speed, model), partial(cache_facts, read)
    )


def _of_whole(name: str, whole: WholeModel, tokenizer: PreTrainedTokenizerBase | None) -> _Subject:
    return _Subject(
        name,
        whole.config,
        tokenizer,
        whole.size_bytes,
        whole.logits,
        partial(speed, whole.model),
        partial(live_cache_facts, whole.model),
    )


def _walked(model: LayerwiseModel) -> Callable[[Tensor, Track, int], Iterator[Tensor]]:
    def logits(sequences: Tensor, track: Track, unscored: int) -> Iterator[Tensor]:
        return walked(model, sequences, track, unscored)

    return logits


@dataclass(frozen=True)
class Trial:
    """A model as from_pretrained loads it: its speed, and what it wrote after prompts, int64 [P, N]. None for
    what was not done; `why` says why nothing was written."""

    speed: Speed | None = None
    written: Tensor | None = None
    why: str | None = None


def speed_of(folder: Path, sequences: Tensor, device: torch.device) -> Speed | None:
    """Time the model as from_pretrained loads it; None if it is too large to load whole, or to run."""
    return trial_of(folder, sequences, device).speed


def trial_of(
    folder: Path, sequences: Tensor, device: torch.device, prompts: Tensor | None = None, tokens: int = 0
) -> Trial:
    """Time the model as from_pretrained loads it, and let it write `tokens` tokens after each of the prompts,
    if that is quick. A model that is too large is not loaded."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if Checkpoint.open(folder, base=False).size_bytes > SHARE * free:
        return Trial(why="a model was too large to be loaded whole")
    config = defaults(load_config(folder))
    with no_progress_bar():
        model = auto_class(config).from_pretrained(folder, config=config, device_map={"": device})
    try:
        timed = speed(model, sequences)
        return Trial(timed) if prompts is None else _written(model, timed, prompts, tokens)
    except torch.OutOfMemoryError as error:
        logger.warning("%s can't be timed: %s", folder, first_line(error))
        return Trial(why="the device had no memory for a model that is loaded whole")


def _written(model: PreTrainedModel, timed: Speed, prompts: Tensor, tokens: int) -> Trial:
    """Let a model write after prompts, if its speed says that this is quick."""
    if timed.decode_tokens_per_s is None:
        return Trial(timed, why="a model keeps no cache between tokens")
    expected_s = tokens / timed.decode_tokens_per_s + prompts.numel() / timed.prefill_tokens_per_s
    if expected_s > WRITES_S:
        return Trial(timed, why=f"to write {tokens} tokens would take a model more than {WRITES_S} s")
    training = model.training
    model.eval()
    try:
        return Trial(timed, continued(model, prompts, tokens))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a sample of text is not worth a run
        logger.warning("the model can't write a sample of text: %s", first_line(error))
        return Trial(timed, why=f"a model could not write ({first_line(error)[:200]})")
    finally:
        model.train(training)
