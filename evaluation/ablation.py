"""Which part of the solver contributes what? The same model and tokens, one ingredient after another.

    python -m evaluation ablation [--model demo] [--threads 2]

All variants write nf4 with a group size of 64 and float32 scales: the same bytes. 256 sequences of 256 tokens
calibrate, 64 evaluate. The result goes to results/ablation-MODEL.json; NOTES.md says what it means.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from evaluation import machine, results
from evaluation.models import MODELS
from evaluation.options import parser
from evaluation.results import AblationRow
from llmcompress.algorithms.gptq import descend, gptq
from llmcompress.algorithms.grids import Grid, grid
from llmcompress.algorithms.hessian import retarget
from llmcompress.algorithms.quantize_weight import RoundedWeight
from llmcompress.algorithms.scales import fit_scales, groups_of, search_scales, spread
from llmcompress.formats.schemes import FourBitScheme
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.backward import output_fisher
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import logits, walk
from llmcompress.pipeline.resolve import calibration_data, find_base
from llmcompress.report.metrics import fidelity
from llmcompress.stages.quantize.rounding import Rounding
from llmcompress.stages.quantize.stage import Quantize

GROUP_SIZE = 64
CPU = torch.device("cpu")
Linear = Callable[[Tensor, Tensor], Tensor]  # (W [R, C], H [C, C]) -> what it is rounded to


def absmax(W_RC: Tensor) -> Tensor:
    """The scale of each group of a weight [R, C], [R, C / GROUP_SIZE]: its largest absolute value."""
    return groups_of(W_RC, GROUP_SIZE).abs().amax(-1).clamp_min(1e-12)


def solver(levels: Grid, *, search: bool, signed: bool, feedback: bool, rounds: int) -> Linear:
    """The solver with some of its parts left out."""

    def linear(W_RC: Tensor, H_CC: Tensor) -> Tensor:
        scale = (
            search_scales(W_RC, H_CC.diagonal(), levels, GROUP_SIZE, signed=signed)
            if search
            else absmax(W_RC)
        )
        index = (
            gptq(W_RC, H_CC, scale, levels) if feedback else levels.nearest(W_RC / spread(scale, GROUP_SIZE))
        )
        for _ in range(rounds):
            scale = fit_scales(W_RC, H_CC, levels.levels[index], scale)
            index = descend(W_RC, H_CC, index, scale, levels)
        return RoundedWeight(index, scale).weight(levels)

    return linear


@dataclass(frozen=True)
class Measured:
    """KL in nats/token of a variant, and the seconds that it took."""

    kl_nats_mean: float
    seconds: float


class Changed(DiskModel):
    """A model on disk, some of whose tensors, by their name on disk, are others."""

    changed: Mapping[str, Tensor] = MappingProxyType({})

    def _read(self, key: str, target: str) -> Tensor:
        return self.changed[key] if key in self.changed else super()._read(key, target)


class Variants:
    """A model, its tokens, and ways of rounding it."""

    def __init__(self, name: str) -> None:
        subject = MODELS[name]
        self.model = Changed(find_base(subject.base).folder, CPU)
        self.data = calibration_data(self.model, subject.data(), tokenizer_of(self.model.folder))
        self.base = list(logits(self.model, self.data.evaluation))
        self.levels = grid("nf4")
        self.fisher: dict[int, Tensor] = {}
        chosen, _ = Quantize().choose(self.model)
        inner = (name.removeprefix(f"{self.model.anatomy.layers}.").partition(".")[2] for name in chosen)
        self.linears = tuple(dict.fromkeys(inner))  # by name in a layer: those whose shape the format takes

    def score(
        self, change: Callable[[DecoderLayer], Mapping[str, Tensor]], *, reference: bool = False
    ) -> Measured:
        """KL and seconds of a model whose every layer is changed so."""
        start, changed = time.monotonic(), {}
        for layer in walk(self.model, self.data.calibration, reference=reference):
            for linear, W_RC in change(layer).items():
                layer.set_weight(linear, W_RC)
                changed[f"{layer.name}.{linear}.weight"] = layer.oriented(linear, W_RC)
        seconds = time.monotonic() - start
        self.model.changed = {self.model.sources[target][0]: W for target, W in changed.items()}
        measured = fidelity(logits(self.model, self.data.evaluation), self.data.evaluation, self.base)
        self.model.changed = {}
        return Measured(float(measured.kl_nats_mean or 0), seconds)

    def alone(self, linear: Linear) -> Measured:
        """All linears of a layer from one pass over the layer as it was."""

        def change(layer: DecoderLayer) -> dict[str, Tensor]:
            moments = layer.moments()
            return {name: linear(layer.weight(name), moments[name].H_CC) for name in self.linears}

        return self.score(change)

    def in_turn(self, *, asymmetric: bool = True, at_once: bool = False) -> Measured:
        """Linears solved one after another; `at_once`: all from one pass over the layer as it was."""
        linear = solver(self.levels, search=True, signed=True, feedback=True, rounds=3)

        def change(layer: DecoderLayer) -> dict[str, Tensor]:
            changed = {}
            consumers = layer.anatomy.consumers
            for groups in [consumers] if at_once else [(group,) for group in consumers]:
                moments = layer.moments(*groups)
                for name in [name for group in groups for name in group if name in self.linears]:
                    W_RC, seen = layer.weight(name), moments[name]
                    changed[name] = linear(retarget(W_RC, seen) if asymmetric else W_RC, seen.H_CC)
                    layer.set_weight(name, changed[name])
            return changed

        return self.score(change, reference=True)

    def learned(self, *, metric: str = "fisher", target: str = "full", steps: int = 200) -> Measured:
        """Learned rounding by a metric (fisher, plain), to the full model's outputs or the layer's own."""
        if not self.fisher:
            with tempfile.TemporaryDirectory() as scratch:
                self.fisher = dict(output_fisher(self.model, self.data.calibration[:128], Path(scratch), 0))
        rounding = Rounding(
            dict.fromkeys(self.linears, FourBitScheme("nf4", GROUP_SIZE, False, torch.float32)), CPU
        )

        def change(layer: DecoderLayer) -> dict[str, Tensor]:
            F_DD = self.fisher[layer.index]
            if metric == "plain":
                F_DD = torch.eye(len(F_DD))
            weights = {name: layer.weight(name) for name in self.linears}
            found = rounding.in_turn(layer, weights)
            aim = layer if target == "full" else replace(layer, reference=layer.inputs, _targets=[])
            rounding.learned(aim, weights, found, F_DD, steps=steps, seed=0)
            return {name: solution.weight(CPU) for name, solution in found.solutions.items()}

        return self.score(change, reference=True)


def jobs(variants: Variants) -> dict[str, Callable[[], Measured]]:
    """Every variant by name."""

    def part(search: bool, signed: bool, feedback: bool, rounds: int) -> Callable[[], Measured]:
        linear = solver(variants.levels, search=search, signed=signed, feedback=feedback, rounds=rounds)
        return lambda: variants.alone(linear)

    return {
        "absmax, nearest (stock)": part(False, False, False, 0),
        "searched scales, nearest": part(True, False, False, 0),
        "searched signed scales, nearest": part(True, True, False, 0),
        "absmax, GPTQ": part(False, False, True, 0),
        "searched scales, GPTQ": part(True, False, True, 0),
        "searched signed scales, GPTQ": part(True, True, True, 0),
        "the same, 1 round of fit and descent": part(True, True, True, 1),
        "the same, 3 rounds": part(True, True, True, 3),
        "the same, 6 rounds": part(True, True, True, 6),
        "3 rounds, one linear after another": lambda: variants.in_turn(asymmetric=False),
        "3 rounds, against the full model": lambda: variants.in_turn(at_once=True),
        "both (gptq)": variants.in_turn,
        "learned": variants.learned,
        "learned, 100 steps": lambda: variants.learned(steps=100),
        "learned, plain squared error": lambda: variants.learned(metric="plain"),
        "learned, the layer's own output as target": lambda: variants.learned(target="own"),
    }


def main(argv: Sequence[str]) -> int:
    """Measure every variant and write the result."""
    options = parser("ablation", __doc__)
    options.add_argument("--model", choices=MODELS, default="demo")
    given = machine.parse(options, argv)
    rows = []
    for name, job in jobs(Variants(given.model)).items():
        found = job()
        rows.append(AblationRow(variant=name, kl_nats_mean=found.kl_nats_mean, seconds=found.seconds))
        print(f"{name}: KL {found.kl_nats_mean:.5f} nats/token, {found.seconds:.0f} s", flush=True)
    results.write(f"ablation-{given.model}", machine.head(), {"rows": rows})
    return 0
