"""Derived anatomies agree with the table of families, and each proof fails where its fact is wrong."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from llmcompress.architectures.families import FAMILIES
from llmcompress.architectures.shape_grammar import Spelling, units_along
from llmcompress.architectures.spec import AXES, Anatomy
from llmcompress.derivation import derive
from llmcompress.derivation.derive import anatomy_of, derived
from llmcompress.derivation.proofs import prove_causal, prove_poison, prove_walk, proved_walk
from llmcompress.derivation.readers import readers_of
from llmcompress.derivation.scales import Crossing, prove_crossing, proved_crossings
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.derivation.subject import EXACT, Subject, first_of_each_kind, layers_at
from llmcompress.errors import ModelError
from llmcompress.modeling.layer_arguments import Arguments
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.model_config import skeleton
from llmcompress.modeling.sequential import layer_of
from tests.models import VARIANTS, config_of, pico, tiny_config

CONFIGS = [*((family, {}) for family in FAMILIES), *VARIANTS]


@cache
def anatomy_like(name: str) -> Anatomy:
    """What is derived of a type, or of one of SHARING, of the size that its class has by default."""
    return derived(skeleton(config_of(name), torch.float32))


_OF_PICO: dict[str, Anatomy] = {}


def anatomy_of_pico(family: str, overrides: Mapping[str, Any]) -> Anatomy:
    """What is derived of a pico model."""
    key = f"{family} {overrides}"
    if key not in _OF_PICO:
        _OF_PICO[key] = derived(pico(family, **overrides))
    return _OF_PICO[key]


Change = Callable[[PreTrainedModel], None]


def changed(change: Change | None = None) -> Subject:
    """A tiny Llama, changed."""
    model = pico("llama").double()
    if change is not None:
        change(model)
    return Subject.of(model, "model.layers")


def mlp_of(model: PreTrainedModel, index: int = 1) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """The feed-forward part of a layer, and its linears: gate, up and down."""
    mlp = model.get_submodule(f"model.layers.{index}.mlp")
    gate, up, down = (mlp.get_submodule(f"{name}_proj") for name in ("gate", "up", "down"))
    return mlp, gate, up, down


# crossings of the table in heads that share out the hidden width, or inside of experts
NOT_SPELLED = {"attention.query_key_value[2]", "mlp.experts.gate_up_proj[1]"}
# the axes that are not proved, by family: the embedding is scaled by the width, or heads share it out
NOT_CUT = {
    "gemma2": {"hidden"},
    "gemma3_text": {"hidden"},
    "gpt2": {"kv", "q", "hidden"},
    "opt": {"kv", "q", "hidden"},
    "gpt_neox": {"kv", "q", "hidden"},
}


@pytest.mark.parametrize(("family", "overrides"), CONFIGS)
def test_what_is_derived_is_what_the_table_says(family: str, overrides: dict[str, Any]) -> None:
    model = pico(family, **overrides)
    table, found = FAMILIES[family].at(model.config), anatomy_of_pico(family, overrides)
    assert found.level == AXES
    sizes = table.axis_sizes(model.config)
    alone = {axis for axis, size in sizes.items() if size == 1}
    known = {"ffn", "kv", "q", "hidden", *({"expert"} if table.experts else ())}
    assert found.cuts is not None and set(found.cuts) == known - NOT_CUT.get(family, set()) - alone
    assert [set(group) for group in found.consumers] == [set(group) for group in table.consumers]
    assert (found.layers, found.embedding, found.head) == (table.layers, table.embedding, table.head)
    assert found.conv1d == table.conv1d
    assert found.kept.keys() == {f"{router}.weight" for router in table.router}
    assert found.experts == table.experts
    assert found.layer.keys() == table.layer.keys() and found.outer.keys() == table.outer.keys()
    assert not found.each_layer and found.form.returned_items == 0
    assert found.norm_offset == (table.norm_offset if table.scale_pairs else 0.0)
    expected = {key: {*readers} for key, readers in table.scale_pairs.items() if key not in NOT_SPELLED}
    pairs = {key: {name.removesuffix(".weight") for name in of} for key, of in found.scale_pairs.items()}
    # the last part of a fused linear is its second here, if no axis runs along what comes before it
    both = {key.replace("c_attn[2]", "c_attn[1]"): readers for key, readers in expected.items()}
    assert pairs == both
    for axis in found.cuts:
        for rows, derived_rows in ((table.layer, found.layer), (table.outer, found.outer)):
            for name in rows:
                assert units_of(rows[name], sizes, axis) == units_of(derived_rows[name], found.counts, axis)


def units_of(row: str, sizes: Mapping[str, int], axis: str) -> list[list[int]]:
    """The unit of an axis at each position of each dimension of a row."""
    return [units_along(term, sizes, axis).tolist() for term in Spelling.parse(row).dims]


@pytest.mark.parametrize(("family", "overrides"), CONFIGS)
def test_derived_scales_cross_a_layer_of_other_sizes(family: str, overrides: dict[str, Any]) -> None:
    """They are derived on a model with other sizes than this one has."""
    model = pico(family, **overrides).double()
    model.set_experts_implementation("eager")  # the others have no double precision
    anatomy, tokens = anatomy_of_pico(family, overrides), torch.arange(3, 27)[None]
    resident = InMemoryModel(model.config, model.state_dict(), torch.device("cpu"), torch.float64)
    resident.anatomy = anatomy
    with torch.no_grad():
        before = model(tokens).logits
    for key in anatomy.scale_pairs:
        for index, module in enumerate(layers_at(model, anatomy.layers)):
            layer = layer_of(resident, index, module, Arguments(resident, []), [], [])
            shape = [layer.sizes[axis] for axis in anatomy.producer(key)[2]]
            draw = torch.Generator().manual_seed(index)
            factor = torch.rand(shape, generator=draw, dtype=torch.float64) + 0.5
            assert len(layer.cross(key, factor, torch.float64)) > 1
        with torch.no_grad():
            after = model(tokens).logits
        assert (after - before).abs().max() < EXACT * before.std(), key


def test_a_family_of_the_table_is_not_derived() -> None:
    assert anatomy_of(pico("llama")).level == AXES


def test_a_config_that_the_table_refuses_is_derived_with_a_kind_for_each_layer() -> None:
    found = anatomy_of(pico("qwen3_moe", mlp_only_layers=[0]))
    assert found.level == AXES and len(found.each_layer) == 2
    dense, sparse = found.each_layer
    assert dense.consumers[2:] == (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)) and not dense.kept
    assert len(sparse.consumers) == 2
    assert sparse.kept == {
        "mlp.gate.weight": "is a matrix of a Qwen3MoeTopKRouter, which no loader replaces",
    }
    assert sparse.experts == {"mlp.experts.gate_up_proj": False, "mlp.experts.down_proj": False}
    assert not dense.experts


@pytest.mark.slow
def test_a_config_is_proved_once_and_a_damaged_file_of_the_cache_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    model = pico("qwen3_moe", mlp_only_layers=[0])  # which has a kind for each layer

    def found(*, proves: bool) -> Anatomy:
        monkeypatch.setattr(derive, "_DERIVED", {})  # as in a new process
        with patch.object(derive, "derived", wraps=derived) as proof:
            anatomy = anatomy_of(model)
        assert proof.called is proves
        return anatomy

    first = found(proves=True)
    assert found(proves=False) == first
    (file,) = (tmp_path / "anatomies").iterdir()
    for damaged in ("", "{", "{}", file.read_text().replace('"layers"', '"layer"')):
        file.write_text(damaged)
        assert found(proves=True) == first
    model.config.rms_norm_eps = 1e-5  # another config
    found(proves=True)


def test_the_tiny_model_has_as_many_layers_as_it_takes_to_see_each_kind() -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    whole = skeleton(config, torch.float32)
    assert max(first_of_each_kind(layers_at(whole, "model.layers")).values()) == 5
    assert not derived(whole).each_layer  # local or global, a layer has the same linears


def remembering(model: PreTrainedModel) -> None:
    """What leaves a layer depends on the batch before."""
    layer = model.get_submodule("model.layers.1")
    run, seen = layer.forward, list[Tensor]()

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = run(hidden, *args, **kwargs) + sum(state.mean() for state in seen)
        seen[:] = [hidden.detach()]
        return out

    layer.forward = forward


def skipping(model: PreTrainedModel) -> None:
    """What enters the first layer goes around all of them."""
    norm, embedded = model.get_submodule("model.norm"), list[Tensor]()
    run = norm.forward
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out))
    norm.forward = lambda hidden: run(hidden + embedded[-1])


def summing(model: PreTrainedModel) -> None:
    """What follows the layers looks at several positions."""
    norm = model.get_submodule("model.norm")
    run = norm.forward
    norm.forward = lambda hidden: run(hidden.cumsum(1))


def telling(model: PreTrainedModel) -> None:
    """Layers are called with an argument that depends on the tokens."""
    inner = model.base_model
    run = inner.forward
    layers = [*model.get_submodule("model.layers").children()]

    def forward(**kwargs: Any) -> Any:
        told = kwargs["input_ids"].double().mean(-1)[:, None, None]
        own = [layer.forward for layer in layers]
        for layer, each in zip(layers, own, strict=True):
            layer.forward = partial(each, told=told)
        try:
            return run(**kwargs)
        finally:
            for layer, each in zip(layers, own, strict=True):
                layer.forward = each

    def adding(layer: nn.Module) -> Callable[..., Tensor]:
        own = layer.forward
        return lambda hidden, *, told, **kwargs: own(hidden, **kwargs) + told

    for layer in layers:
        layer.forward = adding(layer)
    inner.forward = forward


def handing_on(model: PreTrainedModel) -> None:
    """A layer is called with something that the one before computed."""
    layers = [model.get_submodule(f"model.layers.{index}") for index in (0, 1)]
    (one, other), inner = [layer.forward for layer in layers], model.base_model
    run = inner.forward

    def computing(hidden: Tensor, *, handed: dict[str, Tensor], **kwargs: Any) -> Tensor:
        handed["on"] = hidden.mean()
        return one(hidden, **kwargs)  # type: ignore[no-any-return]

    def reading(hidden: Tensor, *, handed: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return other(hidden, **kwargs) + handed.get("on", 0.0)  # type: ignore[no-any-return]

    def forward(**kwargs: Any) -> Any:
        handed = dict[str, Tensor]()
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"handed": handed}),
                with_kwargs=True,
                prepend=True,
            )
            for layer in layers
        ]
        try:
            return run(**kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    layers[0].forward, layers[1].forward, inner.forward = computing, reading, forward


@pytest.mark.parametrize("change", [remembering, skipping, summing, telling])
def test_a_model_that_computes_something_between_its_layers_can_not_be_walked(change: Change) -> None:
    assert prove_walk(changed()) is None
    why = prove_walk(changed(change))
    assert why and why.startswith("its layers one by one give other logits than the whole (off by")


@pytest.mark.parametrize("change", [remembering, skipping, summing])
def test_arguments_of_each_batch_do_not_make_up_for_what_a_walk_does_not_see(change: Change) -> None:
    with pytest.raises(ModelError, match="its layers one by one give other logits than the whole"):
        proved_walk(changed(change))


def test_arguments_are_of_each_batch_only_where_they_depend_on_the_tokens() -> None:
    assert proved_walk(changed()) == (False, {}) and proved_walk(changed(telling)) == (True, {})
    for family in FAMILIES:
        assert not anatomy_of_pico(family, {}).arguments_by_batch


def test_what_layers_hand_on_in_a_way_that_is_not_known_is_refused_with_this_reason() -> None:
    with pytest.raises(ModelError, match="its layers hand on more than their states to later ones, in a way"):
        proved_walk(changed(handing_on))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4_e2b", "gemma3n"])
def test_layers_that_read_keys_and_values_of_earlier_ones_are_of_kinds_of_their_own(name: str) -> None:
    config = config_of(name)
    found = anatomy_like(name)
    assert found.form.handed_on == {"shared_kv_states": 0} and found.arguments_by_batch
    modes = config.kv_sharing_modes
    assert [each.writes for each in found.each_layer] == [mode == "store" for mode in modes]
    keys = {"self_attn.k_proj", "self_attn.v_proj"}
    for each, mode in zip(found.each_layer, modes, strict=True):
        assert keys.isdisjoint(each.linears) if mode == "reuse" else keys <= {*each.linears}
        assert {"self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"} <= {*each.linears}


def test_what_a_layer_returns_for_the_next_one_is_found_by_the_argument_that_takes_it() -> None:
    found = anatomy_like("zaya")
    assert found.form.handed_on == {"prev_router_hidden_states": 1}
    assert not any(each.writes for each in found.each_layer or [found])


@pytest.mark.slow
def test_heads_that_other_layers_read_are_not_cut() -> None:
    """Stages choose the heads of each layer by themselves; with one head for all queries, none is chosen."""
    cuts = {
        name: {each.cuts for each in anatomy_like(name).each_layer}
        for name in ("gemma4_e2b", "gemma4_e4b", "gemma3n")
    }
    assert cuts["gemma4_e2b"] == {frozenset({"ffn", "q"})}
    assert cuts["gemma4_e4b"] == {frozenset({"ffn"})}
    assert cuts["gemma3n"] == {frozenset()}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(("name", "dim"), [("gemma3n", 0), ("deepseek_v4", 2)])
def test_states_of_four_dimensions_have_their_streams_where_a_batch_is_not(name: str, dim: int) -> None:
    found = anatomy_like(name)
    assert found.form.stream_dim == dim and found.form.streams == 4


def test_weights_of_several_layers_are_kept_and_no_scale_crosses_to_them() -> None:
    found = anatomy_of(skeleton(tiny_config("zamba2"), torch.float32))
    alone, shared = found.each_layer[0], found.each_layer[6]
    assert not alone.kept and set(alone.linears) == {"mamba.in_proj", "mamba.out_proj"}
    why = {why for name, why in shared.kept.items() if "shared_transformer" in name}
    assert why == {"is a weight of several layers"}
    assert set(shared.linears) == {"linear", "mamba_decoder.mamba.in_proj", "mamba_decoder.mamba.out_proj"}
    assert shared.scale_pairs.keys() == {"mamba_decoder.input_layernorm", "mamba_decoder.mamba.norm"}


def test_a_model_whose_tokens_see_those_after_them_is_refused() -> None:
    def change(model: PreTrainedModel) -> None:
        norm = model.get_submodule("model.norm")
        run = norm.forward
        norm.forward = lambda hidden: run(hidden + hidden.mean(1, keepdim=True))

    assert prove_causal(changed()) is None
    assert prove_causal(changed(change)) == "each of its tokens sees those after it"
    with pytest.raises(
        ModelError, match="a bert model can't be compressed layer by layer: each of its tokens"
    ):
        derived(skeleton(AutoConfig.for_model("bert"), torch.float32))


def test_a_weight_that_another_module_reads_too_is_found_and_no_other() -> None:
    def change(model: PreTrainedModel) -> None:
        mlp, _, _, down = mlp_of(model)
        run = mlp.forward
        mlp.forward = lambda x: run(x) + down.get_parameter("weight").mean()

    subject = changed(change)
    linears = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert prove_poison(subject, linears) == {linears[2]: "is read by another module too"}
    assert not prove_poison(subject, [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")])
    assert all(torch.isfinite(parameter).all() for parameter in subject.model.parameters())  # they are back


def test_a_linear_whose_dtype_the_code_around_it_takes_for_its_input_is_kept() -> None:
    """An indexer of DeepSeek-V3.2 casts what it reads to the dtype of a weight; codes are bytes."""
    found = anatomy_like("deepseek_v32")
    name = "self_attn.indexer.weights_proj"
    for each in found.each_layer or [found]:
        assert "gives its dtype to what it reads" in each.kept[name]
        assert name not in each.linears and "self_attn.indexer.wq_b" in each.linears


def test_a_linear_that_is_called_twice_or_for_some_tokens_is_kept() -> None:
    def change(model: PreTrainedModel) -> None:
        mlp, gate, up, down = mlp_of(model)
        mlp.forward = lambda x: down(up(x) * up(x).sigmoid()) + gate(x[:, :3]).mean()

    found = readers_of(changed(change), 1)
    assert found.kept == {
        "mlp.up_proj": "is called 2 times in a pass",
        "mlp.gate_proj": "reads only some of the tokens",
    }
    assert ("mlp.down_proj",) in found.groups


def test_a_linear_that_is_never_called_is_kept() -> None:
    def change(model: PreTrainedModel) -> None:
        mlp, _, up, down = mlp_of(model)
        mlp.forward = lambda x: down(up(x))

    assert readers_of(changed(change), 1).kept == {"mlp.gate_proj": "reads no token of a text"}


def test_linears_that_read_other_inputs_are_no_group() -> None:
    def change(model: PreTrainedModel) -> None:
        mlp, gate, up, down = mlp_of(model)
        mlp.forward = lambda x: down(gate(x) * up(x + 1e-9))

    groups = readers_of(changed(change), 1).groups
    assert groups[2:] == [("mlp.gate_proj",), ("mlp.up_proj",), ("mlp.down_proj",)]


CROSSINGS = ("input_layernorm", "self_attn.v_proj", "mlp.up_proj")


def crossing_of(subject: Subject, producer: str) -> Crossing:
    return next(each for each in proved_crossings(subject, 1) if each.producer == producer)


@pytest.mark.parametrize("producer", CROSSINGS)
def test_a_crossing_is_refuted_without_one_of_its_readers(producer: str) -> None:
    subject = changed()
    crossing = crossing_of(subject, producer)
    for left_out in crossing.readers:
        readers = {name: dim for name, dim in crossing.readers.items() if name != left_out}
        assert not prove_crossing(subject, 1, replace(crossing, readers=readers)), left_out


@pytest.mark.parametrize("producer", CROSSINGS)
def test_a_crossing_is_refuted_with_outputs_in_another_order(producer: str) -> None:
    subject = changed()
    crossing = crossing_of(subject, producer)
    assert not prove_crossing(subject, 1, replace(crossing, unit_C=crossing.unit_C.roll(1)))


def test_a_crossing_from_a_norm_is_refuted_with_another_offset() -> None:
    subject = changed()
    crossing = crossing_of(subject, "input_layernorm")
    assert crossing.offset == 0.0 and not prove_crossing(subject, 1, replace(crossing, offset=1.0))


def test_no_scale_crosses_where_something_else_reads_the_norm_too() -> None:
    def change(model: PreTrainedModel) -> None:
        layer = model.get_submodule("model.layers.1")
        mlp = layer.get_submodule("mlp")
        run = mlp.forward
        mlp.forward = lambda x: run(x) + x

    subject = changed(change)
    assert "post_attention_layernorm" not in {each.producer for each in proved_crossings(subject, 1)}
    assert "post_attention_layernorm" in {each.producer for each in proved_crossings(subject, 0)}


def test_no_scale_crosses_an_activation_that_is_not_linear_for_scales() -> None:
    subject = Subject.of(pico("opt", activation_function="gelu").double(), "model.decoder.layers")
    assert "fc1" not in {each.producer for each in proved_crossings(subject, 0)}
    subject = Subject.of(pico("opt").double(), "model.decoder.layers")
    assert "fc1" in {each.producer for each in proved_crossings(subject, 0)}


def test_a_model_that_can_not_be_walked_is_refused_with_the_proof_in_one_line() -> None:
    model = skeleton(AutoConfig.for_model("hrm_text"), torch.float32)
    with pytest.raises(ModelError) as caught:
        anatomy_of(model)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(
        "a hrm_text model can't be compressed layer by layer: it has no list of 128 decoder layers"
    )


@pytest.mark.parametrize("family", ["bloom", "mixtral", "mamba2", "phi", "gpt_oss"])
def test_other_sizes_give_the_same_facts(family: str) -> None:
    def facts(model: PreTrainedModel) -> Any:
        found = derived(model)
        return found.consumers, found.kept, found.form, found.layers

    config = AutoConfig.for_model(family)
    assert facts(skeleton(config, torch.float32)) == facts(tiny_model(shrunk(config, 2)))
