"""A narrower hidden state: its least important directions are cut out of every weight that has the axis.

With `pca` the hidden state is first rotated onto its principal axes, by one rotation for the whole model that
is folded into the weights; the directions with the least variance are cut. With `activation`, the single
channels are cut that are smallest after the norms. A norm over fewer channels divides by another root mean
square, which its gain makes up for. Linears that read the state are then solved again, so that their outputs
on the narrow state come closest to those on the whole one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Moments, retarget, translate
from llmcompress.architectures.rotation import Rotation, refusal
from llmcompress.architectures.shape_grammar import Spelling, take
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import LayerwiseModel, MetaModel
from llmcompress.modeling.sequential import walk
from llmcompress.stages.base import OUTER, Context
from llmcompress.stages.prune.layer_cutter import STAGE, CutLayer, LayerCuts

AXIS, DIRECTIONS = "hidden", "directions"  # the second is an entry of the journal
SAMPLE = 2  # batches on which the error is measured


def why_not(model: LayerwiseModel, score: str) -> str | None:
    """Why the hidden state of a model can't be cut by this score, or None."""
    if model.anatomy.norm_offset and model.anatomy.cuts is None:
        return "its embedding is scaled by the hidden width"
    return refusal(model.anatomy, model.config, r1=True, r2=False) if score == "pca" else None


def find_directions(model: LayerwiseModel, context: Context, score: str) -> None:
    """Write the directions [D, D] to the journal, those that stay longest first: columns, or for `activation`
    an order [D].

    Source: pca: SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024, section 3.3. Differs: one rotation for the
    whole model, so that no matrix is left on the residual path and the result is a plain model. activation:
    Minitron, Muralidharan et al. 2024, arXiv:2407.14679.
    """
    journal = context.journal
    if journal.has(DIRECTIONS, 0):
        return
    layers, D = len(model.layers), model.sizes[AXIS]
    moments = Moments(D, model.device)
    for layer in context.track(
        walk(model, context.data.calibration, through=True, half=True), f"prune (hidden, {score})", layers + 1
    ):
        for hidden in layer.inputs:
            x_TD = hidden.flatten(0, -2).to(model.device)
            moments.add(x_TD / x_TD.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12))
    if score == "pca":
        order = torch.linalg.eigh(moments.H_CC.double()).eigenvectors.flip(1)
    else:
        order = moments.H_CC.diagonal().argsort(descending=True, stable=True)
    journal.save(DIRECTIONS, 0, {"directions": order.cpu().contiguous()})


def cut(model: LayerwiseModel, context: Context, outline: MetaModel, score: str, mend: bool) -> None:
    """Cut every layer that the journal does not hold yet, and the weights outside the layers."""
    journal, layers, count = context.journal, len(model.layers), outline.sizes[AXIS]
    order = journal.load(DIRECTIONS, 0)["directions"]
    kept = torch.arange(count) if score == "pca" else order[:count].sort().values
    if score == "pca":
        model.turn(Rotation(model.anatomy, model.config, context.seed, r1=order, r2=False))
    if not (all(journal.has(STAGE, index) for index in range(layers)) and journal.has(OUTER, 0)):
        visited = walk(model, context.data.calibration, reference=True, through=True, half=True)
        for layer in context.track(visited, f"prune (hidden, {score})", layers + 1):
            if layer.index == 0:
                layer.inputs = [hidden[..., kept] for hidden in layer.inputs]
            if layer.index == layers:
                journal.save(OUTER, 0, _outer(model, outline, layer, kept, mend))
                continue
            if not journal.has(STAGE, layer.index):
                lost = _layer(layer, copy.deepcopy(outline.layers[layer.index]), kept, mend)
                changed = {name: layer.module.get_parameter(name).data for name in layer.anatomy.layer}
                named = model.as_stored(changed, f"{layer.name}.")
                record = CutLayer(name=layer.name, axis=AXIS, kept_units=count, relative_error=lost)
                journal.save(STAGE, layer.index, named, LayerCuts(cuts=(record,)))
            tensors = journal.load(STAGE, layer.index)  # the next layers see what is written
            inner = {name.removeprefix(f"{layer.name}."): tensor for name, tensor in tensors.items()}
            layer.become(copy.deepcopy(outline.layers[layer.index]), inner)


def _layer(layer: DecoderLayer, narrow: nn.Module, kept: Tensor, mend: bool) -> float:
    """Make a layer narrow, and solve its linears again. Returns the relative error of the states that leave
    it."""
    anatomy, whole = layer.anatomy, {linear: layer.weight(linear) for linear in layer.anatomy.linears}
    tensors = _narrow(
        {name: layer.module.get_parameter(name).data for name in anatomy.layer},
        anatomy.layer,
        layer.sizes,
        kept,
    )
    layer.become(narrow, _with_gains(tensors, anatomy.layer, _share(layer), anatomy.norm_offset))
    for group in anatomy.consumers if mend else ():
        moments = layer.moments(group)[group[0]]
        reads = AXIS in Spelling((anatomy.input_of(group[0]),)).axes
        for linear in group:
            W_RC = layer.weight(linear)
            layer.set_weight(
                linear, translate(whole[linear], W_RC, moments) if reads else retarget(W_RC, moments)
            )
    aims = [target[..., kept] for target in layer.limit.units(layer.targets)[:SAMPLE]]
    outs = layer.outputs(layer.limit.units(layer.inputs)[:SAMPLE])
    errors = [(out - aim).pow(2).sum() for out, aim in zip(outs, aims, strict=True)]
    return float(torch.stack(errors).sum() / torch.stack([aim.pow(2).sum() for aim in aims]).sum())


@torch.no_grad()
def _outer(
    model: LayerwiseModel, outline: MetaModel, layer: DecoderLayer, kept: Tensor, mend: bool
) -> dict[str, Tensor]:
    """The narrow weights outside the layers; `layer` is the one after the last."""
    anatomy, tied = model.anatomy, model.config.tie_word_embeddings
    rows = {
        name: row for name, row in anatomy.outer.items() if not (tied and name == f"{anatomy.head}.weight")
    }
    tensors = {name: model.outer_weight(name) for name in rows}
    tensors = _narrow(tensors, rows, model.sizes, kept)
    tensors = _with_gains(tensors, rows, _share(layer), anatomy.norm_offset)
    if mend and not tied and anatomy.norm:
        whole, narrow = (
            model.model.get_submodule(anatomy.norm),
            copy.deepcopy(outline.model.get_submodule(anatomy.norm)),
        )
        for name in dict(narrow.named_parameters()):
            narrow._parameters[name] = nn.Parameter(tensors[f"{anatomy.norm}.{name}"], requires_grad=False)
        moments = Moments(len(kept), model.device, model.sizes[AXIS])
        for hidden, full in zip(layer.inputs, layer.reference, strict=True):
            moments.add(narrow(hidden.to(model.device)), whole(full.to(model.device)))
        head = f"{anatomy.head}.weight"
        tensors[head] = translate(model.outer_weight(head), tensors[head], moments)
    return model.as_stored(tensors)


def _narrow(
    tensors: dict[str, Tensor], rows: Mapping[str, str], sizes: Mapping[str, int], kept: Tensor
) -> dict[str, Tensor]:
    """The tensors without the channels that are cut."""
    along = {name: AXIS in Spelling.parse(rows[name]).axes for name in tensors}
    return {name: take(t, rows[name], sizes, AXIS, kept) if along[name] else t for name, t in tensors.items()}


def _with_gains(
    tensors: dict[str, Tensor], rows: Mapping[str, str], share: float, offset: float
) -> dict[str, Tensor]:
    """The tensors with the gains of norms multiplied by `share`; a gain is `offset` plus its weight."""
    gains = {name for name in tensors if rows[name] == AXIS and name.endswith(".weight")}
    return {
        name: (tensor + offset) * share - offset if name in gains else tensor
        for name, tensor in tensors.items()
    }


def _share(layer: DecoderLayer) -> float:
    """Mean ratio of the root mean square of the narrow states to that of the whole ones."""
    pairs = zip(layer.inputs, layer.reference, strict=True)
    ratios = [
        (x.pow(2).mean(-1) / full.pow(2).mean(-1).clamp_min(1e-30)).sqrt().flatten() for x, full in pairs
    ]
    return float(torch.cat(ratios).mean())
