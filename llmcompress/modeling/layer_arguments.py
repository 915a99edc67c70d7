"""What each layer is called with beside its states: masks, rotary tables, or an input of its own.

In most families the arguments are the same for all texts. They are then recorded once for each batch size.
Where they depend on the tokens (`Anatomy.arguments_by_batch`), the model's entry runs again for the tokens of
a batch when it first reaches a layer. What differs from the arguments of the layer's first batch is kept on
the CPU, as hidden states are, until the layer is done. So memory holds the arguments of one layer, and not
those of all layers for all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from llmcompress.integrations import layer_calls
from llmcompress.integrations.layer_calls import sharing
from llmcompress.modeling.host_memory import moved, to_host
from llmcompress.modeling.layerwise import LayerwiseModel

# sequences of a call, the number of the first one in the text -> the arguments of one layer. The number is
# None if the caller does not know it, which is an error if the arguments depend on the tokens.
CallArguments = Callable[[int, int | None], Mapping[str, Any]]


def no_arguments(count: int, first: int | None) -> Mapping[str, Any]:
    """The arguments of a module that takes its states alone."""
    return {}


class Arguments:
    """The arguments that the layers of a model are called with, for some batches of one text."""

    def __init__(self, resident: LayerwiseModel, batches: Sequence[Tensor]) -> None:
        """batches: tokens [B, L] each; their sequences are numbered through."""
        self.resident, self.batches = resident, batches
        self.by_batch = resident.anatomy.arguments_by_batch
        self._by_size: dict[int, Sequence[Mapping[str, Any]]] = {}
        self._tokens: Tensor | None = None
        self._embedding: Tensor | None = None

    def keep_embedding(self) -> None:
        """Let later calls have the arguments that the embedding of now gives, whatever it becomes."""
        if self.by_batch:
            self._embedding = self._embedding_weight().data

    def enter(self, tokens: Tensor) -> Tensor:
        """Return the states [B, L, D] of a batch of tokens [B, L] that enter the first layer."""
        hidden, called = self._entering(tokens)
        if not self.by_batch:
            self._by_size.setdefault(len(tokens), called)
        return hidden

    def of_layer(self, index: int) -> CallArguments:
        """The arguments of one layer; those of its batches are kept as long as this is."""
        if self.by_batch:
            return _OfTokens(partial(self._recorded, index), self.resident.device)
        return partial(self._of_size, index)

    def _of_size(self, index: int, count: int, first: int | None) -> Mapping[str, Any]:
        if count not in self._by_size:
            length = self.batches[0].shape[1]
            self._by_size[count] = self._entering(anything(self.resident, count, length))[1]
        return self._by_size[count][index]

    @torch.no_grad()
    def _recorded(self, index: int, count: int, first: int) -> Mapping[str, Any]:
        """The arguments of a layer for so many sequences, from the number `first` on."""
        if self._tokens is None:
            self._tokens = torch.cat(list(self.batches))
        weight = self._embedding_weight()
        current = weight.data
        try:
            weight.data = current if self._embedding is None else self._embedding
            return self._entering(self._tokens[first : first + count])[1][index]
        finally:
            weight.data = current

    def _entering(self, tokens: Tensor) -> tuple[Tensor, list[Mapping[str, Any]]]:
        resident = self.resident
        return layer_calls.entering(
            resident.model, resident.layers, tokens.to(resident.device), resident.anatomy.form
        )

    def _embedding_weight(self) -> nn.Parameter:
        return self.resident.model.get_parameter(f"{self.resident.anatomy.embedding}.weight")


class _OfTokens:
    """The arguments of one layer where they depend on the tokens. They are recorded when they are first asked
    for."""

    def __init__(self, record: Callable[[int, int], Mapping[str, Any]], device: torch.device) -> None:
        self.record, self.device = record, device
        self.first: dict[int, Mapping[str, Any]] = {}  # of the first batch of each size
        self.kept: dict[tuple[int, int], Mapping[str, Any]] = {}  # what differs is on the CPU

    def __call__(self, count: int, first: int | None) -> Mapping[str, Any]:
        if first is None:
            raise ValueError("which sequences are they? The arguments of this layer depend on their tokens")
        if (count, first) not in self.kept:
            own = self.record(count, first)
            common = self.first.setdefault(count, tree_map(_alone, dict(own)))
            shared = {id(value) for value in tree_leaves(common)}
            self.kept[count, first] = tree_map(
                lambda value: value if id(value) in shared else to_host(_alone(value)), sharing(own, common)
            )
        return moved(self.kept[count, first], self.device)  # type: ignore[no-any-return]


def _alone(value: Any) -> Any:
    """A value without the rest of what it is a view of."""
    view = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if view else value


def anything(resident: LayerwiseModel, sequences: int, length: int) -> Tensor:
    """Tokens [S, L] whose values do not matter."""
    padding = getattr(resident.text_config, "pad_token_id", None)
    token = 1 if padding == 0 else 0  # transformers warns of padding
    return torch.full((sequences, length), token, device=resident.device)
