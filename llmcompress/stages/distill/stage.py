"""Train what is left of a model to predict as the model did that the run began with, or as another one does.

The student is what the stages before made of the base; teacher and student are whole in memory, in the
working precision. Held-out sequences, those that calibrate and are not trained on, tell when the student was
best, and that is what stays, or the student as it came if it never was better. An interrupted training goes
on from its last checkpoint in the journal's folder.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback

from llmcompress.errors import DataError, ModelError
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.integrations import distributed
from llmcompress.io.journal import Journal
from llmcompress.modeling.from_disk import no_progress_bar
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import TOKENS_AT_ONCE
from llmcompress.stages.base import OUTER, Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.distill.config import WITHIN, DistillConfig
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

STAGE, DONE = "distill", "distilled"
HELD = 32  # sequences that measure
POINTS = 200  # of a curve in the report


class Distill(DistillConfig, Stage):
    """Trains the model to predict as a teacher does, by default the base."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "distillation"
    trains: ClassVar[bool] = True

    @property
    def models(self) -> dict[str, str]:
        """The teacher and the student, where the recipe names them."""
        named = {"teacher": self.teacher, "student": self.student}
        return {role: name for role, name in named.items() if name}

    @property
    def leaves(self) -> str:
        """The student takes the place of the base, if one is named."""
        return "another model" if self.student else ""

    def training_tokens(self, length: int) -> int:
        """Tokens of text that the stage trains on."""
        return self.tokens(length)

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse to train what can't learn there. Errors: ValueError."""
        if self.train == "lora":
            super().require_place(before, after)
        if self.train == "scales" and not any(stage.quantizes or stage.has_levels for stage in before):
            raise ValueError(
                "train: scales is for what quantize or a codebook left; put one of them before it"
            )
        if self.student and before:
            raise ValueError(
                "a student takes the place of what the stages before it made; let its distill be the first"
            )

    def require_possible(self, model: LayerwiseModel, before: Sequence[StageResult], seed: int) -> None:
        """Refuse what needs a missing package, batches that don't divide, and weights that can't learn so."""
        self.require_packages()
        self.micro(self.length or 1)
        schemes = [scheme for result in before for scheme in result.schemes.values()]
        if self.train == "scales" and not any(
            isinstance(each, FourBitScheme | CodebookLayout) for each in schemes
        ):
            raise ModelError(
                "train: scales is for nf4 and fp4 and for codebooks, and the stages before leave none; "
                "train norms"
            )
        if self.train == "lora" and model.layouts:
            raise ModelError(
                "train: lora is for linears that are plain, and here some are shared or of parts; train all"
            )

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """Nothing but other numbers."""
        return StageResult()

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """The cost of training, with a teacher as large as the student."""
        parameters, length = model.parameters(), self.length or work.length
        what = self.loss if self.train == "all" else f"{self.train}, {self.loss}"
        # a gradient and two moments of every weight, or of next to none
        learning = 3 if self.train == "all" else 0
        floats = parameters * ((1 if self.cache else 2) + learning)
        floats += TOKENS_AT_ONCE * model.config.hidden_size * 16 * len(model.layers)
        return Estimate(
            stage=f"distill ({what}, {self.steps} steps of {self.batch} x {length} tokens)",
            parameters=parameters,
            size_bytes=model.stored_bytes() if self.student else work.size_bytes,
            peak_memory_bytes=4 * floats,
            seconds=self.tokens(work.length)
            * 2.0
            * parameters
            * 4
            / work.rate,  # forward and backward, and the teacher
        )

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Train, unless the journal holds the result; leave the weights that learned there, layer by
        layer."""
        journal = context.journal
        entries = [(DONE, 0), (OUTER, 0), *((STAGE, index) for index in range(len(model.layers)))]
        if not all(journal.has(*entry) for entry in entries):
            with no_progress_bar():
                self._train(model, context)
        found = journal.load(DONE, 0)[1]
        notes = found.pop("notes")
        told = {"loss", "steps", "learning_rate", "batch", "train", *self.model_fields_set}
        details = {"length": context.data.calibration.shape[1]} | self.model_dump(
            mode="json", include=told, exclude_none=True
        )
        return Facts(STAGE, notes=notes, details=details | found)

    def _train(self, model: LayerwiseModel, context: Context) -> None:
        folder, length = context.journal.folder / "training", self.length or context.data.calibration.shape[1]
        text, unscored = context.data.training, context.data.unscored
        if length < 2 + unscored:
            raise DataError(
                f"distill: length {length} leaves no token to predict from text; use {2 + unscored} or more"
            )
        if len(text) < (length - unscored) * self.batch:
            raise DataError(
                f"{context.data.spec.source} leaves {len(text)} tokens to train on, not one batch of "
                f"{self.batch} x {length}"
            )
        student = Student(model, self.train, self.rank, context.seed)
        sequences = SequenceDataset(
            text, length, self.steps * self.batch, context.seed, self.on_policy, context.data.bos
        )
        held, notes = context.data.calibration[:HELD], list[str]()
        objective = self._objective(model, student, context, sequences, held, notes)
        earlier = last_checkpoint(folder)
        left = self.steps - (int(earlier.name.rpartition("-")[2]) if earlier else 0)
        watch = Watch(iter(context.track(range(left), f"distill ({self.loss})", left)))
        trainer = DistillTrainer(
            student=student.model,
            objective=objective,
            model=student.trained,
            args=self.arguments(folder, model.device, length, context.seed, begins=earlier is None),
            train_dataset=sequences,
            eval_dataset=[
                {"input_ids": sequence, SEQUENCE: torch.tensor(n)} for n, sequence in enumerate(held)
            ],
            callbacks=[watch, *([EarlyStoppingCallback(self.patience)] if self.patience else [])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(earlier) if earlier else None)
        measured = _logged(trainer, "eval_loss")
        before, curve = measured.pop(0), list(measured.items())
        best = min((kl for _, kl in curve if math.isfinite(kl)), default=before)
        notes += self._told(watch.broken_at, best < before, len(text), length - unscored)
        learned = student.learned(_state(trainer, student)) if best < before else {}
        curves = {
            "curve": dict(curve),
            "perplexities": _logged(trainer, "eval_perplexity"),
            "losses": _logged(trainer, "loss"),
        }
        found = {name: _thinned(values) for name, values in curves.items()}
        with distributed.first_alone() as writes:
            if writes:
                _leave(model, context, learned)
                kl = {"kl_before": before, "kl_after": min(best, before)}
                context.journal.save(DONE, 0, {}, {**kl, **found, "notes": notes})
                shutil.rmtree(folder, ignore_errors=True)

    def _told(self, broken_at: int | None, better: bool, tokens: int, length: int) -> list[str]:
        """What is to be known of a training that came to its end, with so many tokens of text, `length` of
        them a sequence."""
        notes = []
        if broken_at is not None:
            notes.append(
                f"training left the numbers at step {broken_at}, and the best step before stays; lower "
                "learning_rate"
            )
        if not better:
            notes.append("training made nothing better on held-out text, so the student stays as it came")
        if (rounds := self.steps * self.batch * length / tokens) > 1:
            notes.append(
                f"the text was gone through {rounds:.1f} times: {tokens} tokens are left to train on"
            )
        return notes

    def _objective(
        self,
        model: LayerwiseModel,
        student: Student,
        context: Context,
        sequences: SequenceDataset,
        held_NL: Tensor,
        notes: list[str],
    ) -> Objective:
        """What the student is to come near; the teacher is read only if something is to be asked of it."""
        source = context.teacher(self.teacher)

        @functools.cache
        def present() -> LiveTeacher:
            teacher = loaded(source.open(), self.teacher_format)
            if self.attention:
                teacher.set_attn_implementation("eager")
            return LiveTeacher(teacher, model.config.vocab_size)

        def kept() -> list[CachedTeacher]:
            key = f"{source.digest()} {self.teacher_format} {model.dtype} {model.config.vocab_size}"
            wanted = ((sequences.ids_NL, self.temperature), (held_NL, 1.0))
            return [
                CachedTeacher(context.cache, key, present, asked_NL, self.top_k, t, context.track)
                for asked_NL, t in wanted
            ]

        teacher: Teacher
        examiner: Teacher
        if self.cache:
            with distributed.first_alone() as writes:  # or all would ask for all of it
                known = kept() if writes else []
            teacher, examiner = known or kept()
            notes.append(_said_of(known or [teacher, examiner]))
        else:
            teacher = examiner = present()
        matching = None
        if any(getattr(self, name) for name in WITHIN):
            origin = () if self.teacher else context.origin
            matching = self._matching(
                student, present(), held_NL[:4].to(model.device), origin, context.data.unscored
            )
        taught = self.loss != "cross_entropy" or matching is not None
        generator = context.seed if self.on_policy else None
        options = self.loss, self.label_share, self.temperature, self.skew
        return Objective(
            *options, teacher if taught else None, examiner, matching, generator, context.data.unscored
        )

    def _matching(
        self, student: Student, teacher: LiveTeacher, ids_BL: Tensor, origin: Sequence[int], unscored: int
    ) -> Matching:
        """How layers are held against each other; gives the student the linear between unequal widths."""
        if self.attention:
            student.model.set_attn_implementation("eager")
        with torch.no_grad():
            more = {"output_attentions": True} if self.attention else {}
            own = output_of(student.model, student.model(**forward_arguments(ids_BL, **more)))
            taught = teacher({"input_ids": ids_BL}, **more)
        layers, teachers = len(own.hidden_BLD) - 1, len(taught.hidden_BLD) - 1
        if self.attention and (len(own.attention_BHLL) < layers or len(taught.attention_BHLL) < teachers):
            raise ModelError(
                "this family does not show where its attention goes; leave attention, and use hidden"
            )
        widths = {one.hidden_BLD[-1].shape[-1] for one in (own, taught)}
        if self.hidden and len(widths) > 1 and len({states.shape[-1] for states in own.hidden_BLD[1:]}) > 1:
            raise ModelError("the hidden states of this student have several widths; leave hidden")
        states = (one.hidden_BLD[-1][:, unscored:] for one in (own, taught))
        if self.hidden and (projection := projection_of(*states)) is not None:
            student.model.add_module(PROJECTION, projection)
        return Matching.of(layers, teachers, origin, self.hidden_loss, self.hidden, self.attention, unscored)


def _said_of(kept: Sequence[CachedTeacher]) -> str:
    """What was kept, in words."""
    sequences, size = sum(len(one.sequences_NL) for one in kept), kept[0].token_bytes
    asked_now = sum(one.asked for one in kept)
    return (
        f"the teacher was asked for {asked_now} of {sequences} sequences, {size} bytes per token; the rest "
        "were in the cache. KL on held-out sequences counts all but the likeliest tokens as one, so it is "
        "never more than in full"
    )


def _logged(trainer: DistillTrainer, what: str) -> dict[int, float]:
    """What was logged of a quantity, by step."""
    return {int(row["step"]): float(row[what]) for row in trainer.state.log_history if what in row}


def _thinned(values: Mapping[int, float]) -> list[list[float | None]]:
    """Pairs of a step and a value, null where it is no number; of more than POINTS, the means between as many
    steps."""
    pairs, every = list(values.items()), max(1, -(-len(values) // POINTS))
    groups = [pairs[i : i + every] for i in range(0, len(pairs), every)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [[step, mean if math.isfinite(mean) else None] for step, mean in means]


def _state(trainer: DistillTrainer, student: Student) -> Mapping[str, Tensor]:
    """The trained tensors by name, whole."""
    if trainer.is_fsdp_enabled:
        return cast(Mapping[str, Tensor], trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return {name: parameter.data for name, parameter in student.model.named_parameters()}


def _leave(model: LayerwiseModel, context: Context, learned: Mapping[str, Tensor]) -> None:
    """Have the journal hold what has learned: a layer an entry, and what lies outside them."""
    for index in range(len(model.layers)):
        prefix = f"{model.layer_name(index)}."
        inside = {name: tensor for name, tensor in learned.items() if name.startswith(prefix)}
        context.journal.save(STAGE, index, inside, {})
    outside = {
        name: tensor for name, tensor in learned.items() if not name.startswith(f"{model.anatomy.layers}.")
    }
    context.journal.save(OUTER, 0, outside, {})
