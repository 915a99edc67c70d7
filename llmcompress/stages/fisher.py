"""Which errors of a layer the model's predictions feel: the output Fisher matrices, found once and kept in
the journal."""

from __future__ import annotations

from torch import Tensor

from llmcompress.algorithms.hessian import metric_factor
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import output_fisher
from llmcompress.stages.base import Context

FISHER = "fisher"  # in the journal
TOKENS = 32768  # more than these change what is made of them by less than its noise
DAMP = 0.01  # of a matrix, when it is factored


def tokens_for(width: int) -> int:
    """Tokens that matrices of hidden width `width` are taken over."""
    return max(TOKENS, 8 * width)


def find_fisher(model: LayerwiseModel, context: Context) -> None:
    """Have the journal hold the matrix of each layer, for the model as it is now."""
    journal, layers = context.journal, len(model.layers)
    if all(journal.has(FISHER, index) for index in range(layers)):
        return
    sequences = context.data.calibration
    sequences = sequences[: -(-tokens_for(model.config.hidden_size) // sequences.shape[1])]
    found = output_fisher(model, sequences, context.scratch, context.seed, unscored=context.data.unscored)
    for index, F_DD in context.track(found, "find the errors that matter", layers):
        journal.save(FISHER, index, {"F_DD": F_DD})


def fisher(context: Context, index: int) -> Tensor:
    """The matrix [D, D] of a layer: an error e of the states that leave it costs e F e^T / 2 nats a token."""
    return context.journal.load(FISHER, index)["F_DD"]


def metric(model: LayerwiseModel, context: Context, index: int) -> Tensor | None:
    """M [D, D], such that an error e of what a sublayer adds in a layer costs |e M|^2 nats a token; None
    where none is known.

    That is where a norm follows the sublayer, which the matrix of the layer does not reach through.
    """
    rows, scale_pairs = model.anatomy.layer, model.anatomy.scale_pairs
    gains = {
        name.removesuffix(".weight")
        for name, row in rows.items()
        if row == "hidden" and name.endswith(".weight")
    }
    if gains - scale_pairs.keys() or not context.journal.has(FISHER, index):  # norms that no linear follows
        return None
    return nats_factor(fisher(context, index).to(model.device))


def nats_factor(F_DD: Tensor) -> Tensor:
    """M [D, D], such that an error e costs |e M|^2 nats a token where F is the Fisher matrix of what it is an
    error of."""
    return metric_factor(F_DD, DAMP) * (F_DD.diagonal().mean() / 2).sqrt()
