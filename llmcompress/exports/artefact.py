"""An artefact as a target reads it: its names, shapes and layouts at once, its tensors one at a time.

Only headers and config are read when it is opened. The weights stay on the disk until a target asks for one,
so that memory is one matrix, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.formats import registry
from llmcompress.formats.base import DTYPES
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.quantization_config import CompressedConfig, read_config
from llmcompress.formats.registry import AnyLayout, StoredWeight
from llmcompress.formats.schemes import FourBitScheme, Int8Scheme
from llmcompress.formats.sparse import SparseLayout
from llmcompress.integrations.transformers_compat import Conv1D
from llmcompress.io.checkpoint import Checkpoint, Entry, check_finite, read_json, require_no_adapter
from llmcompress.modeling.from_disk import dtypes_of, has_own_head, taken
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.modeling.model_config import load_config, require_readable

NativeScheme = FourBitScheme | Int8Scheme  # those of bitsandbytes' own layouts


@dataclass(frozen=True)
class Matrix:
    """A linear or embedding [R, C] whose weight is stored as codes, values or factors, by its full name in
    the model.

    `key` is its name in the files. `layout` is None for bitsandbytes' own layouts, and `format` is then
    `nf4`, `fp4` or `int8`; otherwise it is the name of our format. `tied` names the matrix whose tensors it
    shares.
    """

    name: str
    key: str
    shape: tuple[int, int]
    layout: AnyLayout | None
    format: str
    is_embedding: bool = False
    tied: str | None = None

    @property
    def native(self) -> bool:
        """Whether it is stored in one of bitsandbytes' own layouts."""
        return self.layout is None


class Artefact:
    """A checkpoint folder of which one tensor at a time is in memory.

    `config` is its config.json, `model` its outline with names, shapes and anatomy. Errors: ModelError if the
    folder holds no whole model, or one whose config transformers can't build.
    """

    def __init__(self, folder: Path) -> None:
        require_no_adapter(folder)
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder, base=False)
        self.config: dict[str, Any] = self.checkpoint.config
        require_readable(folder)
        said = self.config.get("quantization_config")
        self.quantization: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        self.ours: CompressedConfig = read_config(said)
        config = load_config(folder)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        layouts = self.ours.assigned()
        self.model = MetaModel(
            config, torch.device("cpu"), torch.float32, layouts, self.ours.ties, divided=[*self.ours.experts]
        )
        self.model.place = str(folder)
        self.checkpoint, self.sources = taken(self.checkpoint, self.model)
        self.model.dtypes = dtypes_of(self.checkpoint, self.sources)
        tied = config.tie_word_embeddings
        if tied and has_own_head(self.checkpoint, self.sources, self.model):
            self.model.untie()
            self.config = self.config | {"tie_word_embeddings": False}
        elif tied:
            self.sources.pop(f"{self.model.anatomy.head}.weight", None)
        self.model.model.tie_weights()  # so that a tied head counts once
        named = self.model.model.named_parameters()
        self.model.require_all(name for name, _ in named if name not in self.sources)

    def input_scales(self, names: Sequence[str]) -> list[float]:
        """The stored scale of the inputs of each of some linears, by full name."""
        keys = [self.matrices[name].key for name in names]
        return [float(self.checkpoint.read(f"{key}.input_scale")) for key in keys]

    @property
    def tied_head(self) -> str | None:
        """The head's full name if its matrix is the embedding's, else None."""
        return self.model.reader(self.model.anatomy.embedding)

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The linears and embeddings that are stored as something else than plain numbers, by full name, in
        the order of the model.

        A head that the config ties to the embedding is left out; a matrix that is tied to that of another
        layer stands here under both names.
        """
        layouts, marked = self.model.layouts, {*registry.quantized_linears(self.checkpoint.tensors)}
        found = {}
        for name, module in self.model.model.named_modules():
            key = self.sources.get(f"{name}.weight", [""])[0].removesuffix(".weight")
            if not key or (name not in layouts and key not in marked):
                continue
            if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                raise ModelError(
                    f"config.json gives {name} a scheme, but this model has no such linear; the config is of "
                    "another model"
                )
            rows, columns = module.get_parameter("weight").shape[:: -1 if isinstance(module, Conv1D) else 1]
            layout, source = layouts.get(name), self.checkpoint.aliases.get(f"{key}.weight")
            found[name] = Matrix(
                name,
                key,
                (rows, columns),
                layout,
                self._format(key) if layout is None else _name_of(layout),
                isinstance(module, nn.Embedding),
                None if source is None else source.removesuffix(".weight"),
            )
        return found

    def _format(self, key: str) -> str:
        """The format of a matrix in one of bitsandbytes' own layouts."""
        if f"{key}.SCB" in self.checkpoint.tensors:
            return "int8"
        return str(self.quantization.get("bnb_4bit_quant_type", "nf4"))

    @cached_property
    def plain(self) -> dict[str, list[str]]:
        """All other tensors: full name in the model -> the keys in the files that it is made of."""
        codes = {f"{name}.weight" for name in self.matrices}
        return {name: keys for name, keys in self.sources.items() if name not in codes}

    @property
    def native(self) -> bool:
        """Whether plain transformers loads it in bitsandbytes' own layouts."""
        return bool(self.matrices) and all(matrix.native for matrix in self.matrices.values())

    @property
    def uneven(self) -> bool:
        """Whether layers have widths of their own, which only `per_layer_config` says."""
        return bool(self.config.get("per_layer_config"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which a loader holds the weights that are no codes."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        if said:
            found: torch.dtype = getattr(torch, str(said).removeprefix("torch."))
            return found
        return self.model.weight_dtype

    def dense_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype of a matrix once it is written as plain numbers: that of its values, or of the model."""
        layout = matrix.layout
        return DTYPES[layout.dtype] if isinstance(layout, SparseLayout) else self.dtype

    def stored(self, matrix: Matrix) -> StoredWeight:
        """Read the codes of a matrix. Errors: ModelError if they are damaged."""
        names = registry.parts_of(matrix.key, self.checkpoint.by_module.get(matrix.key, {}))
        parts = {part: self.checkpoint.read(f"{matrix.key}.{part}") for part in names}
        return registry.read(parts, matrix.layout, matrix.shape)

    def weight(self, matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [R, C] that a matrix stands for."""
        return registry.dequantize(self.stored(matrix), dtype)

    def tensor(self, key: str) -> Tensor:
        """A plain tensor by its key in the files, as it is stored. Errors: ModelError if it is not finite."""
        tensor = self.checkpoint.read(key)
        check_finite(tensor, key)
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every plain tensor by its key in the files, as it is stored, one at a time."""
        for keys in self.plain.values():
            for key in keys:
                yield key, self.tensor(key)

    def settings(self) -> dict[str, Any]:
        """The fields of tokenizer_config.json, empty without one."""
        file = self.folder / "tokenizer_config.json"
        return read_json(file) if file.is_file() else {}


class PlannedArtefact(Artefact):
    """What a recipe would leave of a base: names, shapes and layouts, and no tensor.

    A target says of it whether it can hold it, and in how many bytes. `folder` is that of the base, `model`
    the outline of the result, and `native` the scheme of each linear in one of bitsandbytes' own layouts.
    """

    def __init__(self, folder: Path, model: MetaModel, native: Mapping[str, NativeScheme]) -> None:
        self.folder, self.model, self.schemes = folder, model, native
        self.config = model.config.to_dict()
        first = next(iter(native.values()), None)
        self.quantization = {"llm_int8_threshold": first.threshold} if isinstance(first, Int8Scheme) else {}
        self.ours = read_config(None)
        tied = {*model.tied, *([f"{self.tied_head}.weight"] if self.tied_head else [])}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.model.named_parameters()}
        entries = {
            name: Entry(shape, model.dtype_of(name), "") for name, shape in shapes.items() if name not in tied
        }
        self.checkpoint = Checkpoint(folder, self.config, entries)
        self.sources = {name: [name] for name in entries}

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The linears and embeddings that would be stored as something else than plain numbers."""
        shapes, found = self.model.matrices(), {}
        for name, shape in shapes.items():
            layout, scheme = self.model.layouts.get(name), self.schemes.get(name)
            embedding = name == self.model.anatomy.embedding
            if layout is not None:
                found[name] = Matrix(name, name, shape, layout, _name_of(layout), embedding)
            elif scheme is not None:
                found[name] = Matrix(name, name, shape, None, scheme.format, embedding)
        return found

    def input_scales(self, names: Sequence[str]) -> list[float]:
        """Nothing: the run finds them, and those of linears that read the same input are the same."""
        return []


def _name_of(layout: AnyLayout) -> str:
    """The name of a layout's format, as reports have it."""
    return layout.name if isinstance(layout, SparseLayout | FactoredLayout) else str(layout.format)
