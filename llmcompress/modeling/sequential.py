"""Walk a model layer by layer, with the hidden states that enter and leave each layer.

A stage sees one decoder layer at a time, in memory on the working device and in the working precision, with
the hidden states that reach it: `inputs`, as the compressed layers before it left them, and on request
`reference`, as the full model has them. What lies outside the layers (embedding, final norm, head, masks,
rotary tables, soft caps) is run by the model's own code with its layers stubbed out, so no family needs a
line here.

Advancing a stream costs one forward pass of each layer. The memory is that of one layer and of the streams,
whatever the number of layers. `layerwise.py` decides where the layers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.logit_chunks import pieces, positions_at_once
from llmcompress.algorithms.overflow import all_finite
from llmcompress.errors import ModelError
from llmcompress.integrations import layer_calls
from llmcompress.integrations.distributed import ALONE, Processes
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.half_precision import runs_in_half
from llmcompress.modeling.handed_on import HandedOn
from llmcompress.modeling.host_memory import CPU, to_host
from llmcompress.modeling.layer_arguments import Arguments, anything, no_arguments
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.token_limit import batches_of

EVALUATE = "evaluate"  # what progress calls the measurement of a model
SAMPLE = 8192  # tokens that decide what goes or what is shared
# (items, description, count) -> the same items
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Part = tuple[int, str | None]  # a layer, or a linear of it
Key = TypeVar("Key", bound=Hashable)
# a layer in memory -> parameters to run with in place of its own
Edit = Callable[[DecoderLayer], Mapping[str, Tensor]]
Edits = Mapping[int, Edit | None]  # by layer; None skips the layer
Entered = tuple[list[Tensor], Arguments]  # states that enter the first layer, and what layers are called with


def untracked(things: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """The Track that shows nothing."""
    return things


@torch.no_grad()
def enter(resident: LayerwiseModel, batches: Sequence[Tensor]) -> Entered:
    """Return the hidden states [B, L, D] that enter the first layer, and the arguments that each layer is
    called with."""
    arguments, streams = Arguments(resident, batches), []
    for tokens in batches:
        hidden = arguments.enter(tokens)
        if not all_finite(hidden):
            raise ModelError(
                f"{resident.anatomy.embedding} gives activations that are NaN or infinite, as its weights "
                "are too large; take a sound base"
            )
        streams.append(to_host(hidden))
    return streams, arguments


def leave(resident: LayerwiseModel, hidden: Tensor) -> Tensor:
    """Return the logits [B, L, V] of hidden states [B, L, D] that left the last layer: final norm, head and
    all that goes with them."""
    tokens, states = anything(resident, *hidden.shape[:2]), hidden.to(resident.device)
    return layer_calls.leaving(resident.model, resident.layers, states, tokens, resident.anatomy.form)


def pieces_of(resident: LayerwiseModel, hidden: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the pieces of states [B, L, D] whose logits are to be in memory at once, whatever the
    vocabulary."""
    V = resident.model.get_parameter(f"{resident.anatomy.head}.weight").shape[0]
    B, L, _ = hidden.shape
    return pieces(B, L, positions_at_once(V, resident.device))


@torch.no_grad()
def head_states(resident: LayerwiseModel, hidden: Tensor) -> Tensor:
    """Return the head's input [B, L, D] for hidden states [B, L, D] that left the last layer, without
    computing a logit."""
    head, read = resident.model.get_submodule(resident.anatomy.head), list[Tensor]()

    def record(states: Tensor) -> Tensor:
        read.append(states)
        return states[..., :1]

    before = vars(head).get("forward")
    head.forward = record
    try:
        leave(resident, hidden)
    finally:
        del head.forward
        if before is not None:
            head.forward = before
    return read[0]


def walk(
    resident: LayerwiseModel,
    sequences: Tensor,
    *,
    reference: bool = False,
    through: bool = False,
    half: bool = False,
    processes: Processes = ALONE,
    full: Entered | None = None,
) -> Iterator[DecoderLayer]:
    """Yield each layer in turn, with the hidden states of token `sequences` [S, L] that enter it.

    Later layers see what the caller does to a layer's weights. With `reference`, the stream of the unchanged
    model runs beside it; it begins with `full` if the embedding is another one by now. The last layer is run
    only if `through` asks for the states that leave it. One more DecoderLayer then follows, whose module is
    an identity and whose `inputs` are these states. With `half`, a model that is stored in bfloat16 is
    computed in it, if the device multiplies bfloat16 faster; the states between layers are float32. Each of
    several `processes` runs its share of the sequences.
    """
    half = half and runs_in_half(resident)
    shard = processes.shard(batches_of(sequences))
    inputs, arguments = enter(resident, processes.shard(resident.limit.batches(sequences)).batches)
    targets = list(full[0] if full else inputs) if reference else []
    full_arguments = full[1] if full and full[1].by_batch else None
    full = None  # its states are given up too
    handed, full_handed = (HandedOn(resident.anatomy.form.handed_on) for _ in range(2))
    for index in range(len(resident.layers)):
        last = index == len(resident.layers) - 1
        with resident.layer(index) as module:
            layer = layer_of(resident, index, module, arguments, inputs, targets)
            layer.half, layer.shard = half, shard
            layer.handed, layer.full_handed = handed, full_handed
            if full_arguments:
                layer.full_arguments = full_arguments.of_layer(index)
            yield layer
            if through or not last:
                inputs, targets = [], []  # the layer holds them alone, to give them up
                inputs, targets = layer.pass_on()
    if through:
        yield DecoderLayer(
            len(resident.layers),
            "",
            nn.Identity(),
            resident.anatomy,
            resident.device,
            resident.sizes,
            no_arguments,
            inputs,
            targets,
            shard=shard,
            limit=resident.limit,
        )


def layer_of(
    resident: LayerwiseModel,
    index: int,
    module: nn.Module,
    arguments: Arguments,
    inputs: list[Tensor],
    reference: list[Tensor],
) -> DecoderLayer:
    """Return the DecoderLayer of layer `index`, which is in memory, with the states that enter it."""
    anatomy, sizes = resident.anatomy_of_layer(index), resident.sizes_of(index)
    return DecoderLayer(
        index,
        resident.layer_name(index),
        module,
        anatomy,
        resident.device,
        sizes,
        arguments.of_layer(index),
        inputs,
        reference,
        limit=resident.limit,
    )


@contextmanager
def together(
    resident: LayerwiseModel, sequences: Tensor, entering: Mapping[int, list[Tensor]]
) -> Iterator[list[DecoderLayer]]:
    """Yield several layers in memory at once, each with the states of `sequences` that enter it."""
    _, arguments = enter(resident, batches_of(sequences))
    with ExitStack() as stack:
        modules = {index: stack.enter_context(resident.layer(index)) for index in entering}
        yield [
            layer_of(resident, index, module, arguments, entering[index], [])
            for index, module in modules.items()
        ]


@torch.no_grad()
def variants(
    resident: LayerwiseModel, sequences: Tensor, edits: Mapping[Key, Edits], base: Edits | None = None
) -> dict[Key | None, list[Tensor]]:
    """Return the states that leave the last layer under each set of edits on top of those of `base`, and
    under None with those of `base` alone.

    It takes one pass: each layer runs once for every set that began before it or begins there.
    """
    inputs, arguments = enter(resident, resident.limit.batches(sequences))
    base = base or {}
    streams: dict[Key | None, list[Tensor]] = {None: inputs}
    handed: dict[Key | None, HandedOn] = {None: HandedOn(resident.anatomy.form.handed_on)}
    starts = {key: min(own) for key, own in edits.items()}
    for index in range(len(resident.layers)):
        entered = streams[None]
        begun = [key for key, start in starts.items() if start == index]
        streams |= dict.fromkeys(begun, entered)
        handed |= {key: handed[None].copy() for key in begun}
        wanted = {
            key: (edits[key] if key is not None else base).get(index, base.get(index, _as_it_is))
            for key in streams
        }
        if all(edit is None for edit in wanted.values()):
            continue
        with resident.layer(index) as module:
            layer = layer_of(resident, index, module, arguments, [], [])
            changed = {edit: edit(layer) for edit in dict.fromkeys(wanted.values()) if edit is not None}
            for key, edit in wanted.items():
                if edit is not None:
                    layer.handed = handed[key]
                    streams[key] = layer.outputs_with(streams[key], changed[edit], CPU, keep=True)
                    layer.handed.advance()
    return streams


def _as_it_is(layer: DecoderLayer) -> dict[str, Tensor]:
    return {}


def without_each(
    resident: LayerwiseModel, sequences: Tensor, candidates: Collection[Part], gone: Collection[Part] = ()
) -> dict[Part | None, list[Tensor]]:
    """Return the states that leave the last layer without each of the candidates, and under None with all of
    them.

    A part is a layer, which is then skipped, or one of its linears, whose weight is then zero. The parts in
    `gone` are left out everywhere.
    """

    def without(index: int, linears: Collection[str | None]) -> Edit | None:
        if None in linears:
            return None
        names = [f"{linear}.weight" for linear in linears]
        return lambda layer: {name: torch.zeros_like(layer.module.get_parameter(name)) for name in names}

    lost: dict[int, list[str | None]] = {}
    for index, linear in gone:
        lost.setdefault(index, []).append(linear)
    base = {index: without(index, linears) for index, linears in lost.items()}
    left = [part for part in candidates if part not in gone and None not in lost.get(part[0], [])]
    edits = {part: {part[0]: without(part[0], [part[1], *lost.get(part[0], [])])} for part in left}
    return variants(resident, sequences, edits, base)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats/token of scores [B, L, V] from the expected log-probabilities."""
    return float((expected.exp() * (expected - found.float().log_softmax(-1))).sum(-1).mean())


@torch.no_grad()
def divergences(
    model: LayerwiseModel, full: list[Tensor], streams: Mapping[Key, list[Tensor]], unscored: int = 0
) -> dict[Key, float]:
    """KL in nats/token of each stream's predictions, from its last states, against those of the full model.

    Predictions at the first `unscored` positions of a sequence do not count.
    """
    lost = dict.fromkeys(streams, 0.0)
    streams = {key: model.limit.units(states) for key, states in streams.items()}
    for i, hidden in enumerate(model.limit.units(full)):
        hidden = hidden[:, unscored:]
        for here in pieces_of(model, hidden):
            expected = leave(model, hidden[here]).float().log_softmax(-1)
            share = expected[..., 0].numel() / hidden[0, :, 0].numel()
            for index, states in streams.items():
                found = leave(model, states[i][:, unscored:][here])
                lost[index] += divergence(expected, found) * share
    return {index: total / sum(map(len, full)) for index, total in lost.items()}


def logits(
    resident: LayerwiseModel, sequences: Tensor, track: Track = untracked, unscored: int = 0
) -> Iterator[Tensor]:
    """Yield logits of token sequences [S, L] without the first `unscored` positions, in the order of the
    positions: [B, L - unscored, V] of some sequences, or [1, C, V] of a part of one.

    The size of the vocabulary decides how many; all layers are run once, before the first logits.
    """
    for layer in track(walk(resident, sequences, through=True), EVALUATE, len(resident.layers) + 1):
        last = layer
    for hidden in resident.limit.units(last.inputs):
        hidden = hidden[:, unscored:]
        for here in pieces_of(resident, hidden):
            # closed before the yield: a generator dropped half way must not leave it open
            with torch.no_grad():
                scores = leave(resident, hidden[here])
            yield scores
            del scores  # freed before the next piece is computed


def head_input(resident: LayerwiseModel, layer: DecoderLayer) -> tuple[Tensor, Moments]:
    """Return the head's weight [V, D] and the second moments of its inputs; `layer` is the one that `walk`
    yields after the last."""
    W_RC = resident.outer_weight(f"{resident.anatomy.head}.weight")
    moments = Moments(W_RC.shape[1], resident.device)
    reference = resident.limit.units(layer.reference)
    for i, hidden in enumerate(resident.limit.units(layer.inputs)):
        moments.add(*(head_states(resident, states) for states in (hidden, *reference[i : i + 1])))
    layer.shard.processes.pool([moments])
    return W_RC, moments
