"""A cache whose keys and values are codes of 8 or 4 bits, in transformers' own interface of caches.

transformers has a `QuantizedCache`, which needs another package for its codes, rounds all tokens again each
time its window is full, and refuses models that have other layers beside full attention. The layer here
rounds each block of tokens once, keeps the first tokens and the latest ones as they are, and stands in a
`DynamicCache` in the place of the layers that grow with the text. All other layers of a model (sliding
windows, linear attention) keep the cache that transformers gives them.

config.json says in `llmcompress_kv_cache` how a model's cache is stored. Once llmcompress is imported,
`generate` makes such a cache by itself (`registration`); `kv_cache` makes one for a call of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel

from llmcompress.algorithms.key_value_blocks import Codes, Per, bytes_of_token, dequantize, quantize
from llmcompress.errors import ModelError
from llmcompress.integrations.transformers_compat import DynamicLayer, DynamicSlidingWindowLayer

FIELD = "llmcompress_kv_cache"  # the same as registration.CACHE_FIELD


@dataclass(frozen=True)
class CacheSettings:
    """How keys and values are stored: `bits` 8 or 4; `per`, what a scale of keys is for; tokens in a block;
    and how many of the latest and of the first tokens stay in the model's dtype."""

    bits: int = 8
    per: Per = "channel"
    block: int = 32
    window: int = 32
    sinks: int = 32

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("block", "window", "sinks")}
        least = {"block": 1, "window": 0, "sinks": 0}
        wrong = [name for name, value in numbers.items() if type(value) is not int or value < least[name]]
        if self.bits not in (8, 4) or self.per not in ("channel", "token") or wrong:
            raise ModelError(
                f"{FIELD} can't be {str(asdict(self))[:200]}; bits is 8 or 4, per is channel or token, block "
                "is 1 or more, window and sinks are 0 or more"
            )

    @classmethod
    def of(cls, config: PretrainedConfig) -> CacheSettings | None:
        """What a model's config says of its cache; None if it says nothing. Errors: ModelError."""
        said = getattr(config, FIELD, None)
        if said is None:
            return None
        known = {field.name for field in fields(cls)}
        if not isinstance(said, Mapping) or not said.keys() <= known:
            raise ModelError(
                f"config.json has {FIELD} {str(said)[:80]}, which this llmcompress doesn't know: update it"
            )
        return cls(**said)

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return asdict(self)

    def coded(self, length: int) -> int:
        """How many of `length` tokens are codes."""
        return max(0, length - self.sinks - self.window) // self.block * self.block

    def bytes_of(self, length: int, heads: int, key_dim: int, value_dim: int, itemsize: int) -> float:
        """Bytes that a layer holds of a text of `length` tokens; `itemsize` is that of the model's dtype."""
        coded = self.coded(length)
        keys = bytes_of_token(key_dim, self.bits, self.per, self.block)
        values = bytes_of_token(value_dim, self.bits, "token", self.block)
        whole = (length - coded) * (key_dim + value_dim) * itemsize
        return heads * (coded * (keys + values) + whole)


class QuantizedKeysAndValues(DynamicLayer):
    """The cache of one layer with full attention: its first tokens, blocks of codes, and its latest tokens.

    A block is rounded when `block` tokens have left the window, so between `window` and `window + block - 1`
    tokens are as they were. Tokens are rounded after those that came with them have read them, so a prompt
    that is read at once is read with its own keys and values. `keys` and `values` are the latest tokens.
    """

    keys: Tensor  # [B, H, latest tokens, D]
    values: Tensor
    first: tuple[Tensor, Tensor]  # keys and values [B, H, at most `sinks` tokens, D]

    def __init__(self, settings: CacheSettings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings = settings
        self.codes: tuple[Codes, Codes] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape and dtype of the first states [B, H, T, D]. Errors: ModelError for an odd number of
        channels in 4 bits."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for states in (key_states, value_states):
            if self.settings.bits == 4 and states.shape[-1] % 2:
                raise ModelError(
                    f"heads of {states.shape[-1]} channels can't be stored in 4 bits, two channels to a "
                    "byte; use bits: 8"
                )
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.first = self.keys, self.values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in states [B, H, T, D] and return all keys and values so far, the new ones as they are, in the
        dtype of the first."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([*self._past(0), key_states], dim=-2)
        values = torch.cat([*self._past(1), value_states], dim=-2)
        self._take_in(key_states, value_states)
        return keys, values

    def _past(self, side: int) -> list[Tensor]:
        """The keys (side 0) or values (side 1) of earlier tokens, in order."""
        blocks = [] if self.codes is None else [self._values_of(self.codes[side], side)]
        return [self.first[side], *blocks, (self.keys, self.values)[side]]

    def _values_of(self, codes: Codes, side: int) -> Tensor:
        """Blocks of codes as states [B, H, N * block, D]."""
        return dequantize(codes, self.settings.bits, self._per(side), self.dtype).flatten(2, 3)

    def _per(self, side: int) -> Per:
        """What a scale is for: values have one for each token."""
        return self.settings.per if side == 0 else "token"

    def _take_in(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep new states: the first tokens apart, and those that leave the window as codes."""
        begins = self.codes is None and self.keys.shape[-2] == 0
        room = max(0, self.settings.sinks - self.first[0].shape[-2]) if begins else 0
        if room:
            self.first = (
                torch.cat([self.first[0], key_states[:, :, :room]], dim=-2),
                torch.cat([self.first[1], value_states[:, :, :room]], dim=-2),
            )
        self.keys = torch.cat([self.keys, key_states[:, :, room:]], dim=-2)
        self.values = torch.cat([self.values, value_states[:, :, room:]], dim=-2)
        count = max(0, self.keys.shape[-2] - self.settings.window) // self.settings.block
        if count:
            self._round(count)

    def _round(self, count: int) -> None:
        """Make codes of the first `count` blocks of the latest tokens."""
        tokens = count * self.settings.block
        keys, values = (
            quantize(states[:, :, :tokens].unflatten(2, (count, -1)), self.settings.bits, self._per(side))
            for side, states in enumerate((self.keys, self.values))
        )
        if self.codes is not None:
            keys, values = _joined(self.codes[0], keys), _joined(self.codes[1], values)
        self.codes = keys, values
        # copies, because views would hold the memory of all tokens
        self.keys, self.values = self.keys[:, :, tokens:].clone(), self.values[:, :, tokens:].clone()

    def get_seq_length(self) -> int:
        """The number of tokens so far."""
        if not self.is_initialized:
            return 0
        coded = 0 if self.codes is None else self.codes[0].codes_BHNTP.shape[2] * self.settings.block
        return self.first[0].shape[-2] + coded + self.keys.shape[-2]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest `-tokens_to_remove` tokens. Blocks of codes that lose some become latest tokens
        again, as the values that they stand for."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        lost = min(-tokens_to_remove, self.get_seq_length())
        if self.codes is not None and lost > self.keys.shape[-2]:
            self._restore(-(-(lost - self.keys.shape[-2]) // self.settings.block))
        left = max(0, self.keys.shape[-2] - lost)
        lost -= self.keys.shape[-2] - left
        self.keys, self.values = self.keys[:, :, :left].clone(), self.values[:, :, :left].clone()
        if lost:
            left = self.first[0].shape[-2] - lost
            self.first = self.first[0][:, :, :left].clone(), self.first[1][:, :, :left].clone()

    def _restore(self, count: int) -> None:
        """Make latest tokens of the last `count` blocks, or of all if there are fewer."""
        assert self.codes is not None
        left = max(0, self.codes[0].codes_BHNTP.shape[2] - count)
        keys, values = (
            self._values_of(_part(codes, slice(left, None)), side) for side, codes in enumerate(self.codes)
        )
        self.keys = torch.cat([keys, self.keys], dim=-2)
        self.values = torch.cat([values, self.values], dim=-2)
        kept = (_part(self.codes[0], slice(left)), _part(self.codes[1], slice(left)))
        self.codes = kept if left else None

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Put `how` of each tensor that is held in its place."""
        self.first = how(self.first[0]), how(self.first[1])
        self.keys, self.values = how(self.keys), how(self.values)
        if self.codes is not None:
            keys, values = (Codes(*map(how, codes.tensors)) for codes in self.codes)
            self.codes = keys, values

    def held(self) -> list[Tensor]:
        """The tensors that are held."""
        if not self.is_initialized:
            return []
        codes = [tensor for codes in self.codes or () for tensor in codes.tensors]
        return [*self.first, *codes, self.keys, self.values]

    def reset(self) -> None:
        """Forget all tokens."""
        if self.is_initialized:
            del self.first
        self.keys = self.values = None  # type: ignore[assignment]  # as in a layer that was never used
        self.codes = None
        self.is_initialized = False

    def offload(self) -> None:
        """Move what is held to the CPU."""
        if self.is_initialized:
            self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move what is held back to the device of the states."""
        if self.is_initialized and self.keys.device != self.device:
            self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequences in the order of a beam search."""
        if self.get_seq_length() > 0:
            self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.get_seq_length() > 0:
            self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        if self.get_seq_length() > 0:
            self._change(lambda tensor: tensor[indices, ...])


def _joined(before: Codes, after: Codes) -> Codes:
    """Blocks behind one another."""
    return Codes(*(torch.cat(pair, dim=2) for pair in zip(before.tensors, after.tensors, strict=True)))


def _part(codes: Codes, blocks: slice) -> Codes:
    """Some of the blocks, in memory of their own."""
    return Codes(*(tensor[:, :, blocks].clone() for tensor in codes.tensors))


def quantize_layers(cache: DynamicCache, settings: CacheSettings) -> None:
    """Put a layer of codes in the place of each layer of an empty cache that grows with the text."""
    cache.layers = [
        QuantizedKeysAndValues(settings) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]


def growing_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """Which layers of a model have a cache that grows with the text, by index."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return tuple(index for index, layer in enumerate(layers) if type(layer) is DynamicLayer)


def store_as_config_says(model: PreTrainedModel, cache: Any) -> None:
    """Let an empty cache that `generate` made store its layers as the config of the model says. A cache of
    another class stays as it is."""
    settings = CacheSettings.of(model.config)
    if settings is not None and type(cache) is DynamicCache:
        quantize_layers(cache, settings)


def require_growing(config: PretrainedConfig, kind: type[PreTrainedModel]) -> None:
    """Refuse a model without a layer whose cache grows with the text; `kind` is its class. Errors:
    ModelError."""
    text = config.get_text_config(decoder=True)
    generates: Any = kind
    if issubclass(kind, GenerationMixin) and not generates._supports_default_dynamic_cache():
        raise ModelError(
            f"a {config.model_type} model has a cache of its own, which kv_cache can't store; leave kv_cache"
        )
    if not growing_layers(config):
        kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=text).layers})
        raise ModelError(
            f"no layer of this {config.model_type} model has a cache that grows with the text (it has "
            f"{', '.join(kinds)}), so there is nothing to store in fewer bits; leave kv_cache"
        )


def kv_cache(model: PreTrainedModel, settings: CacheSettings | None = None) -> DynamicCache:
    """Make an empty cache for a call of a model, or of its `generate`, as `past_key_values`.

    Args:
        model: a model whose config says how its cache is stored, as a recipe with `kv_cache` leaves it.
        settings: takes the place of what the config says.

    Raises:
        ModelError: nothing says how, or no layer of the model has a cache that grows with the text.
    """
    found = settings or CacheSettings.of(model.config)
    if found is None:
        raise ModelError(
            f"the config of this model has no {FIELD}; give settings, or compress it with a recipe that has "
            "kv_cache"
        )
    require_growing(model.config, type(model))
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    quantize_layers(cache, found)
    return cache


def bytes_held(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedKeysAndValues):
            held += sum(tensor.nbytes for tensor in layer.held())
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            held += layer.keys.nbytes + layer.values.nbytes
    return held


def bytes_of_text(cache: DynamicCache, length: int, itemsize: int, settings: CacheSettings | None) -> float:
    """Bytes of a text of `length` tokens in a cache whose shapes are those of `cache`, which has held a text.

    `itemsize` is that of the dtype of its states. Layers with full attention are stored as `settings` say, or
    plain without them; a sliding window holds no more than its width. States of other kinds do not count.
    """
    total = 0.0
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            continue
        heads, key_dim, value_dim = layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]
        if settings is not None and isinstance(layer, QuantizedKeysAndValues):
            total += settings.bytes_of(length, heads, key_dim, value_dim, itemsize)
            continue
        most = layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else length
        tokens = min(length, most)
        total += heads * tokens * (key_dim + value_dim) * itemsize
    return total
