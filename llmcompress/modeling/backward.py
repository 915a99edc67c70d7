"""Backward passes layer by layer: gradients of the states that leave each layer, and their Fisher matrices.

The forward pass of `sequential.py` comes first and leaves its states on disk; each layer is then run again
for its gradient. The memory is that of one layer and one stream of gradients, whatever the depth; what layers
hand on beside their states stays in memory, with its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from llmcompress.algorithms.distillation_losses import IGNORED
from llmcompress.algorithms.hessian import Moments
from llmcompress.algorithms.two_sided import TOGETHER, add_blocks
from llmcompress.integrations.distributed import ALONE, Processes
from llmcompress.integrations.layer_calls import Handed
from llmcompress.io.safetensors_writer import writing
from llmcompress.modeling.decoder_layer import DecoderLayer, firsts
from llmcompress.modeling.half_precision import half_precision, runs_in_half
from llmcompress.modeling.handed_on import HandedOn
from llmcompress.modeling.layer_arguments import Arguments
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.sequential import enter, layer_of, leave, pieces_of, walk
from llmcompress.modeling.token_limit import batches_of, joined

# number of a batch, the model's probabilities [B, C, V] at some positions of it, next tokens [B, C] there
# -> labels [B, C]
Labels = Callable[[int, Tensor, Tensor], Tensor]
# number of a sequence -> the gradients of what was handed on, by place
Slopes = dict[int, dict[str, Tensor]]
Linears = Mapping[int, Collection[str]]  # by layer, by their names in it
NO_LINEARS: Linears = MappingProxyType({})


def output_fisher(
    resident: LayerwiseModel,
    sequences: Tensor,
    scratch: Path,
    seed: int,
    *,
    first: bool = False,
    unscored: int = 0,
    processes: Processes = ALONE,
) -> Iterator[tuple[int, Tensor]]:
    """Yield for each layer, last to first, its index and the Fisher matrix [D, D] of the states that leave
    it: the mean of g g^T.

    With `first`, -1 and the matrix of the states that enter the first layer come last.

    g is the gradient of the log-likelihood of labels drawn from the model's own distribution. To second
    order, an error e of the hidden state costs e F e^T / 2 nats of KL per token, so F says which errors of a
    layer change the predictions. Predictions at the first `unscored` positions of a sequence do not count.
    Several `processes` divide the batches, and draw the labels that one would draw.
    """
    for index, F_DD, _ in fisher_matrices(
        resident, sequences, scratch, seed, first=first, unscored=unscored, processes=processes
    ):
        yield index, F_DD


def fisher_matrices(
    resident: LayerwiseModel,
    sequences: Tensor,
    scratch: Path,
    seed: int,
    linears: Linears = NO_LINEARS,
    *,
    first: bool = False,
    unscored: int = 0,
    processes: Processes = ALONE,
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Yield what `output_fisher` does, and with it the Fisher matrices of the outputs of some `linears` of
    the layer, by their names in it, in blocks as `two_sided.add_blocks` leaves them."""
    processes = replace(processes, by="batch")
    generators: dict[int, torch.Generator] = {}  # by the number of a batch, whichever process runs it

    def drawn(batch: int, p: Tensor, text: Tensor) -> Tensor:
        if batch not in generators:
            generators[batch] = label_generator(seed, batch, resident.device)
        return drawn_from(p.flatten(0, 1), generators[batch]).view(text.shape)

    for index, grads, outputs in gradients(
        resident,
        sequences,
        scratch,
        drawn,
        linears=linears,
        first=first,
        half=True,
        unscored=unscored,
        processes=processes,
    ):
        found = Moments(resident.hidden_size, resident.device)
        for grad in grads:
            found.add(grad.to(resident.device))
        processes.pool([found])
        yield (
            index,
            found.H_CC.cpu(),
            {name: F_RB.div_(sequences.numel()).cpu() for name, F_RB in outputs.items()},
        )


def drawn_from(p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token [T] from each distribution.

    A uniform number is looked up in the cumulative distribution: torch.multinomial draws a number for every
    token of the vocabulary.
    """
    total_TV = p_TV.cumsum(-1)
    at_T1 = torch.rand(len(p_TV), 1, generator=generator, device=p_TV.device) * total_TV[:, -1:]
    return torch.searchsorted(total_TV, at_T1, right=True).squeeze(1).clamp_(max=p_TV.shape[1] - 1)


def label_generator(seed: int, batch: int, device: torch.device) -> torch.Generator:
    """The generator of a batch's labels, whichever process draws them."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + batch)


def next_tokens(tokens: Tensor, unscored: int = 0) -> Tensor:
    """Next-token labels of tokens [B, L]; the first `unscored` positions and the last one are IGNORED."""
    return F.pad(tokens[:, 1 + unscored :], (unscored, 1), value=IGNORED)


def following(number: int, p: Tensor, text: Tensor) -> Tensor:
    """The next-token labels of the text, whatever the model predicts."""
    return text


def gradients(
    resident: LayerwiseModel,
    sequences: Tensor,
    scratch: Path,
    labels: Labels,
    watched: Sequence[str] = (),
    linears: Linears = NO_LINEARS,
    *,
    first: bool = False,
    half: bool = False,
    unscored: int = 0,
    processes: Processes = ALONE,
) -> Iterator[tuple[int, list[Tensor], dict[str, Tensor]]]:
    """Yield for each layer, last to first, its index, the gradients of the states [B, L, D] that leave it,
    and those of some parameters, together with the sums of g g^T of the outputs of some linears.

    They are the gradients of the negative log-likelihood of `labels`, summed over tokens. Labels at the first
    `unscored` positions do not count. `watched` are parameters by their names in the layers that have them.
    `linears` are those whose outputs have their gradients g summed, in blocks as `two_sided.add_blocks` does.
    With `first`, -1 and the gradients of the states that enter the first layer come last.

    The backward pass goes layer by layer as the forward pass does. The states in between are kept in the
    folder `scratch`. With `half`, layers are computed in bfloat16 as `walk` says. Each of several `processes`
    yields the gradients of the states of its own sequences, and those of the parameters over all sequences.
    """
    half = half and runs_in_half(resident)
    shard, grads = processes.shard(batches_of(sequences)), list[Tensor]()
    handed = list[HandedOn]()  # to each layer
    for layer in walk(resident, sequences, through=True, half=half, processes=processes):
        last = layer
        handed.append(layer.handed.copy())
        with writing(scratch):
            save_file(
                {str(i): hidden for i, hidden in enumerate(resident.limit.units(layer.inputs))},
                scratch / f"states-{layer.index}.safetensors",
            )
    for number, tokens, hidden in zip(
        shard.numbers, shard.batches, resident.limit.units(last.inputs), strict=True
    ):
        grads.append(_from_head(resident, hidden, tokens, number, labels, unscored))
    _, arguments = enter(resident, shard.batches)
    (scratch / f"states-{last.index}.safetensors").unlink()
    slopes: Slopes = {}
    for index in range(last.index - 1, -1, -1):
        found: dict[str, Tensor] = {}
        on = bool(index or watched or linears.get(index) or first)
        handed.pop()  # what the layer before has left
        entering = (
            _back(
                resident,
                index,
                arguments,
                handed[-1],
                scratch,
                grads,
                slopes,
                watched,
                linears.get(index, ()),
                found,
                half,
            )
            if on
            else []
        )
        processes.sum_(*found.values())
        yield index, grads, found
        grads = entering
        (scratch / f"states-{index}.safetensors").unlink()
    if first:
        yield -1, grads, {}


def _from_head(
    resident: LayerwiseModel,
    hidden: Tensor,
    tokens: Tensor,
    number: int,
    labels: Labels,
    unscored: int,
) -> Tensor:
    """Return the gradients of the states [B, L, D] of batch `number` that left the last layer, as `gradients`
    says, on the CPU."""
    found, text = torch.empty_like(hidden), next_tokens(tokens).to(resident.device)
    for here in pieces_of(resident, hidden):
        states = hidden[here].to(resident.device).requires_grad_()
        scores = leave(resident, states)
        slope = scores.detach().float().softmax(-1)
        wanted = labels(number, slope, text[here])
        wanted[:, : max(0, unscored - here[1].start)] = IGNORED
        # of the negative log-likelihood by the scores: the probabilities, less 1 at the label
        slope.scatter_add_(-1, wanted.clamp(min=0)[..., None], slope.new_full((*wanted.shape, 1), -1.0))
        slope.masked_fill_((wanted == IGNORED)[..., None], 0)
        scores.backward(slope.to(scores.dtype))
        assert states.grad is not None
        found[here] = states.grad.cpu()
    return found


def _back(
    resident: LayerwiseModel,
    index: int,
    arguments: Arguments,
    handed: HandedOn,
    scratch: Path,
    grads: Sequence[Tensor],
    slopes: Slopes,
    watched: Sequence[str],
    linears: Collection[str],
    found: dict[str, Tensor],
    half: bool,
) -> list[Tensor]:
    """Return the gradients of the states that enter layer `index`, from those of the states that leave it.
    The gradients of watched parameters and the sums of linears go into `found`; `slopes` are those of what
    leaves the layer beside its states, and then of what enters it."""
    states = load_file(scratch / f"states-{index}.safetensors")
    out = []
    with resident.layer(index) as module:
        layer = layer_of(resident, index, module, arguments, [], [])
        layer.half, layer.handed = half, handed
        there = dict(module.named_parameters())
        parameters = {name: there[name].requires_grad_() for name in watched if name in there}
        for linear in sorted(linears):
            R = len(layer.weight(linear))
            found[linear] = torch.zeros(R, min(R, TOGETHER), device=layer.device)
        for i, (grad, number) in enumerate(zip(grads, firsts(grads), strict=True)):
            part = partial(
                _back_part, layer, states[str(i)], grad, number, slopes, list(parameters.values()), linears
            )
            entering = []
            for hidden_grad, own_grads, output_grads, own_slopes in layer.limit.parts(part, *grad.shape[:2]):
                entering.append(hidden_grad)
                slopes |= own_slopes
                for linear, slope in output_grads.items():
                    add_blocks(found[linear], slope.flatten(0, -2).float())
                for name, own in zip(parameters, own_grads, strict=True):
                    if own is not None:
                        found[name] = found[name].add_(own) if name in found else own
            out.append(joined(entering))
        for name, parameter in parameters.items():
            if name not in found:  # this process has no sequence
                found[name] = torch.zeros_like(parameter)
    return out


def _back_part(
    layer: DecoderLayer,
    states: Tensor,
    grad: Tensor,
    first: int,
    slopes: Slopes,
    parameters: Sequence[Tensor],
    linears: Collection[str],
    here: slice,
) -> tuple[Tensor, Sequence[Tensor | None], dict[str, Tensor], Slopes]:
    """Return the gradient of a part of the states that enter a layer, those of parameters, those of the
    outputs of linears, and those of what enters it beside its states. `first` is the number of the first
    sequence of these states."""
    hidden = states[here].to(layer.device).requires_grad_()
    first, count = first + here.start, len(hidden)
    entering = tree_map(_differentiable, layer.handed_to(hidden, first))
    handed = _leaves(entering)
    outputs: dict[str, Tensor] = {}
    with _heard(layer.module, linears, outputs), half_precision(layer.device, layer.half):
        out, left = layer.handing_on(hidden, entering, first=first)
    outs, out_grads = [out], [grad[here].to(out.device, out.dtype)]
    for place, leaf in _leaves(left).items():
        own = [slopes.get(first + i, {}).get(place) for i in range(count)]
        if leaf.requires_grad and own[0] is not None:
            outs.append(leaf)
            slope = torch.cat([each for each in own if each is not None])
            out_grads.append(slope.to(leaf.device, leaf.dtype))
    asked = [hidden, *handed.values(), *parameters, *outputs.values()]
    found = torch.autograd.grad(outs, asked, out_grads, allow_unused=True)
    own_slopes: Slopes = {first + i: {} for i in range(count)}
    for place, slope in zip(handed, found[1:], strict=False):
        for i, each in enumerate(slope.cpu().split(1) if slope is not None else ()):
            own_slopes[first + i][place] = each
    of_parameters = found[1 + len(handed) :][: len(parameters)]
    of_outputs = dict(zip(outputs, found[len(asked) - len(outputs) :], strict=True))
    reached = {linear: slope for linear, slope in of_outputs.items() if slope is not None}
    return found[0].cpu(), of_parameters, reached, own_slopes


def _heard(module: nn.Module, linears: Collection[str], outputs: dict[str, Tensor]) -> ExitStack:
    """Within the context, the outputs of the linears of a layer go into `outputs` as they are computed."""

    def keep(linear: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        outputs[linear] = out

    stack = ExitStack()
    for linear in linears:
        hook = module.get_submodule(linear).register_forward_hook(partial(keep, linear))
        stack.callback(hook.remove)
    return stack


def _differentiable(value: Any) -> Any:
    """A value as a leaf of a graph, if it has gradients."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _leaves(handed: Handed) -> dict[str, Tensor]:
    """The tensors that have gradients in what layers hand on, by their places in it."""
    leaves, _ = tree_flatten_with_path(handed)
    tensors = {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    return {place: leaf for place, leaf in tensors.items() if leaf.is_floating_point()}
