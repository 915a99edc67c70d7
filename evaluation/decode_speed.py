"""How fast do whole models write on a CPU, in every format, at batch 1 and 4?

    python -m evaluation decode-speed [--threads 2] [--models smollm2 half-billion] [--candidates w8a8 ...]
                                      [--inputs float32] [--pace 1]

Models have the shapes of SmolLM2-135M and of a Llama of 0.5 B parameters, and random weights rounded to
nearest: what a weight is does not change what its product costs. The linears of the decoder are replaced;
embedding, head, norms and attention stay floats, and all runs eagerly, as transformers runs it. A call is one
token of each sequence after 128 others. `--inputs` is the type of the model in every format; the references
float32 and bfloat16 are always there. Candidates named after bitsandbytes are its own modules, multiplied by
bitsandbytes; `int8` and `nf4` are the same modules as importing llmcompress has them multiplied. torchao is
measured where installed, and so is llama.cpp, whose files have Q4_0 or Q8_0 in the same places.

Each candidate takes turns with the reference in short bursts in one process (timing.py), and is held against
the reference of the same turns. ATEN_CPU_CAPABILITY=avx2 has torch and our kernels take AVX2 alone;
bitsandbytes' module for 4 bits is then run as on a CPU without AVX512-BF16. A quarter of an hour on two
cores; the result goes to evaluation/results/speed-avx512-decode.json, or speed-avx2-decode.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from evaluation import llama_cpp, llama_cpp_speed, machine, results
from evaluation.options import parser
from evaluation.results import SpeedRow
from evaluation.speed import (
    PAST,
    TINY,
    TORCHAO,
    Absent,
    Candidate,
    Case,
    Make,
    alone,
    candidates,
    forward_of,
    llama,
    model_of,
    own,
    show,
    stock_nf4,
    timed,
    working,
)
from llmcompress.formats import ggml
from llmcompress.formats.ggml import GgmlLayout, GgmlWeight
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.schemes import GgmlScheme
from llmcompress.kernels import packed_gemm

SMOLLM2 = llama(49152, 576, 1536, 30, 9, 3)
HALF_BILLION = llama(32000, 1024, 4864, 26, 16, 8)
MODELS: dict[str, tuple[str, LlamaConfig]] = {
    "smollm2": ("SmolLM2-135M's shape", SMOLLM2),
    "half-billion": ("0.5B model", HALF_BILLION),
    "tiny": ("tiny model", TINY),
}
BATCHES = (1, 4)
PAIR_S = 15.0  # for all calls of a candidate, a batch and the reference beside it
LEFT_OUT = ("w8a8, static", "bitsandbytes int8, threshold 6")  # of what speed.py measures


def packed(format: str, weight: Tensor) -> Any:
    """Our linear in a format of llama.cpp."""
    found = GgmlScheme(GgmlLayout(format)).nearest(weight.float())  # type: ignore[arg-type]
    assert isinstance(found, GgmlWeight)
    return partial(ggml.linear, found, None)


def without_repacking(make: Make) -> Make:
    """The same module as on a CPU without AVX512-BF16, where bitsandbytes does not repack 4-bit weights."""

    def made(weight: Tensor) -> Any:
        found = make(weight)

        def linear() -> nn.Module:
            module: Any = found()
            module.support_avx512bf16_for_cpu = False
            return module  # type: ignore[no-any-return]

        return linear

    return made


def chosen(names: Sequence[str] | None, inputs: torch.dtype) -> list[Candidate]:
    """All that is measured, float32 and bfloat16 first."""
    every = [one for one in candidates(torch.device("cpu")) if one.name not in LEFT_OUT]
    more: dict[str, Make] = {
        "w8a16": partial(own, IntegerLayout("w8a16", "none")),
        "w4a16": partial(own, IntegerLayout("w4a16", "none", 64)),
        "q4_0": partial(packed, "q4_0"),
        "iq4_nl": partial(packed, "iq4_nl"),
        "nf4": lambda W: partial(stock_nf4, W),
        "bitsandbytes nf4": lambda W: lambda: alone(stock_nf4(W)),
    }
    every = [one for one in every if one.name not in more]
    every += [Candidate(name, torch.float32, make) for name, make in more.items()]
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        every = [
            Candidate(one.name, one.dtype, without_repacking(one.make)) if "nf4" in one.name else one
            for one in every
        ]
    found = every[:2] + [Candidate(one.name, inputs, one.make) for one in every[2:]]
    return found[:1] + [one for one in found[1:] if names is None or one.name in names]


def measured(
    what: str, config: LlamaConfig, every: Sequence[Candidate], pair_s: float, absent: list[Absent]
) -> Iterator[SpeedRow]:
    """A model in every format and batch, each beside the reference alone."""
    reference = model_of(config, every[0], torch.device("cpu"))
    for other in every[1:]:
        try:
            model = model_of(config, other, torch.device("cpu"))
        except Exception as error:  # of a library, of whatever kind
            absent.append(Absent(other.name, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        for batch in BATCHES:
            case = Case(what, batch, 1)
            calls = {
                every[0].name: forward_of(reference, batch, 1),
                other.name: forward_of(model, batch, 1),
            }
            rows = timed(case, working(case, calls, absent), pair_s)
            yield from rows if other is every[1] else rows[1:]
        del model, calls
        gc.collect()


def beside_llama_cpp(
    what: str,
    config: LlamaConfig,
    reference: Candidate,
    names: Sequence[str] | None,
    threads: int,
    pair_s: float,
) -> Iterator[SpeedRow]:
    """The same shape in llama.cpp, in every type and batch, each beside the reference alone."""
    model = model_of(config, reference, torch.device("cpu"))
    for name, type_ in llama_cpp_speed.TYPES.items():
        if names is not None and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            llama_cpp_speed.write(config, type_, file)
            for batch in BATCHES:
                theirs = llama_cpp_speed.decoder(file, batch, PAST, threads)
                calls = {reference.name: forward_of(model, batch, 1), name: theirs}
                yield from timed(Case(what, batch, 1), calls, pair_s)[1:]


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    found = parser("decode-speed", __doc__)
    found.add_argument("--out", type=Path, help="result file; default in results/")
    found.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["smollm2", "half-billion"])
    found.add_argument("--candidates", nargs="+", help="only these, and float32")
    found.add_argument("--inputs", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--pace", type=float, default=1.0, help="how many times the usual number of calls")
    return found


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """Measure what was asked for and write each row as soon as it is there."""
    given = machine.parse(options(), argv)
    every = chosen(given.candidates, getattr(torch, given.inputs))
    if len(every) < 2 and not {*llama_cpp_speed.TYPES} & {*given.candidates}:
        raise SystemExit(f"no candidate is called {' or '.join(given.candidates)}")
    absent = [] if TORCHAO else [Absent("torchao int8", "torchao is not installed")]
    if not llama_cpp.INSTALLED:
        absent += [Absent(name, llama_cpp.INSTALL) for name in llama_cpp_speed.TYPES]
    capability, head = torch.backends.cpu.get_cpu_capability(), machine.head()
    if TORCHAO:
        head.versions["torchao"] = metadata.version("torchao")
    print(f"our kernel: {packed_gemm.form() or packed_gemm.KERNEL.why_not}", file=sys.stderr)
    rows: list[SpeedRow] = []
    for name in given.models:
        pair_s, asked = PAIR_S * given.pace, given.candidates
        found = [measured(*MODELS[name], every, pair_s, absent)]
        if llama_cpp.INSTALLED:
            found += [beside_llama_cpp(*MODELS[name], every[0], asked, given.threads, pair_s)]
        for row in chain.from_iterable(found):
            rows.append(row)
            facts = {
                "cpu_capability": capability,
                "reference": every[0].name,
                "absent": [one.facts() for one in absent],
                "rows": rows,
            }
            results.write(f"speed-{capability.lower()}-decode", head, facts, given.out)
    show(rows)
    for row in rows:
        print(f"{row.what}, batch {row.batch}, {row.candidate}: {row.batch / row.p10_s:.1f} tokens/s")
    return 0
