"""How one linear is written: the settings that a recipe gives for all linears, and its overrides for some.

An override changes the stage's own settings for the linears that it names. An override with another format
starts from that format's defaults. Models whose linears are all 4-bit, or all LLM.int8, are native, whatever
their groups. Every other mixture, and any model whose embedding is int8, needs the plug-in. There LLM.int8
becomes the same codes in the plug-in's layout (`together`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from llmcompress.errors import ModelError
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.ggml import GROUP_SIZE, GgmlLayout
from llmcompress.formats.integer import FORMATS, IntegerLayout
from llmcompress.formats.schemes import FourBitScheme, GgmlScheme, Int8Scheme, IntegerScheme, QuantScheme
from llmcompress.stages.base import Settings


class FormatConfig(Settings):
    """`format, group_size, double_quant, threshold, activations, range, entries`: how linears are written,
    and what their kernels round."""

    retired: ClassVar[Mapping[str, str]] = {"block": "it is called group_size"}
    newer: ClassVar[frozenset[str]] = frozenset({"entries"})

    format: Literal[
        "nf4", "fp4", "int8", "w8a8", "w4a8", "w4a4", "w8a16", "w4a16", "q4_0", "iq4_nl", "codebook"
    ] = Field(
        default="nf4",
        description="how linears are stored; `nf4`, `fp4` and `int8` load with transformers and "
        "bitsandbytes, the others with `import llmcompress`; `q4_0` and `iq4_nl` are llama.cpp's",
    )
    group_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="number of weights under one scale, in 4-bit formats"
    )
    double_quant: bool = Field(
        default=False,
        description="`nf4`, `fp4`: scales in 8 bits, 4.13 bits per weight at `group_size: 64`, not 4.5",
    )
    threshold: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0,
        description="`int8`: columns of activations that reach it stay in float16; 0: none do",
    )
    activations: Literal["dynamic", "static", "none"] = Field(
        default="dynamic",
        description="formats that round activations: a scale per token, a stored scale, or no rounding",
    )
    range: Literal["minmax", "percentile", "mse"] = Field(
        default="mse", description="how a stored scale is chosen, with `activations: static`"
    )
    entries: Literal[4, 8, 16, 256] | None = Field(
        default=None,
        description="`codebook`: number of values that a row's weights take, 2, 3, 4 or 8 bits per index",
    )

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> FormatConfig:
        has = {
            "codebook": "no scales",
            "q4_0": f"groups of {GROUP_SIZE} and no others",
            "iq4_nl": f"groups of {GROUP_SIZE} and no others",
        }.get(self.format, "one scale per row")
        belongs = {
            "group_size": (
                self.has_group_size,
                f"4-bit formats; {self.format} has {has}",
            ),
            "double_quant": (self.format in ("nf4", "fp4"), f"nf4 and fp4, not {self.format}"),
            "threshold": (self.format == "int8", f"int8, not {self.format}"),
            "activations": (self.format in FORMATS, f"{', '.join(FORMATS)}, not {self.format}"),
            "range": (self.activations == "static", f"activations: static, not {self.activations}"),
            "entries": (self.format == "codebook", f"codebook, not {self.format}"),
        }
        for name, (fits, where) in belongs.items():
            if name in self.model_fields_set and not fits:
                raise ValueError(f"{name} is for {where}")
        if self.format == "codebook" and self.entries is None:
            raise ValueError(
                "format: codebook needs entries, how many values the weights of a row take: 4, 8, 16 or 256"
            )
        return self

    @property
    def has_group_size(self) -> bool:
        """Whether `group_size` says anything about the format."""
        return self.format not in ("int8", "w8a8", "w8a16", "q4_0", "iq4_nl", "codebook")

    def coding(self, dtype: torch.dtype) -> QuantScheme:
        """The scheme of a linear in a model stored in `dtype`."""
        if self.format == "nf4" or self.format == "fp4":
            return FourBitScheme(self.format, self.group_size, self.double_quant, dtype)
        if self.format == "int8":
            return Int8Scheme(self.threshold)
        if self.format == "q4_0" or self.format == "iq4_nl":
            return GgmlScheme(GgmlLayout(self.format))
        if self.format == "codebook":
            assert self.entries is not None
            kind = "bfloat16" if dtype is torch.bfloat16 else "float16"
            return CodebookScheme(CodebookLayout(self.entries, 1, kind))
        return IntegerScheme(
            IntegerLayout(
                self.format, self.activations, None if self.format.startswith("w8") else self.group_size
            ),
            self.range,
        )

    def settings(self) -> dict[str, Any]:
        """The fields of the format that were set explicitly."""
        return {
            name: getattr(self, name) for name in FormatConfig.model_fields if name in self.model_fields_set
        }


class Override(FormatConfig):
    """Settings for some linears. Those not given are the stage's, unless the format is another."""

    def over(self, own: FormatConfig) -> FormatConfig:
        """The settings that hold for these linears if the stage's are `own`. Errors: ValueError as for any
        FormatConfig."""
        same = self.format == own.format or "format" not in self.model_fields_set
        return FormatConfig(**((own.settings() if same else {}) | self.settings()))

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> Override:
        return self  # the stage has what an override lacks: `over` checks the two together


def together(codings: Mapping[str, QuantScheme], *, native: bool = True) -> dict[str, QuantScheme]:
    """Return the schemes of one model in a form in which they can stand beside each other. Without `native`
    they also stand beside other linears of the plug-in.

    Errors: ModelError if one can't.
    """
    alike = native and len(set(codings.values())) == 1
    if alike or all(isinstance(coding, FourBitScheme) for coding in codings.values()):
        return dict(codings)
    for linear, coding in codings.items():
        if isinstance(coding, Int8Scheme) and coding.threshold:
            raise ModelError(
                f"threshold: {coding.threshold:g} of {linear} is for models that are int8 throughout, as "
                "LLM.int8 has it; set it to 0 beside others, or beside embedding: int8"
            )
    return {
        name: IntegerScheme(IntegerLayout("w8a8")) if isinstance(coding, Int8Scheme) else coding
        for name, coding in codings.items()
    }
