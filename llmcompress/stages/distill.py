"""Train what is left of a model to predict as the model did that the run began with.

The teacher is the base; the student is what the stages before made of it. Both are whole in memory, in the working precision.
Held-out windows, those that calibrate and are not trained on, tell when the student was best, and that is what stays, or the
student as it came if it never was better. An interrupted training goes on from its last checkpoint in the journal's folder.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainingArguments

from llmcompress.checkpoint import writing
from llmcompress.errors import DataError
from llmcompress.methods.losses import SKEW, Kind
from llmcompress.residency import Resident, no_progress_bar
from llmcompress.stages.context import OUTER, Context, Facts
from llmcompress.stages.training import DistillTrainer, Watch, Windows, last_checkpoint, still, whole

STAGE, DONE = "distill", "distilled"
HELD = 32  # windows that measure
AT_ONCE = 4096  # tokens of a micro-batch, unless the recipe says otherwise


class Distill(BaseModel):
    """`distill: {loss, steps, learning_rate, batch, ...}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str] = STAGE

    loss: Kind = Field(default="forward_kl", description="how far the student's predictions are from the teacher's")
    steps: Annotated[int, Field(ge=1)] = Field(default=1000, description="updates of the weights")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(default=1e-4, description="at its highest, after the warm-up")
    batch: Annotated[int, Field(ge=1)] = Field(default=16, description="windows a step")
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="windows at once, a divisor of batch; default as many as 4096 tokens hold"
    )
    length: Annotated[int, Field(ge=2)] | None = Field(default=None, description="tokens a window; default that of the data")
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="that logits are divided by")
    skew: Annotated[float, Field(ge=0, lt=1)] | None = Field(default=None, description="of the losses that have one")
    label_share: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="share of cross-entropy in the loss")
    train: Literal["all", "norms"] = Field(default="all", description="which weights learn")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.05, description="share of the steps until the highest rate")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(default="cosine", description="what follows it")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of AdamW")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(default="adamw", description="8bit: bitsandbytes', paged on a GPU")
    evaluate_every: Annotated[int, Field(ge=1)] | None = Field(default=None, description="steps; default a tenth of them")
    patience: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="evaluations that may bring nothing before training ends early"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Distill:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} is no divisor of batch {self.batch}")
        if self.skew is not None and self.loss not in SKEW:
            raise ValueError(f"skew is for {', '.join(SKEW)}, not for {self.loss}")
        if "label_share" in self.model_fields_set and self.loss == "cross_entropy":
            raise ValueError("label_share is for losses with a teacher; cross_entropy has no other part")
        return self

    def tokens(self, length: int) -> int:
        """How many tokens of text the stage trains on where windows of the data have `length`."""
        return self.steps * self.batch * (self.length or length)

    def apply(self, model: Resident, context: Context) -> Facts:
        """Train, unless the journal holds the result; leave the weights that learned there, block by block."""
        journal = context.journal
        if not journal.has(DONE, 0):
            with no_progress_bar():
                self._train(model, context)
        found = journal.load(DONE, 0)[1]
        notes = found.pop("notes")
        return Facts(STAGE, notes=notes, details=self.model_dump(exclude_none=True) | found)

    def _train(self, model: Resident, context: Context) -> None:
        folder, length = context.journal.folder / "training", self.length or context.data.calibration.shape[1]
        text = context.data.training
        if len(text) < length * self.batch:
            raise DataError(
                f"{context.data.source} leaves {len(text)} tokens to train on, not one batch of {self.batch} x {length}"
            )
        student, teacher = whole(model), whole(context.base())
        still(student)
        self._choose(student)
        if student.config.tie_word_embeddings:  # or transformers warns that a checkpoint has no head
            student._keys_to_ignore_on_save = [f"{model.anatomy.head}.weight"]
        earlier = last_checkpoint(folder)
        left = self.steps - (int(earlier.name.rpartition("-")[2]) if earlier else 0)
        watch = Watch(iter(context.track(range(left), f"distill ({self.loss})", left)))
        trainer = DistillTrainer(
            teacher=teacher, kind=self.loss, label_share=self.label_share, temperature=self.temperature, skew=self.skew,
            model=student, args=self._arguments(folder, model.device, length, context.seed),
            train_dataset=Windows(text, length, self.steps * self.batch, context.seed),
            eval_dataset=[{"input_ids": window} for window in context.data.calibration[:HELD]],
            callbacks=[watch, *([EarlyStoppingCallback(self.patience)] if self.patience else [])],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        start = folder / "start.json"
        if earlier is None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                start.write_text(json.dumps(trainer.evaluate()["eval_loss"]))
        before = float(json.loads(start.read_text()))
        trainer.train(resume_from_checkpoint=str(earlier) if earlier else None)
        curve = [[row["step"], row["eval_loss"]] for row in trainer.state.log_history if "eval_loss" in row]
        best = min((kl for _, kl in curve if math.isfinite(kl)), default=before)
        notes = []
        if watch.broken_at is not None:
            notes.append(
                f"training left the numbers at step {watch.broken_at}, and the best step before stays; lower learning_rate"
            )
        if best >= before:
            notes.append("training made nothing better on held-out text, so the student stays as it came")
        rounds = self.steps * self.batch * length / len(text)
        if rounds > 1:
            notes.append(f"the text was gone through {rounds:.1f} times: {len(text)} tokens are left to train on")
        self._leave(model, context, student if best < before else None)
        finite = [[step, kl if math.isfinite(kl) else None] for step, kl in curve]
        context.journal.save(DONE, 0, {}, {"kl_before": before, "kl_after": min(best, before), "curve": finite, "notes": notes})
        shutil.rmtree(folder, ignore_errors=True)

    def _choose(self, student: PreTrainedModel) -> None:
        """Let the weights learn that are to."""
        for name, parameter in student.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.requires_grad_(self.train == "all" or norm)

    def _arguments(self, folder: Path, device: torch.device, length: int, seed: int) -> TrainingArguments:
        cuda, fitting = device.type == "cuda", max(1, AT_ONCE // length)
        micro = self.micro_batch or max(n for n in range(1, self.batch + 1) if self.batch % n == 0 and n <= fitting)
        every = min(self.evaluate_every or max(1, self.steps // 10), self.steps)
        eight_bit = "paged_adamw_8bit" if cuda else "adamw_bnb_8bit"
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=self.batch // micro,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=round(self.warmup * self.steps),
            weight_decay=self.weight_decay,
            optim=eight_bit if self.optimizer == "adamw_8bit" else "adamw_torch",
            bf16=cuda,
            use_cpu=not cuda,
            seed=seed % 2**32,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
            dataloader_pin_memory=cuda,
        )

    def _leave(self, model: Resident, context: Context, student: PreTrainedModel | None) -> None:
        """Have the journal hold what has learned: a block an entry, and what lies outside them."""
        learned: dict[str, Tensor] = {}
        if student is not None:
            learned = {name: p.data.to(model.weight_dtype).cpu() for name, p in student.named_parameters() if p.requires_grad}
        for index in range(len(model.layers)):
            prefix = f"{model.block_name(index)}."
            inside = {name: tensor for name, tensor in learned.items() if name.startswith(prefix)}
            context.journal.save(STAGE, index, inside, {})
        outside = {name: tensor for name, tensor in learned.items() if not name.startswith(f"{model.anatomy.layers}.")}
        context.journal.save(OUTER, 0, outside, {})
