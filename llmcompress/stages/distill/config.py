"""The settings of a distillation in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from llmcompress.algorithms.distillation_losses import SKEW, HiddenKind, Kind
from llmcompress.errors import CompressError
from llmcompress.integrations import distributed
from llmcompress.integrations.transformers_compat import available_trackers, is_peft_available, trackers
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.stages.base import Settings
from llmcompress.stages.distill.student import Train

AT_ONCE = 4096  # tokens of a micro-batch, unless the recipe says otherwise
WITHIN = ("hidden", "attention")  # losses that need a teacher in memory


# package of a tracker, if its name is not the tracker's
PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}


class DistillConfig(Settings):
    """Who learns what from whom, for how long and at which rate."""

    model_config = ConfigDict(allow_inf_nan=False)

    loss: Kind = Field(
        default="forward_kl",
        description="loss between the predictions of student and teacher",
    )
    steps: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(default=1000, description="training steps")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-4, description="highest learning rate, after the warm-up"
    )
    batch: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(default=16, description="sequences per step")
    micro_batch: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None,
        description="sequences at once, a divisor of `batch`; default: as many as 4096 tokens hold",
    )
    length: Annotated[int, Field(ge=2, le=MOST_COUNTED)] | None = Field(
        default=None, description="tokens per sequence; default: that of the data"
    )
    temperature: Annotated[float, Field(gt=0, le=1e3)] = Field(
        default=1.0,
        description="temperature of both predictions",
    )
    skew: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="skew of the losses that have one; default: 0.5 for `jensen_shannon`, else 0.1",
    )
    label_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of the cross-entropy with the text in the loss"
    )
    hidden: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0,
        description="weight of the loss between hidden states",
    )
    hidden_loss: HiddenKind = Field(
        default="mse",
        description="loss between hidden states; `mse` is relative to the teacher's mean square",
    )
    attention: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="weight of the loss between attention maps"
    )
    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Hub id or folder of a teacher with the same tokenizer; default: the base"
    )
    teacher_format: Literal["nf4"] | None = Field(
        default=None,
        description="`nf4`: hold the teacher's linears in 4 bits",
    )
    student: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Hub id or folder of another model, or of a config alone, to train in place of the base",
    )
    cache: bool = Field(default=False, description="store the teacher's predictions on disk, and reuse them")
    top_k: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        default=64, description="most likely tokens stored per prediction, with `cache: true`"
    )
    on_policy: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of the sequences whose second half the student writes"
    )
    train: Train = Field(
        default="all",
        description="which weights learn: all, norms, scales (of groups or codebooks, after `quantize` or "
        "`codebook`), or LoRA adapters, which are merged at the end",
    )
    rank: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        default=16, description="rank of the adapters, with `train: lora`"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="share of the steps until the highest learning rate"
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        default="cosine", description="learning rate after the warm-up"
    )
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.0,
        description="weight decay of AdamW",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="`adamw_8bit`: that of bitsandbytes, paged on a GPU"
    )
    evaluate_every: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="steps between evaluations; default: a tenth of all steps"
    )
    patience: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="evaluations without an improvement before training stops early"
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, a third more time",
    )
    trackers: tuple[str, ...] = Field(
        default=(), strict=False, description="trackers that the Trainer reports to, like `tensorboard`"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DistillConfig:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} is no divisor of batch {self.batch}")
        if self.skew is not None and self.loss not in SKEW:
            raise ValueError(f"skew is for {', '.join(SKEW)}, not for {self.loss}")
        if "label_share" in self.model_fields_set and self.loss == "cross_entropy":
            raise ValueError("label_share is for losses with a teacher; cross_entropy has no other part")
        if "rank" in self.model_fields_set and self.train != "lora":
            raise ValueError(f"rank is for train: lora, not {self.train}")
        if "top_k" in self.model_fields_set and not self.cache:
            raise ValueError("top_k is for cache: true; a teacher in memory is asked for everything")
        for name in (*WITHIN, "on_policy"):
            if self.cache and getattr(self, name):
                raise ValueError(f"{name} needs the teacher in memory; leave cache")
        if self.student and self.train == "scales":
            raise ValueError("train: scales is for the model that quantize left; leave student")
        for tracker in self.trackers:
            if tracker not in trackers():
                raise ValueError(f"trackers are {', '.join(trackers())}, not {tracker}")
        return self

    def require_packages(self) -> None:
        """Refuse settings that need a package that is not installed here. Errors: CompressError, which names
        it."""
        if self.train == "lora" and not is_peft_available():
            raise CompressError("train: lora needs the package peft; pip install peft, or use train: all")
        for tracker in self.trackers:
            if tracker not in available_trackers():
                package = PACKAGES.get(tracker, tracker)
                raise CompressError(
                    f"trackers: {tracker} needs the package {package}; pip install {package}, or leave it out"
                )

    def tokens(self, length: int) -> int:
        """Number of tokens of text that the stage trains on, if sequences of the data have `length`
        tokens."""
        return self.steps * self.batch * (self.length or length)

    def micro(self, length: int) -> int:
        """Sequences that one process takes at once. Errors: CompressError if they don't divide the batch."""
        share, rest = divmod(self.batch, distributed.count())
        if rest or (self.micro_batch and share % self.micro_batch):
            at_once = f", {self.micro_batch} at once" if self.micro_batch else ""
            raise CompressError(
                f"batch {self.batch} does not divide among {distributed.count()} processes{at_once}"
            )
        fitting = max(1, AT_ONCE // length)
        return self.micro_batch or max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)
