"""apply_recipe(): a recipe on a model in memory. Nothing is read from or written to disk but a journal in a
temporary folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.per_layer import build_layers
from llmcompress.architectures.resize import changed
from llmcompress.data.calibration import CalibrationData
from llmcompress.errors import ModelError
from llmcompress.formats import (
    integer_embedding,
    registry,
)
from llmcompress.formats.integer import IntegerWeight
from llmcompress.formats.registry import StoredWeight
from llmcompress.formats.schemes import Int8Scheme
from llmcompress.formats.sparse import SparseWeight
from llmcompress.integrations import transformers_quantizer
from llmcompress.integrations.plain_modules import let_resize
from llmcompress.io.cache import cache_folder
from llmcompress.io.journal import Journal
from llmcompress.io.scratch import scratch_folder
from llmcompress.modeling.from_disk import no_progress_bar
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import Track, logits, untracked
from llmcompress.pipeline.outcome import Outcome
from llmcompress.pipeline.resolve import (
    calibration_data,
    pick_device,
    pin_commits,
    require_same_vocabulary,
    source_of,
    student_folder,
)
from llmcompress.pipeline.stages import report_of, require_possible, run_stage
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import fidelity, parameters, peak_memory_bytes
from llmcompress.report.schema import CostFacts, ModelFacts, Report, StageFacts
from llmcompress.stages.base import Context, LinearScheme, ModelSource


def apply_recipe(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str | None = None,
    track: Track = untracked,
) -> tuple[PreTrainedModel, Report]:
    """Compress a model in memory: changed in place and returned with its report.

    One whose widths change is a new model, and the one given stays as it is. The recipe's `base` is not
    looked at. Raises CompressError as `run_recipe` does; the model is then as it was.
    """
    start = time.monotonic()
    recipe.require_own_names(base="the model given")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("the model in memory is quantised already; give the model that it was made from")
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(
            "the model in memory has a PEFT adapter; give the plain model that its merge_and_unload() returns"
        )
    state, where = dict(model.state_dict()), pick_device(device)
    base = InMemoryModel(model.config, state, where)
    require_possible(recipe, base)
    pinned = pin_commits(recipe)
    require_same_vocabulary(pinned, model.config, tokenizer)
    sequences = calibration_data(base, recipe.data, tokenizer, recipe.training_tokens)
    chained = _chain(pinned, base, sequences, track)
    source, left, packed = chained.source, chained.left, chained.packed
    base_model = InMemoryModel(model.config, state, where)  # as it was, whatever a stage did to the other
    ours, theirs = (
        logits(each, sequences.evaluation, track, sequences.unscored) for each in (source, base_model)
    )
    measured = fidelity(ours, sequences.scored, theirs)
    name = str(model.config._name_or_path or type(model).__name__)
    before = ModelFacts(
        model=name, parameters=parameters(model), size_bytes=_size(state),
        perplexity=measured.base_perplexity, perplexity_ci95=measured.base_perplexity_ci95,
    )  # fmt: skip
    written = {
        f"{linear}.{part}": tensor
        for linear, codes in packed.items()
        for part, tensor in registry.tensors_of(codes, native=source.plain).items()
        if f"{linear}.{part}" not in source.ties
    }
    zeros = sum(
        weight.zeros for weight in packed.values() if isinstance(weight, SparseWeight)
    )  # are no parameters
    dense = {
        name: tensor for name, tensor in left.items() if name.removesuffix(".weight") not in chained.chosen
    }
    after = ModelFacts(
        model=name,
        parameters=source.parameters() - zeros,
        size_bytes=_size(dense) + sum(tensor.nbytes for tensor in written.values()),
        perplexity=measured.perplexity,
        perplexity_ci95=measured.perplexity_ci95,
    )
    cost = CostFacts(seconds=time.monotonic() - start, peak_memory_bytes=peak_memory_bytes(where))
    report = report_of(recipe, before, after, measured, sequences, chained.facts, cost, where)
    report.require(**recipe.accept.model_dump())
    if source.config is not base.config:
        model = _rebuilt(source.config, left, model)
    _tell_tied(model, source.config.tie_word_embeddings, source.anatomy.head)
    for name, tensor in chained.dense.items():
        model.get_parameter(name).data.copy_(tensor)
    if packed:
        _install(model, packed, chained)
    if chained.quantization:
        model.config.quantization_config = chained.quantization
    return model, report


def _tell_tied(model: PreTrainedModel, tied: bool, head: str) -> None:
    """Have config and module agree with the weights on whether the head is the embedding."""
    if tied:
        model.tie_weights()
    elif model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys.pop(f"{head}.weight", None)


@dataclass
class Chained:
    """What the stages have come to: dense weights by name, codes, how they are written, and what changed of
    the dense ones."""

    source: InMemoryModel
    left: dict[str, torch.Tensor]
    packed: dict[str, StoredWeight] = field(default_factory=dict)
    chosen: dict[str, LinearScheme] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None  # of config.json
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: list[StageFacts] = field(default_factory=list)


def _chain(recipe: Recipe, base: InMemoryModel, sequences: CalibrationData, track: Track) -> Chained:
    """Do the stages, each journal in a folder that goes with it."""

    def teacher(name: str | None) -> ModelSource:
        if name is not None:
            return source_of(name, base.device)
        return ModelSource(
            partial(InMemoryModel, base.config, base.source, base.device), base.fingerprint, base.fingerprint
        )

    now = Chained(base, dict(base.source))
    origin = list(range(len(base.layers)))
    if recipe.student:
        now.source, origin = _student(recipe.student, recipe.data.seed, base.device), []
        now.left = dict(now.source.source)
    for stage in recipe.stages:
        with scratch_folder() as folder:
            journal = Journal(folder / "journal", "in memory")
            context = Context(
                teacher, origin, sequences, journal, folder, cache_folder(), recipe.data.seed, track
            )
            now.facts.append(run_stage(stage, now.source, context))
            outcome = Outcome(stage, now.source, journal)
            origin = outcome.left_of(origin)
            _take_in(now, outcome)
    return now


def _take_in(now: Chained, outcome: Outcome) -> None:
    """What a stage made of the model becomes the model."""
    source, changes = now.source, outcome.changes()
    now.chosen = {**now.chosen, **outcome.schemes}
    now.quantization = changes.pop("quantization_config", now.quantization)
    for linears, dense in outcome.entries():
        now.packed, now.dense = now.packed | linears, now.dense | dense
    resized = outcome.result.config
    config = changed(source.config, resized) if resized else source.config
    named = {outcome.renamed(name): tensor for name, tensor in (now.left | now.dense).items()}
    now.left = {name: tensor for name, tensor in named.items() if name is not None}
    if config is not source.config:
        now.dense = {}
    weights = dict(now.left)
    for name, codes in now.packed.items():
        weight = registry.dequantize(codes)
        weights[f"{name}.weight"] = (
            weight.T if isinstance(source.model.get_submodule(name), Conv1D) else weight
        )
    if config.tie_word_embeddings:
        for tensors in (now.left, weights):
            tensors[f"{source.anatomy.head}.weight"] = tensors[f"{source.anatomy.embedding}.weight"]
    now.source = InMemoryModel(
        config, weights, source.device, quantized=now.packed, layouts=outcome.layouts, ties=outcome.ties
    )
    for name, codes in now.packed.items():
        reader, inputs = now.source.reader(name), now.chosen[name].inputs(getattr(codes, "input_scale", None))
        if reader and inputs:
            now.source.round_inputs(reader, inputs)


def _student(name: str, seed: int, device: torch.device) -> InMemoryModel:
    """The model that takes the place of the base."""
    with scratch_folder() as folder, no_progress_bar():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(student_folder(name, folder, seed))
    return InMemoryModel(model.config, dict(model.state_dict()), device)


def _rebuilt(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    """A new model of `config` with the weights of `state`, in the dtype and on the device of another."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=like.dtype)
    anatomy = anatomy_of(config)
    build_layers(model, cast(nn.ModuleList, model.get_submodule(anatomy.layers)), anatomy)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(state[name].dtype)
    model.load_state_dict(dict(state))
    model.to(like.device)  # type: ignore[arg-type]  # a decorator hides its signature
    return cast(PreTrainedModel, model.train(like.training))


def _install(model: PreTrainedModel, packed: dict[str, StoredWeight], chained: Chained) -> None:
    """Put the modules that run on the kernels in place of the linears, and of the embedding; what is shared
    is one tensor."""
    chosen, native_layout = chained.chosen, chained.source.plain
    for name, codes in packed.items():
        plain, coding = model.get_submodule(name), chosen[name]
        if isinstance(plain, nn.Embedding):
            assert isinstance(codes, IntegerWeight)
            shared = [
                linear for linear in chosen if linear not in packed
            ]  # a tied head, whose codes are these
            transformers_quantizer.set_embedding(
                model, name, integer_embedding.embedding(name, plain, codes), *shared
            )
            continue
        kept = plain.bias
        bias = kept if isinstance(kept, nn.Parameter) else None
        threshold = coding.threshold if isinstance(coding, Int8Scheme) else 0.0
        module = registry.linear_of(
            codes, bias, native=native_layout, threshold=threshold, device=model.device
        )
        model.set_submodule(name, module)
    transformers_quantizer.declare_ties(model, chained.source.ties)
    transformers_quantizer.unite(model, chained.source.ties)
    let_resize(model)


def _size(state: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors that a checkpoint would hold, tied ones once."""
    return sum(tensor.nbytes for tensor in {(t.data_ptr(), t.shape): t for t in state.values()}.values())
