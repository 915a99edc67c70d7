"""An int8 input embedding, and an output head tied to it.

A forward looks up rows of the codes and multiplies each by its scale. The tensors are those of an int8 linear
[V, D], so a tied head can be an IntegerLinear on the same tensors: one matrix in memory and on disk. As
there, `weight` has three axes, which no plain embedding has, so a stock loader refuses it. Model families
that scale the looked-up rows do so in embedding classes of their own: the classes known here are reproduced,
others are refused. V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.formats import integer
from llmcompress.formats.base import StoredModule
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.integer_linear import IntegerLinear

# these compute rows * embed_scale, in the type of the rows
SCALED = ("Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


def factor_of(name: str, plain: nn.Module) -> float | None:
    """The factor by which an embedding multiplies its rows, None for a plain one. Errors: ModelError if it
    does anything else."""
    kind = type(plain)
    if not isinstance(plain, nn.Embedding) or (kind is not nn.Embedding and kind.__name__ not in SCALED):
        raise ModelError(
            f"{name} is a {kind.__name__}, and what that computes llmcompress doesn't know; use embedding: "
            "keep"
        )
    if plain.max_norm is not None:
        raise ModelError(
            f"{name} changes its rows as they are read (max_norm), which codes can't; use embedding: keep"
        )
    return None if kind is nn.Embedding else float(cast(Any, plain).scalar_embed_scale)


class IntegerEmbedding(StoredModule, nn.Embedding):
    """An embedding [num_embeddings, embedding_dim] whose parameters are those of a StoredModule.

    It replaces `plain` (called `name` in errors) and returns rows in `dtype`, which follows the casts of the
    model. Errors: ModelError for an embedding class that is not known here.
    """

    scheme: IntegerLayout
    weight_scale: Tensor
    like: Tensor

    def __init__(
        self,
        name: str,
        plain: nn.Module,
        scheme: IntegerLayout,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # skips nn.Embedding's, which allocates a float weight
        self.factor, self.kind = factor_of(name, plain), cast("type[nn.Embedding]", type(plain))
        known = cast(nn.Embedding, plain)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            known.num_embeddings,
            known.embedding_dim,
            known.padding_idx,
        )
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._store(scheme, self.num_embeddings, self.embedding_dim, device)
        # its type is the type of the rows
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] to rows [..., D]."""
        codes = nn.functional.embedding(input, self.weight[0])
        scale = nn.functional.embedding(input, self.weight_scale[:, None])
        rows = (codes.float() * scale).to(self.like.dtype)
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=rows.dtype)

    def prepare(self) -> None:
        """Do nothing: the forward needs the stored tensors alone."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [V, D]. Errors: ModelError if the stored tensors are damaged."""
        return integer.read(self.stored(), self.scheme, self.embedding_dim).dequantize(dtype)

    def plain(self, dtype: torch.dtype) -> nn.Embedding:
        """The float embedding with the same weight."""
        scaled: dict[str, Any] = {} if self.factor is None else {"embed_scale": self.factor}
        with torch.device("meta"):
            plain = self.kind(self.num_embeddings, self.embedding_dim, self.padding_idx, **scaled)
        plain.weight = nn.Parameter(self.dequantized(dtype))
        if self.factor is not None:
            cast(Any, plain).embed_scale = torch.tensor(self.factor, device=self.weight.device)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.format}"


def embedding(name: str, plain: nn.Embedding, weight: IntegerWeight) -> IntegerEmbedding:
    """Return a live module, in eval mode, that holds copies of our codes and scales and has the type of
    `plain`."""
    dtype, device = plain.weight.dtype, plain.weight.device
    module = IntegerEmbedding(name, plain, weight.scheme, dtype=dtype, device=device)
    for part, tensor in weight.tensors().items():
        module.get_parameter(part).data.copy_(tensor)
    return module.eval()


def share(head: IntegerLinear, embedding: IntegerEmbedding) -> None:
    """Make a head multiply by the embedding's own codes and scales."""
    for part in embedding.stored():
        setattr(head, part, getattr(embedding, part))
