"""An input embedding in int8, and an output head that is the same matrix.

An embedding is looked up and not multiplied: a forward takes the rows of the codes, times the scale of each.
Its tensors are those of an int8 linear [V, D], so that a tied head can be an IntegerLinear that multiplies by
the very same ones: one matrix in memory and on the disk. As there, `weight` has three axes that no plain
embedding has, for a stock loader to refuse. Families that scale what they look up do so in a class of their
own; those known here are done alike, others are refused. V vocabulary, D width.
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

# rows * embed_scale, in the type of the rows
SCALED = ("Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


def factor_of(name: str, plain: nn.Module) -> float | None:
    """What an embedding multiplies its rows by, None for a plain one. Errors: ModelError for one that does
    anything else."""
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
    """An embedding [num_embeddings, embedding_dim] of a StoredModule's parameters.

    It takes the place of `plain` (called `name` in errors) and gives rows in `dtype`, which follows the casts
    of the model. Errors: ModelError for an embedding that does what is not known here.
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
        nn.Module.__init__(self)  # past nn.Embedding's, which allocates a float weight
        self.factor, self.kind = factor_of(name, plain), cast("type[nn.Embedding]", type(plain))
        known = cast(nn.Embedding, plain)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            known.num_embeddings,
            known.embedding_dim,
            known.padding_idx,
        )
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._store(scheme, self.num_embeddings, self.embedding_dim, device)
        # the type of the rows
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] to rows [..., D]."""
        codes = nn.functional.embedding(input, self.weight[0])
        scale = nn.functional.embedding(input, self.weight_scale[:, None])
        rows = (codes.float() * scale).to(self.like.dtype)
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=rows.dtype)

    def prepare(self) -> None:
        """Nothing is kept beside the stored tensors."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [V, D]. Errors: ModelError where the stored tensors are nonsense."""
        return integer.read(self.stored(), self.scheme, self.embedding_dim).dequantize(dtype)

    def plain(self, dtype: torch.dtype) -> nn.Embedding:
        """The float embedding that this one stands for."""
        scaled: dict[str, Any] = {} if self.factor is None else {"embed_scale": self.factor}
        with torch.device("meta"):
            plain = self.kind(self.num_embeddings, self.embedding_dim, self.padding_idx, **scaled)
        plain.weight = nn.Parameter(self.dequantized(dtype))
        if self.factor is not None:
            cast(Any, plain).embed_scale = torch.tensor(self.factor, device=self.weight.device)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """What the scheme is, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme.format}"


def embedding(name: str, plain: nn.Embedding, weight: IntegerWeight) -> IntegerEmbedding:
    """A live module, in eval mode, that holds copies of our codes and scales, in the place and the type of
    `plain`."""
    dtype, device = plain.weight.dtype, plain.weight.device
    module = IntegerEmbedding(name, plain, weight.scheme, dtype=dtype, device=device)
    for part, tensor in weight.tensors().items():
        module.get_parameter(part).data.copy_(tensor)
    return module.eval()


def share(head: IntegerLinear, embedding: IntegerEmbedding) -> None:
    """Have a head multiply by the embedding's own codes and scales."""
    for part in embedding.stored():
        setattr(head, part, getattr(embedding, part))
