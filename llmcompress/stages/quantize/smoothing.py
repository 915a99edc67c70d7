"""Smoothing before the rounding: a scale per channel crosses from a producer to its readers, as a search
decides.

The search decides one entry of `scale_pairs` after another. It measures the error in the output of the whole
layer that the readers' rounding makes: nearest codes, and the kernel's rounding of their inputs. The error is
relative to each token's output, by which the next norm will divide. Candidates are the exponents of the
papers, a fit of all factors to the expected noise, and no scale at all, so a layer is never made worse on the
sample that decides. All are tried on a quarter of the sample, the best few and no scale on the whole. The
function of the model stays the same: see `DecoderLayer.cross`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.smoothing import EXPONENTS, awq, fitted, smoothquant
from llmcompress.architectures.shape_grammar import Spelling, scale
from llmcompress.formats.schemes import QuantScheme
from llmcompress.integrations.distributed import Processes
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.finished_parts import FinishedParts
from llmcompress.modeling.token_limit import joined
from llmcompress.stages.base import Settings
from llmcompress.stages.quantize.fake_quant import trial

SAMPLE = 1  # units of tokens on which the search decides
QUARTER, FINALISTS = 4, 3  # all are tried on one sequence of so many, the best few on all of them
TOKENS, ROWS = 1024, 256  # tokens of the inputs and rows of each weight that a fit uses


class Sample(NamedTuple):
    """Batches of states that enter a layer, what they should leave as, and what no factor changes there."""

    inputs: Sequence[Tensor]
    aims: Sequence[Tensor]
    parts: FinishedParts

    def quarter(self) -> Sample:
        """A quarter of the sequences, at least one of each batch."""
        sizes = [-(-len(batch) // QUARTER) for batch in self.inputs]
        inputs, aims = (
            [batch[:size] for batch, size in zip(of, sizes, strict=True)] for of in (self.inputs, self.aims)
        )
        return Sample(inputs, aims, FinishedParts({}))


class Smooth(Settings):
    """Moves a scale per channel between linears and what feeds them, before the rounding."""

    method: Literal["smoothquant", "awq"] = Field(
        default="smoothquant",
        description="`smoothquant` is for formats that round activations, `awq` for 4-bit weights",
    )
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default="auto",
        description="exponent of the scale; `auto`: the one with the least error, or a fit of all factors",
    )

    def search(
        self, layer: DecoderLayer, codings: Mapping[str, QuantScheme], dtype_of: Callable[[str], torch.dtype]
    ) -> dict[str, Tensor]:
        """Find the factor of each entry of `scale_pairs` with a reader among `codings`. The factors have
        crossed when this returns.

        `dtype_of` gives the stored dtype of a parameter, by its name in the layer.
        """
        moments, found = layer.moments(), {}
        # before anything is rounded
        inputs = layer.limit.units(layer.inputs)[: layer.shard.first(SAMPLE)]
        aims = layer.outputs_with(inputs, {}, layer.device)
        read: dict[str, Tensor] = {}
        if layer.shard.first(1):
            size_T1 = aims[0].flatten(0, -2).norm(dim=-1, keepdim=True)[:TOKENS]
            read = _first_inputs(layer, len(size_T1))
        for key, consumers in layer.anatomy.smooth_pairs.items():
            reading = [reader for reader in consumers if reader in codings]
            if not reading:
                continue
            first = next(group[0] for group in layer.anatomy.consumers if reading[0] in group)
            X_TC = read[first] / size_T1 if read else None
            factors = self._candidates(layer, key, reading, moments[first], X_TC, codings[reading[0]])
            own, dtype = {reader: codings[reader] for reader in reading}, dtype_of(norm_of(layer, key))
            loss = partial(self._loss, layer, key, own, moments[first], dtype)
            sample = Sample(inputs, aims, FinishedParts({}))
            found[key] = best(factors, sample, loss, layer.shard.processes)
            layer.cross(key, found[key], dtype)
        return found

    def _candidates(
        self,
        layer: DecoderLayer,
        key: str,
        consumers: Sequence[str],
        moments: Moments,
        X_TC: Tensor | None,
        coding: QuantScheme,
    ) -> list[Tensor]:
        """Return the factors to try, shaped as the axes of the producer's output. With `auto` the first one
        changes nothing.

        The fit is that of the process which has X, the inputs of the first batch: rank 0.
        """
        unit_C, shape = _units(layer, key, consumers[0])
        weights = [layer.weight(reader) for reader in consumers]
        weight_top = torch.stack([W_RC.abs().amax(0) for W_RC in weights]).amax(0)
        top, tops, size = (
            _largest(x, unit_C, shape) for x in (moments.top_C, weight_top, moments.H_CC.diagonal().sqrt())
        )
        exponents = EXPONENTS if self.alpha == "auto" else (self.alpha,)
        found = [
            smoothquant(top, tops, a) if self.method == "smoothquant" else awq(size, a) for a in exponents
        ]
        if self.alpha != "auto":
            return found
        W_RC = torch.cat([W_RC[:: max(1, len(W_RC) // ROWS)] for W_RC in weights])
        ones_U = torch.ones(shape, device=layer.device).flatten()
        fit_U = ones_U
        if X_TC is not None:
            fit_U = fitted(
                X_TC,
                W_RC,
                unit_C,
                ones_U,
                input_largest=coding.input_largest,
                weight_largest=coding.weight_largest,
                group_size=coding.columns(tuple(W_RC.shape)),
            )
        fit_U = layer.shard.processes.sent({"fit": fit_U}, 0)["fit"].to(layer.device)
        return [ones_U.reshape(shape), *found, fit_U.reshape(shape)]

    def _loss(
        self,
        layer: DecoderLayer,
        key: str,
        codings: Mapping[str, QuantScheme],
        moments: Moments,
        dtype: torch.dtype,
        on: Sample,
        factor: Tensor,
    ) -> float:
        """Squared error of the layer's output relative to its size, with the readers rounded once the factor
        has crossed. The layer is left unchanged. Submodules that the factor does not touch are run once, for
        the parts of the sample."""
        before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
        unit_C, _ = _units(layer, key, next(iter(codings)))
        layer.cross(key, factor, dtype)
        top = float((moments.top_C / factor.flatten()[unit_C]).max())
        untouched = _before(layer, key, next(iter(codings)))
        tops = dict.fromkeys(codings, top)
        outs = trial(layer, codings, tops, on.inputs, on.parts, untouched)
        for name, data in before.items():
            layer.module.get_parameter(name).data = data
        errors = [
            ((out - aim).square().sum(-1) / aim.square().sum(-1)).sum()
            for out, aim in zip(outs, on.aims, strict=True)
        ]
        lost = torch.tensor(float(sum(errors)), dtype=torch.float64)
        layer.shard.processes.sum_(lost)
        return float(lost)


def best(
    factors: Sequence[Tensor],
    sample: Sample,
    loss: Callable[[Sample, Tensor], float],
    processes: Processes,
) -> Tensor:
    """Return the factor with the least loss on the sample. The first one, which changes nothing, and those
    that are best on a quarter of it are measured there."""
    quarter = sample.quarter()
    sequences = torch.tensor([sum(map(len, part.inputs)) for part in (quarter, sample)])
    processes.sum_(sequences)
    if len(factors) > 1 + FINALISTS and sequences[0] < sequences[1]:
        losses = [loss(quarter, factor) for factor in factors[1:]]
        order = sorted(range(len(losses)), key=losses.__getitem__)
        factors = [factors[0], *(factors[1 + place] for place in sorted(order[:FINALISTS]))]
    losses = [loss(sample, factor) for factor in factors]
    return factors[losses.index(min(losses))]


def norm_of(layer: DecoderLayer, key: str) -> str:
    """The parameter, by its name in the layer, that takes in a factor if the producer of a key of
    `scale_pairs` is a norm."""
    return f"{layer.anatomy.producer(key)[0]}.weight"


def _before(layer: DecoderLayer, key: str, reader: str) -> list[str]:
    """The submodules, such as self_attn, that come before a reader and hold no producer of a key of
    `scale_pairs`: no factor changes what they return."""
    group = next(group for group in layer.anatomy.consumers if reader in group)
    producing = layer.anatomy.producer(key)[0].partition(".")[0]
    return [name for name in layer.ending_before(group) if name != producing]


def _first_inputs(layer: DecoderLayer, tokens: int) -> dict[str, Tensor]:
    """What the first linear of each group reads of the first `tokens` tokens: X [T, C] by name."""
    parts: dict[str, list[Tensor]] = {}
    with closing(layer.reads(*layer.anatomy.consumers)) as reads:
        for read, _ in reads:
            for name, x in read.items():
                parts.setdefault(name, []).append(x.flatten(0, -2))
            if sum(map(len, parts[layer.anatomy.consumers[0][0]])) >= tokens:
                break
    return {name: joined(of_one)[:tokens] for name, of_one in parts.items()}


def _units(layer: DecoderLayer, key: str, reader: str) -> tuple[Tensor, tuple[int, ...]]:
    """Return the unit of the producer's output that each column of a reader reads, int64 [C], and the shape
    of the units."""
    _, _, axes = layer.anatomy.producer(key)
    term = Spelling((layer.anatomy.input_of(reader),))
    shape = tuple(layer.sizes[axis] for axis in axes)
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    columns = torch.ones(term.shape(layer.sizes), dtype=torch.float64)
    return scale(columns, term, layer.sizes, axes, count).long().to(layer.device), shape


def _largest(x_C: Tensor, unit_C: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The largest x among the columns of each unit."""
    found = torch.zeros(torch.Size(shape).numel(), device=x_C.device)
    return found.scatter_reduce(0, unit_C, x_C, "amax").reshape(shape)
