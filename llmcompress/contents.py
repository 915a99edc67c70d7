"""What the artefact holds: weights and config that from_pretrained loads, report, recipe, card and pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress import native
from llmcompress.artifact import Writer
from llmcompress.checkpoint import Journal
from llmcompress.recipe import Recipe
from llmcompress.report import CHANGE_PICTURE, ERROR_PICTURE, FILE, Report
from llmcompress.report.card import card, front_matter
from llmcompress.report.pictures import before_after, error_per_layer
from llmcompress.residency import OnDisk, Resident
from llmcompress.stages.quantize import STAGE, Quantize


def finished(journal: Journal, model: Resident) -> Iterator[dict[str, Tensor]]:
    """The quantised tensors, block by block and the head last, by their names in the model."""
    for index in range(len(model.layers) + 1):
        if journal.has(STAGE, index):
            yield journal.load(STAGE, index)[0]


def packed_linears(tensors: Mapping[str, Tensor]) -> dict[str, native.Packed]:
    """The linears among `tensors`, by full name."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {name: native.unpack(native.parts_of(name, tensors)) for name in names}


def quantization_of(stage: Quantize, model: Resident) -> dict[str, Any]:
    """config.json's `quantization_config` for a model to which the stage was applied."""
    return native.quantization_config(stage.format, stage.double_quant, model.weight_dtype, list(stage.choose(model)[1]))


def write_weights(writer: Writer, model: OnDisk, stage: Quantize, journal: Journal) -> Path:
    """Weights, config and the base's small files; the folder returned loads with from_pretrained.

    Quantised linears come from the journal under the names that the base has for them, everything else as the base stores it.
    """
    keys = {target: sources[0] for target, sources in model.sources.items()}
    replaced: set[str] = set()
    for tensors in finished(journal, model):
        named = {}
        for name, tensor in tensors.items():
            target = name[: name.index(".weight") + len(".weight")]
            named[keys[target] + name.removeprefix(target)] = tensor
            replaced.add(keys[target])
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
