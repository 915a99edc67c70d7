"""What does a KV cache in 8 or 4 bits cost? Ours with keys per channel and per token, and transformers' own.

    python -m evaluation kv-cache [--models demo] [--only bits...] [--threads 1]

Each model reads its evaluation text in pieces of 32 tokens, with a plain cache and with each of the others,
in float32: KL is that of the same pieces. `fp8` is transformers' cache of 8-bit floats; `hqq` and `quanto`
are its `QuantizedCache` with these packages, which are left out where they are not installed. Bytes are those
of codes, scales and tokens kept as they are, in a model whose states are in bfloat16. The result goes to
results/kv_cache.json.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel, QuantizedCache

from evaluation import machine, results
from evaluation.models import MODELS, present
from evaluation.options import parser
from evaluation.reference_models import SMOLLM2
from evaluation.results import CacheRow, Fidelity
from llmcompress.data.calibration import DEMO_MODEL
from llmcompress.data.sources import DataSpec
from llmcompress.integrations.kv_cache import CacheSettings, bytes_of_text, kv_cache
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.pipeline.kv_cache import losses_at, read_with
from llmcompress.pipeline.resolve import calibration_data, require_tokenizer
from llmcompress.report.metrics import Columns

LENGTHS = {"demo": (512,), "wikilm-8m": (512, 1024), SMOLLM2: (512, 2048)}
SEQUENCES = {"demo": 16, "wikilm-8m": 8, SMOLLM2: 2}
STOCK = "nf4-nearest"  # the row of stock nf4 in the results of `bench`
ITEMSIZE = 2  # bytes of a state in bfloat16
OURS = {
    "8 bits": CacheSettings(8),
    "8 bits, keys per token": CacheSettings(8, "token"),
    "4 bits": CacheSettings(4),
    "4 bits, keys per token": CacheSettings(4, "token"),
    "4 bits, 4 first tokens": CacheSettings(4, sinks=4),
}


class Peer(NamedTuple):
    """A cache of transformers: its bits, the package that it needs, and what it is made with."""

    bits: int
    package: str | None
    options: dict[str, Any]


PEERS = {
    "fp8": Peer(8, None, {"backend": "fp8"}),
    "hqq, 8 bits": Peer(8, "hqq", {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1}),
    "hqq, 4 bits": Peer(4, "hqq", {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}),
    "quanto, 4 bits": Peer(4, "optimum", {"backend": "quanto", "nbits": 4}),
}


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors in what a cache of transformers holds, those inside a package's own kind of tensor too."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_of(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)


def peer_bytes(cache: Cache) -> int:
    """Bytes that a cache of transformers holds, with its floats in two bytes each."""
    held = 0
    layers: list[Any] = cache.layers
    for layer in layers:
        for value in (layer.keys, layer.values, layer._quantized_keys, layer._quantized_values):
            for tensor in tensors_of(value):
                wide = tensor.dtype in (torch.float32, torch.float64)
                held += tensor.numel() * (ITEMSIZE if wide else tensor.element_size())
    return held


def nf4_kl_nats(model: str) -> float:
    """The loss of stock nf4 on a model."""
    found = results.load(results.RESULTS, f"fidelity-{model}", Fidelity)
    assert found is not None, "`bench` has measured it"
    (row,) = (row for row in found.rows if row.recipe == STOCK)
    return row.kl_nats_mean


def loaded(name: str) -> PreTrainedModel:
    """A model in float32."""
    base = str(DEMO_MODEL) if name == "demo" else MODELS[name].base
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.eval()
    return model


def rows_of(name: str, only: Sequence[str]) -> Iterator[CacheRow]:
    """Every cache on one model."""
    model, lengths = loaded(name), LENGTHS[name]
    base = DEMO_MODEL if name == "demo" else Path(MODELS[name].base)
    spec = DataSpec(
        source=MODELS[name].text, samples=1, length=lengths[-1], evaluation_samples=SEQUENCES[name], bos=False
    )
    text = calibration_data(model, spec, require_tokenizer(tokenizer_of(base))).evaluation
    plain_bytes = 0.0
    for cache, settings in OURS.items():
        if only and cache not in only:
            continue
        found, used = read_with(partial(kv_cache, model, settings), model, text)
        plain_bytes = bytes_of_text(used, lengths[-1], ITEMSIZE, None) / lengths[-1]
        for length in lengths:
            yield CacheRow(
                model=name,
                cache=cache,
                bits=settings.bits,
                tokens=text[:, :length].numel(),
                bytes_per_token=bytes_of_text(used, length, ITEMSIZE, settings) / length,
                plain_bytes_per_token=plain_bytes,
                nf4_kl_nats=nf4_kl_nats(name),
                **losses_at(length, found),
            )
    for cache, peer in PEERS.items():
        if (only and cache not in only) or (peer.package and importlib.util.find_spec(peer.package) is None):
            continue
        held, at = list[tuple[int, Columns]](), lengths
        for length in at:  # its bytes are those of the whole text that it has read
            found, other = read_with(
                partial(QuantizedCache, config=model.config, **peer.options), model, text[:, :length]
            )
            held.append((peer_bytes(other), found))
        for length, (size, found) in zip(at, held, strict=True):
            yield CacheRow(
                model=name,
                cache=cache,
                bits=peer.bits,
                tokens=text[:, :length].numel(),
                bytes_per_token=size / length,
                plain_bytes_per_token=plain_bytes,
                nf4_kl_nats=nf4_kl_nats(name),
                **losses_at(length, found),
            )


def main(argv: Sequence[str]) -> int:
    """Measure every cache on every model that lies here, and write the result after each row."""
    options = parser("kv-cache", __doc__)
    options.add_argument("--models", nargs="+", choices=[*LENGTHS], help="default: those that lie here")
    options.add_argument("--only", nargs="+", default=[], choices=[*OURS, *PEERS], help="default: all")
    given = machine.parse(options, argv, threads=1)
    for name in given.models or [name for name in present() if name in LENGTHS]:
        for row in rows_of(name, given.only):
            print(row, file=sys.stderr, flush=True)
            results.write(
                "kv_cache",
                machine.head(),
                {"rows": results.merge("kv_cache", ("model", "cache", "length"), row)},
            )
    return 0
