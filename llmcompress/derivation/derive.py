"""The anatomy of a model: from the table of families, or derived on a tiny model of its config and proved.

A tiny model is the first layers of the model with other sizes, as many as hold one of each kind. What a pass
through it shows is proved there, and what can't be proved is refused: nothing is guessed from names. So a
family that is new in transformers needs no line here.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompress.architectures.families import table_of
from llmcompress.architectures.spec import LINEARS, SCALES, Anatomy
from llmcompress.derivation import proof_cache
from llmcompress.derivation.proofs import prove_causal, prove_poison, proved_walk
from llmcompress.derivation.readers import Readers, readers_of
from llmcompress.derivation.scales import Crossing, proved_crossings
from llmcompress.derivation.spelling import spelled
from llmcompress.derivation.subject import (
    Subject,
    described,
    first_of_each_kind,
    kind_of,
    layers_at,
    paths_of_layers,
    tied_in_layers,
)
from llmcompress.errors import CompressError, ModelError
from llmcompress.integrations.linear_modules import is_linear
from llmcompress.integrations.transformers_compat import Conv1D


@dataclass(frozen=True)
class Kind:
    """A kind of layer: one of the tiny model, and what is proved of it."""

    tiny: nn.Module
    readers: Readers
    crossings: Sequence[Crossing]


_DERIVED: dict[str, Anatomy] = {}  # in this process, by the key of the cache


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model; its weights are not read.

    Errors: ModelError for a config that the family's rows don't cover, and for a family that the table lacks
    and that can't be walked, with the proof that failed.
    """
    if (table := table_of(model.config)) is not None:
        return table.at(model.config)
    key = proof_cache.key_of(model)
    if key not in _DERIVED:
        found = proof_cache.kept(key)
        if found is None:
            found = derived(model)
            proof_cache.keep(key, found)
        _DERIVED[key] = found
    return _DERIVED[key]


def derived(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model as its tiny twin shows it. Errors: ModelError as for `anatomy_of`."""
    try:
        with _one_thread():
            return _derived(model)
    except CompressError as error:
        why, cause = str(error), None
    except Exception as error:  # each family fails in its own way
        why, cause = described(error), error
    raise ModelError(
        f"a {model.config.model_type} model can't be compressed layer by layer: {why}; take a model of "
        "another family (`llmcompress families`)"
    ) from cause


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread within the context: a tiny model has no work for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _derived(model: PreTrainedModel) -> Anatomy:
    """Prove a tiny model, and carry what is proved of each kind of layer to the layers of the model."""
    subject = _subject(model)
    path, layers = subject.path, layers_at(model, subject.path)
    if (why := prove_causal(subject)) is not None:
        raise ModelError(why)
    by_batch = proved_walk(subject)
    kinds: dict[Hashable, Kind] = {}
    for kind, index in first_of_each_kind(subject.layers).items():
        readers, crossings = proved_readers(subject, index), proved_crossings(subject, index)
        kinds[kind] = Kind(subject.layers[index], readers, crossings)
    common = Anatomy(
        family=model.config.model_type,
        layers=path,
        layer={},
        outer={
            name: _shape(parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{path}.")
        },
        consumers=(),
        scale_pairs={},
        sizes={},
        embedding=_name(model, model.get_input_embeddings()),
        head=_name(model, model.get_output_embeddings()),
        norm=None,
        level=LINEARS,
        returned_items=subject.returned_items,
        arguments_by_batch=by_batch,
    )
    hidden = model.config.get_text_config(decoder=True).hidden_size
    tied = tied_in_layers(model, path)
    each = tuple(
        _of_layer(common, index, layer, kinds, hidden, tied.get(index, set()))
        for index, layer in enumerate(layers)
    )
    level = max(of.level for of in each)
    return replace(each[0], level=level, each_layer=each if any(of != each[0] for of in each) else ())


def _subject(model: PreTrainedModel) -> Subject:
    """The tiny model of a model. Errors: ModelError if no list of its modules are the layers of a text."""
    why = ""
    for path in paths_of_layers(model):
        try:
            return Subject.like(model, path)
        except CompressError as error:
            why = str(error)
        except Exception as error:  # each family fails in its own way
            why = f"no text goes through a small model of its config ({described(error)})"
    raise ModelError(why)


def proved_readers(subject: Subject, index: int) -> Readers:
    """The linears of a layer by what they read, without those whose weight is read by another module too."""
    found = readers_of(subject, index)
    prefix = f"{subject.path}.{index}."
    seen = prove_poison(subject, [prefix + name for group in found.groups for name in group])
    found.kept |= {name.removeprefix(prefix): why for name, why in seen.items()}
    groups = [tuple(name for name in group if name not in found.kept) for group in found.groups]
    found.groups = [group for group in groups if group]
    return found


def _of_layer(
    common: Anatomy,
    index: int,
    layer: nn.Module,
    kinds: Mapping[Hashable, Kind],
    hidden: int,
    tied: Collection[str],
) -> Anatomy:
    """The facts of one layer, some of whose parameters other layers have too: these stay as they are. Errors:
    ModelError if the tiny model has none of its kind."""
    found = kinds.get(kind_of(layer))
    if found is None:
        raise ModelError(f"layer {index} is of a kind that no small model of this config has")
    readers, crossings = _untied(found, layer, tied) if tied else (found.readers, found.crossings)
    groups = readers.groups
    linears = {name for group in groups for name in group}
    conv1d = {name for name in linears if isinstance(layer.get_submodule(name), Conv1D)}
    spelling = spelled(layer, found.tiny, crossings, hidden)
    return replace(
        common,
        layer=spelling.rows,
        consumers=tuple(groups),
        scale_pairs=spelling.pairs,
        counts=spelling.sizes,
        norm_offset=spelling.offset,
        kept=readers.kept,
        experts=readers.experts,
        conv1d=frozenset(conv1d),
        level=SCALES if spelling.pairs else LINEARS,
    )


def _untied(kind: Kind, layer: nn.Module, tied: Collection[str]) -> tuple[Readers, list[Crossing]]:
    """What is proved of a kind of layer, without what would change parameters that are tied."""
    why = "is a weight of several layers"
    modules = {name.rpartition(".")[0] for name in tied}
    matrices = {
        name.removesuffix(".weight") if is_linear(layer.get_submodule(name.rpartition(".")[0])) else name
        for name in tied
        if layer.get_parameter(name).dim() > 1
    }
    groups = [tuple(name for name in group if name not in modules) for group in kind.readers.groups]
    readers = Readers(
        [group for group in groups if group],
        kind.readers.kept | dict.fromkeys(sorted(matrices), why),
        {name: how for name, how in kind.readers.experts.items() if name not in tied},
    )
    crossings = [
        crossing
        for crossing in kind.crossings
        if modules.isdisjoint({crossing.producer, *crossing.readers}) and not {*crossing.readers} & {*tied}
    ]
    return readers, crossings


def _shape(parameter: nn.Parameter) -> str:
    """The shape of a parameter as a row without axes; a number alone is one of one element."""
    return " ".join(map(str, parameter.shape)) or "1"


def _name(model: PreTrainedModel, module: nn.Module | None) -> str:
    """The full name of a module that a model gives out. Errors: ModelError if it gives out none."""
    found: str | None = next((name for name, each in model.named_modules() if each is module), None)
    if found is None:
        raise ModelError("it has no embedding or no output head of its own")
    return found
