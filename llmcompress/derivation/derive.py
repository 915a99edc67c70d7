"""The anatomy of a model: from the table of families, or derived on a tiny model of its config and proved.

A tiny model is the first layers of the model with other sizes, as many as hold one of each kind. What a pass
through it shows is proved there, and what can't be proved is refused: nothing is guessed from names. So a
family that is new in transformers needs no line here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from llmcompress.architectures.families import table_of
from llmcompress.architectures.spec import Anatomy
from llmcompress.derivation import proof_cache
from llmcompress.derivation.assembly import Found, Kind, fits
from llmcompress.derivation.axes import proved_axes
from llmcompress.derivation.config_fields import Setting
from llmcompress.derivation.handing_on import layers_that_write
from llmcompress.derivation.proofs import prove_causal, prove_poison, proved_walk
from llmcompress.derivation.readers import Readers, readers_of
from llmcompress.derivation.scales import final_norm, proved_crossings
from llmcompress.derivation.subject import (
    Subject,
    described,
    first_of_each_kind,
    kind_of,
    layers_at,
    paths_of_layers,
    tied_in_layers,
)
from llmcompress.derivation.turns import proved_turns
from llmcompress.errors import CompressError, ModelError

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
    by_batch, handed_on = proved_walk(subject)
    subject = replace(subject, form=replace(subject.form, handed_on=handed_on))
    subject = replace(subject, writers=layers_that_write(subject))
    kinds: dict[Hashable, Kind] = {}
    each_kind = [kind_of(layer) for layer in subject.layers]
    for kind, index in first_of_each_kind(subject.layers).items():
        writes = any(each_kind[writer] == kind for writer in subject.writers)
        readers, crossings = proved_readers(subject, index), proved_crossings(subject, index)
        kinds[kind] = Kind(subject.layers[index], f"{path}.{index}", readers, crossings, writes)
    experts = {
        f"{path}.{index}.{name}": transposed
        for index, kind in enumerate(each_kind)
        for name, transposed in kinds[kind].readers.experts.items()
    }
    setting, tied = Setting.of(subject, experts), tied_in_layers(model, path)
    wanted = [kinds.get(kind_of(layer)) for layer in layers]
    axes = [each for each in proved_axes(setting) if fits(each, model, path, wanted, tied)]
    found = Found(subject, axes, setting.reads, final_norm(subject), by_batch)
    tiny = found.anatomy(subject.model, [kinds[kind] for kind in each_kind], {})
    turns = frozenset[str]() if tied else proved_turns(subject, tiny)
    return found.anatomy(model, wanted, tied, turns)


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
