"""apply_recipe(): a recipe on a model in memory; nothing is read from or written to disk but a journal in a
temporary folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.architectures.auto_classes import auto_class, has_own_code
from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.per_layer import build_layers, mixed
from llmcompress.data.sources import Effort
from llmcompress.errors import ModelError, RecipeError
from llmcompress.formats import (
    integer_embedding,
    registry,
)
from llmcompress.formats.integer import IntegerWeight
from llmcompress.formats.integer_embedding import IntegerEmbedding
from llmcompress.formats.schemes import Int8Scheme
from llmcompress.formats.sparse import SparseWeight
from llmcompress.integrations import transformers_quantizer
from llmcompress.integrations.expert_linears import divide, divided_in
from llmcompress.integrations.own_classes import let_build
from llmcompress.integrations.plain_modules import let_resize
from llmcompress.kernels.float32_products import fast_float32_products
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import Track, logits, untracked
from llmcompress.pipeline.effort import as_it_ran, effort_facts
from llmcompress.pipeline.kv_cache import cache_facts
from llmcompress.pipeline.memory_store import MemoryStore
from llmcompress.pipeline.report_facts import Compared, Loads, Ran, Stored, model_facts, report_of
from llmcompress.pipeline.resolve import (
    calibration_data,
    name_of,
    require_same_vocabulary,
    resolve,
)
from llmcompress.pipeline.stages import require_possible, run_stages
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.metrics import fidelity, parameters, peak_memory_bytes
from llmcompress.report.schema import CostFacts, Report


@fast_float32_products()
def apply_recipe(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    effort: Effort | None = None,
    device: str | None = None,
    track: Track = untracked,
) -> tuple[PreTrainedModel, Report]:
    """Compress a model in memory. The model is changed in place and returned with its report.

    If its widths or its config change, a new model is returned and the given one stays as it is. The recipe's
    `base` is ignored, and `effort` takes the place of its own. Raises CompressError as `run_recipe` does; the
    model is then unchanged.
    """
    start = time.monotonic()
    recipe.require_own_names(base="the model given")
    if recipe.export:
        raise RecipeError(
            "export needs a folder that is exported; give out, or leave export out of the recipe"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("the model in memory is quantised already; give the model that it was made from")
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(
            "the model in memory has a PEFT adapter; give the plain model that its merge_and_unload() returns"
        )
    let_build(model)
    settled = recipe.with_effort(effort)
    resolved, state = resolve(settled, None, device), dict(model.state_dict())
    pinned, where = resolved.recipe, resolved.device
    # as save_pretrained does: some types have a text class and a multimodal one
    model.config.architectures = model.config.architectures or [type(model).__name__]
    base = InMemoryModel(model.config, state, where)
    require_possible(settled, base)
    require_same_vocabulary(resolved, model.config, tokenizer)
    text = calibration_data(base, settled.data, tokenizer, settled.training_tokens, settled.effort)
    store = MemoryStore(pinned, base)
    facts = run_stages(pinned, store, store.teacher, text, track)
    source = store.model
    base_model = InMemoryModel(model.config, state, where)  # unchanged, whatever a stage did to `base`
    ours, theirs = (logits(each, text.evaluation, track, text.unscored) for each in (source, base_model))
    measured = fidelity(ours, text.scored, theirs)
    name = name_of(model)
    before = model_facts(
        name,
        measured.base_perplexity,
        measured.base_perplexity_ci95,
        stored=Stored(parameters(model), base_model.idle_parameters(), _size(state)),
    )
    after = model_facts(
        name,
        measured.perplexity,
        measured.perplexity_ci95,
        stored=Stored(source.parameters() - _zeros(store), source.idle_parameters(), _stored_size(store)),
    )
    cost = CostFacts(seconds=time.monotonic() - start, peak_memory_bytes=peak_memory_bytes(where))
    chosen = effort_facts(recipe, settled, recipe.data, *text.calibration.shape)
    ran = as_it_ran(settled, text)
    report = report_of(
        Ran(ran, text, where, facts, chosen, cost),
        Compared(before, after, measured),
        Loads(model.config, source.plain, has_own_code(model.config)),
    ).model_copy(update={"kv_cache": cache_facts(source, text.evaluation, text.unscored, track)})
    report.require(**recipe.accept.model_dump())
    return _made(model, base, store), report


def _made(model: PreTrainedModel, base: InMemoryModel, store: MemoryStore) -> PreTrainedModel:
    """Return the model as the stages left it. Everything is built before the given model is changed."""
    config = store.model.config
    built = model if config is base.config else _rebuilt(config, store.left, model)
    modules = _modules(built, store)
    for name, weights in divided_in(store.model.model).items():
        divide(built, name, transposed=weights.transposed)
    dense = [(built.get_parameter(name), tensor) for name, tensor in store.dense.items()]
    for parameter, tensor in dense:
        parameter.data.copy_(tensor)
    _tell_tied(built, config.tie_word_embeddings, store.model.anatomy.head)
    if modules:
        _install(built, modules, store)
    if store.quantization:
        built.config.quantization_config = store.quantization
    return built


def _tell_tied(model: PreTrainedModel, tied: bool, head: str) -> None:
    """Make config and module agree with the weights on whether the head is tied to the embedding."""
    if tied:
        model.tie_weights()
    elif model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys.pop(f"{head}.weight", None)


def _rebuilt(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    """Return a new model of `config` with the weights of `state` in their dtypes, on the device of `like`."""
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=like.dtype)
    if mixed(config):
        anatomy = anatomy_of(config)
        build_layers(model, cast(nn.ModuleList, model.get_submodule(anatomy.layers)), anatomy)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(state[name].dtype)
    model.load_state_dict(dict(state))
    model.to(like.device)  # type: ignore[arg-type]  # a decorator hides its signature
    return cast(PreTrainedModel, model.train(like.training))


def _modules(model: PreTrainedModel, store: MemoryStore) -> dict[str, nn.Module]:
    """Return the modules that run on the kernels, by the names of the plain modules that they replace."""
    found: dict[str, nn.Module] = {}
    for name, codes in store.packed.items():
        scheme = store.chosen[name]
        # an expert is no linear of the model yet
        plain = None if name in store.model.expert_linears else model.get_submodule(name)
        if isinstance(plain, nn.Embedding):
            assert isinstance(codes, IntegerWeight)
            found[name] = integer_embedding.embedding(name, plain, codes)
            continue
        bias = getattr(plain, "bias", None)
        if bias is not None and (corrected := store.dense.get(f"{name}.bias")) is not None:
            bias = corrected.to(bias)
        threshold = scheme.threshold if isinstance(scheme, Int8Scheme) else 0.0
        found[name] = registry.linear_of(
            codes, bias, native=store.model.plain, threshold=threshold, device=model.device
        )
    return found


def _install(model: PreTrainedModel, modules: Mapping[str, nn.Module], store: MemoryStore) -> None:
    """Put modules in place of the plain ones. Shared weights become one tensor."""
    for name, module in modules.items():
        if isinstance(module, IntegerEmbedding):
            shared = [linear for linear in store.chosen if linear not in store.packed]  # a tied head
            transformers_quantizer.set_embedding(model, name, module, *shared)
        else:
            model.set_submodule(name, module)
    transformers_quantizer.declare_ties(model, store.model.ties)
    transformers_quantizer.unite(model, store.model.ties)
    let_resize(model)


def _zeros(store: MemoryStore) -> int:
    """Number of weights that are zero and not stored; they do not count as parameters."""
    return sum(weight.zeros for weight in store.packed.values() if isinstance(weight, SparseWeight))


def _stored_size(store: MemoryStore) -> int:
    """Bytes of the tensors that the compressed model would have on disk."""
    source = store.model
    written = {
        f"{linear}.{part}": tensor
        for linear, codes in store.packed.items()
        for part, tensor in registry.tensors_of(codes, native=source.plain).items()
        if f"{linear}.{part}" not in source.ties
    }
    dense = {
        name: tensor
        for name, tensor in store.left.items()
        if name.removesuffix(".weight") not in store.chosen
    }
    return _size(dense) + sum(tensor.nbytes for tensor in written.values())


def _size(state: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors that a checkpoint would hold, tied ones once."""
    return sum(tensor.nbytes for tensor in {(t.data_ptr(), t.shape): t for t in state.values()}.values())
