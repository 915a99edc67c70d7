"""The anatomy of a model, put together from what is proved of each kind of layer of its tiny twin."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from llmcompress.architectures.spec import AXES, LINEARS, SCALES, Anatomy
from llmcompress.derivation.axis_proofs import HIDDEN, Axes
from llmcompress.derivation.config_fields import HEAD_DIM, Place
from llmcompress.derivation.drafts import Draft
from llmcompress.derivation.readers import Readers
from llmcompress.derivation.scales import Crossing
from llmcompress.derivation.spelling import spelled
from llmcompress.derivation.subject import Subject, layers_at
from llmcompress.errors import ModelError
from llmcompress.integrations.linear_modules import is_linear
from llmcompress.integrations.transformers_compat import Conv1D

# by the number of a layer, its parameters that other layers have too
Tied = Mapping[int, set[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of layer: one of the tiny model, its name, and what is proved of it."""

    tiny: nn.Module
    name: str
    readers: Readers
    crossings: Sequence[Crossing]
    writes: bool = False  # whether it writes to a mapping that layers hand on


@dataclass(frozen=True)
class Found:
    """What is proved of a tiny model beside its kinds of layers: its axes. `reads` are the dimensions of
    its matrices that are inputs, `norm` is the module whose gain the head follows, and `by_batch` is whether
    the arguments of layers depend on the tokens."""

    subject: Subject
    axes: Sequence[Axes]
    reads: frozenset[Place]
    norm: str | None
    by_batch: bool

    def anatomy(
        self,
        model: PreTrainedModel,
        kinds: Sequence[Kind | None],
        tied: Tied,
        turns: frozenset[str] = frozenset(),
    ) -> Anatomy:
        """The facts of a model with layers of these kinds. Errors: ModelError for a layer whose kind the tiny
        model lacks, given as None."""
        path = self.subject.path
        common = Anatomy(
            family=model.config.model_type,
            layers=path,
            layer={},
            outer=_outer(model, path, self.axes),
            consumers=(),
            scale_pairs={},
            sizes={},
            embedding=_name(model, model.get_input_embeddings()),
            head=_name(model, model.get_output_embeddings()),
            norm=self.norm,
            level=LINEARS,
            turns=turns,
            arguments_by_batch=self.by_batch,
            form=self.subject.form,
        )
        each = tuple(
            self._layer(common, model, index, kind, tied.get(index, set()))
            for index, kind in enumerate(kinds)
        )
        if any(HIDDEN not in (of.cuts or ()) for of in each):  # it is cut in all layers or in none
            each = tuple(replace(of, cuts=(of.cuts or frozenset()) - {HIDDEN}) for of in each)
        level = max(of.level for of in each)
        return replace(each[0], level=level, each_layer=each if any(of != each[0] for of in each) else ())

    def _layer(
        self, common: Anatomy, model: PreTrainedModel, index: int, found: Kind | None, tied: Collection[str]
    ) -> Anatomy:
        """The facts of one layer; its parameters that other layers have too stay as they are."""
        layer, text = layers_at(model, common.layers)[index], model.config.get_text_config(decoder=True)
        if found is None:
            raise ModelError(f"layer {index} is of a kind that no small model of this config has")
        readers, crossings = _untied(found, layer, tied) if tied else (found.readers, found.crossings)
        groups = readers.groups
        linears = {name for group in groups for name in group}
        conv1d = {name for name in linears if isinstance(layer.get_submodule(name), Conv1D)}
        here = [each for each in self.axes if each.of(found.name)]
        draft, tiny = Draft.of(layer), Draft.of(found.tiny)
        for each in here:
            draft.lay(each, found.name, each.in_model(text, index), self.reads)
            tiny.lay(each, found.name, each.sizes, self.reads)
        spelling = spelled(draft, tiny, crossings, text.hidden_size)
        cuts = frozenset(
            axis for each in here for axis in each.cuts if axis != HIDDEN or each.offset == spelling.offset
        )
        return replace(
            common,
            layer=spelling.rows,
            buffers=spelling.buffers,
            consumers=tuple(groups),
            scale_pairs=spelling.pairs,
            sizes={axis: name for each in here for axis, name in each.fields.items()},
            counts=spelling.sizes,
            cuts=cuts,
            head_dim=HEAD_DIM if any(each.head_dim for each in here) else None,
            norm_offset=spelling.offset,
            kept=readers.kept,
            experts=readers.experts,
            conv1d=frozenset(conv1d),
            writes=found.writes,
            level=AXES if cuts else SCALES if spelling.pairs else LINEARS,
        )


def fits(axes: Axes, model: PreTrainedModel, path: str, kinds: Sequence[Kind | None], tied: Tied) -> bool:
    """Whether in every layer of a model the dimensions fit the sizes of axes that its config says, and are
    of no parameter that other layers have too."""
    text = model.config.get_text_config(decoder=True)
    for index, (layer, kind) in enumerate(zip(layers_at(model, path), kinds, strict=True)):
        if kind is not None:
            known = axes.in_model(text, index)
            if tied.get(index, set()) & {name for name, _ in axes.of(kind.name)}:
                return False
            if not Draft.of(layer).lay(axes, kind.name, known, frozenset()):
                return False
    return True


def _untied(kind: Kind, layer: nn.Module, tied: Collection[str]) -> tuple[Readers, list[Crossing]]:
    """What is proved of a kind of layer, without what would change parameters that are tied."""
    why = "is a weight of several layers"
    modules = {name.rpartition(".")[0] for name in tied}
    matrices = {
        name.removesuffix(".weight") if is_linear(layer.get_submodule(name.rpartition(".")[0])) else name
        for name in tied
        if layer.get_parameter(name).dim() > 1
    }
    groups = [tuple(name for name in group if name not in modules) for group in kind.readers.groups]
    readers = Readers(
        [group for group in groups if group],
        kind.readers.kept | dict.fromkeys(sorted(matrices), why),
        {name: how for name, how in kind.readers.experts.items() if name not in tied},
    )
    crossings = [
        crossing
        for crossing in kind.crossings
        if modules.isdisjoint({crossing.producer, *crossing.readers}) and not {*crossing.readers} & {*tied}
    ]
    return readers, crossings


def _outer(model: PreTrainedModel, path: str, axes: Sequence[Axes]) -> dict[str, str]:
    """The rows of the parameters outside the layers, with the channels of the states where they are known."""
    hidden = {place for each in axes if HIDDEN in each.sizes for place in each.layouts}
    rows = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{path}."):
            terms = [HIDDEN if (name, dim) in hidden else str(n) for dim, n in enumerate(parameter.shape)]
            rows[name] = " ".join(terms) or "1"  # a number alone is one of one element
    return rows


def _name(model: PreTrainedModel, module: nn.Module | None) -> str:
    """The full name of a module that a model gives out. Errors: ModelError if it gives out none."""
    found: str | None = next((name for name, each in model.named_modules() if each is module), None)
    if found is None:
        raise ModelError("it has no embedding or no output head of its own")
    return found
