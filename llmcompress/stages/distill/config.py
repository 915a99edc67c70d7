"""What a recipe says of a distillation, and what of that transformers' Trainer is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils.import_utils import is_peft_available

from llmcompress.algorithms.distillation_losses import SKEW, HiddenKind, Kind
from llmcompress.errors import CompressError
from llmcompress.integrations import distributed
from llmcompress.io.safe_parsing import MOST_COUNTED
from llmcompress.stages.base import Settings
from llmcompress.stages.distill.student import Train

AT_ONCE = 4096  # tokens of a micro-batch, unless the recipe says otherwise
WITHIN = ("hidden", "attention")  # losses that need a teacher in memory


# What a tracker's package is called, where it is not the tracker's name.
PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}


class DistillConfig(Settings):
    """Who learns what from whom, for how long and at which rate."""

    model_config = ConfigDict(allow_inf_nan=False)

    loss: Kind = Field(
        default="forward_kl", description="how far the student's predictions are from the teacher's"
    )
    steps: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        default=1000, description="updates of the weights"
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-4, description="at its highest, after the warm-up"
    )
    batch: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(default=16, description="windows a step")
    micro_batch: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="windows at once, a divisor of batch; default as many as 4096 tokens hold"
    )
    length: Annotated[int, Field(ge=2, le=MOST_COUNTED)] | None = Field(
        default=None, description="tokens a window; default that of the data"
    )
    temperature: Annotated[float, Field(gt=0, le=1e3)] = Field(
        default=1.0, description="that logits are divided by"
    )
    skew: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="of the losses that have one"
    )
    label_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of cross-entropy in the loss"
    )
    hidden: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="weight of the loss between hidden states"
    )
    hidden_loss: HiddenKind = Field(default="mse", description="mse is a share of the teacher's mean square")
    attention: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="weight of the loss between attention maps"
    )
    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Hub id or folder of a model with the same tokenizer; default the base"
    )
    teacher_format: Literal["nf4"] | None = Field(
        default=None, description="hold the teacher's linears in 4 bits"
    )
    student: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "Hub id or folder of the model to train, or of its config alone; default what the base became"
        ),
    )
    cache: bool = Field(
        default=False, description="keep what the teacher says on disk, and don't ask it twice"
    )
    top_k: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        default=64, description="likeliest tokens that are kept of each prediction"
    )
    on_policy: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of the windows of which the student writes the second half itself"
    )
    train: Train = Field(
        default="all",
        description=(
            "which weights learn; scales: of 4-bit groups, after quantize; lora: merged when it is over"
        ),
    )
    rank: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(default=16, description="of lora")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="share of the steps until the highest rate"
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        default="cosine", description="what follows it"
    )
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = Field(default=0.0, description="of AdamW")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="8bit: bitsandbytes', paged on a GPU"
    )
    evaluate_every: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="steps; default a tenth of them"
    )
    patience: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None, description="evaluations that may bring nothing before training ends early"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="less memory for activations, a third more time"
    )
    trackers: tuple[str, ...] = Field(
        default=(), strict=False, description="that the Trainer reports to, like tensorboard"
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
            if tracker not in INTEGRATION_TO_CALLBACK:
                raise ValueError(f"trackers are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, not {tracker}")
        return self

    def require_packages(self) -> None:
        """Refuse what needs a package that is not installed here. Errors: CompressError, which names it."""
        if self.train == "lora" and not is_peft_available():
            raise CompressError("train: lora needs the package peft; pip install peft, or use train: all")
        for tracker in self.trackers:
            if tracker not in get_available_reporting_integrations():
                package = PACKAGES.get(tracker, tracker)
                raise CompressError(
                    f"trackers: {tracker} needs the package {package}; pip install {package}, or leave it out"
                )

    def tokens(self, length: int) -> int:
        """How many tokens of text the stage trains on where windows of the data have `length`."""
        return self.steps * self.batch * (self.length or length)

    def micro(self, length: int) -> int:
        """Windows that one process takes at once. Errors: CompressError where they don't divide the batch."""
        share, rest = divmod(self.batch, distributed.count())
        if rest or (self.micro_batch and share % self.micro_batch):
            at_once = f", {self.micro_batch} at once" if self.micro_batch else ""
            raise CompressError(
                f"batch {self.batch} does not divide among {distributed.count()} processes{at_once}"
            )
        fitting = max(1, AT_ONCE // length)
        return self.micro_batch or max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)

    def arguments(
        self, folder: Path, device: torch.device, length: int, seed: int, *, begins: bool
    ) -> TrainingArguments:
        """For the Trainer, which writes its checkpoints to `folder`; one that begins is measured first."""
        cuda, micro = device.type == "cuda", self.micro(length)
        every = min(self.evaluate_every or max(1, self.steps // 10), self.steps)
        eight_bit = "paged_adamw_8bit" if cuda else "adamw_bnb_8bit"
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=self.batch // (micro * distributed.count()),
            activation_checkpointing=self.gradient_checkpointing,
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
            eval_on_start=begins,
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            report_to=list(self.trackers),
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
            dataloader_pin_memory=cuda,
        )
