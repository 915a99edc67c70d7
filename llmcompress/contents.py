"""What the artefact holds: weights and config that from_pretrained loads, report, recipe, card and pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress import integer, native, plugin, stored
from llmcompress.artifact import Writer
from llmcompress.checkpoint import Journal
from llmcompress.recipe import Recipe
from llmcompress.report import CHANGE_PICTURE, ERROR_PICTURE, FILE, Report
from llmcompress.report.card import card, front_matter
from llmcompress.report.pictures import before_after, error_per_layer
from llmcompress.residency import OnDisk, Resident
from llmcompress.stages.coding import FourBit, Int8
from llmcompress.stages.quantize import OUTER, STAGE, Quantize
from llmcompress.stored import Stored


def finished(journal: Journal, model: Resident) -> Iterator[dict[str, Tensor]]:
    """The tensors that the stage made, by their names in the model: block by block, the head, what else a rotation changed."""
    for index in range(len(model.layers) + 1):
        if journal.has(STAGE, index):
            yield journal.load(STAGE, index)[0]
    if journal.has(OUTER, 0):
        yield journal.load(OUTER, 0)[0]


def read_entry(tensors: Mapping[str, Tensor], stage: Quantize, model: Resident) -> tuple[dict[str, Stored], dict[str, Tensor]]:
    """The quantised linears of a journal's entry by full name, and the dense parameters that the stage changed."""
    coding, shapes = stage.coding(model.weight_dtype), dict(model.linear_maps())
    linears, parts = {}, set()
    for name in stored.quantized_linears(tensors):
        found = stored.parts_of(name, tensors)
        linears[name] = coding.read(found, shapes[name][1])
        parts |= {f"{name}.{part}" for part in found}
    return linears, {name: tensor for name, tensor in tensors.items() if name not in parts}


def quantization_of(stage: Quantize, model: Resident) -> dict[str, Any]:
    """config.json's `quantization_config` for a model to which the stage was applied."""
    (chosen, kept), coding = stage.choose(model), stage.coding(model.weight_dtype)
    if isinstance(coding, FourBit):
        return native.quantization_config(coding.format, coding.double_quant, coding.dtype, list(kept))
    if isinstance(coding, Int8):
        return integer.int8_config(coding.threshold, list(kept))
    return plugin.quantization_config([(coding.scheme, chosen)])


def write_weights(writer: Writer, model: OnDisk, stage: Quantize, journal: Journal) -> Path:
    """Weights, config and the base's small files; the folder returned loads with from_pretrained.

    What a stage made comes from the journal under the names that the base has for it, everything else as the base stores it.
    """
    keys = {target: sources[0] for target, sources in model.sources.items()}
    replaced: set[str] = set()
    for tensors in finished(journal, model):
        linears, dense = read_entry(tensors, stage, model)
        named = {keys[name]: tensor for name, tensor in dense.items()}
        for linear, packed in linears.items():
            key = keys[f"{linear}.weight"].removesuffix(".weight")
            named |= {f"{key}.{part}": tensor for part, tensor in stored.tensors_of(packed).items()}
        replaced |= {keys[name] for name in (*dense, *(f"{linear}.weight" for linear in linears))}
        writer.add(named)
    for key in model.checkpoint.tensors:
        if key not in replaced:
            writer.add({key: model.checkpoint.read(key)})
    return writer.close(model.checkpoint.config | {"quantization_config": quantization_of(stage, model)})


def ties_of(model: OnDisk) -> dict[str, str]:
    """The head's tensor, where a tied base stores it beside the embedding's: stored twice, it is written once."""
    head, embedding = (model.sources.get(f"{name}.weight") for name in (model.anatomy.head, model.anatomy.embedding))
    return {head[0]: embedding[0]} if model.config.tie_word_embeddings and head and embedding else {}


def companions(report: Report, recipe: Recipe, base: Path) -> dict[str, str | bytes]:
    """What goes beside the weights: report.json, recipe.yaml, README.md and the pictures, by file name."""
    readme, text = base / "README.md", recipe.to_yaml()
    inherited = front_matter(readme.read_text("utf-8", "replace")) if readme.is_file() else {}
    files: dict[str, str | bytes] = {FILE: report.to_json(), "recipe.yaml": text, "README.md": card(report, text, inherited)}
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in ((ERROR_PICTURE, error_per_layer), (CHANGE_PICTURE, before_after)):
            draw(report, Path(folder) / name)
            files[name] = (Path(folder) / name).read_bytes()
    return files
