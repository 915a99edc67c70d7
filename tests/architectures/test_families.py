"""The table is proved, not reviewed: on a pico model of every family, and of every config that changes its
rows.

Each proof changes weights through the table alone and compares logits. Where a change is an identity by the
table, it has to be one in the model (<= 1e-5); where any single row is left out of it, the logits have to
move, so no row is there for nothing.
"""

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.architectures.families import FAMILIES as TABLES
from llmcompress.architectures.families import Anatomy, anatomy_of
from llmcompress.architectures.shape_grammar import Spelling, scale, take
from llmcompress.errors import ModelError
from tests.models import FAMILIES, VARIANTS, pico

EXACT, MOVED = 1e-5, 0.1  # logits have a standard deviation of about 1
CASES = [pytest.param(family, {}, id=family) for family in FAMILIES]
CASES += [
    pytest.param(family, over, id="-".join([family, *(f"{k}={v}" for k, v in over.items())]))
    for family, over in VARIANTS
]
every_config = pytest.mark.parametrize(("family", "overrides"), CASES)

# Without rotary embedding a bias on the keys adds the same to every score of a query, which softmax takes out
# again.
WITHOUT_EFFECT = {("opt", "self_attn.k_proj.bias")}


class Subject:
    """A pico model in float64, its anatomy, and its logits under other weights."""

    def __init__(self, family: str, overrides: dict[str, Any]) -> None:
        self.model: PreTrainedModel = pico(family, **overrides).double()
        # the default has no float64; other families have no experts to set
        self.model.set_experts_implementation("eager")
        self.anatomy: Anatomy = anatomy_of(self.model.config)
        self.sizes = self.anatomy.axis_sizes(self.model.config)
        self.rows = self.anatomy.rows(self.model.config)
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())  # tied ones once
        self.rotary = {
            k: v for k, v in self.model.named_buffers() if k.endswith("inv_freq") and "original" not in k
        }
        self.ids = torch.randint(3, self.sizes["vocab"], (2, 24), generator=torch.Generator().manual_seed(1))
        self.base = self.logits({})

    @torch.no_grad()
    def logits(
        self, weights: dict[str, Tensor], ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        inputs = {"input_ids": self.ids if ids is None else ids, "attention_mask": torch.ones_like(self.ids)}
        if positions is not None:
            inputs["position_ids"] = positions.expand_as(self.ids)
        found: Tensor = functional_call(
            self.model, {**self.weights, **weights}, kwargs={**inputs, "use_cache": False}
        ).logits
        return found

    def row_of(self, name: str) -> str:
        """The row of the table that a full parameter name belongs to."""
        return re.sub(rf"^{re.escape(self.anatomy.layers)}\.\d+\.", "", name)

    def along(self, axis: str) -> set[str]:
        return {self.row_of(name) for name in self.weights if axis in Spelling.parse(self.rows[name]).axes}


@cache
def subject(family: str, overrides: tuple[tuple[str, Any], ...]) -> Subject:
    return Subject(family, dict(overrides))


def case_of(family: str, overrides: dict[str, Any]) -> Subject:
    return subject(family, tuple(overrides.items()))


def moved(subject: Subject, logits: Tensor, base: Tensor | None = None) -> float:
    return float((logits - (subject.base if base is None else base)).abs().max())


def one_cycle(n: int) -> Tensor:
    """A permutation that moves everything, [n]."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


# 1. Every parameter is listed, with its shape.


@every_config
def test_every_parameter_is_listed_and_has_the_shape_it_spells(
    family: str, overrides: dict[str, Any]
) -> None:
    case = case_of(family, overrides)
    shapes = {name: tuple(p.shape) for name, p in case.model.named_parameters(remove_duplicate=False)}
    assert shapes == {name: Spelling.parse(row).shape(case.sizes) for name, row in case.rows.items()}


@every_config
def test_tied_weights_are_spelled_the_same(family: str, overrides: dict[str, Any]) -> None:
    case = case_of(family, overrides)
    head, embedding = (
        case.model.get_submodule(name).weight for name in (case.anatomy.head, case.anatomy.embedding)
    )
    tied = head is embedding
    assert tied == case.model.config.tie_word_embeddings
    if tied:
        assert case.rows[f"{case.anatomy.head}.weight"] == case.rows[f"{case.anatomy.embedding}.weight"]


def test_every_family_has_a_pico_model_and_every_condition_is_decided_both_ways() -> None:
    assert set(TABLES) == set(FAMILIES)
    for family, table in TABLES.items():
        found = [
            anatomy_of(pico(family, **over).config)
            for name, over in [(family, {}), *VARIANTS]
            if name == family
        ]
        for name, text in [*table.layer.items(), *table.outer.items()]:
            if " if " in text:
                assert len({{**a.layer, **a.outer}.get(name) for a in found}) == 2, (
                    f"{family}: {name}: {text}"
                )
        for text in table.scale_pairs:
            if " if " in text:
                assert len({text.split(" if ")[0] in a.scale_pairs for a in found}) == 2, f"{family}: {text}"


# 2. Permuting an axis through the table is an identity, and every row has a part in it.


def permutation(case: Subject, axis: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A permutation of an axis that moves every unit, and the buffers that have to follow it.

    Rotary embedding turns the pairs (i, i + r/2) of the first r units of d, each at its own frequency: a
    permutation has to keep the pairs together and take the frequencies along. What lies past r, and d without
    rotary embedding, is free.
    """
    if axis != "d" or not case.rotary:
        return one_cycle(case.sizes[axis]), {}
    half = len(next(iter(case.rotary.values())))
    pairs, rest = one_cycle(half), one_cycle(case.sizes["d"] - 2 * half) + 2 * half
    return torch.cat([pairs, pairs + half, rest]), {name: freq[pairs] for name, freq in case.rotary.items()}


def difference(case: Subject, axis: str, left_out: str | None = None) -> float:
    """How far the logits are from where they belong when an axis is permuted through the table, less one
    row."""
    order, buffers = permutation(case, axis)
    rows = {name: case.rows[name] for name in case.weights if case.row_of(name) != left_out}
    weights = {name: take(case.weights[name], row, case.sizes, axis, order) for name, row in rows.items()}
    ids = order.argsort()[case.ids] if axis == "vocab" else None
    positions = order.argsort()[: case.ids.shape[1]] if axis == "position" else None
    base = case.base[..., order] if axis == "vocab" else case.base
    return moved(case, case.logits({**weights, **buffers}, ids, positions), base)


@every_config
def test_permuting_any_axis_through_the_table_leaves_the_logits(
    family: str, overrides: dict[str, Any]
) -> None:
    case = case_of(family, overrides)
    assert {axis: d for axis in case.sizes if (d := difference(case, axis)) > EXACT} == {}


@every_config
def test_leaving_any_one_row_out_of_a_permutation_moves_the_logits(
    family: str, overrides: dict[str, Any]
) -> None:
    case = case_of(family, overrides)
    mutants = [(axis, row) for axis, size in case.sizes.items() if size > 1 for row in case.along(axis)]
    survivors = {(axis, row): d for axis, row in mutants if (d := difference(case, axis, row)) < MOVED}
    assert {(family, row) for _, row in survivors} == WITHOUT_EFFECT & {
        (family, row) for _, row in mutants
    }, survivors
    assert len(mutants) >= 15


# 3. A scale crosses every entry of feeds.


def rescaled(case: Subject, key: str, left_out: str | None = None) -> dict[str, Tensor]:
    """The weights after a scale has crossed from a producer to its readers in every layer, less one of these
    modules."""
    name, part, axes = case.anatomy.producer(key)
    factor = (
        torch.rand([case.sizes[axis] for axis in axes], generator=torch.Generator().manual_seed(2)).double()
        + 0.5
    )
    weights = {}
    for full, weight in case.weights.items():
        row = case.row_of(full)
        module, spelled = row.removesuffix(".weight").removesuffix(".bias"), case.rows[full]
        offset = case.anatomy.norm_offset if axes == ("hidden",) and row.endswith("weight") else 0.0
        if full == row or module == left_out:
            continue
        if module == name:
            weights[full] = scale(weight + offset, spelled, case.sizes, axes, factor, part) - offset
        elif module in case.anatomy.scale_pairs[key] and not row.endswith("bias"):
            weights[full] = scale(weight, spelled, case.sizes, axes, 1 / factor)
    return weights


@every_config
def test_crossing_a_scale_along_feeds_leaves_the_logits(family: str, overrides: dict[str, Any]) -> None:
    case = case_of(family, overrides)
    for key, consumers in case.anatomy.scale_pairs.items():
        assert moved(case, case.logits(rescaled(case, key))) <= EXACT, key
        for module in (case.anatomy.producer(key)[0], *consumers):
            assert moved(case, case.logits(rescaled(case, key, left_out=module))) > MOVED, (key, module)


@every_config
def test_whatever_reads_a_norm_before_it_is_in_feeds(family: str, overrides: dict[str, Any]) -> None:
    """Every norm with a weight of the hidden width is a producer, unless it stands after its sublayer."""
    case = case_of(family, overrides)
    norms = {
        row.removesuffix(".weight")
        for row, axes in case.anatomy.layer.items()
        if axes == "hidden" and "weight" in row
    }
    after = {"post_attention_layernorm", "post_feedforward_layernorm"} if "gemma" in family else set()
    after = norms if not getattr(case.model.config, "do_layer_norm_before", True) else after
    assert norms - set(case.anatomy.scale_pairs) == after


# 4. The facts about modules are those of the model.


@every_config
def test_readers_are_the_linears_of_a_block_by_the_input_they_get(
    family: str, overrides: dict[str, Any]
) -> None:
    case = case_of(family, overrides)
    layer = case.model.get_submodule(f"{case.anatomy.layers}.0")
    linears = {
        name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    groups: list[tuple[Tensor, list[str]]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = next(
                (names for x, names in groups if x.shape == inputs[0].shape and torch.equal(x, inputs[0])),
                None,
            )
            if seen is None:
                groups.append((inputs[0], [name]))
            else:
                seen.append(name)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    case.logits({})
    for handle in handles:
        handle.remove()
    assert tuple(tuple(names) for _, names in groups) == case.anatomy.consumers
    assert set(case.anatomy.linears) == set(linears)
    assert case.anatomy.conv1d == {name for name, module in linears.items() if isinstance(module, Conv1D)}


@every_config
def test_every_matrix_of_a_block_is_a_linear_a_router_or_the_experts(
    family: str, overrides: dict[str, Any]
) -> None:
    case = case_of(family, overrides)
    matrices = {row for row, text in case.anatomy.layer.items() if len(Spelling.parse(text).dims) > 1}
    known = {f"{name}.weight" for name in (*case.anatomy.linears, *case.anatomy.router)} | set(
        case.anatomy.experts
    )
    assert matrices == known
    assert bool(case.anatomy.experts) == bool(case.anatomy.router) == (family == "qwen3_moe")


@every_config
def test_embedding_norm_and_head_are_the_models_own(family: str, overrides: dict[str, Any]) -> None:
    case = case_of(family, overrides)
    anatomy, model = case.anatomy, case.model
    assert model.get_submodule(anatomy.embedding) is model.get_input_embeddings()
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()
    assert len(list(model.get_submodule(anatomy.layers).children())) == model.config.num_hidden_layers
    if anatomy.norm is None:
        assert family == "opt" and not any("final_layer_norm" in name for name in anatomy.outer)
    else:
        assert "Norm" in type(model.get_submodule(anatomy.norm)).__name__


# 5. transformers' own plan for tensor parallelism says the same.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_agrees_with_the_tensor_parallel_plan(family: str) -> None:
    anatomy, config = case_of(family, {}).anatomy, case_of(family, {}).model.config
    plan = {
        name.removeprefix("layers.*."): style for name, style in (config.base_model_tp_plan or {}).items()
    }
    checked = set()
    for module, style in plan.items():
        row = anatomy.layer.get(f"{module}.weight") or anatomy.layer.get(module)
        if row is None:  # the module that holds the experts, and the dense MLP that is refused
            assert family == "qwen3_moe" and module in (
                "mlp.experts",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            )
            continue
        output, columns = (
            (Spelling((dim,)).axes for dim in Spelling.parse(row).dims[-2:]) if "wise" in style else ((), ())
        )
        if "colwise" in style:  # the output axis is cut, the input whole
            assert "hidden" not in output and columns == ("hidden",), (module, style)
            assert ("packed" not in style) or "|" in row
        elif "rowwise" in style:
            assert output == ("hidden",) and "hidden" not in columns, (module, style)
        else:
            assert (row, style) == ("d", "replicated_with_grad_allreduce")
            continue
        checked.add(module)
    assert checked == ({*anatomy.linears, *anatomy.experts} if family not in ("gpt2", "opt") else set())


# 6. What the table does not know is an error.


def test_a_family_that_the_table_lacks_is_an_error() -> None:
    with pytest.raises(ModelError, match='"lama" is not one of the families in the table'):
        anatomy_of(SimpleNamespace(model_type="lama"))


@pytest.mark.parametrize(
    ("family", "overrides", "condition"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step != 1"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_a_config_that_the_rows_do_not_cover_is_refused(
    family: str, overrides: dict[str, Any], condition: str
) -> None:
    with pytest.raises(ModelError, match=f"a {family} model with {condition}"):
        anatomy_of(pico(family, **overrides).config)


def test_a_field_that_decides_rows_and_is_missing_is_an_error_and_not_a_no() -> None:
    with pytest.raises(ModelError, match='the qwen3 config has no "attention_bias"'):
        anatomy_of(SimpleNamespace(model_type="qwen3"))


def test_sizes_that_a_config_leaves_open_are_those_that_the_model_takes() -> None:
    config = SimpleNamespace(
        num_attention_heads=6, num_key_value_heads=None, head_dim=None, hidden_size=48, vocab_size=10
    )
    sizes = TABLES["mistral"].axis_sizes(SimpleNamespace(**vars(config), intermediate_size=8))
    assert sizes == {"vocab": 10, "hidden": 48, "kv": 6, "q": 1, "d": 8, "ffn": 8}
    with pytest.raises(ModelError, match="6 query heads can't share 4 kv heads"):
        TABLES["mistral"].axis_sizes(
            SimpleNamespace(**{**vars(config), "num_key_value_heads": 4, "intermediate_size": 8})
        )
    with pytest.raises(ModelError, match='the mistral config has no "vocab_size"'):
        TABLES["mistral"].axis_sizes(SimpleNamespace(**{**vars(config), "vocab_size": None}))
