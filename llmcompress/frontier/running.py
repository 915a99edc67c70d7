"""What linears take while a model runs: bytes in memory, and nanoseconds of a token.

Both are found on the modules that `from_pretrained` puts in place, one of each shape and way, with
arbitrary codes. Time is that of one token at batch size 1. All ways of a shape are timed in turn, so that
noise hits all of them, and the median of each counts. Before each run as many bytes are read as lie in a
processor's caches, because in a model the other weights have passed through them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from llmcompress.formats import registry
from llmcompress.formats.base import DTYPES
from llmcompress.formats.bitsandbytes_layout import Packed, double_quantize
from llmcompress.formats.codebook import CodebookWeight
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.ggml import GROUP_SIZE, GgmlWeight
from llmcompress.formats.integer import Int8Weight, IntegerWeight
from llmcompress.formats.schemes import FourBitScheme, GgmlScheme, Int8Scheme, QuantScheme
from llmcompress.frontier.choice import Outer, Quantity
from llmcompress.frontier.costs import Priced
from llmcompress.frontier.ways import KEEP, Palette, Way
from llmcompress.kernels.float32_products import plain_float32_products
from llmcompress.modeling.sequential import Track
from llmcompress.report.metrics import tensor_bytes

ROUNDS = 9  # runs of each way, of which the median counts
CALLS = 20  # of a module in a run on a GPU, where kernels are queued
CACHES = 1 << 26  # bytes that are read before a run on a CPU, at most
Shape = tuple[int, int]
Clock = Callable[[], int]  # nanoseconds
Run = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Taken:
    """What a linear of a shape takes, by way and by whether plain transformers loads the model."""

    amounts: Mapping[tuple[Shape, str, bool], int] = field(default_factory=dict)

    def of(self, shape: Shape, way: str, *, native: bool) -> int:
        """What one linear takes. Errors: KeyError if it was not looked at."""
        return self.amounts[shape, way, native]

    def scaled(self, factor: float) -> Taken:
        """The same, each multiplied by a factor."""
        return Taken({key: round(amount * factor) for key, amount in self.amounts.items()})

    def quantity(self, shapes: Mapping[str, Shape], outside: Callable[[Outer], int]) -> Quantity:
        """The quantity of a budget, of linears with these shapes by name."""

        def of(unit: Priced, way: str, native: bool) -> int:
            return sum(self.of(shapes[linear], way, native=native) for linear in unit.linears)

        return Quantity(of, outside)


def held_bytes(shapes: Iterable[Shape], palettes: Sequence[Palette], dtype: torch.dtype) -> Taken:
    """The bytes of the tensors that each module holds, without its bias, in a model of a dtype."""
    return Taken(
        {
            (shape, way.name, palette.native): tensor_bytes(module)
            for shape in dict.fromkeys(shapes)
            for palette in palettes
            for way in palette.ways
            if (module := module_of(way, shape, dtype, native=palette.native)) is not None
        }
    )


@torch.no_grad()
@plain_float32_products()
def nanoseconds(
    shapes: Iterable[Shape],
    palettes: Sequence[Palette],
    dtype: torch.dtype,
    device: torch.device,
    *,
    beside: int,
    track: Track,
    clock: Clock = time.perf_counter_ns,
) -> Taken:
    """The time of one token in each module, without its bias, in a model of a dtype whose weights take
    `beside` bytes."""
    found: dict[tuple[Shape, str, bool], int] = {}
    between, distinct = _reading(min(beside, CACHES), device), list(dict.fromkeys(shapes))
    for shape in track(distinct, "how fast each format is", len(distinct)):
        x_TC = torch.randn(1, 1, shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
        runs: dict[tuple[str, bool], Run] = {}
        for palette in palettes:
            for way in palette.ways:
                module = module_of(way, shape, dtype, native=palette.native, device=device)
                if module is not None:
                    runs[way.name, palette.native] = _calling(module, x_TC)
        calls = CALLS if device.type == "cuda" else 1
        for (name, native), amount in medians(runs, between, clock).items():
            found[shape, name, native] = round(amount / calls)
    return Taken(found)


def medians(runs: Mapping[Key, Run], between: Run, clock: Clock, rounds: int = ROUNDS) -> dict[Key, int]:
    """The median time of each run in so many rounds, in which all take turns; `between` runs before each."""
    for run in runs.values():
        run()  # what is made on first use is made
    times: dict[Key, list[int]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            between()
            start = clock()
            run()
            times[key].append(clock() - start)
    return {key: round(statistics.median(each)) for key, each in times.items()}


def _calling(module: nn.Module, x_TC: torch.Tensor) -> Run:
    if x_TC.device.type != "cuda":
        return partial(module, x_TC)

    def run() -> None:
        for _ in range(CALLS):
            module(x_TC)
        torch.cuda.synchronize(x_TC.device)

    return run


def _reading(size_bytes: int, device: torch.device) -> Run:
    """Reads so many bytes; on a GPU nothing."""
    if device.type == "cuda":
        return lambda: None
    return torch.ones(max(1, size_bytes // 4), dtype=torch.float32).sum


def module_of(
    way: Way,
    shape: Shape,
    dtype: torch.dtype,
    *,
    native: bool,
    device: torch.device | str = "cpu",
) -> nn.Module | None:
    """The module that runs a linear [R, C] of a model in a dtype, with arbitrary codes; None if its shape
    can't be stored in this way."""
    R, C = shape
    coding = way.coding(dtype)
    if coding is None:
        plain = nn.Linear(C, R, bias=False, dtype=dtype, device="meta").to_empty(device=device)
        nn.init.constant_(plain.weight, 0.5)
        return plain.requires_grad_(False).eval()
    if coding.refusal(shape) is not None:
        return None
    threshold = coding.threshold if isinstance(coding, Int8Scheme) else 0.0
    return registry.linear_of(_codes(coding, R, C), None, native=native, threshold=threshold, device=device)


def _codes(coding: QuantScheme, R: int, C: int) -> registry.StoredWeight:
    """A weight [R, C] with arbitrary codes and scales of one."""

    def codes(count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(count, (R, C), dtype=dtype, generator=torch.Generator().manual_seed(0))

    if isinstance(coding, CodebookScheme):
        books = coding.layout.shapes(R, C)["weight_levels"][0]
        levels_GL = torch.linspace(-1, 1, books[1]).to(DTYPES[coding.layout.dtype]).expand(books).clone()
        return CodebookWeight(codes(coding.layout.entries), levels_GL, coding.layout)
    if isinstance(coding, FourBitScheme):
        scale_RG = torch.ones(R, C // coding.group_size)
        nested = double_quantize(scale_RG) if coding.double_quant else None
        scale_RG = nested.decode() if nested else scale_RG
        return Packed(codes(16), scale_RG, coding.format, coding.group_size, coding.dtype, nested)
    if isinstance(coding, Int8Scheme):
        return Int8Weight(codes(100, torch.int8), torch.ones(R))
    if isinstance(coding, GgmlScheme):
        return GgmlWeight(codes(16), torch.ones(R, C // GROUP_SIZE, dtype=torch.float16), coding.layout)
    return IntegerWeight(codes(100, torch.int8), torch.ones(R), coding.scheme)


def coded_head(outer: Outer, head: str, *, tied: bool) -> bool:
    """Whether the output head is int8 in a model with this outside the layers."""
    return head in outer.overrides or (tied and "embedding" in outer.settings)


HEAD_WAYS = (Palette((KEEP, Way("w8a16", {"format": "w8a16"})), native=False),)  # of a head
