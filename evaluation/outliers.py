"""Does smoothing take outliers out of the activations? The demo model with some planted, with and without it.

    python -m evaluation outliers [--threads 2]

Four channels of every norm are multiplied by 50 to 100 and the columns that read them divided by as much: the
function is the same, and each token's largest input is now far above the rest. Each row is a whole run on
that model and its own report; formats without smoothing also run on the model without outliers. The result
goes to results/outliers.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from evaluation import machine, results
from evaluation.options import parser
from evaluation.results import Loss, OutlierRow
from evaluation.runs import losses, recipe_of, run
from llmcompress.data.calibration import DEMO_MODEL
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk

CHANNELS, LEAST, MOST = 4, 50.0, 100.0
SAMPLES = 256
SETTINGS: dict[str, dict[str, object]] = {
    "int8, nearest (stock bitsandbytes, threshold 0)": {"format": "int8", "rounding": "nearest"},
    "int8, nearest (stock bitsandbytes, threshold 6)": {
        "format": "int8",
        "threshold": 6.0,
        "rounding": "nearest",
    },
    "w8a8, nearest": {"format": "w8a8", "rounding": "nearest"},
    "w8a8, gptq": {"format": "w8a8"},
    "w8a8, nearest, smooth": {"format": "w8a8", "rounding": "nearest", "smooth": {}},
    "w8a8, gptq, smooth": {"format": "w8a8", "smooth": {}},
    "int8, gptq, smooth": {"format": "int8", "smooth": {}},
}


def plant(base: Path, folder: Path) -> None:
    """The model in `base` with outliers planted, saved in `folder`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    state, draw = model.state_dict(), torch.Generator().manual_seed(0)
    for layer in walk(
        InMemoryModel(model.config, state, torch.device("cpu")), torch.zeros(1, 2, dtype=torch.int64)
    ):
        for key in [
            key for key in layer.anatomy.scale_pairs if layer.anatomy.layer.get(f"{key}.weight") == "hidden"
        ]:
            factor = torch.ones(layer.sizes["hidden"])
            where = torch.randperm(len(factor), generator=draw)[:CHANNELS]
            factor[where] = 1 / (LEAST + (MOST - LEAST) * torch.rand(CHANNELS, generator=draw))
            layer.cross(key, factor, torch.float32)
        for name, parameter in layer.module.named_parameters():
            model.get_parameter(f"{layer.name}.{name}").data.copy_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def measure(base: Path, settings: dict[str, object], out: Path) -> Loss:
    """The losses of one `quantize` stage."""
    recipe = recipe_of([{"quantize": settings}], "python-docs", SAMPLES)
    return Loss(**losses(run(recipe, out, base, overwrite=True)))


def main(argv: Sequence[str]) -> int:
    """Measure every format and write the result."""
    machine.parse(parser("outliers", __doc__), argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        planted, out = Path(scratch) / "planted", Path(scratch) / "out"
        plant(DEMO_MODEL, planted)
        for name, settings in SETTINGS.items():
            found = OutlierRow(what=name, planted=measure(planted, settings, out))
            if "smooth" not in settings:
                found = OutlierRow(
                    what=name, planted=found.planted, original=measure(DEMO_MODEL, settings, out)
                )
            rows.append(found)
            print(f"{name}: perplexity {found.planted.perplexity:.3f}", flush=True)
    about = {"channels": CHANNELS, "factors": [LEAST, MOST], "model": "demo", "text": "python-docs"}
    results.write("outliers", machine.head(), {**about, "rows": rows})
    return 0
