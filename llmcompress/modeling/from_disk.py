"""A model on disk, plain or quantised: a checkpoint folder of which one layer at a time is in memory.

Tensors are loaded with transformers' own loader, which knows every renamed key and merged expert of every
family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llmcompress.errors import ModelError
from llmcompress.formats import registry
from llmcompress.integrations import transformers_quantizer
from llmcompress.integrations.transformers_compat import (
    Conv1D,
    LoadStateDictConfig,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    get_model_conversion_mapping,
    logging,
    rename_source_key,
)
from llmcompress.io.checkpoint import Checkpoint, check_finite, is_beside
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.model_config import load_config, require_stored


class DiskModel(LayerwiseModel):
    """A checkpoint folder. Codes are read as the weights that they stand for, and inputs are rounded as the
    kernels round them."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        quantized: bool = False,
    ) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder, base=not quantized)
        ours = transformers_quantizer.read_config(self.checkpoint.config.get("quantization_config"))
        config = load_config(folder)
        if not quantized:
            require_stored(folder, config, self.checkpoint.tensors)
        self.quantization: Any = getattr(config, "quantization_config", None)
        if self.quantization is not None:
            del config.quantization_config
        super().__init__(config, device, dtype, ours.assigned(), ours.ties, divided=[*ours.experts])
        self._check_layouts()
        self.checkpoint, self.sources = taken(self.checkpoint, self)
        self.dtypes = dtypes_of(self.checkpoint, self.sources)
        head, embedding = (f"{name}.weight" for name in (self.anatomy.head, self.anatomy.embedding))
        if config.tie_word_embeddings and has_own_head(self.checkpoint, self.sources, self):
            self.untie()
            self.checkpoint = replace(
                self.checkpoint, config=self.checkpoint.config | {"tie_word_embeddings": False}
            )
        elif (
            config.tie_word_embeddings and head in self.sources and not self.checkpoint.aliases.get(embedding)
        ):
            # a tied matrix that is stored twice counts once
            twice = {part for key in self.sources.pop(head) for part in self.with_codes(key)}
            self.checkpoint = self.checkpoint.only(self.checkpoint.tensors.keys() - twice)
        self._bring_outer()
        self._round_all_inputs()

    def _check_layouts(self) -> None:
        """Refuse a scheme for a module that is no linear and not the embedding of this model. Errors:
        ModelError."""
        modules = dict(self.model.named_modules())
        for name in self.layouts:
            if not isinstance(modules.get(name), nn.Linear | Conv1D | nn.Embedding):
                raise ModelError(
                    f"config.json gives {name} a scheme, but this model has no such linear; the config is "
                    "of another model"
                )

    @property
    def where(self) -> str:
        return str(self.folder)

    def fingerprint(self) -> str:
        """A digest of config, names, shapes and every byte of the tensors."""
        return self.checkpoint.fingerprint()

    @property
    def has_codes(self) -> bool:
        """Whether any matrix is stored as codes. A model that was only pruned can need the plug-in without
        having any."""
        return bool(self.layouts or registry.quantized_linears(self.checkpoint.tensors))

    def with_codes(self, key: str) -> list[str]:
        """The key of a weight in the checkpoint, with the keys of the scales beside it."""
        return _with_codes(key, self.checkpoint)

    def codes(self, name: str) -> registry.StoredWeight | None:
        """The stored form of a quantised matrix, by the full name of its module; None for a plain matrix."""
        target = f"{name}.weight"
        key = self.sources.get(target, [""])[0]
        names = _parts_of(key, self.checkpoint)
        return self._stored(key, target, names) if len(names) > 1 or name in self.layouts else None

    def _round_all_inputs(self) -> None:
        """Round the inputs of the linears whose kernels round them."""
        quantization = self.quantization or {}
        linears = {
            keys[0].removesuffix(".weight"): target.removesuffix(".weight")
            for target, keys in self.sources.items()
        }
        for name in registry.quantized_linears(self.checkpoint.tensors):
            inputs, reader = None, self.reader(linears[name])
            if linears[name] in self.layouts:
                static = self.checkpoint.tensors.get(f"{name}.input_scale")
                scale = self.checkpoint.read(f"{name}.input_scale").to(self.device) if static else None
                inputs = registry.layout_inputs(self.layouts[linears[name]], scale)
            elif f"{name}.SCB" in self.checkpoint.tensors:
                inputs = registry.int8_inputs(float(quantization.get("llm_int8_threshold", 6.0)))
            if inputs is not None and reader is not None:
                self.round_inputs(reader, inputs)

    def _read(self, key: str, target: str) -> Tensor:
        """Read one tensor of the checkpoint as parameter `target` is stored, with codes turned back into
        weights."""
        names = _parts_of(key, self.checkpoint)
        if len(names) < 2 and target.removesuffix(".weight") not in self.layouts:
            tensor = self.checkpoint.read(key)
        else:
            tensor = registry.dequantize(self._stored(key, target, names), self.dtype)
            conv1d = isinstance(self.model.get_submodule(target.removesuffix(".weight")), Conv1D)
            # codes are [R, C], whatever way the module is stored
            tensor = tensor.T if conv1d else tensor
        check_finite(tensor, key)
        return tensor

    def _stored(self, key: str, target: str, names: Iterable[str]) -> registry.StoredWeight:
        """Read the codes of parameter `target` from the parts `names` beside `key`."""
        linear = target.removesuffix(".weight")
        parts = {part: self.checkpoint.read(f"{key.removesuffix('weight')}{part}") for part in names}
        conv1d = isinstance(self.model.get_submodule(linear), Conv1D)
        rows, columns = self.model.get_parameter(target).shape[:: -1 if conv1d else 1]
        return registry.read(parts, self.layouts.get(linear), (rows, columns))

    def _as_stored(self, name: str) -> Tensor:
        key = self.sources[name][-1]
        tensor, shape = self._read(key, name), self.model.get_parameter(name).shape
        if tensor.shape != shape:
            raise self._misfit(f"{key} is {list(tensor.shape)}, not {list(shape)}")
        return tensor

    @cached_property
    def _conversions(self) -> Any:
        """What a loader changes in the names and tensors of a checkpoint."""
        return get_model_conversion_mapping(self.model)

    def _bring(self, names: Iterable[str]) -> None:
        names = list(names)
        tied = [name for name in names if name in self.tied and name not in self.sources]
        keys = [(key, name) for name in names for key in self.sources.get(name, [])]
        config = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": str(self.device)},
            weight_mapping=self._conversions,
        )
        with no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, {key: self._read(key, name) for key, name in keys}, config
            )
        if info.mismatched_keys or info.conversion_errors:
            wrong = sorted(str(entry) for entry in (info.mismatched_keys or info.conversion_errors))
            raise self._misfit(wrong[0])
        for name in tied:
            owner, _, leaf = name.rpartition(".")
            weight = self._as_stored(self.tied[name]).to(self.device, self.dtype)
            self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(weight)
        for owner, _, leaf in (name.rpartition(".") for name in names):
            if (parameter := self.model.get_submodule(owner)._parameters.get(leaf)) is not None:
                parameter.requires_grad_(False)

    def _misfit(self, what: str) -> ModelError:
        """The error for a tensor of another shape than the config says."""
        return ModelError(f"{self.where} does not fit its config.json: {what}; fetch it again")


def meta_model(folder: Path, config: PretrainedConfig, device: torch.device) -> MetaModel:
    """Return the outline of a plain model. If its files are here, it has the dtypes of their weights and the
    head that they hold.

    Raises ModelError if weights are missing.
    """
    outline = MetaModel(config, device, torch.float32)
    outline.model.tie_weights()  # so that a tied head counts once
    if Checkpoint.is_whole(folder):
        outline.place = str(folder)
        checkpoint, sources = taken(Checkpoint.open(folder), outline)
        outline.dtypes = dtypes_of(checkpoint, sources)
        if config.tie_word_embeddings and has_own_head(checkpoint, sources, outline):
            outline.untie()
        outline.require_all(name for name, _ in outline.model.named_parameters() if name not in sources)
    return outline


def taken(checkpoint: Checkpoint, resident: LayerwiseModel) -> tuple[Checkpoint, dict[str, list[str]]]:
    """Return the part of a checkpoint that a loader takes, and for each tensor of the model the keys that it
    is made of.

    Other tensors are no part of the model, such as masks that old checkpoints store, or layers that this
    class does not have. A tied model may store its one matrix under the head's name; it is then listed under
    the embedding's name too.
    """
    model, sources = resident.model, defaultdict[str, list[str]](list)
    mapping, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for key in checkpoint.tensors:
        # scales belong to the weight beside them
        if ".weight." not in key and not is_beside(key.rpartition(".")[2]):
            target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            target = target if target in known or key not in known else key
            if target in known:
                sources[target].append(key)
    parts = {part for keys in sources.values() for key in keys for part in _with_codes(key, checkpoint)}
    head, embedding = (f"{name}.weight" for name in (resident.anatomy.head, resident.anatomy.embedding))
    aliases: dict[str, str] = {}
    if resident.config.tie_word_embeddings and head in sources and embedding not in sources:
        of = {
            part: part.removeprefix(resident.anatomy.head)
            for part in _with_codes(sources[head][0], checkpoint)
        }
        aliases = {f"{resident.anatomy.embedding}{name}": part for part, name in of.items()}
        sources[embedding] = [embedding]
    return checkpoint.only(parts, aliases), dict(sources)


def dtypes_of(checkpoint: Checkpoint, sources: Mapping[str, Sequence[str]]) -> dict[str, torch.dtype]:
    """The stored dtype of each tensor of the model that is not codes."""
    found = {target: checkpoint.tensors[keys[0]].dtype for target, keys in sources.items()}
    return {target: dtype for target, dtype in found.items() if dtype.is_floating_point}


def has_own_head(
    checkpoint: Checkpoint, sources: Mapping[str, Sequence[str]], resident: LayerwiseModel
) -> bool:
    """Whether the files hold a head that differs from the embedding. The two are compared as a loader does,
    in the dtype that it loads."""
    head, embedding = (
        sources.get(f"{name}.weight") for name in (resident.anatomy.head, resident.anatomy.embedding)
    )
    if not head or not embedding or embedding[0] in checkpoint.aliases:
        return False
    loaded = getattr(torch, str(resident.config.dtype or resident.weight_dtype).removeprefix("torch."))
    one, other = (
        [
            tensor.to(loaded) if tensor.is_floating_point() else tensor
            for tensor in map(checkpoint.read, _with_codes(key, checkpoint))
        ]
        for key in (head[0], embedding[0])
    )
    return len(one) != len(other) or not all(map(torch.equal, one, other))


def _parts_of(key: str, checkpoint: Checkpoint) -> Mapping[str, object]:
    """The tensors of the linear whose weight has a key, by their names in it."""
    linear = key.removesuffix(".weight")
    return registry.parts_of(linear, checkpoint.by_module.get(linear, {}))


def _with_codes(key: str, checkpoint: Checkpoint) -> list[str]:
    linear = key.removesuffix(".weight")
    return [f"{linear}.{part}" for part in _parts_of(key, checkpoint)] if linear != key else [key]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Turn off transformers' progress bar within the context: it draws one at each load, and here one load is
    one layer."""
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()
