"""The entry of all measurements: `python -m evaluation NAME [options]`; without a name they are listed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """A measurement: the module whose `main` runs it, its duration on two cores, and what it answers."""

    module: str
    duration: str
    about: str


SCRIPTS = {
    "bench": Script("bench", "6 h", "the loss of every recipe on every model, beside stock bitsandbytes"),
    "rivals": Script(
        "rivals.quantizers", "20 min", "AutoRound, GPTQModel and llm-compressor on the same sequences"
    ),
    "ablation": Script("ablation", "15 min", "what each ingredient of the 4-bit solver contributes"),
    "two-sided": Script(
        "two_sided", "3 h", "roundings of each row by itself and of all rows of a linear together"
    ),
    "outliers": Script(
        "outliers", "15 min", "8-bit formats on activations with planted outliers, with and without smoothing"
    ),
    "experts": Script(
        "experts", "1 h", "experts of a mixture in every format, and what those with few tokens are given"
    ),
    "bos": Script("bos", "10 min", "calibration and evaluation with and without a BOS token"),
    "gguf": Script(
        "gguf_export", "30 min", "llama.cpp's 4-bit formats beside its own rounding, and run by llama.cpp"
    ),
    "pruning": Script("pruning", "1 h", "scores, repair, axes and allocations of structured pruning"),
    "rivals-pruning": Script("rivals.pruners", "30 min", "Torch-Pruning at the same share of the parameters"),
    "healing": Script("healing", "1 h", "how much of a cut's loss distillation recovers, by loss function"),
    "sharing": Script("sharing", "6 h", "pruning, sharing, low rank, codebooks and 4 bits at the same bytes"),
    "compression-speed": Script(
        "compression_speed", "5 h", "seconds, memory and loss of our quantisers beside those of others"
    ),
    "search": Script(
        "search", "2 h", "what search finds within a size, beside single methods and random choices"
    ),
    "other-choices": Script(
        "other_choices", "15 min", "whether products of low rank or missing sublayers are worth a search"
    ),
    "cost": Script(
        "cost", "8 min", "seconds and memory of a run against one forward pass, and how they grow"
    ),
    "several-processes": Script(
        "several_processes", "15 min", "seconds and codes of a run in one process and in two"
    ),
    "vocabulary-memory": Script(
        "vocabulary_memory", "10 min", "peak memory of a run on models of 32 to 262 thousand tokens"
    ),
    "calibration-text": Script(
        "calibration_text", "30 min", "what a run loses with less text, more text, and text of other kinds"
    ),
    "kv-cache": Script(
        "kv_cache", "15 min", "KV caches in 8 and 4 bits, beside those of transformers, at three lengths"
    ),
    "foretold": Script("foretold", "10 min", "the time that `plan` foretells against the time of the run"),
    "gpu-compression": Script(
        "gpu_compression",
        "-",
        "on a GPU: seconds and memory of quantising random models of 1 B and 8 B, beside rivals",
    ),
    "gpu": Script("gpu", "-", "on a GPU: the loss of recipes, beside the same on a CPU"),
    "throughput": Script("throughput", "2 min", "tokens/s of evaluation against bare forward passes"),
    "distill-speed": Script(
        "distill_speed", "10 min", "steps/s of distillation against a bare training loop"
    ),
    "speed": Script("speed", "6 min", "linears and a whole model in every format, against floats"),
    "decode-speed": Script(
        "decode_speed", "15 min", "whole models that write, at batch 1 and 4, in every format"
    ),
    "lookup-speed": Script("lookup_speed", "5 min", "codebook linears against bitsandbytes' nf4"),
    "attention-speed": Script("attention_speed", "1 min", "attention in bfloat16 against torch's"),
    "codebook-speed": Script(
        "codebook_speed", "3 min", "solving for codebooks by the C kernels, against torch's loops"
    ),
    "pruned-speed": Script("pruned_speed", "3 min", "models of fewer parameters against the whole one"),
    "import-time": Script(
        "import_time", "3 min", "what importing llmcompress adds to importing transformers"
    ),
    "advise-time": Script("advise_time", "2 min", "how long `advise` takes beside its imports"),
    "reference-models": Script(
        "reference_models", "1 min", "makes models of real size from the package index; writes no result"
    ),
    "train-demo": Script("train_demo", "30 min", "trains the demo model; writes no result"),
    "same-bytes": Script(
        "same_bytes", "10 min", "whether two checkouts write the same tensors; writes no result"
    ),
    "tables": Script(
        "tables", "1 s", "writes RESULTS.md and the heads of the recipes; --check compares them"
    ),
    "pictures": Script("pictures", "5 s", "draws pictures/*.svg; --check compares their numbers"),
}


def listing() -> str:
    """A line for each measurement: name, duration on two cores, what it answers."""
    lines = [f"  {name:17} {script.duration:>7}  {script.about}" for name, script in SCRIPTS.items()]
    return "\n".join(["usage: python -m evaluation NAME [--help] [options]", "", *lines])


def main(argv: Sequence[str]) -> int:
    """Run the measurement that the first argument names; return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *options = argv
    if name not in SCRIPTS:
        print(f"no measurement {name!r}; choose one of {', '.join(SCRIPTS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"evaluation.{SCRIPTS[name].module}")
    code: int = module.main(options)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
