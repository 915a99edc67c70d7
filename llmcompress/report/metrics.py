"""Quality and cost of a model: perplexity, divergence from its base, bytes, tokens per second, memory.

Fidelity reads pieces of logits rather than a model, so the same code measures a model in memory and one that
is walked layer by layer from disk. A piece is processed once, a few tokens at a time and in float32: that
copy stays in the processor's cache, and memory is that of a piece, which can be a part of one sequence.
Perplexity costs 2 to 6 us per token at a vocabulary of 4096 on one core (the fused cross entropy is twice as
fast there as a hand-written logsumexp), a few hundredths of the forward pass of a model with 8 M parameters.
Divergence costs five to ten times that. Nothing here changes a weight, but a kernel may: bitsandbytes repacks
4-bit weights on some CPUs at the first forward, so do not save a model after measuring it.
"""

import importlib
import inspect
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.algorithms.distillation_losses import IGNORED
from llmcompress.errors import DataError, ModelError, first_line
from llmcompress.formats.four_bit import FourBitLinear
from llmcompress.kernels.float32_products import plain_float32_products
from llmcompress.report.schema import DistributionFacts, EnvironmentFacts, FidelityFacts, Interval

# resamples of the bootstrap: the ends of a 95 % interval then move by about 2 % of its width between seeds
RESAMPLES = 2000
# nats: four edges a decade, from what float32 resolves to more than a flat prediction costs
KL_EDGES = tuple(float(f"{10 ** (step / 4):.3g}") for step in range(-24, 9))
CHUNK_ELEMENTS_CPU = 1 << 17  # logits in float32 at a time: 0.5 MB stays in a core's cache
CHUNK_ELEMENTS_GPU = 1 << 25  # the same on a GPU: 128 MB keeps it busy

Progress = Callable[[int, int], None]  # (sequences done, sequences in all)
Columns = tuple[Tensor, ...]  # what is measured at each of some positions


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Perplexity over S sequences and, if a base was given, the distance from it.

    Intervals are 95 % by bootstrap over sequences; with a single sequence an interval has no width.
    `nll_nats` is the mean negative log-likelihood of each sequence, float64 [S].
    """

    perplexity: float
    perplexity_ci95: Interval
    tokens: int  # predicted tokens: S * (L - 1)
    nll_nats: Tensor
    kl_nats_mean: float | None = None  # KL(base || model) per token, over all S * L positions
    kl_nats_p99: float | None = None
    kl_nats_distribution: DistributionFacts | None = None
    top1_agreement: float | None = None  # share of the S * L positions where both rank the same token first
    base_perplexity: float | None = None
    base_perplexity_ci95: Interval | None = None
    perplexity_ratio: float | None = None  # model / base; its interval resamples both on the same sequences
    perplexity_ratio_ci95: Interval | None = None

    def facts(self) -> FidelityFacts:
        """The `fidelity` section of report.json."""
        return FidelityFacts(
            kl_nats_mean=self.kl_nats_mean,
            kl_nats_p99=self.kl_nats_p99,
            kl_nats_distribution=self.kl_nats_distribution,
            top1_agreement=self.top1_agreement,
            perplexity_ratio=self.perplexity_ratio,
            perplexity_ratio_ci95=self.perplexity_ratio_ci95,
        )


@torch.no_grad()
def fidelity(
    logits: Iterable[Tensor],
    sequences: Tensor,
    against: Iterable[Tensor] | None = None,
    *,
    progress: Progress | None = None,
) -> Fidelity:
    """Measure a model from its `logits` on any device, on `sequences`, int64 [S, L] with L >= 2.

    They come in the order of the positions, in floating-point tensors [B, L, V] of some sequences or [1, C,
    V] of a part of one. `against` yields the base's logits in tensors of the same sizes. Position t predicts
    token t + 1, so perplexity is over the first L - 1 positions. KL and top-1 agreement use all L, because
    the last position has a distribution too. KL is computed in float32, exact to about 1e-6 nats; values that
    rounding leaves below zero count as zero. p99 is the smallest KL that 99 % of the tokens do not exceed.
    Raises ModelError for non-finite logits or unequal vocabularies, DataError for tokens outside the
    vocabulary.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise ValueError(f"sequences are [S >= 1, L >= 2], not {list(sequences.shape)}")
    pairs: Iterable[tuple[Tensor, Tensor | None]]
    pairs = ((batch, None) for batch in logits) if against is None else zip(logits, against, strict=True)
    return summary(list(columns(pairs, sequences, progress)), sequences.shape[1])


def columns(
    pairs: Iterable[tuple[Tensor, Tensor | None]], sequences: Tensor, progress: Progress | None = None
) -> Iterator[Columns]:
    """Measure pieces of logits as `fidelity` does; those of several processes make one `summary`.

    Yield per piece of n positions (nll [n],), or with a base (nll [n], base nll [n], KL [n], agreement [n]),
    on the CPU; both nll are 0 at a sequence's last position.
    """
    done, largest, (S, length) = 0, int(sequences.max()), sequences.shape  # positions
    following_SL = F.pad(sequences[:, 1:], (0, 1), value=IGNORED)
    for batch, base in pairs:
        B, L, V = batch.shape
        sequence, position = divmod(done, length)
        whole = length == L and position == 0 and sequence + B <= S
        part = B == 1 and position + L <= length and sequence < S
        if not whole and not part:
            raise ValueError(
                f"logits {[B, L, V]} do not continue sequences {list(sequences.shape)} at {sequence}"
            )
        if largest >= V:
            raise DataError(
                f"the evaluation text holds token {largest}, the vocabulary ends at {V - 1}: use the "
                "model's own tokenizer"
            )
        if base is not None and base.shape[-1] != V:
            raise ModelError(
                f"the model predicts {V} tokens and its base {base.shape[-1]}: only models of one "
                "vocabulary can be compared"
            )
        if base is not None and base.shape != batch.shape:
            raise ValueError(f"the base's logits {list(base.shape)} are not beside the model's {[B, L, V]}")
        labels = following_SL[sequence : sequence + B, position : position + L].to(batch.device)
        if base is None:
            yield (_finite(_cross_entropy(batch, labels).cpu(), "model", sequence),)
        else:
            own, other, kl, same = (x.cpu() for x in _divergence(batch, base.to(batch.device), labels))
            yield (
                _finite(own, "model", sequence),
                _finite(other, "base", sequence),
                _finite(kl, "model or its base", sequence).clamp_(min=0),
                same,
            )
        done += B * L
        if progress is not None:
            progress(done // length, S)
    if done != S * length:
        raise ValueError(f"{done // length} sequences of logits for {S} sequences of tokens")


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the B * L positions, each with its labels [C]."""
    following = labels.flatten()
    elements = CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    step = max(1, elements // logits.shape[-1])
    for start in range(0, len(following), step):
        here = slice(start, start + step)
        yield here, following[here]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of labels [B, L], float32 [B * L], 0 where they are IGNORED."""
    flat = logits.flatten(0, 1)  # [B * L, V]
    return torch.cat(
        [
            F.cross_entropy(flat[here].float(), y, reduction="none", ignore_index=IGNORED)
            for here, y in _chunks(logits, labels)
        ]
    )


def _divergence(logits: Tensor, base: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nll, base nll, KL(base || model), top-1 agreement), each [B * L]; both nll are 0 where labels are
    IGNORED."""
    flat, base_flat, parts = logits.flatten(0, 1), base.flatten(0, 1), []
    for here, y in _chunks(logits, labels):
        z, z_base = flat[here].float(), base_flat[here].float()  # [C, V]
        same = z.argmax(-1) == z_base.argmax(-1)
        q, p = z.log_softmax(-1), z_base.log_softmax(-1)
        own, other = (-log.gather(-1, y.clamp(min=0)[:, None])[:, 0].masked_fill(y < 0, 0) for log in (q, p))
        # sum_v p (log p - log q), in place: p and q are not used again
        parts.append((own, other, p.exp().mul_(p.sub_(q)).sum(-1), same))
    own, other, kl, same = (torch.cat(column) for column in zip(*parts, strict=True))
    return own, other, kl, same


def _per_sequence(nll: Tensor, L: int) -> Tensor:
    """Mean over a sequence's L - 1 predicted tokens, float64 [S], of values at all S * L positions."""
    return nll.view(-1, L).double().sum(-1) / (L - 1)


def _finite(values: Tensor, who: str, first: int) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"the {who} yields non-finite logits near evaluation sequence {first}: its weights hold NaN or "
            "its dtype overflows; check the checkpoint or load it in float32"
        )
    return values


def summary(columns: Sequence[Columns], L: int) -> Fidelity:
    """Return the fidelity over all positions, which `columns` measured in sequences of L tokens."""
    flat, *rest = (torch.cat(column) for column in zip(*columns, strict=True))
    nll = _per_sequence(flat, L)
    tokens = len(nll) * (L - 1)
    if not rest:
        ((perplexity, interval),) = _bootstrap(nll[None])
        return Fidelity(perplexity, interval, tokens, nll)
    base_flat, kl, same = rest
    base_nll, spread = _per_sequence(base_flat, L), distribution(kl)
    (perplexity, interval), (base, base_interval), (ratio, ratio_interval) = _bootstrap(
        torch.stack((nll, base_nll, nll - base_nll))
    )
    return Fidelity(
        perplexity,
        interval,
        tokens,
        nll,
        kl_nats_mean=float(kl.double().mean()),
        kl_nats_p99=spread.p99,
        kl_nats_distribution=spread,
        top1_agreement=float(same.double().mean()),
        base_perplexity=base,
        base_perplexity_ci95=base_interval,
        perplexity_ratio=ratio,
        perplexity_ratio_ci95=ratio_interval,
    )


def distribution(kl: Tensor) -> DistributionFacts:
    """Return quantiles and a histogram of KL in nats, float32 [N]. A quantile is the smallest KL that its
    share of the tokens does not exceed."""
    p50, p90, p99, largest = (
        float(kl.kthvalue(math.ceil(share * len(kl))).values) for share in (0.5, 0.9, 0.99, 1)
    )
    # float64: an edge then is the number that the report names
    counts = torch.bucketize(kl.double(), torch.tensor(KL_EDGES, dtype=torch.float64), right=True).bincount(
        minlength=len(KL_EDGES) + 1
    )
    return DistributionFacts(
        p50=p50, p90=p90, p99=p99, largest=largest, edges=KL_EDGES, counts=tuple(counts.tolist())
    )


def _bootstrap(rows: Tensor) -> list[tuple[float, Interval]]:
    """Return exp of the mean of each row of float64 [K, S] with its 95 % percentile interval; all rows share
    their resamples.

    Sequences rather than tokens are drawn, because the tokens of one text depend on each other.
    Source: Efron and Tibshirani 1993, chapter 13.
    """
    generator, S = torch.Generator().manual_seed(0), rows.shape[1]
    step = max(1, (1 << 20) // S)  # resamples at a time: 8 MB of indices
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    # [K, RESAMPLES]
    means = torch.cat(
        [rows[:, torch.randint(S, (size, S), generator=generator)].mean(-1) for size in sizes], dim=-1
    )
    ends = torch.quantile(means, torch.tensor((0.025, 0.975), dtype=means.dtype), dim=-1)  # [2, K]
    out = []
    for mean, low, high in zip(rows.mean(-1).exp().tolist(), *ends.exp().tolist(), strict=True):
        if not math.isfinite(high):
            raise ModelError(
                "the perplexity is beyond 1e308: the model is broken; check the checkpoint it was loaded from"
            )
        # with one sequence, the interval is the value up to rounding
        out.append((mean, (min(low, mean), max(high, mean))))
    return out


def size_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in `folder` that transformers loads: the single file, else those of the
    index, else all.

    A repository may hold its weights twice (`consolidated.safetensors`); counting both would make the
    compressed model look smaller than it is. Raises ModelError if there is none.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        files = {single}
    elif index.is_file():
        files = {folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    else:
        files = set(folder.glob("*.safetensors"))
    missing = sorted(file.name for file in files if not file.is_file())
    if missing or not files:
        raise ModelError(
            f"{folder} has no {missing[0] if missing else '*.safetensors'}: download or save the model again"
        )
    return sum(file.stat().st_size for file in files)


def parameters(model: torch.nn.Module) -> int:
    """Logical number of parameters: shared ones count once, and each packed 4-bit code counts as one."""
    count = 0
    for parameter in model.parameters():  # yields each object once
        # bitsandbytes' 4-bit weights record the shape before packing
        state = getattr(parameter, "quant_state", None)
        count += math.prod(state.shape) if state is not None else parameter.numel()
    return count


logger = logging.getLogger(__name__)

# what a model keeps between tokens, as `generate` knows it: of attention, of state spaces, of older models
CACHES = ("past_key_values", "cache_params", "state", "mems")


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch size 1 (prefill of a prompt, and greedy decoding with the cache), and bytes
    of the model."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None of a model that keeps no cache
    memory_bytes: int


@torch.no_grad()
@plain_float32_products()
def speed(
    model: torch.nn.Module,
    sequences: Tensor,
    *,
    decode_tokens: int = 32,
    repeats: int = 5,
    budget_s: float = 3.0,
) -> Speed:
    """Return the best of up to `repeats` runs after one warm-up run, on the first of `sequences`, int64 [S,
    L] with L >= 2.

    Prefill reads the whole sequence and predicts the token after it, as `generate` does; decode writes
    `decode_tokens` (fewer if L is short) after at most 128 tokens of it. Each has `budget_s` seconds, after
    which no new run starts; a model slower than that is timed by its warm-up run alone. Gradients are off
    through `no_grad`, as in `generate`: `inference_mode` could leave buffers in the model that training
    refuses later.
    """
    sequence, memory = sequences[:1].to(next(model.parameters()).device), tensor_bytes(model)
    prompt = sequence[:, : max(1, min(128, sequence.shape[1] - decode_tokens))]
    steps = min(decode_tokens, sequence.shape[1] - prompt.shape[1])
    training = model.training
    model.eval()
    try:
        prefill_s = _best(lambda: _prefill_s(model, sequence), repeats, budget_s)
        decode_s = _best_decode_s(model, prompt, steps, repeats, budget_s)
    finally:
        model.train(training)
    return Speed(sequence.shape[1] / prefill_s, steps / decode_s if decode_s else None, memory)


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors that a model holds, shared ones once, including the scales that bitsandbytes keeps
    beside its codes, and the codes that a 4-bit linear of ours keeps for its kernel."""
    seen: dict[tuple[str, int], int] = {}
    modules = [*model.modules()]
    modules += [kernel for module in modules if isinstance(module, FourBitLinear) for kernel in module.kernel]
    for module in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            state = getattr(tensor, "quant_state", None)
            holders = (tensor, state, getattr(state, "state2", None), getattr(module, "state", None))
            beside = (getattr(holder, part, None) for holder in holders for part in ("absmax", "code", "SCB"))
            for one in (tensor, *(part for part in beside if isinstance(part, Tensor))):
                seen[str(one.device), one.data_ptr()] = one.nbytes
    return sum(seen.values())


def _best(run: Callable[[], float], repeats: int, budget_s: float) -> float:
    start, times = time.perf_counter(), [run()]
    while len(times) <= repeats and time.perf_counter() - start < budget_s:
        times.append(run())
    return min(times[1:] or times)


def _last_logits(model: torch.nn.Module) -> dict[str, int]:
    """The argument with which a forward pass computes the logits of the last position alone, if it has
    one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _prefill_s(model: torch.nn.Module, sequence: Tensor) -> float:
    kept, start = _last_logits(model), _now(sequence.device)
    model(sequence, use_cache=False, **kept)
    return _now(sequence.device) - start


def _decode_s(model: torch.nn.Module, prompt: Tensor, steps: int) -> float:
    """Seconds for `steps` greedy tokens, without the time to read the prompt."""
    out = model(prompt, use_cache=True, **_last_logits(model))
    start = _now(prompt.device)
    for _ in range(steps):
        out = model(out.logits[:, -1:].argmax(-1), **_cache(out), use_cache=True)
    return _now(prompt.device) - start


@torch.no_grad()
def continued(model: torch.nn.Module, prompts: Tensor, tokens: int) -> Tensor:
    """Return what a model that keeps a cache writes greedily after prompts [P, C]: int64 [P, tokens], on the
    CPU."""
    out = model(prompts.to(next(model.parameters()).device), use_cache=True, **_last_logits(model))
    written = [out.logits[:, -1:].argmax(-1)]
    for _ in range(tokens - 1):
        out = model(written[-1], **_cache(out), use_cache=True)
        written.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(written, -1).cpu()


def _best_decode_s(
    model: torch.nn.Module, prompt: Tensor, steps: int, repeats: int, budget_s: float
) -> float | None:
    """Seconds for `steps` greedy tokens; None of a model that keeps nothing between them, or whose own code
    fails with a cache."""
    try:
        if not _cache(model(prompt, use_cache=True)):
            return None
        return _best(lambda: _decode_s(model, prompt, steps), repeats, budget_s)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each family has a cache of its own
        logger.warning("writing can't be timed (%s), so the report has no speed of it", first_line(error))
        return None


def _cache(out: Any) -> dict[str, Any]:
    """What an output keeps for the next token, by the name of the argument that takes it; empty if it keeps
    nothing."""
    kept = {name: getattr(out, name, None) for name in CACHES}
    return {name: cache for name, cache in kept.items() if cache is not None}


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        # kernels are queued, so wait for them before reading the clock
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Peak memory so far: torch's on a CUDA `device`, else the resident set of this process since its
    start."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    if sys.platform == "win32":
        # psutil is a dependency of accelerate
        return int(importlib.import_module("psutil").Process().memory_info().peak_wset)
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device: torch.device | str | None = None) -> EnvironmentFacts:
    """What a number in a report depends on besides the recipe: versions of packages, and a description of the
    device.

    `device` is where the work was done; without it, the first GPU if torch sees one.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "bitsandbytes", "llmcompress"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    words = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda"):
        words = f"{torch.cuda.get_device_name(device)}; {words}"
    return EnvironmentFacts(versions=versions, device=words)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
