"""A run's model in memory: between two stages it is a state dict, and the codes of the linears that have
some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmcompress.architectures.auto_classes import auto_class
from llmcompress.architectures.resize import changed
from llmcompress.formats import registry
from llmcompress.formats.registry import StoredWeight
from llmcompress.integrations.transformers_compat import Conv1D
from llmcompress.io.journal import Journal
from llmcompress.io.scratch import scratch_folder
from llmcompress.modeling.from_disk import no_progress_bar
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.model_config import load_config
from llmcompress.pipeline.outcome import Outcome
from llmcompress.pipeline.resolve import source_of, student_folder
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import LinearScheme, ModelSource


class MemoryStore:
    """The model of a run in memory. Journals are in temporary folders, and the base's weights are never
    written to."""

    shared = False

    def __init__(self, recipe: Recipe, base: InMemoryModel) -> None:
        self.base = base
        self.model = (
            base if recipe.student is None else _student(recipe.student, recipe.data.seed, base.device)
        )
        self.left = dict(self.model.source)  # dense weights by name
        self.packed: dict[str, StoredWeight] = {}
        self.chosen: dict[str, LinearScheme] = {}  # schemes by linear
        self.quantization: dict[str, Any] | None = None  # `quantization_config` of config.json
        self.dense: dict[str, torch.Tensor] = {}  # dense weights changed since the last change of shapes

    def teacher(self, name: str | None) -> ModelSource:
        """Return a model by its name, or the model as it was given if no name is given."""
        if name is not None:
            return source_of(name, self.base.device)
        opened = partial(InMemoryModel, self.base.config, self.base.source, self.base.device)
        return ModelSource(opened, self.base.fingerprint, self.base.fingerprint)

    @contextmanager
    def working(self, number: int) -> Iterator[tuple[Journal, Path]]:
        """Yield a journal in a temporary folder, and that folder."""
        with scratch_folder() as folder:
            yield Journal(folder / "journal", "in memory"), folder

    def take_in(self, outcome: Outcome, *, last: bool) -> str | None:
        """Make what a stage left the current model."""
        source, changes = self.model, outcome.changes()
        self.chosen = {**self.chosen, **outcome.schemes}
        self.quantization = changes.pop("quantization_config", self.quantization)
        for linears, dense in outcome.entries():
            self.packed, self.dense = self.packed | linears, self.dense | dense
        resized = outcome.result.config
        config = changed(source.config, resized) if resized else source.config
        named = {outcome.renamed(name): tensor for name, tensor in (self.left | self.dense).items()}
        self.left = {name: tensor for name, tensor in named.items() if name is not None}
        if config is not source.config:
            self.dense = {}
        weights = dict(self.left)
        for name, codes in self.packed.items():
            weight = registry.dequantize(codes)
            weights[f"{name}.weight"] = (
                weight.T if isinstance(source.model.get_submodule(name), Conv1D) else weight
            )
        if config.tie_word_embeddings:
            for tensors in (self.left, weights):
                tensors[f"{source.anatomy.head}.weight"] = tensors[f"{source.anatomy.embedding}.weight"]
        self.model = InMemoryModel(
            config,
            weights,
            source.device,
            quantized=self.packed,
            layouts=outcome.layouts,
            ties=outcome.ties,
            divided=[*source.divided],
        )
        for name, codes in self.packed.items():
            reader, inputs = (
                self.model.reader(name),
                self.chosen[name].inputs(getattr(codes, "input_scale", None)),
            )
            if reader and inputs:
                self.model.round_inputs(reader, inputs)
        return None


def _student(name: str, seed: int, device: torch.device) -> InMemoryModel:
    """Load the model that takes the place of the base."""
    with scratch_folder() as folder, no_progress_bar():
        place = student_folder(name, folder, seed)
        config = load_config(place)
        model: PreTrainedModel = auto_class(config).from_pretrained(place, config=config)
    return InMemoryModel(model.config, dict(model.state_dict()), device)
