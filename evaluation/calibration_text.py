"""How much text does calibration need, and of which kind?

    python -m evaluation calibration-text [--models demo wikilm-8m] [--rows amounts kinds] [--seeds 2]

`nf4-gptq` is run with 1 thousand to 1 million tokens of the text that each model is evaluated on, and with 65
thousand tokens of other kinds: encyclopedia (WikiText-2), documentation (that of Python), code (the modules
of Python's standard library) and text that the model wrote itself. The loss is always that on the model's own
evaluation text. Seeds choose other sequences, so that noise is seen. The result goes to
results/calibration_text.json, a row at a time.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from evaluation import machine, results
from evaluation.models import LENGTH, MODELS, WIKITEXT, Subject
from evaluation.options import parser
from evaluation.results import CalibrationTextRow
from evaluation.runs import known, run
from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.resolve import find_base, require_tokenizer
from llmcompress.recipe.recipe import Recipe

NAME = "calibration_text"
AMOUNTS = (4, 16, 64, 256, 1024, 4096)  # sequences of LENGTH tokens
MOST = {"demo": 2048}  # of which there are so many in the text of a model
SAMPLES = 256  # sequences of each kind
WRITES = 320  # sequences that a model writes; a tenth is kept for evaluation
BATCH = 32  # of them at a time
OWN, WRITTEN = "its own kind", "written by the model"
STAGE = {"quantize": {"format": "nf4", "rounding": "gptq"}}
ROWS = ("amounts", "kinds")


def written(base: str, file: Path, seed: int) -> None:
    """Write sequences that a model samples from its own predictions, from nothing but its first
    token, a blank line between them."""
    folder = find_base(base).folder
    tokenizer = require_tokenizer(tokenizer_of(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(seed)
    texts = list[str]()
    for _ in range(WRITES // BATCH):
        begun = torch.full((BATCH, 1), 0 if first is None else first)
        told = model.generate(begun, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=True, top_k=0)
        texts += tokenizer.batch_decode(told, skip_special_tokens=True)
    file.write_text("\n\n".join(texts), "utf-8")


def code(file: Path) -> None:
    """Write the modules of Python's standard library into one file, in the order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8", errors="ignore") for path in sorted(library.glob("*.py"))]
    file.write_text("\n\n".join(texts), "utf-8")


def kinds(subject: Subject, folder: Path, seed: int) -> Iterator[tuple[str, str]]:
    """The kinds of text by name, and where each lies."""
    yield "WikiText-2", WIKITEXT
    yield "Python's documentation", "python-docs"
    code(folder / "code.txt")
    yield "Python's standard library", str(folder / "code.txt")
    written(subject.base, folder / "written.txt", seed)
    yield WRITTEN, str(folder / "written.txt")


def measure(model: str, kind: str, text: str, samples: int, seed: int, folder: Path) -> None:
    """Run the recipe with a text, and write what it lost on the model's own evaluation text."""
    subject = MODELS[model]
    spec = DataSpec(source=text, samples=samples, length=LENGTH, seed=seed, evaluation_samples=1, bos=False)
    recipe = Recipe.of_entries({"stages": [STAGE]})
    report = run(recipe, folder / "out", subject.base, spec, overwrite=True)
    found = evaluate(folder / "out", against=find_base(subject.base).folder, data=subject.data())
    head = machine.head()
    row = CalibrationTextRow(
        model=model,
        text=kind,
        seed=seed,
        tokens=report.data.calibration_tokens,
        kl_nats_mean=known(found.kl_nats_mean),
        perplexity=found.perplexity,
        seconds=report.stages[0].seconds,
        commit=head.commit,
        hardware=head.hardware,
    )
    print(f"{model}: {kind}, {row.tokens} tokens, seed {seed}: KL {row.kl_nats_mean:.5f}", flush=True)
    results.write(NAME, head, {"rows": results.merge(NAME, ("model", "text", "tokens", "seed"), row)})


def main(argv: Sequence[str]) -> int:
    """Measure the rows of every model."""
    options = parser("calibration-text", __doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "wikilm-8m"])
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options.add_argument("--samples", nargs="+", type=int, default=AMOUNTS, help="sequences of the amounts")
    options.add_argument("--seeds", type=int, default=2)
    given = machine.parse(options, argv)
    for model in given.models:
        print(f"{model} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as place:
            os.environ["LLMCOMPRESS_CACHE"] = place
            for seed in range(given.seeds):
                for samples in given.samples if "amounts" in given.rows else ():
                    most = min(samples, MOST.get(model, samples))
                    measure(model, OWN, MODELS[model].text, most, seed, Path(place))
                if "kinds" in given.rows:
                    for kind, text in kinds(MODELS[model], Path(place), seed):
                        measure(model, kind, text, SAMPLES, seed, Path(place))
    return 0
