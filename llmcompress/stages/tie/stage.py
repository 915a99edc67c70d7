"""Tie the embedding and the output head of a model with an untied lm_head: one matrix, fitted to do the work
of both.

The fit (`algorithms.tied_embeddings`) weights errors of the embedding by their effect on the predictions, and
errors of the head by the head's inputs. The balance of the two is decided by the predictions on calibration
text. A gain on the channels that the head reads goes into the final norm. The result is an ordinary tied
model, `tie_word_embeddings: true`, which needs no plug-in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.tied_embeddings import tie
from llmcompress.architectures.shape_grammar import Spelling, scale
from llmcompress.errors import ModelError
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.modeling.backward import output_fisher
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import divergence, head_states, leave, pieces_of, walk
from llmcompress.modeling.token_limit import first_sequences
from llmcompress.stages.base import OUTER, Context, Estimate, Facts, Stage, StageResult, Workload

STAGE = "tie"
SAMPLE = 8192  # tokens by which the balance is decided
STEPS = (4.0, 2.0, 1.4)  # factors between the balances that are tried, coarse to fine
START = 0.25


class TiedFacts(JournalFacts):
    """KL in nats/token of the tied model on the text that decides, and the balance chosen by it."""

    kl_nats: float
    balance: float | None = None


class Tie(Stage):
    """Makes one matrix of the input embedding and the output head."""

    name: ClassVar[str] = STAGE
    section: ClassVar[str] = "shared or factorised weights"
    combines: ClassVar[bool] = True
    retired: ClassVar[Mapping[str, str]] = {
        "weights": "tie is always for embedding and head; leave weights",
        **dict.fromkeys(
            ("layers", "pairs", "groups", "parts"), "layers share weights by share: {layers: auto, groups: 2}"
        ),
        "basis": "linears become products of low rank by low_rank: {keep: 0.5, layers_per_basis: 2}",
        "codebook": "weights become indices by codebook: {entries: 16}",
    }

    fit: Literal["least_squares", "mean", "embedding", "head"] = Field(
        default="least_squares",
        description="`least_squares`: fit one matrix to the work of both; `mean`: the mean of the two; "
        "`embedding`, `head`: one of them as it is",
    )

    @property
    def leaves(self) -> str:
        """What the two matrices become."""
        return "one matrix for embedding and head"

    def result(self, model: LayerwiseModel, journal: Journal | None = None) -> StageResult:
        """A tied model, without a matrix for its head."""
        self.require_two_matrices(model)
        return StageResult(
            config={"tie_word_embeddings": True}, removed=frozenset({f"{model.anatomy.head}.weight"})
        )

    def estimate(self, model: MetaModel, left: MetaModel, work: Workload) -> Estimate:
        """Estimate the cost of statistics and of the search for the balance."""
        inner, D = model.inner_parameters(), model.hidden_size
        outer = model.text_config.vocab_size * D
        floats = 4 * outer + inner // len(model.layers) + 2 * work.tokens * D
        return Estimate(
            stage="tie (embedding and head)",
            parameters=left.parameters(),
            size_bytes=work.size_bytes - model.stored_bytes() + left.stored_bytes(),
            peak_memory_bytes=4 * floats,
            time=work.passes(2)
            + work.heads(2, work.tokens)
            + work.passes(12, SAMPLE)
            + work.heads(12, SAMPLE),
        )

    def require_two_matrices(self, model: LayerwiseModel) -> None:
        """Refuse a model whose embedding and head can't be one matrix. Errors: ModelError."""
        anatomy, rows = model.anatomy, model.anatomy.outer
        head, embedding = f"{anatomy.head}.weight", f"{anatomy.embedding}.weight"
        if model.config.tie_word_embeddings:
            raise ModelError("the embedding and the head of this model are one matrix already; leave tie")
        if rows[head] != rows[embedding]:
            raise ModelError(
                f'the embedding of this model is "{rows[embedding]}" and its head "{rows[head]}"; they '
                "can't be one"
            )

    def apply(self, model: LayerwiseModel, context: Context) -> Facts:
        """Write the matrix to the journal, and with it the weights that make the channels that the head
        reads."""
        self.require_two_matrices(model)
        journal = context.journal
        if not journal.has(OUTER, 0):
            journal.save(OUTER, 0, *self._made(model, context))
        found = journal.facts(OUTER, 0, TiedFacts)
        notes = [
            "operations per token are unchanged: the one matrix is looked up and multiplied by as the two "
            "were"
        ]
        return Facts(STAGE, notes=notes, details={"fit": self.fit, **found.model_dump(exclude_none=True)})

    @torch.no_grad()
    def _made(self, model: LayerwiseModel, context: Context) -> tuple[dict[str, Tensor], TiedFacts]:
        """Return the tensors that change, in the dtype of the base, and their loss."""
        anatomy = model.anatomy
        E = model.outer_weight(f"{anatomy.embedding}.weight")
        O = model.outer_weight(f"{anatomy.head}.weight")  # noqa: E741
        embedding = f"{anatomy.embedding}.weight"
        if torch.equal(E, O):
            return model.as_stored({embedding: E}), TiedFacts(kl_nats=0.0)
        trial = _Trial(model, context)
        if self.fit != "least_squares":
            made = {embedding: {"mean": (E + O) / 2, "embedding": E, "head": O}[self.fit]}
            return model.as_stored(made), TiedFacts(kl_nats=trial.kl_nats(made))
        statistics = _statistics(model, context)
        tried: dict[float, tuple[float, dict[str, Tensor]]] = {}

        def attempt(balance: float) -> None:
            if balance not in tried:
                M_VD, gain_D = tie(E, O, *statistics, balance)
                made = {embedding: M_VD, **_with_gain(model, gain_D)}
                tried[balance] = trial.kl_nats(made), made

        best = START
        attempt(best)
        for factor in context.track(STEPS, "tie (embedding, head)", len(STEPS)):
            while True:
                for balance in (best / factor, best * factor):
                    attempt(balance)
                better = min(tried, key=lambda balance: (tried[balance][0], balance))
                if better == best:
                    break
                best = better
        kl_nats, made = tried[best]
        return model.as_stored(made), TiedFacts(kl_nats=kl_nats, balance=best)


class _Trial:
    """Measures what the model's predictions lose with other weights outside its layers, on some sequences of
    the calibration text."""

    def __init__(self, model: LayerwiseModel, context: Context) -> None:
        sequences = context.data.calibration
        self.model, self.sequences = model, first_sequences(sequences, SAMPLE)
        self.unscored = context.data.unscored
        self.full = self._states()

    def _states(self) -> Sequence[Tensor]:
        *_, last = walk(self.model, self.sequences, through=True)
        return [hidden[:, self.unscored :] for hidden in self.model.limit.units(last.inputs)]

    def kl_nats(self, made: Mapping[str, Tensor]) -> float:
        """KL in nats/token with these weights in place, the matrix for embedding and head; infinite if it is
        NaN."""
        with _placed(self.model, made):
            states = self._states()
        lost = 0.0
        for full, hidden in zip(self.full, states, strict=True):
            for here in pieces_of(self.model, full):
                expected = leave(self.model, full[here]).float().log_softmax(-1)
                with _placed(self.model, made):
                    found = divergence(expected, leave(self.model, hidden[here]))
                lost += found * expected[..., 0].numel() / full[0, :, 0].numel()
        kl_nats = lost / sum(map(len, self.full))
        return kl_nats if math.isfinite(kl_nats) else math.inf


@contextmanager
def _placed(model: LayerwiseModel, made: Mapping[str, Tensor]) -> Iterator[None]:
    """Put these weights in place of the model's own outside its layers within the context. The embedding's
    matrix is the head's too."""
    anatomy = model.anatomy
    stored = model.as_stored(made)  # as it will be read back
    both = stored | {f"{anatomy.head}.weight": stored[f"{anatomy.embedding}.weight"]}
    parameters = {name: model.model.get_parameter(name) for name in both}
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = both[name].to(parameter)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def _with_gain(model: LayerwiseModel, gain_D: Tensor) -> dict[str, Tensor]:
    """The weights that make the channels that the head reads, multiplied by a gain for each channel; empty if
    there are none."""
    anatomy, sizes = model.anatomy, model.sizes
    read = Spelling.parse(anatomy.outer[f"{anatomy.head}.weight"]).dims[-1]
    if read == "hidden" or isinstance(read, int):  # the states, which the final norm makes
        offset = anatomy.norm_offset
        made = [f"{anatomy.norm}.{part}" for part in ("weight", "bias")]
        found = {name: model.outer_weight(name) for name in made if anatomy.outer.get(name) == str(read)}
        return {
            name: (t + offset) * gain_D - offset if name.endswith("weight") else t * gain_D
            for name, t in found.items()
        }
    rows = {name: row for name, row in anatomy.outer.items() if Spelling.parse(row).dims[0] == read}
    data = {name: model.outer_weight(name) for name in rows}
    return {name: scale(tensor, rows[name], sizes, (str(read),), gain_D) for name, tensor in data.items()}


@torch.no_grad()
def _statistics(model: LayerwiseModel, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return how often each token is seen or predicted (twice), the Fisher matrix of the embedding's output,
    and the second moments of the head's inputs."""
    anatomy, sequences = model.anatomy, context.data.calibration
    V, D = model.model.get_parameter(f"{anatomy.head}.weight").shape
    seen_V = torch.bincount(sequences.flatten(), minlength=V).to(model.device, torch.float32)
    said_V, moments = torch.zeros(V, device=model.device), Moments(D, model.device)
    *_, last = walk(model, sequences, through=True)
    for hidden in model.limit.units(last.inputs):
        moments.add(head_states(model, hidden))
        scored = hidden[:, context.data.unscored :]
        for here in pieces_of(model, scored):
            said_V += leave(model, scored[here]).float().softmax(-1).flatten(0, 1).sum(0)
    sample = first_sequences(sequences, SAMPLE)
    with torch.enable_grad():
        unscored = context.data.unscored
        *_, (_, F_DD) = output_fisher(
            model, sample, context.scratch, context.seed, first=True, unscored=unscored
        )
    F_DD = F_DD.to(model.device)
    for name, row in anatomy.outer.items():  # an embedding of another width that a linear widens
        if row == "hidden embed":
            P_DE = model.outer_weight(name)
            F_DD = P_DE.T @ F_DD @ P_DE
    # Both matrices weight a row alike: with two weights, rare tokens lose one row or the other, and the model
    # loses with them. No row has weight zero: tokens that the calibration text lacks come in other texts.
    rows_V = seen_V + said_V + sequences.numel() / V
    return rows_V, rows_V, F_DD, moments.H_CC
