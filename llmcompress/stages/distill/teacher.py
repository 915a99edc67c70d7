"""The teacher of a distillation: a model whole in memory, or its predictions for each sequence, kept on disk.

For each token, the K likeliest next tokens and the log-probability of all others together are kept: 2 bytes
per number in half precision, and 2 or 4 per index. They are found again by the teacher's weights and the
sequence's tokens. So another recipe on the same text reads them too, and predictions of another teacher or of
other text are never taken for them.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.algorithms.distillation_losses import Scores, TopK, top_k
from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import Track
from llmcompress.modeling.token_limit import TokenLimit, batches_of
from llmcompress.stages.distill.logit_scale import logit_scale, soft_cap
from llmcompress.stages.distill.student import whole

SHARD = 64  # sequences in a file
SEQUENCE = "sequence"  # key of a batch: numbers of its sequences among all that a teacher is asked


@dataclass(frozen=True, eq=False)
class CachedOutput:
    """The kept predictions of a model for B sequences."""

    scores: TopK


@dataclass(frozen=True, eq=False)
class TeacherOutput:
    """The output of a model for B sequences of L tokens: scores of each next token and, if asked for, hidden
    states and attention maps."""

    scores: Scores
    # states that enter the first layer, and that leave each layer; the last after the norm
    hidden_BLD: tuple[Tensor, ...] = ()
    attention_BHLL: tuple[Tensor, ...] = ()  # attention map of each layer


class Teacher(Protocol):
    """A teacher of batches {input_ids [B, L], sequence [B]}."""

    def __call__(
        self, batch: Mapping[str, Tensor], **forward_arguments: bool
    ) -> TeacherOutput | CachedOutput:
        """Return the teacher's output for the batch."""


def output_of(model: PreTrainedModel, found: Any, vocabulary: int | None = None) -> TeacherOutput:
    """Return the output of a forward pass, without computing the logits. `vocabulary` limits the scores to
    the first tokens. Errors: ModelError if the model's own code returns no hidden states, or logits that are
    not those of its head."""
    if not getattr(found, "hidden_states", None):
        raise ModelError(
            f"{type(model).__name__} returns no hidden states, which distill asks of it "
            "(output_hidden_states=True); leave distill out"
        )
    head: Any = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    last_BLD = found.hidden_states[-1]
    scores = Scores(
        last_BLD.flatten(0, 1),
        head.weight[:vocabulary],
        None if bias is None else bias[:vocabulary],
        scale=logit_scale(model, last_BLD[0, -1], found.logits[0, -1], head.weight, bias),
        cap=soft_cap(model),
    )
    return TeacherOutput(scores, found.hidden_states, getattr(found, "attentions", None) or ())


def forward_arguments(ids_BL: Tensor, **more: bool) -> dict[str, Any]:
    """The arguments of a forward pass whose result goes to `output_of`."""
    return {
        "input_ids": ids_BL,
        "output_hidden_states": True,
        "logits_to_keep": 1,
        "use_cache": False,
        **more,
    }


class LiveTeacher:
    """A model in memory that answers when it is asked."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self.model, self.vocabulary = model.requires_grad_(False).eval(), vocabulary

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], **more: bool) -> TeacherOutput:
        """Return the model's output for the batch."""
        return output_of(
            self.model, self.model(**forward_arguments(batch["input_ids"], **more)), self.vocabulary
        )


def loaded(resident: LayerwiseModel, format: str | None) -> PreTrainedModel:
    """Load a teacher whole into memory. With `format`, the linears of its layers are held in it if the
    kernels take them."""
    # imported here, because it imports bitsandbytes
    from llmcompress.formats import bitsandbytes_linear

    def quantized(layer: nn.Module) -> None:
        for name, module in list(layer.named_modules()):
            if (
                format
                and type(module) is nn.Linear
                and bitsandbytes_layout.refusal(module.weight.shape, "nf4", 64) is None
            ):
                packed = bitsandbytes_layout.quantize_nearest(
                    module.weight.data.to(torch.bfloat16), "nf4", 64, double_quant=False
                )
                bias = None if module.bias is None else module.bias.data.to(torch.bfloat16)
                layer.set_submodule(name, bitsandbytes_linear.linear(packed, bias, device=resident.device))

    model = whole(resident, quantized)
    if format and not any(isinstance(module, bitsandbytes_linear.Linear4bit) for module in model.modules()):
        raise ModelError(
            "teacher_format: nf4 finds no linear of this teacher that it can hold; leave teacher_format"
        )
    return model


class ShardFacts(JournalFacts):
    """Which sequences a file of the cache is about; its name says the same."""

    name: str


class CachedTeacher:
    """A teacher's predictions for N sequences of L tokens, read from disk. Missing ones are asked of
    `teacher` first, once."""

    def __init__(
        self,
        folder: Path,
        key: str,
        teacher: Callable[[], LiveTeacher],
        sequences_NL: Tensor,
        k: int,
        temperature: float,
        track: Track,
    ) -> None:
        k = min(k, 1 << 16)
        key = hashlib.sha256(f"{key} {k} {temperature} {SHARD}".encode()).hexdigest()
        # two runs may ask for the same; both write the same
        self.journal = Journal(folder / key[:32], key, shared=True)
        self.temperature, self.sequences_NL = temperature, sequences_NL
        self.shards: list[dict[str, Tensor]] = []
        names = [_name(shard) for shard in sequences_NL.split(SHARD)]
        lacking = {
            name: shard
            for name, shard in zip(names, sequences_NL.split(SHARD), strict=True)
            if not self._has(name)
        }
        self.asked = sum(map(len, lacking.values()))
        if lacking:
            self._ask(teacher(), k, lacking, track)
            gc.collect()
        self.shards = [load_file(self.journal.file(name, 0)) for name in names]  # memory-mapped, not read

    def _has(self, name: str) -> bool:
        """Whether the predictions for a shard are there, under its own name."""
        return self.journal.has(name, 0) and self.journal.facts(name, 0, ShardFacts).name == name

    def _ask(self, teacher: LiveTeacher, k: int, lacking: Mapping[str, Tensor], track: Track) -> None:
        limit = TokenLimit(teacher.model.device)
        for name in track(lacking, "ask the teacher", len(lacking)):
            found = list[tuple[Tensor, ...]]()
            for sequences in batches_of(lacking[name]):
                found += limit.each(partial(self._top, teacher, sequences, k), *sequences.shape)
            index, log_p = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
            small = (
                index.to(torch.uint16).view(torch.int16)
                if teacher.vocabulary <= 1 << 16
                else index.to(torch.int32)
            )
            self.journal.save(
                name, 0, {"index": small, "log_p": log_p.to(torch.float16)}, ShardFacts(name=name)
            )

    def _top(self, teacher: LiveTeacher, sequences: Tensor, k: int, here: slice) -> tuple[Tensor, ...]:
        """The teacher's K likeliest tokens [B, L, K] for a part of `sequences`, and their
        log-probabilities."""
        ids_BL = sequences[here].to(teacher.model.device)
        scores = teacher({"input_ids": ids_BL}).scores
        top = top_k(scores, min(k, teacher.vocabulary - 1), temperature=self.temperature)
        return tuple(part.unflatten(0, ids_BL.shape) for part in (top.index_TK, top.log_p_TK1))

    @property
    def token_bytes(self) -> int:
        """Bytes that are kept per token."""
        return sum(tensor.shape[-1] * tensor.dtype.itemsize for tensor in self.shards[0].values())

    def __call__(self, batch: Mapping[str, Tensor], **more: bool) -> CachedOutput:
        """Return the kept predictions for the sequences of the batch."""
        where, device = [divmod(int(n), SHARD) for n in batch[SEQUENCE]], batch["input_ids"].device
        index, log_p = (
            torch.cat([self.shards[shard][part][row] for shard, row in where]).to(device)
            for part in ("index", "log_p")
        )
        index = index.view(torch.uint16) if index.dtype == torch.int16 else index
        # rounded probabilities no longer sum to one
        return CachedOutput(TopK(index.long(), log_p.float().log_softmax(-1), self.temperature))


def _name(sequences_NL: Tensor) -> str:
    return hashlib.sha256(
        f"{tuple(sequences_NL.shape)}".encode() + sequences_NL.numpy().tobytes()
    ).hexdigest()[:32]
