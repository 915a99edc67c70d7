"""How fast are the formats? Single linears and a whole model, beside floats and the kernels of others.

    python -m evaluation speed [--threads 2] [--quick] [--eight-billion] [--candidates w8a8 ...] [--pace 1]

On a CPU everything is held against float32; on a GPU against bfloat16, in which the activations of the other
candidates are then too. Weights are random and rounded to nearest: what a weight is does not change what its
product costs. A model of Llama's shape has the linears of its decoder replaced; embedding, head, norms and
attention stay as they are. Decoding is one token after 128 others. Everything runs eagerly, as transformers
runs it. Random inputs have no outliers: threshold 6 at its best.

The candidates take turns in short bursts in one process, so that a busy machine slows all of them; the 10th
percentile and the median of each one's calls are held against the reference's of the same run. Slow ones take
part in fewer turns, spread over the whole. Which kernels run depends on the processor: on a CPU torch and
bitsandbytes have products of int8 for AVX512, of 4 bits for AVX512-BF16, and go through float32 elsewhere.
`cpu_capability` says what torch found. torchao is measured where installed, 2:4 sparsity on a GPU. What a
candidate can't do on a device is said under `absent`.

Six minutes on two cores, with --pace 0.2 a fifth of the calls; the result goes to
evaluation/results/speed-avx2.json, speed-avx512.json, or for a GPU speed-cuda.json; with --decode, which
leaves out linears and prompts, to speed-cuda-decode.json. With --quick (half a minute, numbers that mean
nothing) only --out is written. With --eight-billion a GPU also runs a model of Llama-3-8B's shape, built
linear by linear in the format it has, each candidate beside the reference alone.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from evaluation import machine, results
from evaluation.options import parser
from evaluation.results import SpeedRow
from evaluation.timing import Call, race
from llmcompress.algorithms.sparsegpt import keep_mask
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear, integer, integer_linear
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.schemes import IntegerScheme

# rows x columns; the last comes from memory each time, even in int8
SHAPES = ((256, 768), (2048, 2048), (4096, 11008))
PAST = 128  # tokens before the one that is decoded
GROUP_SIZE = 64
STEP = 4 / 127  # the static scale: a unit normal, clipped at four
LINEAR_S = 15.0  # for all calls of a case
MODEL_S = 60.0
FAR = 0.3  # relative error of an output that is not that of the linear; 4 bits are off by 0.1
HALF = 0.5  # the same where half of all weights are zeros: random ones are off by 0.32
TORCHAO = util.find_spec("torchao") is not None
Shapes = Sequence[tuple[int, int]]
# a weight [R, C] to what makes linears of it, each in its own memory
Make = Callable[[Tensor], Callable[[], nn.Module]]
Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """A linear or a model on `batch` sequences of `tokens` tokens; a single token is decoded after others."""

    what: str
    batch: int
    tokens: int


CASES = {"cpu": ((1, 1), (1, 128)), "cuda": ((1, 1), (8, 1), (32, 1), (1, 2048))}  # batch, tokens


@dataclass(frozen=True)
class Absent:
    """A candidate that can't be measured here, and why."""

    candidate: str
    error: str
    case: Case | None = None

    def facts(self) -> dict[str, object]:
        """As the result file has it."""
        case: dict[str, object] = asdict(self.case) if self.case else {}
        return {**case, "candidate": self.candidate, "error": self.error}


def llama(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv: int) -> LlamaConfig:
    """A shape."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
    )


TINY = llama(512, 128, 384, 2, 4, 2)
SMALL = llama(8192, 1024, 2816, 8, 16, 8)
EIGHT_BILLION = llama(128256, 4096, 14336, 32, 32, 8)


@dataclass(frozen=True)
class Candidate:
    """One way to store and multiply a linear, and the type of its activations."""

    name: str
    dtype: torch.dtype
    make: Make
    far: float = FAR


def plain(weight: Tensor) -> nn.Linear:
    """A linear in floats."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def own(scheme: IntegerLayout, weight: Tensor) -> Callable[[], nn.Module]:
    """Our integer linear."""
    found = IntegerScheme(scheme).nearest(weight.float(), STEP if scheme.activations == "static" else None)
    assert isinstance(found, IntegerWeight)
    return partial(integer_linear.linear, found, None, device=weight.device)


def on(linear: nn.Module, device: torch.device) -> nn.Module:
    """The linear on a device, which is when bitsandbytes quantises it."""
    return linear.to(device).eval()


def alone(module: nn.Module) -> nn.Module:
    """A module of bitsandbytes, multiplied by bitsandbytes alone, as if llmcompress were not imported."""
    forward = getattr(type(module).forward, "__wrapped__", None)
    if forward is not None:
        module.forward = partial(forward, module)
    return module


def stock_int8(threshold: float, weight: Tensor) -> nn.Module:
    """Linear8bitLt as bitsandbytes makes it."""
    R, C = weight.shape
    linear = Linear8bitLt(C, R, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    linear.weight = Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
    return alone(on(linear, weight.device))


def stock_nf4(weight: Tensor) -> nn.Module:
    """Linear4bit as bitsandbytes makes it."""
    R, C = weight.shape
    linear = Linear4bit(C, R, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    linear.weight = Params4bit(
        weight.cpu().clone(), requires_grad=False, quant_type="nf4", blocksize=GROUP_SIZE
    )
    return on(linear, weight.device)


def torchao_int8(weight: Tensor) -> nn.Linear:
    """torchao's int8 with activations rounded token by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(linear := plain(weight), Int8DynamicActivationInt8WeightConfig())
    return linear


class Semi(nn.Module):
    """cuSPARSELt's product with a 2:4 weight, called without torch's tensor subclass for such weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch._cslt_compress(torch.where(keep_mask(weight.abs(), (2, 4)), weight, 0))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] to [..., R]; tokens in eights."""
        flat, tokens = x.flatten(0, -2), x[..., 0].numel()
        flat = nn.functional.pad(flat, (0, 0, 0, -tokens % 8))
        return torch._cslt_sparse_mm(self.packed, flat.t(), transpose_result=True)[:tokens].reshape(
            *x.shape[:-1], -1
        )


def candidates(device: torch.device) -> list[Candidate]:
    """All that is measured, the reference first."""
    floats = [
        Candidate(name, getattr(torch, name), lambda W: partial(plain, W)) for name in ("float32", "bfloat16")
    ]
    if device.type == "cuda":
        floats.reverse()
    others: dict[str, Make] = {
        "w8a8": partial(own, IntegerLayout("w8a8")),
        "w8a8, static": partial(own, IntegerLayout("w8a8", "static")),
        "w4a8": partial(own, IntegerLayout("w4a8", group_size=GROUP_SIZE)),
        "int8": lambda W: partial(
            integer_linear.stock, integer.quantize_nearest(W.cpu()), None, threshold=0.0, device=W.device
        ),
        "nf4": lambda W: partial(
            bitsandbytes_linear.linear,
            bitsandbytes_layout.quantize_nearest(W, "nf4", GROUP_SIZE, False),
            None,
            device=W.device,
        ),
        "bitsandbytes int8": lambda W: partial(stock_int8, 0.0, W),
        "bitsandbytes int8, threshold 6": lambda W: partial(stock_int8, 6.0, W),
        "bitsandbytes nf4": lambda W: lambda: alone(stock_nf4(W)),
    }
    if TORCHAO:
        others["torchao int8"] = lambda W: partial(torchao_int8, W)
    found = [*floats, *(Candidate(name, floats[0].dtype, make) for name, make in others.items())]
    if device.type == "cuda":
        found.append(Candidate("2:4", floats[0].dtype, lambda W: partial(Semi, W), HALF))
    return found


def random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix whose products with unit normals are such, the same for every candidate."""
    generator = torch.Generator(device).manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator, device=device).mul_(columns**-0.5).to(dtype)


def model_of(config: LlamaConfig, candidate: Candidate, device: torch.device) -> LlamaForCausalLM:
    """A Llama with the candidate's linears, never others; its layers have equal weights, each its own."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.eval()
    layers = list(model.model.layers)
    linears = {name: part for name, part in layers[0].named_modules() if isinstance(part, nn.Linear)}
    for name, linear in linears.items():
        make = candidate.make(random(linear.out_features, linear.in_features, candidate.dtype, device))
        for layer in layers:
            layer.set_submodule(name, make())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embedding, head and norms
                value = filled(parameter.shape, device).to(candidate.dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def filled(shape: torch.Size, device: torch.device) -> Tensor:
    """A parameter outside the linears: ones for a norm, random for a matrix."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    rows, columns = shape
    return random(rows, columns, torch.float32, device)


def forward_of(model: LlamaForCausalLM, batch: int, tokens: int) -> Callable[[], Tensor]:
    """The logits of the last token of a prompt, or of one token after PAST cached others."""
    generator = torch.Generator().manual_seed(0)
    length = tokens if tokens > 1 else PAST + 1
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    cache = DynamicCache(config=model.config)

    def read() -> Tensor:
        return logits(model(input_ids=ids, use_cache=False, logits_to_keep=1))

    def decode() -> Tensor:
        if not cache.get_seq_length():
            model(input_ids=ids[:, :PAST], past_key_values=cache, logits_to_keep=1)
        found = logits(model(input_ids=ids[:, PAST:], past_key_values=cache))
        cache.crop(-1)
        return found

    return read if tokens > 1 else decode


def logits(output: CausalLMOutputWithPast) -> Tensor:
    """Those of a forward pass, which has them without labels too."""
    assert output.logits is not None
    return output.logits


def working(case: Case, calls: Calls, absent: list[Absent]) -> Calls:
    """Those that run on this device; what the others say is added to `absent`."""
    left = {}
    for name, call in calls.items():
        try:
            call()
            left[name] = call
        except Exception as error:  # of a kernel, of whatever kind
            absent.append(Absent(name, f"{type(error).__name__}: {error}".splitlines()[0], case))
    return left


def timed(
    case: Case, calls: Mapping[str, Call], budget_s: float, errors: Mapping[str, float] | None = None
) -> list[SpeedRow]:
    """The rows of a case, the reference first, with the relative error of each output where that is known."""
    print(f"{case.what}, batch {case.batch}, tokens {case.tokens}", file=sys.stderr, flush=True)
    rows = []
    for name, timing in race(calls, budget_s).items():
        facts = {**asdict(case), "candidate": name, **asdict(timing)}
        rows.append(SpeedRow(**facts, relative_error=errors[name]) if errors else SpeedRow(**facts))
    return rows


def linears(
    shapes: Shapes, chosen: Sequence[Candidate], device: torch.device, budget_s: float, absent: list[Absent]
) -> Iterator[SpeedRow]:
    """Every shape in every case. Errors: SystemExit where a candidate's output is not that of the linear."""
    for R, C in shapes:
        modules = {one: one.make(random(R, C, one.dtype, device))() for one in chosen}
        for batch, tokens in CASES[device.type]:
            case = Case(f"linear {R} x {C}", batch, tokens)
            # a unit normal
            x = random(batch * tokens, C, torch.float32, device).mul_(C**0.5).view(batch, tokens, C)
            calls: Calls = {one.name: partial(module, x.to(one.dtype)) for one, module in modules.items()}
            calls = working(case, calls, absent)
            exact = calls[chosen[0].name]().float()
            errors = {
                name: float((call().float() - exact).norm() / exact.norm()) for name, call in calls.items()
            }
            allowed = {one.name: one.far for one in chosen}
            if wrong := {name: error for name, error in errors.items() if not error < allowed[name]}:
                raise SystemExit(f"not the products of this linear, by relative error: {wrong}")
            yield from timed(case, calls, budget_s, errors)


def models(
    what: str,
    config: LlamaConfig,
    groups: Sequence[Sequence[Candidate]],
    device: torch.device,
    budget_s: float,
    absent: list[Absent],
    *,
    decode: bool = False,
) -> Iterator[SpeedRow]:
    """A model in every case, a group of candidates in memory at a time; the reference leads every group. With
    `decode`, a prompt is no case."""
    cases = [(batch, tokens) for batch, tokens in CASES[device.type] if tokens == 1 or not decode]
    for group in groups:
        made = {one.name: model_of(config, one, device) for one in group}
        for batch, tokens in cases:
            case = Case(what, batch, tokens)
            calls = {name: forward_of(model, batch, tokens) for name, model in made.items()}
            rows = timed(case, working(case, calls, absent), budget_s / len(groups))
            yield from rows if group is groups[0] else rows[1:]
        del made, calls
        gc.collect()
        torch.cuda.empty_cache()


def show(rows: Sequence[SpeedRow]) -> None:
    """Print a table for each linear and model: speed-ups at the 10th percentile, and in the median."""
    for what in dict.fromkeys(row.what for row in rows):
        found = {(row.candidate, row.batch, row.tokens): row for row in rows if row.what == what}
        cases = list(dict.fromkeys((batch, tokens) for _, batch, tokens in found))
        table = Table(
            "candidate", *(f"batch {batch}, {tokens} tokens" for batch, tokens in cases), title=what
        )
        for name in dict.fromkeys(candidate for candidate, *_ in found):
            cells = [found.get((name, *case)) for case in cases]
            texts = [
                f"{cell.speedup_p10:.2f} x ({cell.speedup_median:.2f})" if cell else "-" for cell in cells
            ]
            table.add_row(name, *texts)
        Console(width=110).print(table)


def everything(
    chosen: Sequence[Candidate], device: torch.device, absent: list[Absent], given: argparse.Namespace
) -> Iterator[SpeedRow]:
    """All that was asked for, in its order."""
    shapes: Shapes = SHAPES
    linear_s, model_s = LINEAR_S * given.pace, MODEL_S * given.pace
    what, config = "111M model", SMALL
    if given.quick:
        shapes, linear_s, model_s = SHAPES[:1], 2.0, 2.0
        what, config = "tiny model", TINY
    if not given.decode:
        yield from linears(shapes, chosen, device, linear_s, absent)
    yield from models(what, config, [chosen], device, model_s, absent, decode=given.decode)
    if given.eight_billion:
        pairs = [[chosen[0], other] for other in chosen[1:] if other.name != "float32"]
        yield from models("8B model", EIGHT_BILLION, pairs, device, model_s, absent, decode=given.decode)


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    found = parser("speed", __doc__)
    found.add_argument("--out", type=Path, help="result file; default in results/, none with --quick")
    found.add_argument(
        "--quick", action="store_true", help="a tiny model and little time, to see that it runs"
    )
    found.add_argument("--pace", type=float, default=1.0, help="how many times the usual number of calls")
    found.add_argument("--candidates", nargs="+", help="only these, and the reference")
    found.add_argument(
        "--decode", action="store_true", help="models alone, decoding; results/speed-cuda-decode.json"
    )
    found.add_argument(
        "--eight-billion", action="store_true", help="also Llama-3-8B's shape, on a GPU of 40 GB"
    )
    return found


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """Measure what was asked for and write each row as soon as it is there."""
    given = machine.parse(options(), argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.eight_billion and device.type == "cpu":
        raise SystemExit("--eight-billion needs a GPU")
    every = candidates(device)
    chosen = [
        every[0],
        *(one for one in every[1:] if given.candidates is None or one.name in given.candidates),
    ]
    absent = [] if TORCHAO else [Absent("torchao int8", "torchao is not installed")]
    capability = torch.backends.cpu.get_cpu_capability()
    name = "speed-cuda" if device.type == "cuda" else f"speed-{capability.lower()}"
    name += "-decode" if given.decode else ""
    head = machine.head(device)
    if TORCHAO:
        head.versions["torchao"] = metadata.version("torchao")
    rows: list[SpeedRow] = []
    for row in everything(chosen, device, absent, given):
        rows.append(row)
        facts = {
            "cpu_capability": capability,
            "reference": every[0].name,
            "absent": [one.facts() for one in absent],
        }
        if given.out or not given.quick:
            results.write(name, head, {**facts, "rows": rows}, given.out)
    show(rows)
    for one in absent:
        print("absent:", ", ".join(f"{key} {value}" for key, value in one.facts().items()), file=sys.stderr)
    return 0
