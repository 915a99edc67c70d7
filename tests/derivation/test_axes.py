"""Axes are found by the fields that count them, and their proof fails wherever the fact is wrong."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmcompress.architectures.resize import resized
from llmcompress.derivation.axes import proved_axes
from llmcompress.derivation.axis_proofs import Axes, holds, leaves_out, permutes
from llmcompress.derivation.config_fields import Setting
from llmcompress.derivation.derive import derived
from llmcompress.derivation.experts import proved_experts
from llmcompress.derivation.layouts import HEADS, channels, fitting, written
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.derivation.subject import Subject, paths_of_layers
from llmcompress.errors import ModelError
from llmcompress.modeling.model_config import skeleton
from llmcompress.stages.prune.stage import cuttable


def setting_of(model_type: str, **fields: Any) -> Setting:
    """A tiny model of two layers of a type."""
    model = tiny_model(shrunk(AutoConfig.for_model(model_type, **fields), 2))
    (path, *_) = paths_of_layers(model)
    subject = Subject.of(model, path)
    found = {
        f"{path}.{index}.{name}": transposed
        for index in range(len(subject.layers))
        for name, transposed in proved_experts(subject, index).items()
    }
    return Setting.of(subject, found)


def axes_of(setting: Setting, name: str) -> Axes:
    """The axes of which one has a name."""
    return next(axes for axes in proved_axes(setting) if name in axes.sizes)


def test_channels_follow_from_the_length_of_a_dimension() -> None:
    sizes = {"kv": 2, "q": 4}
    assert channels("(kv q _ | kv _ | kv _)", sizes, 2 * 4 * 5 + 2 * 2 * 5) == 5
    assert channels("(kv q _)", sizes, 41) is None
    assert channels("kv", sizes, 4) is None
    assert written("(kv q _)", 1) == "(kv q)"
    assert written("(kv _)", 1) == "kv"
    assert written("(kv (q _ | _ | _))", 6, "d") == "(kv (q d | d | d))"


def test_a_layout_fits_if_its_channels_are_the_same_at_every_size() -> None:
    cases = [({"kv": 2, "q": 4}, 60), ({"kv": 1, "q": 4}, 30), ({"kv": 2, "q": 2}, 40)]
    assert fitting(HEADS, cases) == ["(kv q _ | kv _ | kv _)", "(kv (q _ | _ | _))"]
    assert not fitting(HEADS, [*cases, ({"kv": 1, "q": 2}, 25)])


WRONG = [
    ("phi3", "ffn", "mlp.gate_up_proj.weight", 0, "(ffn _)"),
    ("gpt_oss", "ffn", "mlp.experts.gate_up_proj", 2, "(ffn | ffn)"),
    ("phi3", "kv", "self_attn.qkv_proj.weight", 0, "(kv (q _ | _ | _))"),
    ("qwen3_5_text", "kv", "self_attn.q_proj.weight", 0, "(kv q _ | kv q _)"),
]


@pytest.mark.parametrize(("family", "axis", "name", "dim", "layout"), WRONG)
def test_a_cut_is_refuted_with_another_layout_of_one_weight(
    family: str, axis: str, name: str, dim: int, layout: str
) -> None:
    said: dict[str, dict[str, Any]] = {
        "qwen3_5_text": {"layer_types": ["full_attention"] * 32},
        "phi3": {"num_key_value_heads": 8},
    }
    setting = setting_of(family, **said.get(family, {}))
    axes = axes_of(setting, axis)
    size = axes.sizes[axis]
    if axis == "ffn":
        fields = {axes.fields["ffn"]: size // 2}
    else:
        heads = {axes.fields["kv"]: size // 2, axes.fields["q"]: size // 2 * axes.sizes["q"]}
        fields = {**heads, "head_dim": setting.head_dim}
    place = (f"{setting.subject.path}.0.{name}", dim)
    assert axes.layouts[place] != layout and holds(setting, axes, axis, fields)
    assert not holds(setting, replace(axes, layouts={**axes.layouts, place: layout}), axis, fields)


def test_no_axis_is_proved_whose_units_a_norm_weighs_together() -> None:
    """Queries and keys of OLMo 2 go through a norm over all heads, neurons of BitNet through one over all."""
    assert derived(skeleton(AutoConfig.for_model("olmo2"), torch.float32)).cuts == frozenset(
        {"ffn", "hidden"}
    )
    assert "ffn" not in (derived(skeleton(AutoConfig.for_model("bitnet"), torch.float32)).cuts or ())


def test_no_axis_is_proved_whose_units_do_different_things() -> None:
    """Each head of a model with ALiBi has a slope of its own."""

    def sloped(setting: Setting) -> None:
        for layer in setting.subject.layers:
            own: nn.Module = layer.get_submodule("self_attn.o_proj")
            slope_C = torch.arange(128, dtype=torch.float64).div(16, rounding_mode="floor") + 1
            own.register_forward_pre_hook(lambda module, args, by=slope_C: args[0] * by)

    setting = setting_of("llama")
    assert any("kv" in axes.sizes for axes in proved_axes(setting))
    sloped(setting)
    changed = replace(setting, subject=Subject.of(setting.subject.model, setting.subject.path))
    assert not any("kv" in axes.sizes for axes in proved_axes(changed))


def test_channels_are_permuted_only_together() -> None:
    setting = setting_of("llama")
    axes = axes_of(setting, "hidden")
    assert permutes(setting, axes, "hidden")
    for place in axes.layouts:
        left_out = {other: layout for other, layout in axes.layouts.items() if other != place}
        assert not permutes(setting, replace(axes, layouts=left_out), "hidden"), place


def test_channels_are_not_cut_where_the_embedding_is_scaled_by_their_number() -> None:
    gemma, qwen = (axes_of(setting_of(family), "hidden") for family in ("gemma", "qwen3_5_text"))
    assert gemma.cuts == () and qwen.cuts == ("hidden",)  # both have gains of one more than their weight


def test_experts_are_left_out_unless_a_token_takes_some_of_each_group() -> None:
    free = setting_of("glm4_moe", first_k_dense_replace=0)
    axes = axes_of(free, "expert")
    biases = {name for name, _ in axes.layouts if name.endswith("e_score_correction_bias")}
    assert axes.cuts == ("expert",) and len(biases) == 2  # buffers, which a checkpoint has too
    for place in axes.layouts:
        left_out = {other: layout for other, layout in axes.layouts.items() if other != place}
        assert not leaves_out(free, replace(axes, layouts=left_out)), place
    grouped = setting_of("glm4_moe", first_k_dense_replace=0, n_group=2, topk_group=1)
    assert not [axes for axes in proved_axes(grouped) if "expert" in axes.sizes]


def test_heads_that_experts_share_are_not_cut_as_neurons_of_each() -> None:
    """In JetMoE each expert has queries of its own, and all of them read the same keys and values."""
    found = derived(skeleton(AutoConfig.for_model("jetmoe"), torch.float32))
    assert found.cuts is not None and {"kv", "ffn"} <= found.cuts
    assert cuttable(found) == ("ffn", "expert", "hidden")


def test_an_open_field_stands_for_the_size_that_it_makes() -> None:
    found = derived(skeleton(AutoConfig.for_model("gptj"), torch.float32))
    assert found.sizes == {"ffn": "n_inner"} and found.counts["ffn"] == 4 * 4096


def test_a_field_inside_a_wrapper_is_changed_there() -> None:
    model = skeleton(AutoConfig.for_model("mistral3"), torch.float32)
    found = derived(model)
    text = model.config.text_config
    changes = resized(model.config, found, {"ffn": [64] * text.num_hidden_layers})
    assert changes.keys() == {"text_config"}
    assert changes["text_config"]["intermediate_size"] == 64
    assert changes["text_config"]["hidden_size"] == text.hidden_size


def test_one_field_can_not_say_two_widths() -> None:
    model = skeleton(AutoConfig.for_model("smollm3"), torch.float32)
    widths = [64] * model.config.num_hidden_layers
    widths[3] = 128
    with pytest.raises(ModelError) as caught:
        resized(model.config, derived(model), {"ffn": widths})
    assert str(caught.value) == (
        "the config of a smollm3 model says intermediate_size once for all layers, so 64 and 128 of it can't "
        "be; use allocation: uniform"
    )
