"""How fast are the formats? Single linears and a whole model, decoding and reading a prompt, beside floats and the rivals.

    python evaluation/speed.py [--threads 2] [--quick] [--eight-billion] [--candidates w8a8 ...] [--pace 1] [--out FILE]

On a CPU everything is held against float32; on a GPU against bfloat16, in which the activations of the other candidates are
then too. Weights are random and rounded to nearest: what a weight is does not change what its product costs. A model of Llama's
shape has the linears of its decoder replaced; embedding, head, norms and attention stay as they are. Decoding is one token
after 128 others. Everything runs eagerly, as transformers runs it. Random inputs have no outliers: threshold 6 at its best.

The candidates take turns in short bursts in one process, so that a busy machine slows all of them; the 10th percentile and the
median of each one's calls are held against the reference's of the same run. Slow ones take part in fewer turns, spread over the
whole. Which kernels run depends on the processor: on a CPU torch and bitsandbytes have products of int8 for AVX512, of 4 bits
for AVX512-BF16, and go through float32 elsewhere. `cpu_capability` says what torch found. torchao is measured where installed,
2:4 sparsity on a GPU. What a candidate can't do on a device is said under `absent`.

Six minutes on two cores, with --pace 0.2 a fifth of the calls; the result goes to evaluation/results/speed-avx2.json,
speed-avx512.json, or for a GPU speed-cuda.json. With --quick (half a minute, numbers that mean nothing) only --out is written.
With --eight-billion a GPU also runs a model of Llama-3-8B's shape, built linear by linear in the format it has, each candidate
beside the reference alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import bitsandbytes.nn
import torch
from bench import head
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from llmcompress.algorithms.sparsegpt import keep_mask
from llmcompress.formats import bitsandbytes_layout, integer, integer_linear
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.schemes import IntegerScheme
from llmcompress.report.metrics import environment

HERE = Path(__file__).parent
SHAPES = ((256, 768), (2048, 2048), (4096, 11008))  # rows x columns; the last comes from memory each time, even in int8
CASES = {"cpu": ((1, 1), (1, 128)), "cuda": ((1, 1), (8, 1), (32, 1), (1, 2048))}  # batch, tokens; one token is decoded
PAST = 128  # tokens before the one that is decoded
FILES = {"cpu": f"speed-{torch.backends.cpu.get_cpu_capability().lower()}.json", "cuda": "speed-cuda.json"}
BLOCK = 64
STEP = 4 / 127  # the static scale: a unit normal, clipped at four
TURNS, FEWEST = 24, 4  # turns of a candidate, and of the slowest
LINEAR_S, MODEL_S = 15.0, 60.0  # for all calls of a case
FAR = 0.3  # relative error of an output that is not that of the linear; 4 bits are off by 0.1
HALF = 0.5  # the same where half of all weights are zeros: random ones are off by 0.32
TORCHAO = util.find_spec("torchao") is not None
Shapes = tuple[tuple[int, int], ...]
Row = dict[str, Any]
Make = Callable[[Tensor], Callable[[], Any]]  # a weight [R, C] to what makes linears of it, each in memory of its own


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


TINY, SMALL = llama(512, 128, 384, 2, 4, 2), llama(8192, 1024, 2816, 8, 16, 8)
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


def own(scheme: IntegerLayout, weight: Tensor) -> Callable[[], Any]:
    """Our integer linear."""
    found: Any = IntegerScheme(scheme).nearest(weight.float(), STEP if scheme.activations == "static" else None)
    return partial(integer_linear.linear, found, None, device=weight.device)


def stock_int8(threshold: float, weight: Tensor) -> Any:
    """Linear8bitLt as bitsandbytes makes it."""
    R, C = weight.shape
    linear: Any = bitsandbytes.nn.Linear8bitLt(C, R, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    linear.weight = bitsandbytes.nn.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
    return linear.to(weight.device).eval()


def stock_nf4(weight: Tensor) -> Any:
    """Linear4bit as bitsandbytes makes it."""
    R, C = weight.shape
    linear: Any = bitsandbytes.nn.Linear4bit(C, R, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes.nn.Params4bit(weight.cpu().clone(), requires_grad=False, quant_type="nf4", blocksize=BLOCK)
    return linear.to(weight.device).eval()


def torchao_int8(weight: Tensor) -> nn.Linear:
    """torchao's int8 with activations rounded token by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(linear := plain(weight), Int8DynamicActivationInt8WeightConfig())
    return linear


class Semi(nn.Module):
    """cuSPARSELt's product with a weight of two zeros in each four, asked for without torch's tensor for such weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch._cslt_compress(torch.where(keep_mask(weight.abs(), (2, 4)), weight, 0))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] to [..., R]; tokens in eights."""
        flat, tokens = x.flatten(0, -2), x[..., 0].numel()
        flat = nn.functional.pad(flat, (0, 0, 0, -tokens % 8))
        return torch._cslt_sparse_mm(self.packed, flat.t(), transpose_result=True)[:tokens].reshape(*x.shape[:-1], -1)


def candidates(device: torch.device) -> list[Candidate]:
    """All that is measured, the reference first."""
    floats = [Candidate(name, getattr(torch, name), lambda W: partial(plain, W)) for name in ("float32", "bfloat16")]
    if device.type == "cuda":
        floats.reverse()
    others: dict[str, Make] = {
        "w8a8": partial(own, IntegerLayout("w8a8")),
        "w8a8, static": partial(own, IntegerLayout("w8a8", "static")),
        "w4a8": partial(own, IntegerLayout("w4a8", layer=BLOCK)),
        "int8": lambda W: partial(
            integer_linear.stock, integer.quantize_nearest(W.cpu()), None, threshold=0.0, device=W.device
        ),
        "nf4": lambda W: partial(
            bitsandbytes_layout.linear, bitsandbytes_layout.quantize_nearest(W, "nf4", BLOCK, False), None, device=W.device
        ),
        "bitsandbytes int8": lambda W: partial(stock_int8, 0.0, W),
        "bitsandbytes int8, threshold 6": lambda W: partial(stock_int8, 6.0, W),
        "bitsandbytes nf4": lambda W: partial(stock_nf4, W),
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


def model_of(config: LlamaConfig, candidate: Candidate, device: torch.device) -> Any:
    """A Llama with the candidate's linears, the only ones ever in memory; its layers have the same weights, but not shared."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).eval()
    linears = {name: part for name, part in model.model.layers[0].named_modules() if isinstance(part, nn.Linear)}
    for name, linear in linears.items():
        make = candidate.make(random(*linear.weight.shape, candidate.dtype, device))
        for layer in model.model.layers:
            layer.set_submodule(name, make())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embedding, head and norms
                ones = parameter.dim() == 1
                value = torch.ones(len(parameter), device=device) if ones else random(*parameter.shape, torch.float32, device)
                setattr(module, name, nn.Parameter(value.to(candidate.dtype), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def forward_of(model: Any, batch: int, tokens: int) -> Callable[[], Tensor]:
    """The logits of the last token: of a prompt, or of one token after others, whose cache is left as it was."""
    generator = torch.Generator().manual_seed(0)
    length = tokens if tokens > 1 else PAST + 1
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    if tokens > 1:
        return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    cache = DynamicCache(config=model.config)

    def decode() -> Tensor:
        if not cache.get_seq_length():
            model(input_ids=ids[:, :PAST], past_key_values=cache, logits_to_keep=1)
        logits: Tensor = model(input_ids=ids[:, PAST:], past_key_values=cache).logits
        cache.crop(-1)
        return logits

    return decode


def seconds(run: Callable[[], Tensor]) -> float:
    """The time of one call, until its result is there."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def race(case: Row, runs: dict[str, Callable[[], Tensor]], budget_s: float) -> list[Row]:
    """Many calls of each, in turns of short bursts, each its share of the budget; the first is the reference."""
    print(", ".join(f"{key} {value}" for key, value in case.items()), file=sys.stderr, flush=True)
    share, bursts = budget_s / len(runs), {}
    for name, run in runs.items():
        run()  # the first call pays for what is set up
        part = TURNS * seconds(run) / share  # of its share, at one call a turn
        bursts[name] = min(50, max(1, int(1 / part))), min(TURNS // FEWEST, max(1, math.ceil(part)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS):
        for name in list(runs) if turn % 2 == 0 else reversed(runs):  # none always runs after the same other
            calls, every = bursts[name]
            if turn % every == 0:
                times[name] += [seconds(runs[name]) for _ in range(calls)]
    found = {name: (quantiles(taken, n=10, method="inclusive")[0], median(taken)) for name, taken in times.items()}
    (low, middle), rows = next(iter(found.values())), []
    for name, (p10, p50) in found.items():
        row = {**case, "candidate": name, "calls": len(times[name]), "p10_s": p10, "median_s": p50}
        rows.append(row | {"speedup_p10": low / p10, "speedup_median": middle / p50})
    return rows


def working(case: Row, runs: dict[str, Callable[[], Tensor]], absent: list[Row]) -> dict[str, Callable[[], Tensor]]:
    """Those that run on this device; what the others say is added to `absent`."""
    left = {}
    for name, run in runs.items():
        try:
            run()
            left[name] = run
        except Exception as error:  # of a kernel, of whatever kind
            absent.append({**case, "candidate": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    return left


def linears(shapes: Shapes, chosen: list[Candidate], device: torch.device, budget_s: float, absent: list[Row]) -> Iterator[Row]:
    """Every shape in every case. Errors: SystemExit where a candidate's output is not that of the linear."""
    for R, C in shapes:
        modules = {one: one.make(random(R, C, one.dtype, device))() for one in chosen}
        for batch, tokens in CASES[device.type]:
            case = {"what": f"linear {R} x {C}", "batch": batch, "tokens": tokens}
            x = random(batch * tokens, C, torch.float32, device).mul_(C**0.5).view(batch, tokens, C)  # a unit normal
            runs = working(case, {one.name: partial(module, x.to(one.dtype)) for one, module in modules.items()}, absent)
            exact = runs[chosen[0].name]().float()
            errors = {name: float((run().float() - exact).norm() / exact.norm()) for name, run in runs.items()}
            if wrong := {one.name: errors[one.name] for one in chosen if one.name in runs and not errors[one.name] < one.far}:
                raise SystemExit(f"not the products of this linear, by relative error: {wrong}")
            for row in race(case, runs, budget_s):
                yield row | {"relative_error": errors[row["candidate"]]}


def models(
    what: str,
    config: LlamaConfig,
    chosen: list[Candidate],
    device: torch.device,
    budget_s: float,
    absent: list[Row],
    pairs: bool,
) -> Iterator[Row]:
    """A model in every case, all candidates in memory at once; or in pairs, of which the first tells about the reference."""
    groups = [[chosen[0], other] for other in chosen[1:]] if pairs else [chosen]
    for group in groups:
        made = {one.name: model_of(config, one, device) for one in group}
        for batch, tokens in CASES[device.type]:
            case = {"what": what, "batch": batch, "tokens": tokens}
            runs = working(case, {name: forward_of(model, batch, tokens) for name, model in made.items()}, absent)
            rows = race(case, runs, budget_s / len(groups))
            yield from rows if group is groups[0] else rows[1:]
        del made, runs
        gc.collect()
        torch.cuda.empty_cache()


def show(rows: list[Row]) -> None:
    """A table for each linear and model: how many times as fast as the reference, at the 10th percentile and in the median."""
    for what in dict.fromkeys(row["what"] for row in rows):
        found = {(row["candidate"], row["batch"], row["tokens"]): row for row in rows if row["what"] == what}
        cases = list(dict.fromkeys(key[1:] for key in found))
        table = Table("candidate", *(f"batch {batch}, {tokens} tokens" for batch, tokens in cases), title=what)
        for name in dict.fromkeys(key[0] for key in found):
            cells = [found.get((name, *case)) for case in cases]
            table.add_row(
                name, *(f"{cell['speedup_p10']:.2f} x ({cell['speedup_median']:.2f})" if cell else "-" for cell in cells)
            )
        Console(width=110).print(table)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; default in evaluation/results, none with --quick")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little time, to see that it runs")
    parser.add_argument("--pace", type=float, default=1.0, help="how many times the usual number of calls")
    parser.add_argument("--candidates", nargs="+", help="only these, and the reference")
    parser.add_argument("--eight-billion", action="store_true", help="also Llama-3-8B's shape, on a GPU of 40 GB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.eight_billion and device.type == "cpu":
        parser.error("--eight-billion needs a GPU")
    every = candidates(device)
    chosen = [every[0], *(one for one in every[1:] if given.candidates is None or one.name in given.candidates)]
    rows: list[Row] = []
    absent: list[Row] = [] if TORCHAO else [{"candidate": "torchao int8", "error": "torchao is not installed"}]
    result = head() | {"hardware": environment(device)["device"], "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    result["versions"] |= {"torchao": metadata.version("torchao")} if TORCHAO else {}
    result |= {"reference": chosen[0].name, "absent": absent, "rows": rows}
    out = given.out or (None if given.quick else HERE / "results" / FILES[device.type])
    for row in everything(chosen, device, absent, given):
        rows.append(row)
        if out:
            out.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)
    for row in absent:
        print("absent:", ", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)


def everything(chosen: list[Candidate], device: torch.device, absent: list[Row], given: argparse.Namespace) -> Iterator[Row]:
    """All that was asked for, in its order."""
    if given.quick:
        yield from linears(SHAPES[:1], chosen, device, 2.0, absent)
        yield from models("tiny model", TINY, chosen, device, 2.0, absent, False)
    else:
        yield from linears(SHAPES, chosen, device, LINEAR_S * given.pace, absent)
        yield from models("111M model", SMALL, chosen, device, MODEL_S * given.pace, absent, False)
    if given.eight_billion:
        large = [one for one in chosen if one.name != "float32"]
        yield from models("8B model", EIGHT_BILLION, large, device, MODEL_S * given.pace, absent, True)


if __name__ == "__main__":
    main()
