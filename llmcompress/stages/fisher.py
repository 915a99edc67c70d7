"""Which errors of a layer change the model's predictions: the output Fisher matrices, computed once and kept
in the journal."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from llmcompress.algorithms.hessian import metric_factor
from llmcompress.architectures.spec import SCALES
from llmcompress.modeling.backward import NO_LINEARS, fisher_matrices
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import Context, Time, Workload

FISHER, OUTPUTS = "fisher", "fisher-outputs"  # entries of the journal
# tokens from which the matrices are computed, at least: as many as rankings of linears and units need
# (evaluation/NOTES.md), and for a training, which follows the noise of a matrix too
TOKENS, MANY = 4096, 32768
WHAT = "errors that matter"  # what its time is called in a plan
DAMP = 0.01  # damping of a matrix when it is factored


def tokens_for(width: int, least: int = TOKENS) -> int:
    """Number of tokens from which the matrices of hidden width `width` are computed: at least so many."""
    return max(least, 8 * width)


def find_fisher(
    model: LayerwiseModel,
    context: Context,
    least: int = TOKENS,
    linears: Mapping[int, Collection[str]] = NO_LINEARS,
) -> None:
    """Compute the matrix of each layer for the model as it is now, from at least so many tokens, unless the
    journal holds it; and those of the outputs of `linears`, by layer and by their names in it."""
    journal, layers = context.journal, len(model.layers)
    kinds = (FISHER, OUTPUTS) if linears else (FISHER,)
    if all(journal.has(kind, index) for index in range(layers) for kind in kinds):
        return
    found = fisher_matrices(
        model,
        first_sequences(context.data.calibration, tokens_for(model.hidden_size, least)),
        context.scratch,
        context.seed,
        linears,
        unscored=context.data.unscored,
        processes=context.processes,
    )
    for index, F_DD, outputs in context.track(found, "find the errors that matter", layers):
        journal.save(FISHER, index, {"F_DD": F_DD})
        if linears:
            journal.save(OUTPUTS, index, outputs)


def time_of(work: Workload, least: int = TOKENS) -> Time:
    """The time of `find_fisher`: a forward pass, then a backward pass that repeats it layer by layer, through
    the inputs alone."""
    D = work.model.hidden_size
    tokens = min(work.tokens, tokens_for(D, least))
    found = work.passes(3, tokens, half=work.half, what=WHAT) + work.heads(3, tokens, what=WHAT)
    moments = len(work.model.layers) * work.machine.moments(tokens, D, 1)
    return found + Time({WHAT: moments})


def fisher(context: Context, index: int) -> Tensor:
    """The matrix F [D, D] of a layer: an error e of the states that leave it costs e F e^T / 2 nats/token."""
    return context.journal.load(FISHER, index)["F_DD"]


def outputs_fisher(context: Context, index: int) -> dict[str, Tensor]:
    """The matrices of the outputs of a layer's linears, by their names in it, in blocks as
    `two_sided.add_blocks` leaves them; none if `find_fisher` was not called, as no linear has a grid."""
    journal = context.journal
    return journal.load(OUTPUTS, index) if journal.has(OUTPUTS, index) else {}


def metric(model: LayerwiseModel, context: Context, index: int) -> Tensor | None:
    """Return M [D, D] such that an error e of a sublayer's output costs |e M|^2 nats/token, or None if none
    is known.

    None is known if the journal has no matrix of the layer, or if a norm follows the sublayer: the matrix
    does not reach through that norm. Nor does it where states are wider than what a sublayer writes.
    """
    anatomy = model.anatomy
    gains = {
        name.removesuffix(".weight")
        for name, row in anatomy.layer.items()
        if row == "hidden" and name.endswith(".weight")
    }
    # what follows is not known, or a norm that no linear follows, or no matrix of the layer
    if (
        anatomy.level < SCALES
        or anatomy.form.streams > 1
        or gains - anatomy.scale_pairs.keys()
        or not context.journal.has(FISHER, index)
    ):
        return None
    return nats_factor(fisher(context, index).to(model.device))


def nats_factor(F_DD: Tensor) -> Tensor:
    """Return M [D, D] such that an error e costs |e M|^2 nats/token, where F is the Fisher matrix of the
    quantity in error."""
    return metric_factor(F_DD, DAMP) * (F_DD.diagonal().mean() / 2).sqrt()
