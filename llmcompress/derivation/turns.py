"""Which rotations leave what a model computes: proved on a tiny model, rotated by its own anatomy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from llmcompress.architectures.rotation import Rotation
from llmcompress.architectures.spec import R1, R2, Anatomy
from llmcompress.derivation.shrink import tiny_model
from llmcompress.derivation.subject import Subject, logits
from llmcompress.errors import ModelError


def proved_turns(subject: Subject, anatomy: Anatomy) -> frozenset[str]:
    """The rotations of a tiny model, whose anatomy this is, that are proved."""
    return frozenset(turn for turn in (R1, R2) if _holds(subject, anatomy, turn))


@torch.no_grad()
def _holds(subject: Subject, anatomy: Anatomy, turn: str) -> bool:
    """Whether the logits stay once a tiny model is rotated. Its head gets a matrix of its own, as R1 asks."""
    config = _untied(subject.model.config)
    state, path = dict(subject.model.state_dict()), anatomy.layers
    asked = replace(anatomy, turns=frozenset({R1, R2}))
    try:
        rotation = Rotation(asked, config, 0, r1=turn == R1, r2=turn == R2)
        turned = rotation.outer({name: state[name] for name in anatomy.outer})
        for index in range(len(subject.layers)):
            own = anatomy.of_layer(index)
            given = {name: state[f"{path}.{index}.{name}"] for name in own.layer}
            layer = rotation.inner(given, own.counts, own)
            turned |= {f"{path}.{index}.{name}": tensor for name, tensor in layer.items()}
        model = tiny_model(config, type(subject.model), dtype=next(subject.model.parameters()).dtype)
        model.load_state_dict({**state, **turned})
        return subject.distance(logits(model, subject.tokens[0])) < subject.exact
    except (ModelError, RuntimeError, ValueError):  # it is refused, or a weight has no row
        return False


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    """A config whose head has a matrix of its own."""
    found = copy.deepcopy(config)
    for each in _parts(found):
        each.tie_word_embeddings = False
    return found


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            yield from _parts(inner)
