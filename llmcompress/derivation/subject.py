"""The tiny model on which facts about a family are derived and proved: its layers, and what they compute."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.architectures.spec import CallForm
from llmcompress.derivation.shrink import FIRST_SPECIAL, shrunk, tiny_model
from llmcompress.errors import ModelError
from llmcompress.integrations.layer_calls import states_of

LENGTH = 24  # tokens of a probe, more than the windows of a tiny model
BATCHES = 2
EXACT = 1e-5  # logits that differ by less are equal: norms and softmax compute in float32
# Where a model amplifies rounding, by less than this many times what rounding its weights to float32 does.
ROUNDINGS, WIDEST = 4.0, 1e-3
ROUNDING = 2.0**-24  # of float32, relative
LARGEST = 1 << 25  # parameters of a tiny model
DEPTHS = ("num_hidden_layers", "num_layers")  # fields that count layers; in some families one counts halves


@dataclass(frozen=True)
class Subject:
    """A tiny model: its decoder layers, how they are called, and its logits."""

    model: PreTrainedModel
    path: str  # of the ModuleList of layers
    layers: nn.ModuleList
    form: CallForm  # how its layers are called, without what they hand on until that is proved
    tokens: list[Tensor]  # batches [B, L], without special tokens
    expected: list[Tensor]  # their logits [B, L, V]
    exact: float = EXACT  # logits that differ by less are equal
    writers: frozenset[int] = frozenset()  # layers that write to a mapping that is handed on

    @classmethod
    def like(cls, model: PreTrainedModel, path: str) -> Subject:
        """A tiny model of the same class and config, with as many of the layers at a path as it takes to have
        one of each kind. Errors: ModelError."""
        tiny, size = _tiny_config(model, path)
        if size > LARGEST:
            raise ModelError(f"a small model of its config still has {size} parameters")
        try:
            return cls.of(tiny_model(tiny, type(model)), path)
        except RuntimeError:  # the code of some families computes in float32 alone
            return cls.of(tiny_model(tiny, type(model), dtype=torch.float32), path)

    @classmethod
    def of(cls, model: PreTrainedModel, path: str) -> Subject:
        """Look at a tiny model. Errors: ModelError if its layers run in no pass, or return something else."""
        layers, tokens, returned = layers_at(model, path), _tokens(), list[Any]()
        hook = layers[-1].register_forward_hook(lambda module, args, out: returned.append(out))
        try:
            expected = [logits(model, batch) for batch in tokens]
            logits(model, tokens[0][:1])
        finally:
            hook.remove()
        if not returned:
            raise ModelError(f"a text doesn't go through {path}")
        form = _form(returned[0], returned[-1], model.config.get_text_config(decoder=True).hidden_size)
        found = cls(model, path, layers, form, tokens, expected)
        return replace(found, exact=min(max(EXACT, ROUNDINGS * found.rounding()), WIDEST))

    @torch.no_grad()
    def distance_with(self, changed: Mapping[str, Tensor], *, tied: bool = True) -> float:
        """How far the logits are with some parameters changed, by full name; the other names of a tied one
        change with it, if `tied`."""
        asked = {"input_ids": self.tokens[0], "use_cache": False}
        found = functional_call(self.model, dict(changed), kwargs=asked, tie_weights=tied)
        return self.distance(found.logits.double())

    @torch.no_grad()
    def rounding(self) -> float:
        """How far logits are from those of the model with its weights moved by as much as float32 rounds:
        the most in three draws."""
        generator, found = torch.Generator().manual_seed(5), list[float]()
        saved = [(parameter, parameter.data) for parameter in self.model.parameters()]
        for _ in range(3):
            for parameter, data in saved:
                noise = torch.randn(data.shape, generator=generator).to(data)
                parameter.data = data * (1 + ROUNDING * noise)
            found.append(self.distance(logits(self.model, self.tokens[0])))
        for parameter, data in saved:
            parameter.data = data
        return max(found)

    def distance(self, logits: Tensor, batch: int = 0) -> float:
        """How far logits are from those of the unchanged model, in standard deviations; infinite for NaN and
        for another shape."""
        expected = self.expected[batch]
        if logits.shape != expected.shape:
            return float("inf")
        off = float((logits - expected).abs().max() / expected.std())
        return off if off == off else float("inf")


def _form(out: Any, of_one: Any, hidden_size: int) -> CallForm:
    """How layers are called, from what one returns for a batch and for one sequence. Errors: ModelError."""
    alone = isinstance(out, Tensor)
    if not alone and not (isinstance(out, tuple | list) and isinstance(out[0], Tensor)):
        raise ModelError(f"its layers return a {type(out).__name__}")
    items = 0 if alone else len(out)
    shape, single = states_of(out).shape, states_of(of_one).shape
    if len(shape) != 4:
        return CallForm(items, max(1, shape[-1] // hidden_size))
    # [streams, B, L, D] or [B, L, streams, D]
    batch = next((dim for dim in range(4) if shape[dim] != single[dim]), -1)
    stream_dim = {0: 2, 1: 0}.get(batch)
    if stream_dim is None or shape[batch + 1] != LENGTH:
        raise ModelError(f"its states are {list(shape)}, and where a batch is in them is not known")
    return CallForm(items, shape[stream_dim] * shape[-1] // hidden_size, stream_dim)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The logits [B, L, V] of a whole model, float64."""
    return model(input_ids=tokens, use_cache=False).logits.double()  # type: ignore[no-any-return]


def _tokens() -> list[Tensor]:
    """Two batches of random tokens [B, L] below the special ones of a tiny model."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, FIRST_SPECIAL, (BATCHES, LENGTH), generator=generator) for _ in range(2)]


def layers_at(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """The layers at a path."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def paths_of_layers(model: PreTrainedModel) -> list[str]:
    """The names of the lists of modules that may be the decoder layers: as long as the config says, those
    first that share most of their names with the embedding, then those with most of the weights.

    Errors: ModelError if there is none.
    """
    text = model.config.get_text_config(decoder=True)
    depths = {int(depth) for name in DEPTHS if (depth := getattr(text, name, None)) is not None}
    names = {module: name for name, module in model.named_modules()}
    embedding = names.get(model.get_input_embeddings(), "").split(".")

    def likely(module: nn.ModuleList) -> tuple[int, int]:
        common = takewhile(bool, map(operator.eq, names[module].split("."), embedding))
        return len([*common]), sum(parameter.numel() for parameter in module.parameters())

    found = [
        module
        for module in names
        if isinstance(module, nn.ModuleList) and len(module) in depths and [*module.parameters()]
    ]
    if not found:
        said = " or ".join(str(depth) for depth in sorted(depths))
        raise ModelError(f"it has no list of {said or 'as many'} decoder layers as its config says")
    return [names[module] for module in sorted(found, key=likely, reverse=True)]


def _tiny_config(model: PreTrainedModel, path: str) -> tuple[PretrainedConfig, int]:
    """The config of a tiny model with a layer of each kind, and its number of parameters.

    It has all layers if what a layer is made of depends on how many there are.
    """
    layers = layers_at(model, path)
    wanted = first_of_each_kind(layers)
    depths = dict.fromkeys((depth_needed(model, path), len(layers)))
    sizes: list[tuple[PretrainedConfig, int]] = []
    for depth in depths:
        tiny = shrunk(model.config, depth)
        with torch.device("meta"):
            small = type(model)._from_config(tiny)
        sizes.append((tiny, sum(parameter.numel() for parameter in small.parameters())))
        if wanted.keys() <= first_of_each_kind(layers_at(small, path)).keys():
            return sizes[-1]
    return sizes[0]


def depth_needed(model: PreTrainedModel, path: str) -> int:
    """As many of the first layers as it takes to have one of each kind, and two that share parameters if any
    do."""
    layers = layers_at(model, path)
    tied = [max(one, other) for (one, _), (other, _) in _ties_in_layers(model, path)]
    needed = max(2, 1 + max(first_of_each_kind(layers).values()), 1 + min(tied, default=0))
    return min(needed, len(layers))


def tied_in_layers(model: PreTrainedModel, path: str) -> dict[int, set[str]]:
    """By the number of a layer, its parameters that other layers have too, by their names in the layer."""
    found: dict[int, set[str]] = {}
    for pair in _ties_in_layers(model, path):
        for index, name in pair:
            found.setdefault(index, set()).add(name)
    return found


Part = tuple[int, str]  # a layer, a parameter in it


def _ties_in_layers(model: PreTrainedModel, path: str) -> Iterator[tuple[Part, Part]]:
    """Yield each tied parameter of a layer, and the one that it is, in another layer."""
    for pair in model.all_tied_weights_keys.items():
        if all(name.startswith(f"{path}.") for name in pair):
            target, source = (name.removeprefix(f"{path}.").partition(".") for name in pair)
            yield (int(target[0]), target[2]), (int(source[0]), source[2])


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two inputs are equal in every bit."""
    return one.shape == other.shape and torch.equal(one, other)


def described(error: Exception) -> str:
    """An error of a family's code as a part of a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


def kind_of(layer: nn.Module) -> Hashable:
    """What tells layers of one model apart, whatever their sizes: their modules, the names of their weights,
    and each flag and word that a module holds."""
    modules = [(name, type(module)) for name, module in layer.named_modules()]
    weights = [name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]]
    flags = [
        (name, attribute, value)
        for name, module in layer.named_modules()
        for attribute, value in sorted(vars(module).items())
        if isinstance(value, bool | str) and not attribute.startswith("_") and attribute != "training"
    ]
    return (*modules,), (*weights,), (*flags,)


def first_of_each_kind(layers: nn.ModuleList) -> dict[Hashable, int]:
    """Each kind of layer with the number of the first one."""
    found: dict[Hashable, int] = {}
    for index, layer in enumerate(layers):
        found.setdefault(kind_of(layer), index)
    return found
