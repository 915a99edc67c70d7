"""Train a student to predict as its teacher does with transformers' Trainer: its data, its loss and its
evaluation.

Sequences are drawn by seed, so that an interrupted training resumes with the very sequences that come next.
The logits of neither model are ever made whole: the loss takes hidden states and head
(`algorithms.distillation_losses`). It is computed inside the student's own forward pass, where a model whose
weights are spread over devices has its head.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmcompress.algorithms.distillation_losses import Kind, token_loss
from llmcompress.data.calibration import with_bos
from llmcompress.integrations import distributed
from llmcompress.io.manifest import MANIFEST, is_sound, manifest_of
from llmcompress.io.safetensors_writer import discard, put
from llmcompress.modeling.backward import next_tokens
from llmcompress.modeling.token_limit import TokenLimit
from llmcompress.stages.distill.feature_matching import PROJECTION, Matching
from llmcompress.stages.distill.teacher import (
    SEQUENCE,
    CachedOutput,
    Teacher,
    TeacherOutput,
    forward_arguments,
    output_of,
)

OWN = "own"  # key of a batch: which sequences the student is to continue by itself


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """`count` sequences of `length` tokens of a text: each once in an order drawn by seed, then each once
    more in another order, and so on.

    If there is a `bos`, it is the first token of each. A share `own` of them, drawn too, is marked for the
    student to write.
    """

    def __init__(
        self, tokens_T: Tensor, length: int, count: int, seed: int, own: float = 0.0, bos: int | None = None
    ) -> None:
        text = length - int(bos is not None)
        self.ids_NL, self.count = (
            with_bos(tokens_T[: len(tokens_T) // text * text].view(-1, text), bos),
            count,
        )
        generator, rounds = torch.Generator().manual_seed(seed), -(-count // max(1, len(self.ids_NL)))
        self.order = torch.cat(
            [torch.randperm(len(self.ids_NL), generator=generator) for _ in range(rounds)]
        )[:count]
        self.own = torch.rand(count, generator=generator) < own

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self.order[index]
        return {"input_ids": self.ids_NL[number], SEQUENCE: number, OWN: self.own[index]}


@dataclass(frozen=True, eq=False)
class Objective:
    """What the student is to learn, from which teacher, and how that is measured."""

    kind: Kind
    label_share: float
    temperature: float
    skew: float | None
    teacher: Teacher | None  # for the training text; None if the text alone teaches
    examiner: Teacher  # for the held-out text
    matching: Matching | None = None
    generator: int | None = None  # seed of the text that the student writes itself, if it does
    unscored: int = 0  # positions at the start of a sequence whose predictions do not count

    def loss(
        self,
        student: PreTrainedModel,
        ids_BL: Tensor,
        taught: TeacherOutput | CachedOutput | None,
        found: Any,
    ) -> Tensor:
        """The loss of a batch, given the output of the student's forward pass."""
        own, labels_T = output_of(student, found), next_tokens(ids_BL, self.unscored).flatten()
        loss = token_loss(
            self.kind, own.scores, taught.scores if taught else None, labels_T=labels_T,
            label_share=self.label_share, temperature=self.temperature, skew=self.skew,
        )  # fmt: skip
        if self.matching is not None and isinstance(taught, TeacherOutput):
            loss = loss + self.matching.loss(own, taught, getattr(student, PROJECTION, None))
        return loss


def measured(
    student: PreTrainedModel, ids_BL: Tensor, taught: TeacherOutput | CachedOutput, unscored: int, found: Any
) -> tuple[Tensor, Tensor]:
    """KL(teacher, student) and -log q(next token) in nats/token, given the output of the student's forward
    pass.

    Predictions at the first `unscored` positions of a sequence count in neither.
    """
    scores = output_of(student, found).scores
    nll = token_loss("cross_entropy", scores, None, labels_T=next_tokens(ids_BL, unscored).flatten())
    counts_BL = torch.ones_like(ids_BL)
    counts_BL[:, :unscored] = 0
    return token_loss("forward_kl", scores, taught.scores, weight_T=counts_BL.flatten()), nll


def answering(model: PreTrainedModel) -> None:
    """Make the model's forward take `then`, and return what `then` makes of its output."""
    plain: Callable[..., Any] = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, then: Callable[[Any], Any] | None = None, **named: Any) -> Any:
        found = plain(*args, **named)
        return found if then is None else then(found)

    model.forward = forward


@torch.no_grad()
def continued(model: PreTrainedModel, ids_BL: Tensor, seed: int) -> Tensor:
    """The first half of each sequence, and a second half that the model samples from its own predictions.

    Source: Agarwal et al. 2023, arXiv:2306.13649 (GKD), Algorithm 1.
    """
    half, training = ids_BL.shape[1] // 2, model.training
    drawn: Any = GenerationConfig(
        max_new_tokens=ids_BL.shape[1] - half,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=0,
    )
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start_BP = ids_BL[:, :half]
        found: Tensor = cast(Any, model).generate(
            start_BP, attention_mask=torch.ones_like(start_BP), generation_config=drawn
        )
    model.train(training)
    return found


class DistillTrainer(Trainer):
    """Trains `student` to an objective; `model` is its trained form. Evaluation is always by the KL
    divergence."""

    student: PreTrainedModel
    objective: Objective
    loss_is_scaled_for_ga = (
        False  # sequences are of one length, so the mean of micro-batches' means is the batch's
    )

    def __init__(self, *, student: PreTrainedModel, objective: Objective, **settings: Any) -> None:
        answering(student)
        super().__init__(**settings)
        self.student, self.objective, self.nll = student, objective, list[Tensor]()
        self.limit = TokenLimit(student.device)
        self._share = 1.0  # of a micro-batch that a part of it has
        self._step, self._seen = -1, list[dict[str, Any]]()  # micro-batches of the step so far

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # the dataset has drawn the order already
        return SequentialSampler(cast(Sized, train_dataset or self.train_dataset))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of a micro-batch to that of the step.

        If memory runs out, the step begins anew with its first micro-batch, in parts. Several processes would
        then no longer do the same, so there the error is passed on.
        """
        if distributed.count() > 1:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step != self._step:
            self._step, self._seen = self.state.global_step, []
        self._seen.append(inputs)

        def anew() -> Tensor:
            model.zero_grad()
            return [self._in_parts(model, micro) for micro in self._seen][-1]

        return self.limit.restarted(partial(self._in_parts, model, inputs), anew, *inputs["input_ids"].shape)

    def _in_parts(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Add the gradient of a micro-batch, part by part. Returns its loss."""
        count, length = inputs["input_ids"].shape
        losses = []
        for here in self.limit.slices(count, length):
            self._share = (here.stop - here.start) / count
            part = {name: value[here] for name, value in inputs.items()}
            losses.append(super().training_step(model, part))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch {input_ids [B, L], sequence [B], own [B]}, a scalar with gradient."""
        objective, ids = self.objective, self._written(inputs)
        more = objective.matching.asked if objective.matching else {}
        taught = objective.teacher({**inputs, "input_ids": ids}, **more) if objective.teacher else None
        loss = model(
            **forward_arguments(ids, **more), then=partial(objective.loss, self.student, ids, taught)
        )
        loss = loss if self._share == 1 else loss * self._share
        return (loss, {}) if return_outputs else loss

    def _written(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The tokens of a batch, in which the student has written those that it is to write itself."""
        ids, own, seed = inputs["input_ids"], inputs[OWN], self.objective.generator
        if seed is None or not own.any():
            return ids
        draw = (seed << 40) + (self.state.global_step << 20) + int(inputs[SEQUENCE][0])
        return ids.index_copy(0, own.nonzero()[:, 0], continued(self.student, ids[own], draw % 2**63))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return KL(teacher, student) of a batch in nats/token. The loss on the next tokens is kept in
        `nll`."""
        batch = cast(Mapping[str, Tensor], self._prepare_inputs(inputs))
        parts = self.limit.each(partial(self._measured, model, batch), *batch["input_ids"].shape)
        kl, nll = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        self.nll.append(nll)
        return kl, None, None

    @torch.no_grad()
    def _measured(self, model: nn.Module, batch: Mapping[str, Tensor], here: slice) -> Tensor:
        """KL and -log q(next token) of a part of a batch, [2], times the share of the batch that it has."""
        part = {name: value[here] for name, value in batch.items()}
        ids, taught = part["input_ids"], self.objective.examiner(part)
        found = partial(measured, self.student, ids, taught, self.objective.unscored)
        both = torch.stack(model(**forward_arguments(ids), then=found))
        return both if len(ids) == len(batch["input_ids"]) else both * (len(ids) / len(batch["input_ids"]))

    def evaluation_loop(self, *given: Any, **named: Any) -> Any:
        """Evaluate as the Trainer does, and add the perplexity of the held-out text."""
        self.nll = []
        output = super().evaluation_loop(*given, **named)
        mean = cast(Tensor, self.accelerator.gather(torch.stack(self.nll).mean()[None])).mean()
        cast(Any, output).metrics["eval_perplexity"] = float(mean.exp())
        return output


class Watch(TrainerCallback):
    """Shows progress, stops a training whose loss is NaN or Inf, and marks checkpoints that are complete."""

    def __init__(self, progress: Iterator[Any]) -> None:
        self.progress = progress
        next(progress, None)  # the first step begins; each end of a step finishes one
        self.broken_at: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance the progress by one step."""
        next(self.progress, None)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the manifest of a checkpoint, which marks it as complete."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        distributed.wait()
        if distributed.first():
            put(folder / MANIFEST, manifest_of(folder))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Stop at a loss that is NaN or Inf."""
        numbers = [
            float(value) for name, value in (logs or {}).items() if name in ("loss", "grad_norm", "eval_loss")
        ]
        if not all(map(math.isfinite, numbers)) and self.broken_at is None:
            self.broken_at, control.should_training_stop = state.global_step, True


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last intact checkpoint of a training whose best checkpoint until then is intact too. Damaged
    ones and those after it are deleted.

    `Watch` writes a manifest into each when it is complete.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: _step(path), reverse=True)
    sound = [path for path in found if is_sound(path)]
    best = {path: _best(path) for path in sound}
    fit = [path for path in sound if best[path] is None or best[path] in {other.name for other in sound}]
    for path in found:
        if path not in sound or (fit and _step(path) > _step(fit[0])):
            discard(path)
    return fit[0] if fit else None


def _step(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name; -1 if it is not a checkpoint."""
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdecimal() and step.isascii() else -1


def _best(checkpoint: Path) -> str | None:
    """The name of the best checkpoint up to this one."""
    best = json.loads((checkpoint / "trainer_state.json").read_text()).get("best_model_checkpoint")
    return Path(best).name if best else None
