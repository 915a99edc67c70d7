"""Does smoothing take outliers out of the activations? The demo model with some planted, with and without it.

    python evaluation/outliers.py [--threads 2]

Four channels of every norm are multiplied by 50 to 100 and the columns that read them divided by as much: the function is the
same, and each token's largest input is now far above the rest. Each row is a whole `run_recipe` of that model and its own report,
whose perplexity stands beside that of the model without outliers. The result goes to evaluation/results/outliers.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import LENGTH, head
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress.data.calibration import DEMO_MODEL
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe

CHANNELS, LEAST, MOST = 4, 50.0, 100.0
SETTINGS = {
    "int8, nearest (stock bitsandbytes, threshold 0)": "format: int8, rounding: nearest",
    "int8, nearest (stock bitsandbytes, threshold 6)": "format: int8, threshold: 6.0, rounding: nearest",
    "w8a8, nearest": "format: w8a8, rounding: nearest",
    "w8a8, gptq": "format: w8a8",
    "w8a8, nearest, smooth": "format: w8a8, rounding: nearest, smooth: {}",
    "w8a8, gptq, smooth": "format: w8a8, smooth: {}",
    "int8, gptq, smooth": "format: int8, smooth: {}",
}


def plant(base: Path, folder: Path) -> None:
    """The model in `base` with outliers planted, saved in `folder`."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    state, draw = model.state_dict(), torch.Generator().manual_seed(0)
    for layer in walk(InMemoryModel(model.config, state, torch.device("cpu")), torch.zeros(1, 2, dtype=torch.int64)):
        for key in [key for key in layer.anatomy.scale_pairs if layer.anatomy.layer.get(f"{key}.weight") == "hidden"]:
            factor = torch.ones(layer.sizes["hidden"])
            where = torch.randperm(len(factor), generator=draw)[:CHANNELS]
            factor[where] = 1 / (LEAST + (MOST - LEAST) * torch.rand(CHANNELS, generator=draw))
            layer.cross(key, factor, torch.float32)
        for name, parameter in layer.module.named_parameters():
            model.get_parameter(f"{layer.name}.{name}").data.copy_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def measure(base: Path, settings: str, out: Path) -> dict[str, Any]:
    """One run's losses."""
    data = f"data: {{source: python-docs, samples: 256, length: {LENGTH}}}"
    report = run_recipe(Recipe.parse(f"{data}\nstages: [quantize: {{{settings}}}]"), out, base=str(base), overwrite=True)
    return {
        "kl_nats_mean": report.fidelity.kl_nats_mean,
        "perplexity": report.compressed.perplexity,
        "base_perplexity": report.base.perplexity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        plant(DEMO_MODEL, Path(scratch) / "planted")
        for name, settings in SETTINGS.items():
            found = {"planted": measure(Path(scratch) / "planted", settings, Path(scratch) / "out")}
            if "smooth" not in name:
                found["as it was"] = measure(DEMO_MODEL, settings, Path(scratch) / "out")
            rows.append({"what": name, **found})
            print(name, {kind: round(row["perplexity"], 3) for kind, row in found.items()}, flush=True)
    about = {"channels": CHANNELS, "factors": [LEAST, MOST], "model": "demo", "text": "python-docs"}
    file = Path(__file__).parent / "results" / "outliers.json"
    file.write_text(json.dumps({**head(), **about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
