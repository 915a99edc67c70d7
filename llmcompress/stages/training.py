"""A student that learns to predict as its teacher does, by transformers' Trainer: what is lent to it, and what it is asked.

Windows are drawn by seed, so that an interrupted training goes on with the very windows that come next. The logits of
neither model are ever made whole: the loss takes hidden states and head (`methods.losses`).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmcompress.methods.losses import Kind, Scores, token_loss
from llmcompress.residency import Resident
from llmcompress.walk import next_tokens


class Windows(Dataset[dict[str, Tensor]]):
    """`count` windows of `length` tokens of a text, each once in an order drawn by seed, then each once more in another."""

    def __init__(self, tokens_T: Tensor, length: int, count: int, seed: int) -> None:
        self.windows_NL, self.count = tokens_T[: len(tokens_T) // length * length].view(-1, length), count
        generator, rounds = torch.Generator().manual_seed(seed), -(-count // max(1, len(self.windows_NL)))
        self.order = torch.cat([torch.randperm(len(self.windows_NL), generator=generator) for _ in range(rounds)])[:count]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows_NL[self.order[index]]}


def whole(resident: Resident) -> PreTrainedModel:
    """The model with all its weights at once, in the working precision: another one, whose changes `resident` does not see."""
    model = copy.deepcopy(resident.model)
    for index in range(len(resident.layers)):
        with resident.block(index) as module:
            block = model.get_submodule(resident.block_name(index))
            for name, parameter in module.named_parameters():
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(parameter.data.clone(), requires_grad=False)
                block.get_submodule(owner)._parameters[leaf] = value
    model.tie_weights()
    return model


def scores(model: nn.Module, plain: PreTrainedModel, ids_BL: Tensor) -> Scores:
    """What a model says of each next token, not made yet; `model` is `plain`, as it may be wrapped to train on many devices."""
    found = model(input_ids=ids_BL, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    head = cast(Any, plain.get_output_embeddings())
    cap = getattr(plain.config, "final_logit_softcapping", None)
    return Scores(found.hidden_states[-1].flatten(0, 1), head.weight, getattr(head, "bias", None), cap=cap)


def still(model: nn.Module) -> None:
    """Turn off what makes a model in training another function than in use: all dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class DistillTrainer(Trainer):
    """Trains by a token loss, and evaluates by the KL divergence, whatever the loss."""

    loss_is_scaled_for_ga = False  # windows are of one length, so the mean of micro-batches' means is the batch's

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        kind: Kind,
        label_share: float,
        temperature: float,
        skew: float | None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.teacher = teacher.requires_grad_(False).eval()
        self.options: dict[str, Any] = {"label_share": label_share, "temperature": temperature, "skew": skew}
        self.kind: Kind = kind
        self.student = cast(PreTrainedModel, settings["model"])

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, train_dataset or self.train_dataset))  # they are drawn already

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch {input_ids [B, L]}, a scalar with gradient."""
        ids = inputs["input_ids"]
        labels_T = next_tokens(ids).flatten()
        loss = token_loss(self.kind, scores(model, self.student, ids), self._taught(ids), labels_T=labels_T, **self.options)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """KL(teacher, student) in nats a token of a batch."""
        ids = self._prepare_inputs(inputs)["input_ids"]
        with torch.no_grad():
            return token_loss("forward_kl", scores(model, self.student, ids), self._taught(ids)).detach(), None, None

    def _taught(self, ids_BL: Tensor) -> Scores:
        with torch.no_grad():
            return scores(self.teacher, self.teacher, ids_BL)


class Watch(TrainerCallback):
    """Shows progress, and ends a training that has left the numbers."""

    def __init__(self, progress: Iterator[Any]) -> None:
        self.progress = progress
        self.broken_at: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step more."""
        next(self.progress, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Stop at a loss that is no number."""
        numbers = [float(value) for name, value in (logs or {}).items() if name in ("loss", "grad_norm", "eval_loss")]
        if not all(map(math.isfinite, numbers)) and self.broken_at is None:
            self.broken_at, control.should_training_stop = state.global_step, True


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a training that was written to its end: its state is what is written last."""
    for found in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((found / "trainer_state.json").read_text())
            return found
        except (OSError, ValueError):
            continue
    return None
