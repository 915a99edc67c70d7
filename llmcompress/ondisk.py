"""A model that lies on disk, plain or quantised: a checkpoint folder of which one block at a time is in memory.

The reading goes through transformers' own loader, which knows every renamed key and merged expert of every family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from llmcompress import plugin, stored
from llmcompress.checkpoint import BESIDE, FACTORS, Checkpoint, check_finite
from llmcompress.errors import ModelError
from llmcompress.residency import Resident


class OnDisk(Resident):
    """A checkpoint folder; codes are read as the weights they stand for, and inputs are rounded as the kernels round them."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, *, quantized: bool = False
    ) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder, base=not quantized)
        ours = plugin.read_config(self.checkpoint.config.get("quantization_config"))
        config = AutoConfig.from_pretrained(folder)
        self.quantization: Any = getattr(config, "quantization_config", None)
        if self.quantization is not None:
            del config.quantization_config
        super().__init__(config, device, dtype, ours.assigned(), ours.ties)
        self._check_layouts()
        self.sources = self._sources()
        self._bring_outer()
        self._round_all_inputs()

    def _check_layouts(self) -> None:
        """Refuse a scheme for what is no linear of this model, nor its embedding. Errors: ModelError."""
        modules = dict(self.model.named_modules())
        for name in self.layouts:
            if not isinstance(modules.get(name), nn.Linear | Conv1D | nn.Embedding):
                raise ModelError(
                    f"config.json gives {name} a scheme, but this model has no such linear; the config is of another model"
                )

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def weight_dtype(self) -> torch.dtype:
        every = (self.checkpoint.tensors[key].dtype for keys in self.sources.values() for key in keys)
        dtypes = [dtype for dtype in every if dtype.is_floating_point]  # of weights, and not of the scales beside them
        return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32

    def fingerprint(self) -> str:
        """A digest over config, names, shapes and every byte of the tensors."""
        return self.checkpoint.fingerprint()

    @property
    def has_codes(self) -> bool:
        """Whether any matrix is no plain one; a model that was only pruned can ask for our plug-in too."""
        return bool(self.layouts or stored.quantized_linears(self.checkpoint.tensors))

    def with_codes(self, key: str) -> list[str]:
        """A weight's key in the checkpoint, with those of the scales beside it."""
        linear = key.removesuffix(".weight")
        return [f"{linear}.{part}" for part in stored.parts_of(linear, self.checkpoint.tensors)] if linear != key else [key]

    def codes(self, name: str) -> stored.Stored | None:
        """How a quantised matrix is stored, by the full name of its module; None where it is a plain one."""
        target = f"{name}.weight"
        key = self.sources.get(target, [""])[0]
        names = stored.parts_of(key.removesuffix(".weight"), self.checkpoint.tensors)
        return self._stored(key, target, names) if len(names) > 1 or name in self.layouts else None

    def _sources(self) -> dict[str, list[str]]:
        """For each parameter of the skeleton, the keys of the checkpoint that it is made of."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        sources: dict[str, list[str]] = defaultdict(list)
        for key in self.checkpoint.tensors:
            if ".weight." not in key and not key.endswith((*BESIDE, *FACTORS)):  # scales belong to the weight beside them
                target, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
                sources[target].append(key)
        return dict(sources)

    def _round_all_inputs(self) -> None:
        """Have the linears read what their kernels will, where these round it."""
        quantization = self.quantization or {}
        linears = {keys[0].removesuffix(".weight"): target.removesuffix(".weight") for target, keys in self.sources.items()}
        for name in stored.quantized_linears(self.checkpoint.tensors):
            inputs, reader = None, self.reader(linears[name])
            if linears[name] in self.layouts:
                static = self.checkpoint.tensors.get(f"{name}.input_scale")
                scale = self.checkpoint.read(f"{name}.input_scale").to(self.device) if static else None
                inputs = stored.layout_inputs(self.layouts[linears[name]], scale)
            elif f"{name}.SCB" in self.checkpoint.tensors:
                inputs = stored.int8_inputs(float(quantization.get("llm_int8_threshold", 6.0)))
            if inputs is not None and reader is not None:
                self.round_inputs(reader, inputs)

    def _read(self, key: str, target: str) -> Tensor:
        """One tensor of the checkpoint as parameter `target` is stored, codes turned back into weights."""
        names = stored.parts_of(key.removesuffix(".weight"), self.checkpoint.tensors)
        if len(names) < 2 and target.removesuffix(".weight") not in self.layouts:
            tensor = self.checkpoint.read(key)
        else:
            tensor = stored.dequantize(self._stored(key, target, names), self.dtype)
            conv1d = isinstance(self.model.get_submodule(target.removesuffix(".weight")), Conv1D)
            tensor = tensor.T if conv1d else tensor  # codes are rows of outputs, whatever way the module is stored
        check_finite(tensor, key)
        return tensor

    def _stored(self, key: str, target: str, names: Iterable[str]) -> stored.Stored:
        """The codes of parameter `target`, whose parts are called so beside `key`."""
        linear = target.removesuffix(".weight")
        parts = {part: self.checkpoint.read(f"{key.removesuffix('weight')}{part}") for part in names}
        conv1d = isinstance(self.model.get_submodule(linear), Conv1D)
        rows, columns = self.model.get_parameter(target).shape[:: -1 if conv1d else 1]
        return stored.read(parts, self.layouts.get(linear), (rows, columns))

    def _bring(self, names: Iterable[str]) -> None:
        keys = [(key, name) for name in names for key in self.sources.get(name, [])]
        config = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": str(self.device)},
            weight_mapping=get_model_conversion_mapping(self.model),  # type: ignore[arg-type]
        )
        with no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, {key: self._read(key, name) for key, name in keys}, config
            )
        if info.mismatched_keys or info.conversion_errors:
            wrong = sorted(str(entry) for entry in (info.mismatched_keys or info.conversion_errors))
            raise ModelError(f"{self.where} does not fit its config.json: {wrong[0]}; fetch it again")
        self.model.requires_grad_(False)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Transformers draws a bar at each load; here one load is one block."""
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()
