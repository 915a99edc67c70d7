"""The contents of an artefact: weights and config that from_pretrained loads, report, recipe, card and
pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress import hub
from llmcompress.algorithms.overflow import all_finite
from llmcompress.architectures.per_layer import SCHEMA
from llmcompress.architectures.resize import changed, renumbered
from llmcompress.errors import ModelError, OutputError, first_line
from llmcompress.formats import bitsandbytes_layout, integer, registry
from llmcompress.formats.codebook_scheme import CodebookScheme
from llmcompress.formats.registry import AnyLayout, RewrittenLayout, StoredWeight
from llmcompress.formats.schemes import FourBitScheme, GgmlScheme, Int8Scheme, IntegerScheme
from llmcompress.integrations import transformers_quantizer
from llmcompress.integrations.expert_linears import divided_in
from llmcompress.io.checkpoint import by_module
from llmcompress.io.companion_files import is_inside
from llmcompress.io.journal import Journal
from llmcompress.io.output_folder import Writer
from llmcompress.io.safetensors_writer import writing
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.model_config import without_flags
from llmcompress.recipe.recipe import FILE as RECIPE
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.model_card import card, evaluations, front_matter
from llmcompress.report.page import page
from llmcompress.report.schema import (
    CARD,
    CHANGE_PICTURE,
    ERROR_PICTURE,
    EVALUATIONS,
    FILE,
    PAGE,
    TRAINING_PICTURE,
    Report,
)
from llmcompress.stages.base import OUTER, LinearScheme, Stage, StageResult

# packed linears by full name, dense parameters by name in the model
Entry = tuple[dict[str, StoredWeight], dict[str, Tensor]]


class Outcome:
    """What a stage made of a model, read from its journal."""

    def __init__(self, stage: Stage, model: LayerwiseModel, journal: Journal) -> None:
        self.stage, self.model, self.journal = stage, model, journal
        self.result = stage.result(model, journal)
        self.schemes = self.result.schemes

    @property
    def layouts(self) -> dict[str, AnyLayout]:
        """The layouts of the linears that need the plug-in, by full name."""
        return layouts_after(self.result, self.model)

    @property
    def ties(self) -> dict[str, str]:
        """Tensors that are stored as other tensors, by their names in the model. A tied head is left out, as
        its config says that it is tied."""
        found, shapes = dict(self.result.ties), self.model.matrices()
        for target, source in self.model.ties.items():
            linear, other = target.rpartition(".")[0], source.rpartition(".")[0]
            if linear in self.schemes:  # written anew, and still the other's weight
                parts = layout_of(self.schemes[linear]).shapes(*shapes[linear])
                found |= {f"{linear}.{part}": f"{other}.{part}" for part in parts if part != "input_scale"}
            else:
                found[target] = source
        return found

    def entries(self) -> Iterator[Entry]:
        """Yield the journal's entries: layer by layer, the head, and what changed outside the layers.

        Raises ModelError if a tensor is NaN or infinite.
        """
        names = [(self.stage.name, index) for index in range(len(self.model.layers) + 1)]
        for name, index in [*names, (OUTER, 0)]:
            if (entry := self.journal.get(name, index)) is not None and entry:
                for tensor, value in entry.items():
                    if value.is_floating_point() and not all_finite(value):
                        raise ModelError(
                            f"{tensor} is NaN or infinite after stage {self.stage.name}: values are beyond "
                            f"{value.dtype}; take a sound base, or leave the layer or the stage out"
                        )
                yield self._read(entry)

    def _read(self, tensors: Mapping[str, Tensor]) -> Entry:
        linears: dict[str, StoredWeight] = {}
        parts, shapes, layouts = set[str](), self.model.matrices(), self.model.layouts
        ours = [name for name in {**self.schemes, **layouts} if f"{name}.weight" in tensors]
        modules = by_module(tensors)
        for name in dict.fromkeys([*registry.quantized_linears(tensors), *ours]):
            found = registry.parts_of(name, modules.get(name, {}))
            if name in self.schemes:
                linears[name] = self.schemes[name].read(found, shapes[name][1])
            else:  # trained: 4-bit codes come in the native layout, whatever the model's
                layout = layouts.get(name)
                linears[name] = registry.read(
                    found, layout if isinstance(layout, RewrittenLayout) else None, shapes[name]
                )
            parts |= {f"{name}.{part}" for part in found}
        return linears, {name: tensor for name, tensor in tensors.items() if name not in parts}

    def changes(self) -> dict[str, Any]:
        """The fields of config.json that change."""
        found = dict(self.result.config)
        if self.schemes:
            found["quantization_config"] = quantization_of(self)
        elif SCHEMA in found:  # so that loading asks for the plug-in
            found["quantization_config"] = transformers_quantizer.quantization_config([])
        if self.model.anatomy.embedding in self.schemes and self.model.config.dtype is None:
            found |= _dtype_of(self.model)  # otherwise a loader takes the dtype of a scale
        return found

    @cached_property
    def _removed(self) -> set[str]:
        """The tensors that the stage removes, by their names in the model and in its files."""
        removed = self.result.removed
        return {*removed, *(key for name in removed for key in names_of(name, self.model))}

    def left_of(self, layers: Sequence[int]) -> list[int]:
        """Given one item for each layer, return the items of the layers that stay."""
        return [layer for index, layer in enumerate(layers) if index not in self.result.removed_layers]

    def renamed(self, name: str) -> str | None:
        """The name of a tensor, in the model or in its files, after the stage; None if the stage removes
        it."""
        if name in self._removed:
            return None
        return renumbered(name, self.model.anatomy.layers, self.result.removed_layers)


def _dtype_of(model: LayerwiseModel) -> dict[str, str]:
    """The `dtype` field of config.json: the dtype in which most weights are stored."""
    return {"dtype": str(model.weight_dtype).removeprefix("torch.")}


def names_of(tensor: str, model: LayerwiseModel) -> list[str]:
    """The names of a model's tensor in its files; empty if the model has no files."""
    return model.sources.get(tensor, []) if isinstance(model, DiskModel) else []


def outline_after(result: StageResult, model: LayerwiseModel) -> MetaModel:
    """The outline of the model that a stage with this `result` makes of `model`."""
    config = changed(model.config, result.config) if result.config else model.config
    numbered = {
        renumbered(name, model.anatomy.layers, result.removed_layers): dtype
        for name, dtype in model.dtypes.items()
    }
    dtypes = {name: dtype for name, dtype in numbered.items() if name is not None}
    ties = model.ties | dict(result.ties)
    layouts = layouts_after(result, model)
    # building a skeleton takes most of the time; one that a stage leaves as it is can be shared
    alike = isinstance(model, MetaModel) and not (result.config or model.expert_weights)
    return MetaModel(
        config, model.device, model.dtype, layouts, ties, dtypes, [*model.divided], model if alike else None
    )


def layouts_after(result: StageResult, model: LayerwiseModel) -> dict[str, AnyLayout]:
    """The layouts of the linears that need the plug-in after a stage, by full name; empty for a native
    model."""
    if native_kind(result.schemes, model) is not None:
        return {}
    return model.layouts | {name: layout_of(how) for name, how in result.schemes.items()}


def native_kind(
    chosen: Mapping[str, LinearScheme], model: LayerwiseModel
) -> type[FourBitScheme] | type[Int8Scheme] | None:
    """The native layout of the whole model; None if it has none, or if something else in it needs the
    plug-in."""
    if not model.plain:
        return None
    kinds = {type(coding) for coding in chosen.values()}
    for kind in (FourBitScheme, Int8Scheme):
        if kinds == {kind}:
            return kind
    return None


def quantization_of(outcome: Outcome) -> dict[str, Any]:
    """Return config.json's `quantization_config` for what a stage left."""
    kind, first = native_kind(outcome.schemes, outcome.model), next(iter(outcome.schemes.values()), None)
    skip = bitsandbytes_layout.skip_list(
        list(outcome.result.kept), outcome.schemes, outcome.model.model.base_model_prefix
    )
    # each linear stores its own 4-bit format and group size
    if kind is FourBitScheme and isinstance(first, FourBitScheme):
        return bitsandbytes_layout.quantization_config(first.format, first.double_quant, first.dtype, skip)
    if kind is Int8Scheme and isinstance(first, Int8Scheme):
        return integer.int8_config(first.threshold, skip)
    linears: dict[AnyLayout, list[str]] = {}
    for name, layout in outcome.layouts.items():
        linears.setdefault(layout, []).append(name)
    experts = {name: weights.transposed for name, weights in divided_in(outcome.model.model).items()}
    return transformers_quantizer.quantization_config(list(linears.items()), outcome.ties, experts)


def layout_of(how: LinearScheme) -> AnyLayout:
    """What config.json says of a linear in a model that needs the plug-in."""
    assert not isinstance(how, Int8Scheme), "LLM.int8 is never mixed with other formats"
    own = FourBitScheme | GgmlScheme | IntegerScheme | CodebookScheme
    return how.layout if isinstance(how, own) else how


def write_weights(writer: Writer, model: DiskModel, outcome: Outcome) -> Path:
    """Write weights, config and the base's small files. The returned folder loads with from_pretrained.

    Tensors that the stage made are written under the base's names for them, and all others as the base stores
    them, each in its own dtype. Models in a bitsandbytes format are an exception: a loader casts only their
    biases, and they run only if their dense weights have one dtype. Their dense weights are written in the
    dtype that most weights have, and config.json names it.
    """
    layouts, native_kinds = outcome.layouts, native_kind(outcome.schemes, model) is not None
    native_layout = native_kinds or (model.has_codes and not layouts)
    # several keys that make one parameter, as those of experts do, are written as that parameter
    keys = {target: sources[0] if len(sources) == 1 else target for target, sources in model.sources.items()}
    writer.ties = ties_of(model) | {
        _key(keys, name): _key(keys, source) for name, source in outcome.ties.items()
    }
    replaced: set[str] = set()
    casts = native_kind(outcome.schemes, model) is not None

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(model.weight_dtype) if casts and tensor.is_floating_point() else tensor

    for linears, dense in outcome.entries():
        named = {keys.get(name, name): cast(tensor) for name, tensor in dense.items()}
        for linear, packed in linears.items():
            key = keys.get(f"{linear}.weight", linear).removesuffix(".weight")
            named |= {
                f"{key}.{part}": tensor
                for part, tensor in registry.tensors_of(packed, native=native_layout).items()
            }
        names = (*dense, *(f"{linear}.weight" for linear in linears))
        # an expert that becomes a linear had none
        taken = {key for name in names for key in model.sources.get(name, ())}
        replaced |= {part for key in taken for part in model.with_codes(key)}
        writer.add(named)
    for key in model.checkpoint.tensors:
        if key not in replaced and (name := outcome.renamed(key)) is not None:
            writer.add({name: cast(model.checkpoint.read(key))})
    config = without_flags(model.checkpoint.config) | outcome.changes()
    said, dtypes = model.config.dtype, {*model.dtypes.values()}
    # otherwise a loader takes the dtype of the first tensor
    if (casts and (said or torch.float32) is not model.weight_dtype) or (said is None and len(dtypes) > 1):
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | _dtype_of(model)
    return writer.close(config)


def _key(keys: Mapping[str, str], name: str) -> str:
    """The name of a linear's tensor in the files."""
    linear, _, part = name.rpartition(".")
    return f"{keys[f'{linear}.weight'].removesuffix('.weight')}.{part}"


def ties_of(model: DiskModel) -> dict[str, str]:
    """The head's tensor and the embedding's, if a tied base stores both; the matrix is then written once."""
    head, embedding = (
        model.sources.get(f"{name}.weight") for name in (model.anatomy.head, model.anatomy.embedding)
    )
    return {head[0]: embedding[0]} if model.config.tie_word_embeddings and head and embedding else {}


def require_pictures() -> None:
    """Refuse early if no picture can be drawn, as matplotlib needs a folder of its own. Errors:
    OutputError."""
    try:
        _draws()
    except OSError as error:
        raise OutputError(f"{first_line(error)}, or TMPDIR to one") from error


def _draws(*, trained: bool = False) -> dict[str, Callable[[Report, Path], None]]:
    """The functions that draw the pictures, by file name. matplotlib is imported only here, as that may fail
    where nothing can be written."""
    from llmcompress.report import plots

    found: dict[str, Callable[[Report, Path], None]] = {
        ERROR_PICTURE: plots.error_per_layer,
        CHANGE_PICTURE: plots.before_after,
    }
    return found | ({TRAINING_PICTURE: plots.training_curves} if trained else {})


def companions(report: Report, recipe: Recipe, base: Path, scratch: Path) -> dict[str, str | bytes]:
    """Return the files beside the weights, by name: report.json, recipe.yaml, README.md, the page and the
    pictures.

    The pictures are drawn in a folder within `scratch`. Errors: OutputError if it can't be written.
    """
    readme = base / CARD
    inherited = (
        front_matter(readme.read_text("utf-8", "replace"))
        if readme.is_file() and is_inside(readme, base)
        else {}
    )
    told = recipe.for_others(report).to_yaml()
    files: dict[str, str | bytes] = {FILE: report.to_json(), RECIPE: recipe.to_yaml()}
    files |= {CARD: card(report, told, inherited), PAGE: page(report, told)}
    if entries := evaluations(report):
        files[EVALUATIONS] = hub.evaluation_results(entries)
    with writing(scratch), tempfile.TemporaryDirectory(dir=scratch) as folder:
        for name, draw in _draws(trained=bool(report.trainings)).items():
            draw(report, Path(folder) / name)
            files[name] = (Path(folder) / name).read_bytes()
    return files
