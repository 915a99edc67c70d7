"""Are our codes better than llama.cpp's own, and does llama.cpp compute what was measured?

    python -m evaluation gguf [--models demo ...] [--formats q4_0 iq4_nl] [--threads 1]

Each model is quantised in llama.cpp's 4-bit formats, by GPTQ here and by llama.cpp's quantiser, without an
importance matrix, and both are measured in the same way against the base. Each is exported to GGUF and run by
llama.cpp on TOKENS tokens, whose logits are compared with those of the artefact in transformers. It needs
`pip install xllamacpp gguf`. The result goes to results/gguf.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evaluation import llama_cpp, machine, results
from evaluation.models import MODELS, present
from evaluation.options import parser
from evaluation.results import GgufRow
from evaluation.runs import known, run
from llmcompress.data.calibration import load_data
from llmcompress.formats.ggml import GgmlLayout, GgmlWeight
from llmcompress.formats.quantization_config import quantization_config
from llmcompress.integrations.registration import register
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.export import export
from llmcompress.pipeline.resolve import find_base
from llmcompress.recipe.recipe import Recipe

FORMATS = {"q4_0": 2, "iq4_nl": 20}  # their numbers in enum ggml_type
WAYS = ("llama.cpp", "gptq")
TOKENS = 512


def by_llama_cpp(W_RC: Tensor, format: str) -> GgmlWeight:
    """A weight as llama.cpp's own quantiser rounds it."""
    blocks = torch.from_numpy(llama_cpp.quantized(W_RC.float().numpy(), FORMATS[format]))
    scale_RG = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    codes = torch.stack((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), dim=2)
    return GgmlWeight(codes.reshape(W_RC.shape), scale_RG.contiguous(), GgmlLayout(cast(Any, format)))


def write_theirs(base: str, format: str, out: Path) -> None:
    """Write a base with the linears of its layers as llama.cpp's own quantiser rounds them."""
    folder = find_base(base).folder
    plain, layout = DiskModel(folder, torch.device("cpu")), GgmlLayout(cast(Any, format))
    shapes = plain.matrices()
    linears = [name for name in plain.layer_linears if layout.refusal(shapes[name]) is None]
    tensors = {key: plain.checkpoint.read(key) for key in plain.checkpoint.tensors}
    for name in linears:
        (key,) = plain.sources[f"{name}.weight"]
        made = by_llama_cpp(tensors.pop(key), format).tensors()
        tensors |= {f"{key.removesuffix('.weight')}.{part}": tensor for part, tensor in made.items()}
    out.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config([(layout, linears)])
    (out / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def in_llama_cpp(folder: Path, model: str, threads: int) -> dict[str, Any]:
    """Export an artefact, run it in llama.cpp, and compare."""
    base, out = find_base(MODELS[model].base), folder.parent / f"{folder.name}-gguf"
    export(folder, "gguf", out, overwrite=True)
    tokenizer, spec = tokenizer_of(base.folder), MODELS[model].data()
    size = json.loads((base.folder / "config.json").read_text())["vocab_size"]
    data = load_data(spec, tokenizer, size, None)
    sequences = data.evaluation[: -(-TOKENS // data.evaluation.shape[1])]
    found, _ = llama_cpp.run(out / "model.gguf", sequences.tolist(), threads=threads)
    theirs = torch.from_numpy(found).double().log_softmax(-1)
    register()
    loaded = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    ours = torch.cat([loaded(each[None]).logits for each in sequences]).double().log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return {"kl_llama_cpp": float(kl.mean()), "top1_llama_cpp": float(agree), "tokens": sequences.numel()}


def rows_of(model: str, format: str, folder: Path, given: argparse.Namespace) -> Iterator[GgufRow]:
    """The ways to round a model in a format that are asked for."""
    subject = MODELS[model]
    if "llama.cpp" in given.ways:
        out = folder / f"{model}-{format}-theirs"
        write_theirs(subject.base, format, out)
        found = evaluate(out, against=subject.base, data=subject.data())
        lost = (
            known(found.kl_nats_mean),
            found.perplexity,
            evaluate(subject.base, data=subject.data()).perplexity,
        )
        yield _row(model, format, "llama.cpp", lost, in_llama_cpp(out, model, given.threads))
    if "gptq" in given.ways:
        out = folder / f"{model}-{format}"
        told = Recipe.parse(f"stages: [quantize: {{format: {format}}}]")
        report = run(told, out, subject.base, subject.data())
        lost = (
            known(report.fidelity.kl_nats_mean),
            known(report.compressed.perplexity),
            known(report.base.perplexity),
        )
        yield _row(model, format, "gptq", lost, in_llama_cpp(out, model, given.threads))


def _row(
    model: str, format: str, rounding: str, lost: tuple[float, float, float], run: dict[str, Any]
) -> GgufRow:
    """A row, which is printed; `lost` are KL, perplexity and that of the base."""
    kl, perplexity, base = lost
    row = GgufRow(
        model=model,
        format=format,
        rounding=rounding,
        kl_nats_mean=kl,
        perplexity=perplexity,
        base_perplexity=base,
        **run,
    )
    print(row, file=sys.stderr, flush=True)
    return row


def main(argv: Sequence[str]) -> int:
    """Measure every model in both formats, and write the result."""
    options = parser("gguf", __doc__)
    options.add_argument("--models", nargs="+", default=present(), choices=list(MODELS))
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    said = machine.parse(options, argv, threads=1)
    if not llama_cpp.INSTALLED:
        sys.exit(llama_cpp.INSTALL)
    with tempfile.TemporaryDirectory() as folder:
        for model in said.models:
            for format in said.formats:
                for row in rows_of(model, format, Path(folder), said):
                    merged = results.merge("gguf", ("model", "format", "rounding"), row)
                    results.write("gguf", machine.head(), {"rows": merged})
    return 0
