"""What a model multiplies the product of its head by: 1 in most families, a field of the config in Granite,
Cohere and Falcon-H1."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from llmcompress.errors import ModelError

TOKENS = 1024  # of the vocabulary, on which the factor is measured
TOLERANCE = (
    0.02  # of the largest logit, within which the product explains all logits; bfloat16 rounds to 0.004
)
BEND = 0.99  # of a soft cap, above which it is too flat to be inverted
_FOUND: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def soft_cap(model: PreTrainedModel) -> float | None:
    """The soft cap of the model's logits, by its config."""
    config = model.config.get_text_config()
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


@torch.no_grad()
def logit_scale(
    model: PreTrainedModel, state_D: Tensor, logits_V: Tensor, head_VD: Tensor, bias_V: Tensor | None = None
) -> float:
    """Return c where the model's logits are c (W h + b) before any soft cap. It is measured once per model.

    Args:
        model: the model, whose config says the soft cap.
        state_D: a hidden state after the final norm, [D].
        logits_V: the model's logits at the same position, [V].
        head_VD: the weight of the head, [V, D].
        bias_V: its bias, [V].

    Raises:
        ModelError: the logits are not proportional to that product.
    """
    if model not in _FOUND:
        if state_D.shape != head_VD.shape[1:]:
            raise _other(model)
        bias_V = None if bias_V is None else bias_V[:TOKENS].double()
        product = linear(state_D.double(), head_VD[:TOKENS].double(), bias_V)
        _FOUND[model] = _ratio(model, product, logits_V[: len(product)].double())
    return _FOUND[model]


def _ratio(model: PreTrainedModel, product: Tensor, logits: Tensor) -> float:
    if cap := soft_cap(model):
        flat = logits.abs() < BEND * cap
        product, logits = product[flat], cap * torch.atanh(logits[flat] / cap)
    if not product.any():
        return 1.0
    ratio = float(product @ logits / product.square().sum())
    if float((ratio * product - logits).abs().max()) > TOLERANCE * float(logits.abs().max()):
        raise _other(model)
    return 1.0 if abs(ratio - 1) < TOLERANCE else ratio


def _other(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"the logits of {type(model).__name__} are not its head times its last hidden state, which distill "
        "takes them for; leave distill out"
    )
