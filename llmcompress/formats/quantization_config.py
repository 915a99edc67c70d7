"""config.json's `quantization_config` of our models: the scheme of each linear, and which tensors are
tied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.errors import ModelError
from llmcompress.formats.registry import AnyLayout, layouts_of
from llmcompress.io.checkpoint import named_ties

METHOD = "llmcompress"


def quantization_config(
    schemes: Sequence[tuple[AnyLayout, Sequence[str]]],
    ties: Mapping[str, str] | None = None,
    experts: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Return config.json's `quantization_config`: each scheme with the full names of its linears, the ties,
    and the parameters of experts that are linears. Errors: ModelError."""
    entries = [{**asdict(scheme), "linears": list(linears)} for scheme, linears in schemes]
    return CompressedConfig(entries, ties, experts).to_dict()


class CompressedConfig(QuantizationConfigMixin):
    """The `quantization_config` of one of our models: `schemes`, each with its `linears`, `ties`, and
    `experts`. Errors: ModelError."""

    ties: Mapping[str, str] = {}  # tensor -> the tensor that it is tied to
    # parameter in whose place each expert has a linear -> whether the model's code has a matrix as [in, out]
    experts: Mapping[str, bool] = {}

    def __init__(
        self,
        schemes: Sequence[Mapping[str, Any]] = (),
        ties: Mapping[str, str] | None = None,
        experts: Mapping[str, bool] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ModelError(
                f"config.json's quantization_config has {sorted(unknown)}, which this llmcompress doesn't "
                "know: update it"
            )
        self.quant_method = cast(Any, quant_method)
        layouts_of(schemes)
        self.schemes = [dict(entry) for entry in schemes]
        if ties is not None and (named := named_ties(ties)):
            self.ties = named
        if experts:
            self.experts = _experts(experts)

    def assigned(self) -> dict[str, AnyLayout]:
        """The layout of each linear, by full name."""
        return layouts_of(self.schemes)

    def without(self, linears: Collection[str]) -> CompressedConfig:
        """The same config for a model in which these linears are plain."""
        left = [
            {**entry, "linears": [name for name in entry["linears"] if name not in linears]}
            for entry in self.schemes
        ]
        ties = {
            target: source for target, source in self.ties.items() if target.rpartition(".")[0] not in linears
        }
        return CompressedConfig([entry for entry in left if entry["linears"]], ties, self.experts)


def _experts(said: Any) -> dict[str, bool]:
    """The `experts` of config.json. Errors: ModelError."""
    if isinstance(said, Mapping) and all(isinstance(how, bool) for how in said.values()):
        return {str(name): how for name, how in said.items()}
    raise ModelError(
        f"config.json has experts that are not names with true or false: {str(said)[:80]}; take it again "
        "from its source"
    )


def read_config(quantization: Any) -> CompressedConfig:
    """Return our linears and ties from config.json's `quantization_config`; empty if there is none or it
    belongs to another method.

    Errors: ModelError.
    """
    if quantization is None:
        return CompressedConfig()
    if not isinstance(quantization, Mapping):
        raise ModelError(
            f"config.json's quantization_config is no object: {str(quantization)[:80]}; take the model "
            "again from its source"
        )
    return (
        CompressedConfig(**quantization) if quantization.get("quant_method") == METHOD else CompressedConfig()
    )
