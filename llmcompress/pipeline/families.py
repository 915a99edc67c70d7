"""`families`: what is known of each type of causal language model that transformers has."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmcompress.architectures.families import table_of
from llmcompress.architectures.spec import Anatomy
from llmcompress.derivation.derive import anatomy_of, derived
from llmcompress.derivation.example_configs import causal_types, example_config
from llmcompress.derivation.subject import layers_at
from llmcompress.errors import CompressError, ModelError, first_line
from llmcompress.integrations.linear_modules import shape_of
from llmcompress.integrations.transformers_compat import logging
from llmcompress.modeling.model_config import skeleton
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.stages.prune.experts import AXIS as EXPERT
from llmcompress.stages.prune.experts import are_called
from llmcompress.stages.prune.stage import cuttable


@dataclass(frozen=True)
class FamilyFacts:
    """What is known of one type of model, with the config that its class has by default.

    `level` is that of its anatomy, 0 if its layers can't be run one by one. The linears that stages may
    rewrite hold `share` of the weights of the layers. `axes` can be cut in all layers that have them, `turns`
    are the rotations, R1 and R2. `why` says what is kept, or why there is no level.
    """

    model_type: str
    level: int
    derived: bool = True  # or in the table
    share: float = 0.0
    axes: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


def known_families(types: Sequence[str] = (), track: Track = untracked) -> list[FamilyFacts]:
    """What is known of some types of models, by default of all causal language models.

    Reads no weights; each type takes a second or two, once. Errors: ModelError for a type that transformers
    does not have.
    """
    every = causal_types()
    if unknown := [name for name in types if name not in every]:
        raise ModelError(
            f"transformers has no causal language model of type {unknown[0]}; leave the names out to see all"
        )
    wanted, level = types or every, logging.get_verbosity()
    logging.set_verbosity_error()  # of kernels that a family would like to have
    try:
        return [_facts(name) for name in track(wanted, "look at families", len(wanted))]
    finally:
        logging.set_verbosity(level)


def _facts(model_type: str) -> FamilyFacts:
    try:
        model = skeleton(example_config(model_type), torch.float32)
        anatomy = anatomy_of(model)
    except CompressError as error:
        return FamilyFacts(model_type, 0, why=(_reason(error),))
    each = [anatomy.of_layer(index) for index in range(len(layers_at(model, anatomy.layers)))]
    linears, every = _weights(model, each)
    kept = {why for of in each for why in of.kept.values()}
    in_table = table_of(model.config) is not None
    proved = derived(model) if in_table else anatomy  # the table leaves it to the config what can be cut
    return FamilyFacts(
        model_type,
        anatomy.level,
        derived=not in_table,
        share=linears / every,
        axes=_cut(model, proved),
        turns=tuple(sorted(proved.turns or ())),
        why=tuple(sorted(kept)),
    )


def _cut(model: PreTrainedModel, anatomy: Anatomy) -> tuple[str, ...]:
    """The axes that `prune` cuts: experts only where each of them can be told apart by its work."""
    layers = layers_at(model, anatomy.layers)
    told = all(
        are_called(layer, anatomy.of_layer(index))
        for index, layer in enumerate(layers)
        if anatomy.of_layer(index).experts
    )
    return tuple(axis for axis in cuttable(anatomy) if axis != EXPERT or told)


def _weights(model: PreTrainedModel, each: Sequence[Anatomy]) -> tuple[int, int]:
    """The number of weights in linears of layers that stages may rewrite, and of all weights of layers, those
    of several layers once."""
    tied = [name for name in model.all_tied_weights_keys if name.startswith(f"{each[0].layers}.")]
    linears, every = 0, -sum(model.get_parameter(name).numel() for name in tied)
    for layer, anatomy in zip(layers_at(model, each[0].layers), each, strict=True):
        every += sum(parameter.numel() for parameter in layer.parameters())
        linears += sum(math.prod(shape_of(layer.get_submodule(name))) for name in anatomy.linears)
        linears += sum(layer.get_parameter(name).numel() for name in anatomy.experts)
    return linears, every


def _reason(error: CompressError) -> str:
    """What a derivation found, without the words around it."""
    said = first_line(error)
    if found := re.search(r"layer by layer: (.*); take a model of another family", said):
        return found[1]
    return said
