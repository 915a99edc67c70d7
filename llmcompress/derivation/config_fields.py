"""Which dimensions of which weights a field of the config decides, seen in the shapes of models without
memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmcompress.derivation.shrink import HIDDEN, SIZES, resized, shrunk
from llmcompress.derivation.subject import Subject
from llmcompress.integrations.linear_modules import is_linear
from llmcompress.integrations.transformers_compat import Conv1D

# fields, by the names that all types share or by their own
FIELDS_OF_HEADS = ("num_attention_heads",)
FIELDS_OF_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_query_groups")
HEAD_DIM, HIDDEN_SIZE = "head_dim", "hidden_size"
OF_OTHER_AXES = ("vocab_size", "num_hidden_layers", HIDDEN_SIZE, *FIELDS_OF_HEADS, *FIELDS_OF_KV_HEADS)
TRIED = 2 * HIDDEN  # a number for a field that is open

Place = tuple[str, int]  # a tensor by its full name, and one of its dimensions
Shapes = Mapping[str, tuple[int, ...]]  # by full name


@dataclass(frozen=True)
class Setting:
    """A tiny model, and the dimensions of its matrices that are inputs."""

    subject: Subject
    reads: frozenset[Place]

    @classmethod
    def of(cls, subject: Subject, experts: Mapping[str, bool]) -> Setting:
        """`experts` are the parameters of experts by full name, and whether their slices are [in, out]."""
        reads = {
            (f"{name}.weight", 0 if isinstance(module, Conv1D) else 1)
            for name, module in subject.model.named_modules()
            if is_linear(module)
        }
        reads |= {(name, 1 if transposed else 2) for name, transposed in experts.items()}
        return cls(subject, frozenset(reads))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint has, tied ones under both names."""
        return dict(self.subject.model.state_dict())

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of these tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    @cached_property
    def parameters(self) -> set[Place]:
        """The dimensions of parameters, which a stage can cut, other than those of buffers."""
        named = self.subject.model.named_parameters(remove_duplicate=False)
        return {(name, dim) for name, parameter in named for dim in range(parameter.dim())}

    @cached_property
    def once(self) -> set[str]:
        """The names of parameters and buffers, tied ones under one name."""
        model = self.subject.model
        return {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}

    @cached_property
    def embeddings(self) -> list[str]:
        """The names of the embedding's matrix."""
        matrix = self.subject.model.get_input_embeddings().weight
        named = self.subject.model.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if parameter is matrix]

    @property
    def text(self) -> PretrainedConfig:
        """The part of the config that describes the decoder."""
        return self.subject.model.config.get_text_config(decoder=True)

    @cached_property
    def fields(self) -> dict[str, int]:
        """The whole numbers of that part, by its own names."""
        return {
            name: value for name, value in self.text.to_dict().items() if type(value) is int and value > 0
        }

    @property
    def head_dim(self) -> int:
        """The width of a head; without heads, that of the states."""
        heads = self.fields.get(self.field(*FIELDS_OF_HEADS) or "", 1)
        return self.fields.get(HEAD_DIM) or int(self.text.hidden_size) // heads

    def field(self, *names: str) -> str | None:
        """The first of some fields that the config has, by its own name."""
        mapped: Mapping[str, str] = self.text.attribute_map
        return next((own for name in names if (own := mapped.get(name, name)) in self.fields), None)

    def counts(self) -> Iterator[tuple[str, int]]:
        """The fields that may count neurons, with the number; of a field that is open, the one that it stands
        for."""
        others = {self.field(name) for name in OF_OTHER_AXES}
        for name, value in self.text.to_dict().items():
            if name in others:
                continue
            if type(value) is int:
                yield name, value
            elif isinstance(value, list) and len(value) == len(self.subject.layers):
                if type(value[0]) is int and len({*value}) == 1:
                    yield name, value[0]
            elif value is None and any(re.fullmatch(pattern, name) for pattern in SIZES):
                lengths = self.changed(self.narrow({name: TRIED}))
                shares = {Fraction(self.shapes[tensor][dim], n) for (tensor, dim), n in lengths.items()}
                if len(shares) == 1 and (size := TRIED * shares.pop()).denominator == 1:
                    yield name, int(size)

    def said(self, fields: Mapping[str, int]) -> dict[str, Any]:
        """Fields as the config writes them: a list with an entry per layer stays one."""
        layers = len(self.subject.layers)
        lists = {name for name in fields if isinstance(getattr(self.text, name, None), list)}
        return {name: [count] * layers if name in lists else count for name, count in fields.items()}

    def narrow(self, fields: Mapping[str, Any]) -> Shapes | None:
        """The shapes of a model with other fields; None if there is no such model with the same tensors, or
        if it would have no tiny copy itself."""
        model = self.subject.model
        try:
            config = resized(model.config, fields)
            shrunk(config, len(self.subject.layers))
            with torch.device("meta"):
                tensors = type(model)._from_config(config).state_dict()
        except Exception:  # each family checks its fields in its own way
            return None
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        alike = found.keys() == self.shapes.keys()
        return found if alike and all(len(found[name]) == len(self.shapes[name]) for name in found) else None

    def changed(self, shapes: Shapes | None) -> dict[Place, int]:
        """The dimensions that differ in other shapes, with their lengths there."""
        return {
            (name, dim): length
            for name, shape in (shapes or {}).items()
            for dim, length in enumerate(shape)
            if length != self.shapes[name][dim]
        }

    def inside(self, places: Iterable[Place]) -> bool:
        """Whether dimensions are all of parameters of layers."""
        prefix = f"{self.subject.path}."
        return all(place in self.parameters and place[0].startswith(prefix) for place in places)

    def layer_of(self, tensor: str) -> str:
        """The name of the layer that a tensor is in."""
        number = tensor.removeprefix(f"{self.subject.path}.").partition(".")[0]
        return f"{self.subject.path}.{number}"

    def writes_states(self, place: Place) -> bool:
        """Whether a matrix that reads a dimension writes the channels of the states."""
        tensor, dim = place
        shape = self.shapes[tensor]
        return prod(shape[-2:]) // shape[dim] == int(self.text.hidden_size)
