"""What an anatomy holds, and how a config decides the conditions in its rows.

A row that only some configs have states its condition: `hidden if attention_bias`, `vocab embed if
word_embed_proj_dim != hidden_size else vocab hidden`. Conditions are data and not code, so that a table can
be read, printed and compared. A field that a condition names and the config lacks is an error, not False: a
row may be missing only because the config says so. The tables are in `families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmcompress.architectures.shape_grammar import Spelling, Term
from llmcompress.errors import ModelError

Rows = Mapping[str, str]
# Rotations: of the states between layers, and of the channels of each value head.
R1, R2 = "r1", "r2"
# How far an anatomy goes; each level holds the facts of those before it.
LINEARS, SCALES, AXES = 1, 2, 3
FACTS = {
    LINEARS: "which linears read the same input",
    SCALES: "where a scale may cross from one weight to another",
    AXES: "which axes its weights run along",
}

# names of the number of experts that a token is routed to
PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)


@dataclass(frozen=True)
class CallForm:
    """How the layers of a model are called: what they return, and the dimensions of the states."""

    returned_items: int = 0  # of the tuple in which a layer returns its states; 0 if it returns them alone
    streams: int = 1  # how many times the hidden width the states between layers are wide
    # the dimension of the streams where a layer takes states of four dimensions; None for [B, L, W]
    stream_dim: int | None = None
    # what layers hand on beside their states: argument of a layer -> the item of what the layer before it
    # returned; 0 for a mapping that layers write to, such as keys and values by type of layer
    handed_on: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The facts of one model family. `anatomy_of` returns those of one config, with all conditions
    decided."""

    family: str  # model_type
    layers: str  # the ModuleList of layers
    layer: Rows  # parameter in a layer -> spelling
    outer: Rows  # parameter outside the layers -> spelling
    # linears of a layer grouped by the input that they read, in order of computation
    consumers: tuple[tuple[str, ...], ...]
    # multiply the output of a key by s > 0 and divide the columns of its readers by s: same model
    scale_pairs: Mapping[str, tuple[str, ...]]
    # axis -> config field; the field of q counts all query heads, those of every kv head together
    sizes: Rows
    embedding: str
    norm: str | None  # the final norm; some OPT models have none
    head: str = "lm_head"
    router: tuple[str, ...] = ()  # modules that choose the experts; they read the same input as the experts
    # parameters that hold one matrix for each expert, in order of computation -> whether that is [in, out]
    experts: Mapping[str, bool] = field(default_factory=dict)
    # once they are divided: the linears of each parameter, by expert
    expert_linears: tuple[tuple[str, ...], ...] = ()
    conv1d: frozenset[str] = frozenset()  # linears stored [in, out]
    norm_offset: float = 0.0  # norms multiply by norm_offset + weight
    # conditions on the config under which these rows do not describe the whole model
    refuses: tuple[str, ...] = ()
    level: int = AXES  # how far the facts go
    form: CallForm = field(default_factory=CallForm)
    writes: bool = False  # whether a layer writes to a mapping that layers hand on
    buffers: Rows = field(default_factory=dict)  # those in a layer that run along an axis -> spelling
    arguments_by_batch: bool = False  # whether what a layer is called with depends on the tokens
    # linears and other matrices of a layer that stay as they are, with the reason
    kept: Rows = field(default_factory=dict)
    each_layer: tuple[Anatomy, ...] = ()  # the facts of each layer, if layers are of several kinds
    counts: Mapping[str, int] = field(default_factory=dict)  # sizes of axes, where `sizes` does not say all
    # axes that may be cut, where they are proved; None for a family of the table, whose config decides
    cuts: frozenset[str] | None = None
    turns: frozenset[str] | None = None  # rotations that are proved: R1, R2; None for a family of the table
    head_dim: str | None = None  # field that has to say the width of a head once heads or channels are cut

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a layer by module name, in order of computation, without routers. Those of experts
        come last."""
        return tuple(linear for group in (*self.consumers, *self.expert_linears) for linear in group)

    @property
    def outer_axes(self) -> frozenset[str]:
        """The axes that have one size in the whole model."""
        return frozenset(axis for row in self.outer.values() for axis in Spelling.parse(row).axes)

    def rows(self, config: Any) -> dict[str, str]:
        """Return the spelling of every parameter of the whole model by its full name.

        Tied weights are listed under both of their names.
        """
        layers = self.each_layer or [self] * config.get_text_config(decoder=True).num_hidden_layers
        inner = {
            f"{self.layers}.{i}.{name}": row
            for i, anatomy in enumerate(layers)
            for name, row in anatomy.layer.items()
        }
        return {**self.outer, **inner}

    def of_layer(self, index: int) -> Anatomy:
        """The facts of one layer."""
        return self.each_layer[index] if self.each_layer else self

    @property
    def smooth_pairs(self) -> dict[str, tuple[str, ...]]:
        """The scale pairs whose readers all read every token: without experts."""
        experts = {linear for linears in self.expert_linears for linear in linears}
        return {key: readers for key, readers in self.scale_pairs.items() if experts.isdisjoint(readers)}

    def group_of(self, linear: str) -> tuple[str, ...]:
        """The linears that read the same input as a linear of a layer. An expert reads what is routed to
        it."""
        return next((group for group in self.consumers if linear in group), (linear,))

    def divided(self, linears: Mapping[str, Sequence[str]]) -> Anatomy:
        """The facts of a layer whose parameters of experts are linears, given by parameter."""
        rows = {name: row for name, row in self.layer.items() if name not in linears}
        for name, of_expert in linears.items():
            _, *dims = Spelling.parse(self.layer[name]).dims
            row = str(Spelling(tuple(dims[::-1] if self.experts[name] else dims)))
            rows |= {f"{linear}.weight": row for linear in of_expert}
        pairs: dict[str, tuple[str, ...]] = {}
        for key, readers in self.scale_pairs.items():
            producer, bracket, part = key.partition("[")
            if producer in linears:  # the neurons of each expert are its own
                for expert, linear in enumerate(linears[producer]):
                    pairs[linear + bracket + part] = tuple(linears[reader][expert] for reader in readers)
            else:
                pairs[key] = tuple(linear for reader in readers for linear in linears.get(reader, (reader,)))
        return replace(
            self,
            layer=rows,
            scale_pairs=pairs,
            experts={name: how for name, how in self.experts.items() if name not in linears},
            expert_linears=tuple(map(tuple, linears.values())),
        )

    def axis_sizes(self, config: Any) -> dict[str, int]:
        """Return the number of units on each axis that some row runs along.

        Raises ModelError if the config does not say it.
        """
        axes = dict.fromkeys(
            axis for row in (*self.outer.values(), *self.layer.values()) for axis in Spelling.parse(row).axes
        )
        if axes.keys() <= self.counts.keys():
            return dict(self.counts)
        heads = getattr(config, self.sizes.get("q", self.sizes["kv"]))  # 0 in a layer without attention
        hidden = config.hidden_size
        # sizes of axes whose field is None
        implied = {"kv": heads, "d": hidden // max(heads, 1), "ffn": 4 * hidden}
        sizes = {}
        for axis in axes:
            size = getattr(config, self.sizes[axis], None) if axis in self.sizes else None
            size = implied.get(axis) if size is None else size
            if size is None:
                raise ModelError(
                    f'the {self.family} config has no "{self.sizes.get(axis, axis)}"; add it to config.json'
                )
            sizes[axis] = int(size)
        if "q" in sizes:
            if heads and (not sizes["kv"] or heads % sizes["kv"]):
                raise ModelError(
                    f"{heads} query heads can't share {sizes['kv']} kv heads evenly; correct config.json"
                )
            sizes["q"] = heads // max(sizes["kv"], 1)
        return sizes

    def cut_along(self, axis: str) -> bool:
        """Whether the weights of a layer run along an axis that may be cut. Of a family of the table, only
        the config that the cut leaves shows it."""
        rows = (*self.outer.values(), *self.layer.values())
        known = self.sizes if self.cuts is None else self.cuts
        return axis in known and any(axis in Spelling.parse(row).axes for row in rows)

    def consumer_of(self, axis: str) -> str | None:
        """Return the linear whose columns run along an axis inside a layer; None if there is no such linear,
        as for experts."""
        if any(axis in Spelling.parse(self.layer[name]).axes for name in self.experts):
            return None
        inside = [linear for linear in self.linears if axis in Spelling((self.input_of(linear),)).axes]
        return inside[0] if len(inside) == 1 else None

    def left(self, sizes: Mapping[str, int]) -> Anatomy:
        """Return the facts of one layer in which an axis may have no units, without the linears and scale
        pairs that are empty there."""
        empty = {name for name, row in self.layer.items() if not all(Spelling.parse(row).shape(sizes))}
        if not empty:
            return self
        consumers = tuple(group for group in self.consumers if f"{group[0]}.weight" not in empty)
        there = {linear for group in consumers for linear in group}
        scale_pairs = {
            key: kept
            for key, old in self.scale_pairs.items()
            if (kept := tuple(name for name in old if name in there))
        }
        return replace(self, consumers=consumers, scale_pairs=scale_pairs)

    def input_of(self, linear: str) -> Term:
        """Return the term that the columns of a linear of a layer run along."""
        return Spelling.parse(self.layer[f"{linear}.weight"]).dims[0 if linear in self.conv1d else -1]

    def output_of(self, linear: str) -> Term:
        """Return the term that the rows of a linear of a layer run along."""
        return Spelling.parse(self.layer[f"{linear}.weight"]).dims[-1 if linear in self.conv1d else 0]

    def producer(self, key: str) -> tuple[str, int | None, tuple[str, ...]]:
        """Resolve a key of `scale_pairs`.

        Returns the module or parameter of a layer, the number of the part if it is fused (else None), and the
        axes of its output.
        """
        name, _, number = key.rstrip("]").partition("[")
        part = int(number) if number else None
        spelling = Spelling.parse(self.layer.get(f"{name}.weight") or self.layer[name])
        dims = (spelling if part is None else spelling.part(part)).dims
        output = dims if len(dims) == 1 else dims[1:] if name in self.conv1d else dims[:-1]
        return name, part, Spelling(output).axes

    def extend(
        self, family: str, *, layer: Rows | None = None, sizes: Rows | None = None, **facts: Any
    ) -> Anatomy:
        """Return the table of a sibling family.

        Rows and sizes are added to those of this table; every other fact given replaces the one of this
        table.
        """
        layer, sizes = {**self.layer, **(layer or {})}, {**self.sizes, **(sizes or {})}
        return replace(self, family=family, layer=layer, sizes=sizes, **facts)

    def refused(self, config: Any) -> str | None:
        """The condition of `refuses` that a config meets, or None."""
        return next((condition for condition in self.refuses if _holds(condition, config)), None)

    def at(self, config: Any) -> Anatomy:
        """Return the facts of one config, with each condition decided and the rows that it rules out left
        out.

        Raises ModelError if the config meets a condition of `refuses`, or lacks a field that a condition
        names.
        """
        if condition := self.refused(config):
            raise ModelError(
                f"a {self.family} model with {condition} is not one that the table describes; use one without"
            )
        layer = {name: row for name, text in self.layer.items() if (row := _choose(text, config))}
        outer = {name: row for name, text in self.outer.items() if (row := _choose(text, config))}
        scale_pairs = {
            key: consumers for text, consumers in self.scale_pairs.items() if (key := _choose(text, config))
        }
        return replace(
            self, layer=layer, outer=outer, scale_pairs=scale_pairs, norm=_choose(self.norm or "", config)
        )


def experts_per_token(config: Any) -> int:
    """The number of experts that a token is routed to, from the part of a config that describes the decoder;
    1 if it doesn't say."""
    found = next((count for name in PER_TOKEN if (count := getattr(config, name, None))), 1)
    return max(found) if isinstance(found, list) else int(found)  # one for each layer


def _choose(text: str, config: Any) -> str | None:
    """Decide `X`, `X if condition` or `X if condition else Y` by the config; None if nothing is left."""
    first, _, rest = text.partition(" if ")
    condition, _, second = rest.partition(" else ")
    return (first if not condition or _holds(condition, config) else second) or None


def _holds(condition: str, config: Any) -> bool:
    """Whether every clause holds: `field`, `not field`, `field == value` or `field != value`, joined by
    `and`."""

    def value(word: str) -> Any:
        if word.isdigit() or word.startswith("'"):
            return int(word) if word.isdigit() else word.strip("'")
        if not hasattr(config, word):
            raise ModelError(
                f'the {config.model_type} config has no "{word}", so its weights are not known; add it to '
                "config.json"
            )
        return getattr(config, word)

    def clause(words: list[str]) -> bool:
        if len(words) == 3:
            return bool((value(words[0]) == value(words[2])) is (words[1] == "=="))
        return bool(value(words[-1])) is (words[0] != "not")

    return all(clause(text.split()) for text in condition.split(" and "))
