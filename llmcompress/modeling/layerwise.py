"""Where a model's weights are while it is worked on: one decoder layer in memory, the rest on disk or in the
live model.

A `LayerwiseModel` is a model skeleton: buffers are real, parameters stay on the meta device until they are
needed. The weights outside the layers are loaded once; embedding and head stay in the dtype in which they are
stored (`stored_matrices`). Those of a layer are loaded for each visit, always as
a copy in the working precision on the working device. So a stage may change what it is given, memory does not
grow with the number of layers, and a folder and a model in memory give the same numbers. The price is that
each visit to a layer reads it again.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.architectures.per_layer import build_layers, config_of_layer, mixed
from llmcompress.architectures.rotation import Rotation
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.architectures.spec import Anatomy, experts_per_token
from llmcompress.derivation.derive import anatomy_of
from llmcompress.errors import ModelError
from llmcompress.formats.base import Inputs
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.registry import AnyLayout, StoredWeight
from llmcompress.formats.sparse import SparseLayout
from llmcompress.integrations import distributed
from llmcompress.integrations.expert_linears import divide, divided_in, unite
from llmcompress.integrations.linear_modules import is_linear, shape_of
from llmcompress.io.checkpoint import check_finite
from llmcompress.io.safetensors_writer import tensors_digest
from llmcompress.modeling.model_config import skeleton
from llmcompress.modeling.stored_matrices import STORED, compute_from_stored
from llmcompress.modeling.token_limit import TokenLimit, fitting

# freed bytes after which the heap is given back: after each layer, or after several small ones
TRIM_BYTES = 1 << 24


class LayerwiseModel(ABC):
    """A causal language model of which one decoder layer at a time is in memory."""

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        layouts: Mapping[str, AnyLayout] | None = None,
        ties: Mapping[str, str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        divided: Sequence[str] = (),
        skeleton_of: LayerwiseModel | None = None,
    ) -> None:
        """`divided` are parameters of experts that are stored as linears, by full name. `skeleton_of` is a
        model of the same config and without stacks of experts, whose skeleton is shared; neither model may
        then load weights."""
        self.config, self.device, self.dtype = config, device, dtype
        # stored dtypes of the weights that are not codes, by their names in the model
        self.dtypes = dict(dtypes or {})
        self.layouts = dict(layouts or {})  # of linears that the plug-in loads, by full name
        # tensors stored as other tensors, by name, without those that config.json ties
        self.ties = dict(ties or {})
        if skeleton_of is None:
            self.model: PreTrainedModel = skeleton(config, dtype)
            self.anatomy = anatomy_of(self.model)
        else:
            self.model, self.anatomy = skeleton_of.model, skeleton_of.anatomy
        layers = self.model.get_submodule(self.anatomy.layers)
        assert isinstance(layers, nn.ModuleList)
        if skeleton_of is None:
            with init_empty_weights(include_buffers=False):
                build_layers(self.model, layers, self.anatomy)
        self.layers = layers
        inside, tied = f"{self.anatomy.layers}.", self.model.all_tied_weights_keys
        # parameters of layers that are those of other layers, by full name; no stage changes them
        self.tied = {
            name: source
            for name, source in tied.items()
            if name.startswith(inside) and source.startswith(inside)
        }
        # parameters of experts that are linears here, by full name: whether the files hold them so
        self.divided: dict[str, bool] = {}
        if skeleton_of is None:
            self._divide(divided, stored=True)
        else:
            self.divided = dict.fromkeys(divided, True)
        self.sizes = self.sizes_of(0)
        self.stored: list[str] = []  # modules outside the layers that compute from a weight as it is stored
        self.rotation: Rotation | None = None
        self._freed = 0  # bytes freed since the heap was last given back

    def divide_experts(self) -> None:
        """Make each expert a linear of its own from now on, with a name in its layer. The weights stay."""
        self._divide([name for name in self.expert_weights if name not in self.divided], stored=False)

    def _divide(self, parameters: Sequence[str], *, stored: bool) -> None:
        """Divide parameters of experts, by full name. Errors: ModelError for a name that is none of them."""
        if not parameters:
            return
        for name in ("layer_linears", "expert_weights", "kept_weights", "expert_linears", "_maps", "_sizes"):
            self.__dict__.pop(name, None)
        wanted, each = {*parameters}, list[Anatomy]()
        for index, module in enumerate(self.layers):
            anatomy, prefix, linears = self.anatomy.of_layer(index), f"{self.layer_name(index)}.", {}
            for name, transposed in anatomy.experts.items():
                if (full := prefix + name) in wanted:
                    linears[name] = divide(module, name, transposed=transposed)
                    self.divided[full] = stored
                    wanted.remove(full)
                    if (dtype := self.dtypes.get(full)) is not None:
                        self.dtypes |= {f"{prefix}{linear}.weight": dtype for linear in linears[name]}
            each.append(anatomy.divided(linears) if linears else anatomy)
        if wanted:
            raise ModelError(
                f"config.json divides {min(wanted)} among experts, but this model has no such parameter; the "
                "config is of another model"
            )
        alike = all(anatomy == each[0] for anatomy in each)
        each_layer = () if alike else tuple(each)
        self.anatomy = replace(each[0], level=self.anatomy.level, each_layer=each_layer)

    def used_share(self, linear: str) -> float:
        """The share of the tokens that a linear of a layer reads, by its full name: of experts, those that a
        token is routed to."""
        count = self.expert_linears.get(linear)
        return min(1.0, experts_per_token(self.text_config) / count) if count else 1.0

    @cached_property
    def expert_linears(self) -> dict[str, int]:
        """The linears that are experts, by full name, with how many read the same states."""
        return {
            f"{self.layer_name(index)}.{linear}": len(linears)
            for index in range(len(self.layers))
            for linears in self.anatomy.of_layer(index).expert_linears
            for linear in linears
        }

    def untie(self) -> None:
        """Give the head its own matrix, whatever the config says. The weights decide, as in
        `from_pretrained`."""
        self.config = copy.deepcopy(self.config)
        head = self.model.get_submodule(self.anatomy.head)
        self.config.tie_word_embeddings = self.model.config.tie_word_embeddings = False
        self.model.all_tied_weights_keys.pop(f"{self.anatomy.head}.weight", None)
        head._parameters["weight"] = nn.Parameter(
            torch.empty_like(head.get_parameter("weight").data), requires_grad=False
        )

    def _bring_outer(self) -> None:
        """Load everything outside the layers; called once, at the end of construction."""
        inside, stored = self.anatomy.layers + ".", self._stay_stored()
        tied = f"{self.anatomy.head}.weight" if self.config.tie_word_embeddings else None
        names = [name for name in self.model.state_dict() if not name.startswith(inside) and name != tied]
        self._bring([name for name in names if name not in stored])
        for name in stored:
            self.stored.append(name.removesuffix(".weight"))
            module = self.model.get_submodule(self.stored[-1])
            if name in names:
                weight = self._as_stored(name).to(self.device)
                module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            compute_from_stored(module, self.dtype)
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        self.require_all(
            name for name, p in self.model.named_parameters() if p.is_meta and not name.startswith(inside)
        )

    def _stay_stored(self) -> list[str]:
        """The matrices of embedding and head that stay in the dtype in which they are stored, and of other
        embeddings that are looked up for each token."""
        embedding, head = self.anatomy.embedding, self.anatomy.head
        source = {embedding: embedding, head: embedding if self.config.tie_word_embeddings else head}
        if self.anatomy.arguments_by_batch:
            inside = f"{self.anatomy.layers}."
            source |= {
                name: name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Embedding) and name not in source and not name.startswith(inside)
            }
        found = {
            f"{module}.weight": self.dtypes.get(f"{stored}.weight")
            for module, stored in source.items()
            if stored not in self.layouts
            and isinstance(self.model.get_submodule(module), nn.Embedding | nn.Linear)
        }
        return [name for name, dtype in found.items() if dtype in STORED and dtype != self.dtype]

    def outer_weight(self, name: str) -> Tensor:
        """A weight outside the layers, by its full name, in the working precision."""
        return self.model.get_parameter(name).data.to(self.dtype)

    @property
    def plain(self) -> bool:
        """Whether transformers loads the model without the plug-in, as it does codes in a native layout."""
        return not (mixed(self.config) or self.layouts or self.ties or self.divided)

    @property
    def shared_linears(self) -> dict[str, str]:
        """The linears whose weight is another linear's with nothing added, by full name, with the other's
        name."""
        linears = {
            name.removesuffix(".weight"): source.removesuffix(".weight") for name, source in self.ties.items()
        }
        return {
            name: source
            for name, source in linears.items()
            if self.layouts.get(name) == FactoredLayout("shared")
        }

    def layer_name(self, index: int) -> str:
        """The full name of a layer, such as `model.layers.3`."""
        return f"{self.anatomy.layers}.{index}"

    def anatomy_of_layer(self, index: int) -> Anatomy:
        """The anatomy of one layer, without the linears that are empty there."""
        return self.anatomy.of_layer(index).left(self.sizes_of(index))

    @property
    def text_config(self) -> PretrainedConfig:
        """The part of the config that describes the decoder."""
        return self.config.get_text_config(decoder=True)

    @property
    def hidden_size(self) -> int:
        """The width of the states between layers."""
        return int(self.text_config.hidden_size) * self.anatomy.form.streams

    @cached_property
    def layer_linears(self) -> dict[str, None]:
        """The full names of the linears of all layers, in the order of computation, without routers."""
        return self.in_layers(lambda anatomy: anatomy.linears)

    @cached_property
    def expert_weights(self) -> dict[str, None]:
        """The full names of the 3-D parameters of all layers that hold experts."""
        return self.in_layers(lambda anatomy: anatomy.experts)

    @cached_property
    def kept_weights(self) -> dict[str, str]:
        """The matrices of layers that no stage changes, by full name, with the reason."""
        return {
            f"{self.layer_name(index)}.{name}": why
            for index in range(len(self.layers))
            for name, why in self.anatomy.of_layer(index).kept.items()
        }

    def in_layers(self, parts: Callable[[Anatomy], Iterable[str]]) -> dict[str, None]:
        """The full names of parts of a layer in all layers, in order; `parts` is asked for those of each."""
        return {
            f"{self.layer_name(index)}.{part}": None
            for index in range(len(self.layers))
            for part in parts(self.anatomy.of_layer(index))
        }

    def sizes_of(self, index: int) -> dict[str, int]:
        """The number of units on each axis in one layer. Only the widths inside layers can differ between
        layers."""
        return self.anatomy.of_layer(index).axis_sizes(config_of_layer(self.config, index))

    def widths_of(self, axis: str) -> tuple[int, ...]:
        """The number of units on one axis in each layer; 0 in one without the axis."""
        return tuple(self.sizes_of(index).get(axis, 0) for index in range(len(self.layers)))

    @cached_property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which most bytes of the weights are stored. New tensors that replace no stored weight
        have it too."""
        sizes: dict[torch.dtype, int] = {}
        for name, parameter in self.model.named_parameters():
            if (dtype := self.dtypes.get(name)) is not None:
                sizes[dtype] = sizes.get(dtype, 0) + parameter.numel() * dtype.itemsize
        if sizes:
            return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)))
        return getattr(torch, str(self.config.dtype or "float32").removeprefix("torch."))  # type: ignore[no-any-return]

    def dtype_of(self, name: str) -> torch.dtype:
        """The stored dtype of a parameter, by its name in the model; for codes, that of most weights."""
        return self.dtypes.get(name, self.weight_dtype)

    def as_stored(self, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return tensors under `prefix` and their names, each on the CPU in the dtype in which it is
        stored."""
        return {
            f"{prefix}{name}": tensor.to(self.dtype_of(f"{prefix}{name}")).cpu().contiguous()
            for name, tensor in tensors.items()
        }

    @cached_property
    def limit(self) -> TokenLimit:
        """How many tokens go through a layer at once, decided when it is first asked for; by several
        processes alike."""
        alone = distributed.count() == 1
        return TokenLimit(self.device, fitting(self.device, self.token_bytes()) if alone else None)

    def token_bytes(self) -> int:
        """Bytes that a token takes in the widest layer, if it keeps every input and output of a matrix."""
        widths = []
        for index, layer in enumerate(self.layers):
            chosen, width = experts_per_token(self.text_config), 0.0
            for name, parameter in layer.named_parameters():
                if parameter.dim() > 1:
                    linear = f"{self.layer_name(index)}.{name.removesuffix('.weight')}"
                    share = chosen if parameter.dim() > 2 else self.used_share(linear)
                    width += sum(parameter.shape[-2:]) * share
            widths.append(math.ceil(width))
        return max(widths, default=0) * self.dtype.itemsize

    def idle_parameters(self) -> int:
        """Number of parameters of experts that a token is not routed to."""
        chosen, idle = experts_per_token(self.text_config), 0.0
        for index, layer in enumerate(self.layers):
            anatomy = self.anatomy.of_layer(index)
            stacks = [layer.get_parameter(name) for name in anatomy.experts]
            sizes = [(len(stack), stack.numel()) for stack in stacks]
            for linears in anatomy.expert_linears:
                names = [f"{self.layer_name(index)}.{linear}" for linear in linears]
                sizes.append((len(names), sum(self._stored_parameters(name) for name in names)))
            idle += sum(size * max(0.0, 1 - chosen / count) for count, size in sizes)
        return round(idle)

    def _stored_parameters(self, linear: str) -> int:
        """Number of parameters that a linear stores, by its full name: of a product those of both matrices,
        of a sparse weight those that stay."""
        shape, layout = shape_of(self.model.get_submodule(linear)), self.layouts.get(linear)
        if isinstance(layout, FactoredLayout):
            return layout.parameters(shape)
        return shape[0] * layout.kept(shape[1]) if isinstance(layout, SparseLayout) else math.prod(shape)

    def inner_parameters(self) -> int:
        """Number of parameters inside the layers, as they are in memory."""
        return sum(parameter.numel() for layer in self.layers for parameter in layer.parameters())

    def bits_of(self, linear: str) -> int:
        """Bits per weight of a plain linear as it is stored, by its full name."""
        return 8 * self.dtype_of(f"{linear}.weight").itemsize

    def parameters(self, widths: Mapping[str, Sequence[int]] | None = None) -> int:
        """Number of parameters that the whole model stores, tied ones once. `widths` are other numbers of
        units of some axes in each layer."""
        return self._sum(widths or {}, lambda name: 1)

    def stored_bytes(self, widths: Mapping[str, Sequence[int]] | None = None) -> int:
        """Bytes of these parameters, each in its own dtype."""
        return self._sum(widths or {}, lambda name: self.dtype_of(name).itemsize)

    def _sum(self, counts: Mapping[str, Sequence[int]], each: Callable[[str], int]) -> int:
        """Sum over the elements of all stored parameters, each counted as `each` says for the parameter's
        name in the model."""
        tied = f"{self.anatomy.head}.weight" if self.config.tie_word_embeddings else None
        sizes = self.sizes | {axis: of[0] for axis, of in counts.items()}
        outer = {name: row for name, row in self.anatomy.outer.items() if name != tied}
        total = sum(math.prod(Spelling.parse(row).shape(sizes)) * each(name) for name, row in outer.items())
        alike = dict[tuple[object, ...], dict[str, int]]()  # most layers have the weights of the first
        for index in range(len(self.layers)):
            sizes = self.sizes_of(index) | {axis: of[index] for axis, of in counts.items()}
            layer, anatomy = self.layer_name(index), self.anatomy.of_layer(index)
            if (key := (id(anatomy), *sizes.items())) not in alike:
                alike[key] = {
                    name: math.prod(Spelling.parse(row).shape(sizes)) for name, row in anatomy.layer.items()
                }
            total += sum(count * each(f"{layer}.{name}") for name, count in alike[key].items())
        return total - (self._unstored(each) if self.layouts or self.ties or self.tied else 0)

    def _unstored(self, each: Callable[[str], int]) -> int:
        """How much less is stored than the whole weights, because some are shared and some are products."""
        found = sum(self.model.get_parameter(name).numel() * each(name) for name in self.tied)
        tied = {name.rpartition(".")[0] for name in self.ties}
        for name, shape in self.linear_maps():
            layout, one = self.layouts.get(name), each(f"{name}.weight")
            if isinstance(layout, FactoredLayout):
                found += (math.prod(shape) - layout.parameters(shape, common=name not in tied)) * one
            elif name in tied:
                found += math.prod(shape) * one
        return found

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Yield layer `index` with its weights, which are freed when the context exits."""
        prefix, module = self.layer_name(index) + ".", self.layers[index]
        # what the files hold in one tensor is loaded so
        whole = {name: how for name, how in divided_in(module).items() if not self.divided[prefix + name]}
        try:
            for name in whole:
                unite(module, name)
            self._bring([prefix + name for name in module.state_dict()])
            self.require_all(prefix + name for name, p in module.named_parameters() if p.is_meta)
            for name, weights in whole.items():
                divide(module, name, transposed=weights.transposed)
            if self.rotation:
                anatomy = self.anatomy.of_layer(index)
                turned = partial(self.rotation.inner, sizes=self.sizes_of(index), anatomy=anatomy)
                self._rewrite(turned, module, anatomy.layer)
            yield module
        finally:
            for owner in module.modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        owner._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
            parameter = None  # a reference to the last one would keep its memory
            self._freed += sum(p.numel() for p in module.parameters()) * self.dtype.itemsize
            if self._freed >= TRIM_BYTES:
                _trim()
                self._freed = 0

    def turn(self, rotation: Rotation) -> None:
        """Rotate all weights from now on. The rotated model computes the same function."""
        self.rotation = rotation
        tied = {f"{self.anatomy.head}.weight"} if self.config.tie_word_embeddings else set()
        self._rewrite(rotation.outer, self.model, [name for name in self.anatomy.outer if name not in tied])

    def _rewrite(
        self,
        rotated: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        owner: nn.Module,
        names: Iterable[str],
    ) -> None:
        given = {name: owner.get_parameter(name).data.to(self.dtype) for name in names}
        for name, tensor in rotated(given).items():
            owner.get_parameter(name).data = tensor.to(self.device, self.dtype)

    def round_inputs(self, linear: str, inputs: Inputs) -> None:
        """Round the inputs of a linear, by its full name, with `inputs` from now on, as its kernel does."""
        self.model.get_submodule(linear).register_forward_pre_hook(
            lambda module, args: (inputs(args[0]), *args[1:])
        )

    def reader(self, name: str) -> str | None:
        """The linear that multiplies by a module's matrix: the module itself; for the embedding, the head
        tied to it, or None."""
        if name != self.anatomy.embedding:
            return name
        return self.anatomy.head if self.config.tie_word_embeddings else None

    def set_embedding(self, W_VD: Tensor, inputs: Inputs | None) -> None:
        """Replace the embedding's matrix for good. A head tied to it uses the new matrix too, and `inputs`
        rounds the head's inputs."""
        # a tied head has the same parameter
        weight = self.model.get_parameter(f"{self.anatomy.embedding}.weight")
        weight.data = W_VD.to(self.device, self.dtype)
        if (head := self.reader(self.anatomy.embedding)) and inputs:
            self.round_inputs(head, inputs)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shape (outputs, inputs) of every matrix that can be quantised, by full name: linears and the
        embedding.

        A tied head is left out, as its matrix is the embedding's.
        """
        shapes = dict(self.linear_maps())
        if (shared := self.reader(self.anatomy.embedding)) is not None:
            del shapes[shared]
        V, D = self.model.get_parameter(f"{self.anatomy.embedding}.weight").shape
        return shapes | {self.anatomy.embedding: (V, D)}

    def linear_maps(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the full name and the shape (outputs, inputs) of every linear of the model that is not
        empty."""
        for name, module in self.model.named_modules():
            if is_linear(module) and module.get_parameter("weight").numel():
                yield name, shape_of(module)

    def require_all(self, absent: Iterable[str]) -> None:
        """Refuse the model if any tensors are `absent`. Errors: ModelError."""
        names = sorted(absent)
        if names == [f"{self.anatomy.head}.weight"]:
            raise ModelError(
                f"{self.where} has no {names[0]}, and its config.json says tie_word_embeddings: false, so a "
                "loader would draw the head at random; set it to true if the head is the embedding, else "
                "fetch the base again"
            )
        if names:
            raise ModelError(
                f"{self.where} has no tensor for {names[0]} ({len(names)} missing); it is incomplete, fetch "
                "it again"
            )

    @property
    @abstractmethod
    def where(self) -> str:
        """The name of the model in an error."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the weights; a model trained in another way has another one."""

    def codes(self, name: str) -> StoredWeight | None:
        """The stored form of a quantised matrix, by the full name of its module; None for a plain matrix."""
        return None

    @abstractmethod
    def _bring(self, names: Iterable[str]) -> None:
        """Load the weights `names` of the skeleton, in the working dtype on the working device."""

    @abstractmethod
    def _as_stored(self, name: str) -> Tensor:
        """The weight `name` of the skeleton, which is no codes, in the dtype in which it is stored. It must
        not be changed."""


class MetaModel(LayerwiseModel):
    """A model without weights, known by its config alone or also by the headers of its files: shapes, names,
    what is shared."""

    place = "the config"  # or the folder

    @property
    def where(self) -> str:
        return self.place

    def sizes_of(self, index: int) -> dict[str, int]:
        """The number of units on each axis in one layer, which stays as the config says."""
        return dict(self._sizes[index])

    @cached_property
    def _sizes(self) -> list[dict[str, int]]:
        return [super(MetaModel, self).sizes_of(index) for index in range(len(self.layers))]

    def linear_maps(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the full name and the shape (outputs, inputs) of every linear that is not empty."""
        yield from self._maps.items()

    @cached_property
    def _maps(self) -> dict[str, tuple[int, int]]:
        return dict(super().linear_maps())

    def fingerprint(self) -> str:
        """The digest of the config, as there are no weights."""
        return hashlib.sha256(self.config.to_json_string(use_diff=False).encode()).hexdigest()

    def _bring(self, names: Iterable[str]) -> None:
        raise ModelError("a config has no weights; give a folder that holds safetensors")

    def _as_stored(self, name: str) -> Tensor:
        raise ModelError("a config has no weights; give a folder that holds safetensors")


class InMemoryModel(LayerwiseModel):
    """Weights in memory by their names in the model's state dict. They are read and never changed.

    `quantized` holds the stored form of the quantised weights; in `source` they are the weights that the
    codes stand for.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        source: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        quantized: Mapping[str, StoredWeight] | None = None,
        layouts: Mapping[str, AnyLayout] | None = None,
        ties: Mapping[str, str] | None = None,
        divided: Sequence[str] = (),
    ) -> None:
        self.source, self.quantized = source, dict(quantized or {})
        coded = {f"{name}.weight" for name in self.quantized}
        dtypes = {
            name: tensor.dtype
            for name, tensor in source.items()
            if tensor.is_floating_point() and name not in coded
        }
        super().__init__(config, device, dtype, layouts, ties, dtypes, divided)
        head, embedding = (source[f"{name}.weight"] for name in (self.anatomy.head, self.anatomy.embedding))
        if config.tie_word_embeddings and not torch.equal(head, embedding):
            self.untie()
        self._bring_outer()

    @property
    def where(self) -> str:
        return "the model in memory"

    def fingerprint(self) -> str:
        """A digest of every tensor."""
        return tensors_digest(self.source)

    def codes(self, name: str) -> StoredWeight | None:
        """The stored form of a quantised matrix, by the full name of its module; None for a plain matrix."""
        return self.quantized.get(name)

    def _as_stored(self, name: str) -> Tensor:
        check_finite(self.source[name], name)
        return self.source[name].detach()

    def _bring(self, names: Iterable[str]) -> None:
        for name in names:
            tensor = self.source[name]
            check_finite(tensor, name)
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            value = (
                tensor.detach().to(self.device, self.dtype, copy=True)
                if tensor.is_floating_point()
                else tensor
            )
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value


def _trim() -> None:
    """Make glibc give back the free memory of its heap; other C libraries are left alone.

    Layers that come and go fragment the heap, and without this peak memory grows with depth
    (evaluation/results/cost.json).
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
