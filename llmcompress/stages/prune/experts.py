"""Experts of a mixture: how much each contributes to the tokens routed to it, and the layer without the least
of them."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import Tensor, nn

from llmcompress.architectures.shape_grammar import Spelling, take
from llmcompress.architectures.spec import Anatomy, experts_per_token
from llmcompress.errors import ModelError
from llmcompress.modeling.decoder_layer import DecoderLayer, firsts
from llmcompress.modeling.layerwise import LayerwiseModel

AXIS = "expert"


def require_enough(model: LayerwiseModel, count: int) -> None:
    """Refuse fewer experts than each token is routed to. Errors: ModelError."""
    if count < (chosen := experts_per_token(model.text_config)):
        raise ModelError(
            f'keep leaves {count} units of axis "{AXIS}", and each token goes to {chosen}; keep {chosen} or '
            "more"
        )


def require_called(model: LayerwiseModel, index: int) -> None:
    """Refuse experts that are not called with states, chosen experts and their weights. Errors:
    ModelError."""
    if not are_called(model.layers[index], model.anatomy.of_layer(index)):
        raise ModelError(
            f"the experts of a {model.anatomy.family} model run on all tokens at once, and none can be told "
            "apart by its work; cut another axis"
        )


def are_called(layer: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the experts of a layer are called with states, chosen experts and their weights."""
    return len(inspect.signature(layer.get_submodule(_place(anatomy)).forward).parameters) == 3


def _place(anatomy: Anatomy) -> str:
    """The module that holds the experts of a layer."""
    return next(iter(anatomy.experts)).rpartition(".")[0]


@torch.no_grad()
def saliency(layer: DecoderLayer) -> Tensor:
    """The saliency of each expert [experts]: the mean, over all tokens, of its weight for a token times the
    norm of its output.

    Source: REAP, Lasby et al. 2025, arXiv:2510.13999, equation 5. Differs: the mean is over all tokens and
    not over those routed to the expert, so a rarely used expert has little saliency.
    """
    experts = layer.module.get_submodule(_place(layer.anatomy))
    saliency_E, tokens = torch.zeros(layer.sizes[AXIS], device=layer.device), 0
    for hidden, first in zip(layer.inputs, firsts(layer.inputs), strict=True):
        part = partial(_saliency_of_part, layer, experts, hidden, first)
        for found_E, count in layer.limit.parts(part, *hidden.shape[:2]):
            saliency_E += found_E
            tokens += count
    seen_tokens = torch.tensor(tokens)
    layer.shard.processes.sum_(saliency_E, seen_tokens)
    return saliency_E / max(int(seen_tokens), 1)


def _saliency_of_part(
    layer: DecoderLayer, experts: nn.Module, hidden: Tensor, first: int, here: slice
) -> tuple[Tensor, int]:
    """The sum of the saliency of each expert over a part of a batch, and the tokens that it has."""
    seen, saliency_E = list[tuple[Tensor, ...]](), torch.zeros(layer.sizes[AXIS], device=layer.device)
    hook = experts.register_forward_pre_hook(
        lambda module, args, named: seen.append((*args, *named.values())), with_kwargs=True
    )
    try:
        layer.run(hidden[here], first=first + here.start)
    finally:
        hook.remove()
    x_TD, expert_TK, weight_TK = seen[0]
    for expert in expert_TK.unique().tolist():
        if expert < len(saliency_E):  # one index more stands for no expert
            token, rank = torch.nonzero(expert_TK == expert, as_tuple=True)
            alone = torch.full((len(token), 1), expert, device=expert_TK.device)
            answer = experts(x_TD[token], alone, torch.ones_like(alone, dtype=x_TD.dtype))
            saliency_E[expert] = (answer.norm(dim=-1) * weight_TK[token, rank]).sum()
    return saliency_E, len(x_TD)


def cut(layer: DecoderLayer, count: int) -> tuple[dict[str, Tensor], float]:
    """Return the parameters that change if `count` experts stay, by name in the layer, and the share of the
    saliency that goes."""
    saliency_E = saliency(layer)
    kept = saliency_E.argsort(descending=True, stable=True)[:count].sort().values
    rows, own = {**layer.anatomy.layer, **layer.anatomy.buffers}, layer.module.state_dict()
    tensors = {
        name: take(own[name], row, layer.sizes, AXIS, kept)
        for name, row in rows.items()
        if AXIS in Spelling.parse(row).axes
    }
    return tensors, 1 - float(saliency_E[kept].sum() / saliency_E.sum().clamp_min(1e-30))
