"""One training: student, teacher, text, the Trainer, and its result in the journal.

Teacher and student are whole in memory, in the working precision. Held-out sequences, which calibrate and are
not trained on, tell when the student was best. That student is kept, or the initial one if it never got
better. An interrupted training resumes from its last checkpoint in the journal's folder.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainingArguments

from llmcompress.errors import DataError, ModelError
from llmcompress.integrations import distributed
from llmcompress.modeling.half_precision import compute_in_half, runs_in_half
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.stages.base import OUTER, Context, ModelSource
from llmcompress.stages.distill.config import WITHIN
from llmcompress.stages.distill.facts import DONE, STAGE, Curve, TrainedFacts
from llmcompress.stages.distill.feature_matching import PROJECTION, Matching, projection_of
from llmcompress.stages.distill.student import Student
from llmcompress.stages.distill.teacher import (
    SEQUENCE,
    CachedTeacher,
    LiveTeacher,
    Teacher,
    forward_arguments,
    loaded,
    output_of,
)
from llmcompress.stages.distill.trainer import (
    DistillTrainer,
    Objective,
    SequenceDataset,
    Watch,
    last_checkpoint,
)

if TYPE_CHECKING:
    from llmcompress.stages.distill.stage import Distill

HELD = 32  # held-out sequences
POINTS = 200  # most points of a curve in the report


class Training:
    """Trains the model of a run with the settings of a stage."""

    def __init__(self, stage: Distill, model: LayerwiseModel, context: Context) -> None:
        self.stage, self.model, self.context = stage, model, context
        self.length = stage.length or context.data.calibration.shape[1]
        self.held_NL = context.data.calibration[:HELD]
        self.notes = list[str]()

    def run(self) -> None:
        """Train, and write the weights that learned to the journal, layer by layer. Errors: DataError,
        ModelError."""
        self._require_text()
        stage, model, context = self.stage, self.model, self.context
        folder = context.journal.folder / "training"
        student = Student(model, stage.train, stage.rank, context.seed)
        _halve(student.model, model)
        sequences = SequenceDataset(
            context.data.training,
            self.length,
            stage.steps * stage.batch,
            context.seed,
            stage.on_policy,
            context.data.bos,
        )
        objective = self._objective(student, sequences)
        earlier = last_checkpoint(folder)
        left = stage.steps - (int(earlier.name.rpartition("-")[2]) if earlier else 0)
        watch = Watch(iter(context.track(range(left), f"distill ({stage.loss})", left)))
        stopping = [EarlyStoppingCallback(stage.patience)] if stage.patience else []
        trainer = DistillTrainer(
            student=student.model,
            objective=objective,
            model=student.trained,
            args=self._arguments(folder, begins=earlier is None),
            train_dataset=sequences,
            eval_dataset=[
                {"input_ids": sequence, SEQUENCE: torch.tensor(n)} for n, sequence in enumerate(self.held_NL)
            ],
            callbacks=[watch, *stopping],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(earlier) if earlier else None)
        facts = self._facts(trainer, watch)
        learned = student.learned(_state(trainer, student)) if facts.kl_after < facts.kl_before else {}
        with distributed.first_alone() as writes:
            if writes:
                self._leave(learned)
                context.journal.save(DONE, 0, {}, facts)
                shutil.rmtree(folder, ignore_errors=True)

    def _require_text(self) -> None:
        """Refuse sequences without a token to predict, and text that does not fill a batch. Errors:
        DataError."""
        data, stage, length = self.context.data, self.stage, self.length
        if length < 2 + data.unscored:
            raise DataError(
                f"distill: length {length} leaves no token to predict from text; use {2 + data.unscored} or "
                "more"
            )
        if len(data.training) < (length - data.unscored) * stage.batch:
            raise DataError(
                f"{data.spec.source} leaves {len(data.training)} tokens to train on, not one batch of "
                f"{stage.batch} x {length}"
            )

    def _arguments(self, folder: Path, *, begins: bool) -> TrainingArguments:
        """The arguments of the Trainer, which writes its checkpoints to `folder`. A training that begins is
        measured first."""
        stage, cuda = self.stage, self.model.device.type == "cuda"
        micro = stage.micro(self.length)
        every = min(stage.evaluate_every or max(1, stage.steps // 10), stage.steps)
        eight_bit = "paged_adamw_8bit" if cuda else "adamw_bnb_8bit"
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=stage.batch // (micro * distributed.count()),
            activation_checkpointing=stage.gradient_checkpointing,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
            warmup_steps=round(stage.warmup * stage.steps),
            weight_decay=stage.weight_decay,
            optim=eight_bit if stage.optimizer == "adamw_8bit" else "adamw_torch",
            bf16=cuda,
            use_cpu=not cuda,
            seed=self.context.seed % 2**32,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_on_start=begins,
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            report_to=list(stage.trackers),
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
            dataloader_pin_memory=cuda,
        )

    def _facts(self, trainer: DistillTrainer, watch: Watch) -> TrainedFacts:
        """Return what the Trainer logged, and add notes on it."""
        measured = _logged(trainer, "eval_loss")
        before = measured.pop(0)
        best = min((kl for kl in measured.values() if math.isfinite(kl)), default=before)
        if watch.broken_at is not None:
            self.notes.append(
                f"loss became NaN or Inf at step {watch.broken_at}, and the best step before stays; lower "
                "learning_rate"
            )
        if not best < before:
            self.notes.append("training improved nothing on held-out text, so the student is kept as it came")
        tokens, read = len(self.context.data.training), self.length - self.context.data.unscored
        if (rounds := self.stage.steps * self.stage.batch * read / tokens) > 1:
            self.notes.append(f"the text was read {rounds:.1f} times: {tokens} tokens are left to train on")
        return TrainedFacts(
            kl_before=before,
            kl_after=min(best, before),
            curve=_thinned(measured),
            perplexities=_thinned(_logged(trainer, "eval_perplexity")),
            losses=_thinned(_logged(trainer, "loss")),
            notes=tuple(self.notes),
        )

    def _objective(self, student: Student, sequences: SequenceDataset) -> Objective:
        """Return the objective of the student. The teacher is read only if something is to be asked of it."""
        stage, context = self.stage, self.context
        source = context.teacher(stage.teacher)

        @functools.cache
        def live() -> LiveTeacher:
            resident = source.open()
            teacher = loaded(resident, stage.teacher_format)
            if stage.teacher_format is None:
                _halve(teacher, resident)
            if stage.attention:
                teacher.set_attn_implementation("eager")
            return LiveTeacher(teacher, self.model.text_config.vocab_size)

        teacher, examiner = self._cached(source, live, sequences) if stage.cache else (live(), live())
        matching = None
        if any(getattr(stage, name) for name in WITHIN):
            matching = self._matching(student, live())
        taught = stage.loss != "cross_entropy" or matching is not None
        return Objective(
            kind=stage.loss,
            label_share=stage.label_share,
            temperature=stage.temperature,
            skew=stage.skew,
            teacher=teacher if taught else None,
            examiner=examiner,
            matching=matching,
            generator=context.seed if stage.on_policy else None,
            unscored=context.data.unscored,
        )

    def _cached(
        self, source: ModelSource, live: Callable[[], LiveTeacher], sequences: SequenceDataset
    ) -> tuple[Teacher, Teacher]:
        """Return the teacher's predictions on disk, for the training text and for the held-out text."""
        stage, model, context = self.stage, self.model, self.context

        def cached() -> list[CachedTeacher]:
            key = f"{source.digest()} {stage.teacher_format} {model.dtype} {model.text_config.vocab_size}"
            wanted = ((sequences.ids_NL, stage.temperature), (self.held_NL, 1.0))
            return [
                CachedTeacher(context.cache, key, live, asked_NL, stage.top_k, temperature, context.track)
                for asked_NL, temperature in wanted
            ]

        with distributed.first_alone() as writes:  # otherwise each process would ask for all of it
            known = cached() if writes else []
        teacher, examiner = known or cached()
        self.notes.append(_said_of([teacher, examiner]))
        return teacher, examiner

    def _matching(self, student: Student, teacher: LiveTeacher) -> Matching:
        """Return which layers are compared. Gives the student the linear between unequal widths."""
        stage, unscored = self.stage, self.context.data.unscored
        ids_BL = self.held_NL[:4].to(self.model.device)
        if stage.attention:
            student.model.set_attn_implementation("eager")
        with torch.no_grad():
            more = {"output_attentions": True} if stage.attention else {}
            own = output_of(student.model, student.model(**forward_arguments(ids_BL, **more)))
            taught = teacher({"input_ids": ids_BL}, **more)
        layers, teachers = len(own.hidden_BLD) - 1, len(taught.hidden_BLD) - 1
        if stage.attention and (len(own.attention_BHLL) < layers or len(taught.attention_BHLL) < teachers):
            raise ModelError(
                "this family does not show where its attention goes; leave attention, and use hidden"
            )
        widths = {one.hidden_BLD[-1].shape[-1] for one in (own, taught)}
        if stage.hidden and len(widths) > 1 and len({states.shape[-1] for states in own.hidden_BLD[1:]}) > 1:
            raise ModelError("the hidden states of this student have several widths; leave hidden")
        states = (one.hidden_BLD[-1][:, unscored:] for one in (own, taught))
        if stage.hidden and (projection := projection_of(*states)) is not None:
            student.model.add_module(PROJECTION, projection)
        origin = () if stage.teacher else self.context.origin
        return Matching.of(
            layers, teachers, origin, stage.hidden_loss, stage.hidden, stage.attention, unscored
        )

    def _leave(self, learned: Mapping[str, Tensor]) -> None:
        """Write what has learned to the journal: one entry for each layer, and one for what lies outside the
        layers."""
        model, journal = self.model, self.context.journal
        for index in range(len(model.layers)):
            prefix = f"{model.layer_name(index)}."
            inside = {name: tensor for name, tensor in learned.items() if name.startswith(prefix)}
            journal.save(STAGE, index, inside)
        inner = f"{model.anatomy.layers}."
        journal.save(OUTER, 0, {name: t for name, t in learned.items() if not name.startswith(inner)})


def _halve(whole: PreTrainedModel, resident: LayerwiseModel) -> None:
    """Let the layers of a whole model be computed in bfloat16 where a walk would be. On a GPU the Trainer
    sees to it."""
    if resident.device.type == "cpu" and runs_in_half(resident):
        for layer in whole.get_submodule(resident.anatomy.layers).children():
            compute_in_half(layer, resident.device)


def _said_of(cached: Sequence[CachedTeacher]) -> str:
    """A note on how many sequences the teacher was asked for now, and how many were there."""
    sequences, size = sum(len(one.sequences_NL) for one in cached), cached[0].token_bytes
    asked_now = sum(one.asked for one in cached)
    return (
        f"the teacher was asked for {asked_now} of {sequences} sequences, {size} bytes per token; the rest "
        "were in the cache. KL on held-out sequences counts all but the likeliest tokens as one, so it is "
        "never more than in full"
    )


def _logged(trainer: DistillTrainer, what: str) -> dict[int, float]:
    """The logged values of a quantity, by step."""
    return {int(row["step"]): float(row[what]) for row in trainer.state.log_history if what in row}


def _thinned(values: Mapping[int, float]) -> Curve:
    """A curve of at most POINTS points; a longer one is averaged over equal numbers of steps."""
    pairs, every = list(values.items()), max(1, -(-len(values) // POINTS))
    groups = [pairs[i : i + every] for i in range(0, len(pairs), every)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return tuple((step, mean if math.isfinite(mean) else None) for step, mean in means)


def _state(trainer: DistillTrainer, student: Student) -> Mapping[str, Tensor]:
    """All trained tensors by name, whole."""
    if trainer.is_fsdp_enabled:
        return cast(Mapping[str, Tensor], trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return {name: parameter.data for name, parameter in student.model.named_parameters()}
