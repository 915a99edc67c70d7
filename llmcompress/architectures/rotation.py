"""Rotate a model's weights so that its activations lose their outliers and its function stays.

Between the layers of a pre-norm model, only the gains of the norms single out a channel. Once these are
folded into the linears that read them, an RMS norm commutes with a rotation. One matrix R1 may then rotate
the hidden state everywhere, if every weight that writes it is rotated and every weight that reads it is
rotated back. Between values and output projection, attention mixes tokens and not channels, so a second
matrix R2 may rotate the channels of each head. The inverse of an orthogonal matrix is its transpose, so
weights that read and weights that write need the same product along the axis. The table of spellings says
where that axis is: `hidden` for R1; for R2, `d` on both sides of an entry of `scale_pairs` whose scale runs
along it. The result is a plain model of the same config that costs nothing more at run time.

Weights are rotated one set at a time: all outside the layers, or all of one layer. So the memory is twice
that set, and a float64 copy of a value or output projection. The time is D multiplications per weight for
width D.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.hadamard import hadamard, turn
from llmcompress.architectures.per_layer import config_of_layer
from llmcompress.architectures.shape_grammar import Group, Spelling, Term
from llmcompress.architectures.spec import R1, R2, Anatomy
from llmcompress.errors import ModelError

HIDDEN, HEAD_DIM = "hidden", "d"
Turn = tuple[str, Tensor, int | None]  # the axis, the matrix, the part of a fused weight if not the whole


class Rotation:
    """A rotation of the hidden state (`r1`) and one of the channels of each value head (`r2`), drawn by
    `seed`.

    Source: R1 and R2 of arXiv:2405.16406, with random Hadamard matrices as in arXiv:2404.00456; neither is
    learned here, and R2 is the same in all layers. `r1` may be an orthogonal matrix to use. Raises ModelError
    with the reason that `refusal` gives, if it gives one.
    """

    def __init__(
        self, anatomy: Anatomy, config: Any, seed: int, *, r1: bool | Tensor = True, r2: bool = True
    ) -> None:
        if why := refusal(anatomy, config, r1=r1 is not False, r2=r2):
            raise ModelError(f"this {anatomy.family} model can't be rotated: {why}")
        self.anatomy, self.sizes = anatomy, anatomy.axis_sizes(config_of_layer(config, 0))
        self._r2 = partial(hadamard, seed=seed + 1) if r2 else None  # of a size
        drawn = (
            r1.double().cpu()
            if isinstance(r1, Tensor)
            else hadamard(self.sizes[HIDDEN], seed)
            if r1
            else None
        )
        self.R1_DD = drawn  # [hidden, hidden]
        self._tied = bool(config.tie_word_embeddings)

    def outer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all weights outside the layers (embedding, final norm, head) after the rotation: new,
        float32, by full name.

        Raises ValueError unless the names are those of the anatomy; only a tied head may be missing.
        """
        anatomy = self.anatomy
        _require(tensors, anatomy.outer, {f"{anatomy.head}.weight"} if self._tied else set())
        norms = (
            {anatomy.norm: (anatomy.head,)} if anatomy.norm and f"{anatomy.norm}.weight" in tensors else {}
        )
        return self._rewrite(tensors, anatomy.outer, norms, {})

    def inner(
        self,
        tensors: Mapping[str, Tensor],
        sizes: Mapping[str, int] | None = None,
        anatomy: Anatomy | None = None,
    ) -> dict[str, Tensor]:
        """Return all weights of one layer after the rotation: new, float32, by name in the layer. Any layer
        can be given.

        `sizes` are those of its axes and `anatomy` its facts, where layers differ in them. Raises ValueError
        unless the names are those of the anatomy.
        """
        own = anatomy or self.anatomy
        _require(tensors, own.layer, set())
        values = _values(own) if self._r2 else {}
        return self._rewrite(tensors, own.layer, _norms(own), values, sizes)

    @torch.no_grad()
    def _rewrite(
        self,
        tensors: Mapping[str, Tensor],
        rows: Mapping[str, str],
        norms: Mapping[str, tuple[str, ...]],
        values: Mapping[str, int | None],
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """Return the rotated tensors. The gains of `norms` go into the linears that read them, and R2 applies
        to the modules (and parts) of `values`."""
        if self.R1_DD is None:
            norms = {}
        offset = self.anatomy.norm_offset
        folded = {
            f"{reader}{end}": offset + tensors[f"{norm}.weight"].double()
            for norm, consumers in norms.items()
            for reader in consumers
            for end in ("", ".weight")  # the parameters of experts have no `.weight`
        }
        rewritten = {}
        for name, tensor in tensors.items():
            if _module(name) in norms:
                rewritten[name] = torch.full_like(tensor, 1 - offset, dtype=torch.float32)
                continue
            turns = self._turns(name, rows[name], folded.get(name), values, sizes or self.sizes)
            left = tensor.dtype if tensor.dtype is torch.float64 else torch.float32
            turned = tensor.to(torch.float64 if len(turns) > 1 else left)  # rounded once, at the end
            for axis, M_DD, part in turns:
                turned = rotate(turned, rows[name], sizes or self.sizes, axis, M_DD.to(tensor.device), part)
            rewritten[name] = turned.to(left).contiguous() if turns else turned.clone()
        return rewritten

    def _turns(
        self,
        name: str,
        row: str,
        gain_D: Tensor | None,
        values: Mapping[str, int | None],
        sizes: Mapping[str, int],
    ) -> list[Turn]:
        """The matrices that multiply a weight, and their axes. The gain of the norm that the weight reads
        comes before R1."""
        axes, turns = Spelling.parse(row).axes, list[Turn]()
        if self.R1_DD is not None and HIDDEN in axes:
            turns.append(
                (
                    HIDDEN,
                    self.R1_DD if gain_D is None else gain_D.to(self.R1_DD.device)[:, None] * self.R1_DD,
                    None,
                )
            )
        if self._r2 is not None and HEAD_DIM in axes and _module(name) in values:
            turns.append((HEAD_DIM, self._r2(sizes[HEAD_DIM]), values[_module(name)]))
        return turns


def rotate(
    tensor: Tensor,
    spelling: Spelling | str,
    sizes: Mapping[str, int],
    axis: str,
    M_DD: Tensor,
    part: int | None = None,
) -> Tensor:
    """Multiply by M [size, size], float64, from the right along `axis`, in every dimension and group that
    runs along it.

    Each unit of the other axes is rotated by itself: along `d` of `(kv q d)`, every head. `part` confines it
    to that alternative of a fused weight. The dtype stays. Raises ValueError for a wrong shape or an axis
    that the spelling lacks.
    """
    spelling = Spelling.parse(spelling) if isinstance(spelling, str) else spelling
    if axis not in spelling.axes:
        raise ValueError(f'"{spelling}" has no axis "{axis}"; it runs along {", ".join(spelling.axes)}')
    if tuple(tensor.shape) != spelling.shape(sizes):
        raise ValueError(
            f'"{spelling}" spells the shape {spelling.shape(sizes)}, the tensor has {tuple(tensor.shape)}'
        )
    if tuple(M_DD.shape) != (sizes[axis], sizes[axis]):
        raise ValueError(
            f'a matrix of shape {tuple(M_DD.shape)} does not fit the {sizes[axis]} units of axis "{axis}"'
        )
    for dim, term in enumerate(spelling.dims):
        tensor = _turn_term(tensor, dim, term, sizes, axis, M_DD, part)
    return tensor


def _turn_term(
    tensor: Tensor, dim: int, term: Term, sizes: Mapping[str, int], axis: str, M_DD: Tensor, part: int | None
) -> Tensor:
    """Rotate a tensor along `axis` inside one term, which dimension `dim` runs along."""
    if term == axis:
        return turn(tensor.movedim(dim, -1), M_DD).movedim(-1, dim)
    if not isinstance(term, Group) or axis not in Spelling((term,)).axes:
        return tensor
    shapes = [Spelling(product).shape(sizes) for product in term.alternatives]
    pieces = list(tensor.split([torch.Size(shape).numel() for shape in shapes], dim))
    for number, product in enumerate(term.alternatives):
        if part is None or len(pieces) == 1 or number == part:
            piece = pieces[number].unflatten(dim, shapes[number])
            for place, factor in enumerate(product):
                inside = part if len(pieces) == 1 else None  # inside a part nothing else is selected
                piece = _turn_term(piece, dim + place, factor, sizes, axis, M_DD, inside)
            pieces[number] = piece.flatten(dim, dim + len(product) - 1)
    return torch.cat(pieces, dim)


def refusal(anatomy: Anatomy, config: Any, *, r1: bool = True, r2: bool = True) -> str | None:
    """Why a model of this config can't be rotated and what to do instead, in one clause; None if it can
    be."""
    each = anatomy.each_layer or (anatomy,)
    if r1 and (why := _layer_norm(anatomy, config) or next(filter(None, map(_unplaced, each)), None)):
        return f"{why}; leave R1 out"
    if r1 and config.tie_word_embeddings:
        return (
            "the final norm's gain would go into the head alone, and the head is tied to the embedding; "
            "untie it first"
        )
    if r2 and not any(map(_values, each)):
        return "its table has no linear that reads the values along d; leave R2 out"
    for asked, name in ((r1, R1), (r2, R2)):
        if asked and anatomy.turns is not None and name not in anatomy.turns:
            return (
                "a small model of its config computes something else once it is rotated; leave "
                f"{name.upper()} out"
            )
    return None


def _layer_norm(anatomy: Anatomy, config: Any) -> str | None:
    """Why the norms don't commute with a rotation, or None. RMS norms do: they have no bias, and their
    epsilon is rms_norm_eps."""
    rows = {**anatomy.layer, **anatomy.outer}
    said = anatomy.turns is not None or hasattr(config, "rms_norm_eps")
    if said and not any(f"{norm}.bias" in rows for norm in _gains(rows)):
        return None
    return (
        "its norms are LayerNorms, which subtract the mean over the channels, and no rotation keeps that mean"
    )


def _unplaced(anatomy: Anatomy) -> str | None:
    """Why R1 can't be passed along the hidden axis, or None: a gain or a reader there is not in
    `scale_pairs`."""
    norms = _norms(anatomy)
    followed = {reader for consumers in norms.values() for reader in consumers}
    for norm in _gains(anatomy.layer):
        if norm not in norms:
            return f"the gain of {norm} stands after its sublayer, where no linear can take it in"
    for name, row in anatomy.layer.items():
        module, dims = _module(name), Spelling.parse(row).dims
        if len(dims) > 1:
            *outputs, inputs = reversed(dims) if module in anatomy.conv1d else dims
            reads, writes = HIDDEN in Spelling((inputs,)).axes, HIDDEN in Spelling(tuple(outputs)).axes
            if reads and (writes or module not in followed):
                return f"the table does not tell which norm {module} reads"
    if HIDDEN not in anatomy.outer_axes:
        return "the table does not tell which weights run along the hidden state"
    known = {f"{module}.weight" for module in (anatomy.embedding, anatomy.norm, anatomy.head)}
    for name, row in anatomy.outer.items():
        if HIDDEN in Spelling.parse(row).axes and name not in known:
            return f"the table does not tell whether {_module(name)} stands before the final norm"
    return None


def _require(tensors: Mapping[str, Tensor], rows: Mapping[str, str], optional: set[str]) -> None:
    if missing := sorted(rows.keys() - tensors.keys() - optional):
        raise ValueError(
            f"weights that belong together turn together, and {missing[0]} is missing; give all {len(rows)}"
        )
    if unknown := sorted(tensors.keys() - rows.keys()):
        raise ValueError(f"the table has no row for {unknown[0]}; give the weights that it lists")


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _gains(rows: Mapping[str, str]) -> list[str]:
    """The norms over the hidden axis: modules whose weight is one row along it."""
    return [_module(name) for name, row in rows.items() if row == HIDDEN and name.endswith(".weight")]


def _norms(anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """Each norm of a layer over the hidden axis that linears follow, with these linears."""
    return {norm: anatomy.scale_pairs[norm] for norm in _gains(anatomy.layer) if norm in anatomy.scale_pairs}


def _values(anatomy: Anatomy) -> dict[str, int | None]:
    """The modules that R2 applies to, with the part of fused ones: producers and readers of a scale along
    `d`."""
    found: dict[str, int | None] = {}
    for key, consumers in anatomy.scale_pairs.items():
        name, part, axes = anatomy.producer(key)
        if HEAD_DIM in axes:
            found |= {name: part, **dict.fromkeys(consumers)}
    return found
