"""Train the compressed model to predict as the model did that the run began with, or as another teacher does.

The student is what the stages before made of the base. `training` trains it; the result is in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from llmcompress.architectures.spec import LINEARS
from llmcompress.data.sources import Effort
from llmcompress.errors import ModelError
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.io.journal import Journal
from llmcompress.modeling.from_disk import no_progress_bar
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.stages.base import OUTER, Context, Estimate, Facts, Stage, StageResult, Workload
from llmcompress.stages.distill import estimate
from llmcompress.stages.distill.config import DistillConfig
from llmcompress.stages.distill.facts import DONE, STAGE, TrainedFacts

# by effort, where a recipe does not say it
STEPS: Mapping[Effort, int] = {"fast": 250, "balanced": 1000, "best": 2000}


class Distill(DistillConfig, Stage):
    """Trains the model to predict as a teacher does, by default the base."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "distillation"
    trains: ClassVar[bool] = True

    def with_effort(self, effort: Effort, before: Sequence[Stage]) -> Stage:
        """With the number of steps."""
        return self.model_copy(update=self.unsaid(steps=STEPS[effort]))

    @property
    def needs(self) -> int:
        """What each linear reads."""
        return LINEARS

    @property
    def models(self) -> dict[str, str]:
        """The teacher and the student, if the recipe names them."""
        named = {"teacher": self.teacher, "student": self.student}
        return {role: name for role, name in named.items() if name}

    @property
    def leaves(self) -> str:
        """What is left: another model if a student is named, which takes the place of the base."""
        return "another model" if self.student else ""

    def training_tokens(self, length: int) -> int:
        """Tokens of text that the stage trains on."""
        return self.tokens(length)

    def require_place(self, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Refuse a place where the weights to train can't learn. Errors: ValueError."""
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
        """Refuse missing packages, batches that don't divide, and weights that can't learn in this way."""
        self.require_packages()
        self.micro(self.length or 1)
        if model.anatomy.form.stream_dim is not None:
            raise ModelError(
                f"distill can't read the last states of a {model.anatomy.family} model, whose layers keep "
                "several streams of them; leave distill out"
            )
        schemes = [scheme for result in before for scheme in result.schemes.values()]
        if self.train == "scales" and not any(
            isinstance(each, FourBitScheme | CodebookScheme | CodebookLayout) for each in schemes
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
        """An empty result, as only values change."""
        return StageResult()

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of training, with a teacher as large as the student."""
        return estimate.of(self, model, work)

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Train, unless the journal holds the result, and leave the weights that learned there, layer by
        layer."""
        journal = context.journal
        entries = [(DONE, 0), (OUTER, 0), *((STAGE, index) for index in range(len(model.layers)))]
        if not all(journal.has(*entry) for entry in entries):
            # the Trainer's imports, datasets and peft among them, take a second that only training needs
            from llmcompress.stages.distill.training import Training

            with no_progress_bar():
                Training(self, model, context).run()
        found = journal.facts(DONE, 0, TrainedFacts)
        told = {"loss", "steps", "learning_rate", "batch", "train", *self.model_fields_set}
        details = {
            "length": context.data.calibration.shape[1],
            **self.model_dump(mode="json", include=told, exclude_none=True),
            **found.model_dump(mode="json", exclude={"notes"}),
        }
        return Facts(STAGE, notes=list(found.notes), details=details)
