"""A rotated model is the same model: the logits of every family that can be turned, and of mutants that leave
one row out.

The models are pico ones with random gains and biases; the weights go through `outer` and `inner` one set at a
time, as a streamed model's do. What can't be turned is listed too, with the reason that it has to give.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.rotation import Rotation, refusal, rotate
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.errors import ModelError
from tests.architectures.test_shape_grammar import SIZES, SPELLINGS, names
from tests.models import FAMILIES, VARIANTS, pico

SAME, MOVED = 1e-4, 1e-2  # of the largest logit
Case = tuple[str, dict[str, Any]]

UNITS = {axis: range(size) for axis, size in SIZES.items()}
BIASED = {"attention_bias": True, "mlp_bias": True}
TURNED: tuple[Case, ...] = (
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("phi3", {}),
    ("qwen3_moe", {}),
    ("llama", BIASED),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": True}),
)
LAYER_NORM, AFTER, TIED = "LayerNorms, which subtract the mean", "stands after its sublayer", "untie it first"
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("gemma2", {}, AFTER),
    ("gemma3_text", {}, AFTER),
    ("gpt2", {}, LAYER_NORM),
    ("opt", {}, LAYER_NORM),
    ("gpt_neox", {}, LAYER_NORM),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}, TIED),
    ("qwen2", {"tie_word_embeddings": True}, TIED),
    ("gemma2", {"attention_bias": True}, AFTER),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}, AFTER),
    ("gpt2", {"n_inner": None, "activation_function": "relu", "tie_word_embeddings": False}, LAYER_NORM),
    (
        "opt",
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        LAYER_NORM,
    ),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, LAYER_NORM),
    ("opt", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}, LAYER_NORM),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False, "hidden_act": "relu"}, LAYER_NORM),
)
EVERY: tuple[Case, ...] = (*TURNED, *((family, over) for family, over, _ in REFUSED))


def name_of(case: Case) -> str:
    return "-".join([case[0], *(f"{field}={value}" for field, value in case[1].items())])


def prefixes(model: PreTrainedModel) -> list[str]:
    return [f"{anatomy_of(model.config).layers}.{index}." for index in range(model.config.num_hidden_layers)]


def turned_weights(model: PreTrainedModel, rotation: Rotation) -> dict[str, Tensor]:
    """Every weight after the rotation by its full name, set after set; a tied head stays out."""
    weights = dict(model.named_parameters())
    layers = prefixes(model)
    found = rotation.outer({name: w for name, w in weights.items() if not name.startswith(tuple(layers))})
    for prefix in layers:
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        found |= {prefix + name: w for name, w in rotation.inner(layer).items()}
    return found


@torch.no_grad()
def with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        parameter.copy_(weights[name])
    return changed


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


def moved(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> float:
    """The largest change of a logit under other weights, relative to the largest logit."""
    base = logits(model)
    return float((logits(with_weights(model, weights)) - base).abs().max() / base.abs().max())


def changed_by(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> set[str]:
    return {
        name for name, w in model.named_parameters() if float((weights[name] - w.detach()).abs().max()) > 1e-3
    }


def rotation_of(model: PreTrainedModel, seed: int = 0, *, r1: bool = True, r2: bool = True) -> Rotation:
    return Rotation(anatomy_of(model.config), model.config, seed, r1=r1, r2=r2)


# 1. The model stays the same, or it is said why it would not.


def test_every_family_and_variant_is_in_one_of_the_two_lists() -> None:
    every = sorted(name_of(case) for case in [*((family, {}) for family in FAMILIES), *VARIANTS])
    assert sorted(name_of(case) for case in EVERY) == every


@pytest.mark.parametrize("flags", [{}, {"r2": False}, {"r1": False}], ids=["both", "R1", "R2"])
@pytest.mark.parametrize("case", TURNED, ids=name_of)
def test_a_rotated_model_gives_the_same_logits(case: Case, flags: dict[str, bool]) -> None:
    model = pico(case[0], **case[1])
    assert refusal(anatomy_of(model.config), model.config, **flags) is None
    gains = [w for name, w in model.named_parameters() if name.endswith("norm.weight")]
    assert all(float(gain.detach().std()) > 0.1 for gain in gains)
    weights = turned_weights(model, rotation_of(model, **flags))
    assert moved(model, weights) <= SAME
    changed = changed_by(model, weights)
    assert any("o_proj" in name for name in changed) and ("lm_head.weight" in changed) == flags.get(
        "r1", True
    )


@pytest.mark.parametrize(
    ("family", "overrides", "why"), REFUSED, ids=[name_of((family, over)) for family, over, _ in REFUSED]
)
def test_a_model_that_r1_would_change_is_refused(family: str, overrides: dict[str, Any], why: str) -> None:
    config = pico(family, **overrides).config
    anatomy = anatomy_of(config)
    said = refusal(anatomy, config)
    assert said is not None and why in said and said.endswith(("leave R1 out", TIED)) and "\n" not in said
    with pytest.raises(ModelError, match=rf"^this {family} model can't be rotated: .*{why}"):
        Rotation(anatomy, config, 0)


@pytest.mark.parametrize("case", [(family, over) for family, over, _ in REFUSED], ids=name_of)
def test_r2_alone_leaves_the_logits_of_every_model_that_r1_would_change(case: Case) -> None:
    """Neither norms nor ties are in its way: fused by parts or by heads, Conv1D, with biases or without."""
    model = pico(case[0], **case[1])
    weights = turned_weights(model, rotation_of(model, r1=False))
    assert (
        moved(model, weights) <= SAME
        and len(changed_by(model, weights)) >= 2 * model.config.num_hidden_layers
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_widths_that_are_no_power_of_two_are_turned_too(seed: int) -> None:
    model = pico("llama", **BIASED, hidden_size=96, head_dim=24)
    assert moved(model, turned_weights(model, rotation_of(model, seed))) <= SAME


# 2. Every row has a part in it.


@pytest.mark.parametrize("case", [("llama", BIASED), ("phi3", {}), ("qwen3_moe", {})], ids=name_of)
def test_leaving_any_one_row_out_of_the_rotation_moves_the_logits(case: Case) -> None:
    model = pico(case[0], **case[1])
    before, after = dict(model.named_parameters()), turned_weights(model, rotation_of(model))
    layers, anatomy = prefixes(model), anatomy_of(model.config)
    kept: set[str] = set()
    for row in (*anatomy.outer, *anatomy.layer):
        full = [row] if row in anatomy.outer else [prefix + row for prefix in layers]
        if all(torch.equal(after[name], before[name]) for name in full):
            kept.add(row)
        else:
            assert moved(model, after | {name: before[name].detach() for name in full}) >= MOVED, row
    untouched = {
        "llama": {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias"},
        "phi3": set(),
        "qwen3_moe": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
    }
    assert kept == untouched[case[0]]


@pytest.mark.parametrize("case", [("llama", BIASED), ("qwen3_moe", {})], ids=name_of)
def test_the_norms_are_left_without_a_gain_and_what_comes_out_is_new_and_float32(case: Case) -> None:
    model = pico(case[0], **case[1]).bfloat16()
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    after = turned_weights(model, rotation_of(model))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and after[name].data_ptr() != weight.data_ptr()
        assert after[name].dtype == torch.float32 and after[name].shape == weight.shape
        assert after[name].is_contiguous() and not after[name].requires_grad
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert torch.equal(after[name], torch.ones_like(after[name]))


def test_a_norm_that_adds_one_to_its_gain_is_left_at_zero() -> None:
    """No family of the table has such norms and is turned: here a gemma's convention on llama's rows."""
    model = pico("llama")
    anatomy = anatomy_of(model.config)
    plain = Rotation(anatomy, model.config, 0)
    offset = Rotation(anatomy.extend("llama", norm_offset=1.0), model.config, 0)
    layer = {name: model.get_parameter(f"model.layers.0.{name}").detach() for name in anatomy.layer}
    norms = {name for name, row in anatomy.layer.items() if row == "hidden"}
    shifted = offset.inner({name: w - 1 if name in norms else w for name, w in layer.items()})
    for name, expected in plain.inner(layer).items():
        torch.testing.assert_close(shifted[name], torch.zeros_like(expected) if name in norms else expected)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    model = pico("phi3")
    first, second, third = (turned_weights(model, rotation_of(model, seed)) for seed in (4, 4, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


# 3. What it is for.


def peaks(model: PreTrainedModel) -> list[float]:
    """For the input of each attention: the mean over tokens of the peak over the root mean square."""
    found: list[float] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(float((inputs[0].abs().amax(-1) / inputs[0].square().mean(-1).sqrt()).mean()))

    watched = copy.deepcopy(model)
    for prefix in prefixes(model):
        watched.get_submodule(f"{prefix}self_attn.q_proj").register_forward_pre_hook(watch)
    logits(watched)
    return found


@torch.no_grad()
@pytest.mark.parametrize("where", ["gain", "hidden state"])
def test_an_outlier_channel_is_gone_after_the_rotation(where: str) -> None:
    model, channel = pico("llama"), 11
    if where == "gain":
        for prefix in prefixes(model):
            model.get_parameter(f"{prefix}input_layernorm.weight")[channel] *= 100
            for linear in ("q_proj", "k_proj", "v_proj"):
                model.get_parameter(f"{prefix}self_attn.{linear}.weight")[:, channel] /= 100
    else:
        model.get_parameter("model.embed_tokens.weight")[:, channel] *= 100
    weights = turned_weights(model, rotation_of(model))
    assert moved(model, weights) <= SAME
    before, after = peaks(model), peaks(with_weights(model, weights))
    assert all(b > 5 and a < b / 2 for b, a in zip(before, after, strict=True)), (before, after)


# 4. The product along an axis, against one over all positions.


def matrix_of(text: str, axis: str, seed: int) -> tuple[Tensor, Tensor]:
    """A random tensor of a spelling, and a random matrix for an axis."""
    generator = torch.Generator().manual_seed(seed)
    M_DD = torch.randn(SIZES[axis], SIZES[axis], generator=generator, dtype=torch.float64)
    return torch.randn(Spelling.parse(text).shape(SIZES), generator=generator, dtype=torch.float64), M_DD


@pytest.mark.parametrize(
    ("text", "axis"), [(text, axis) for text in SPELLINGS for axis in Spelling.parse(text).axes]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_rotate_is_the_product_with_a_matrix_written_out_position_by_position(
    text: str, axis: str, seed: int
) -> None:
    tensor, M_DD = matrix_of(text, axis, seed)
    expected = tensor
    for dim, term in enumerate(Spelling.parse(text).dims):
        places = [dict(name) for name in names(term, UNITS)]  # under "|", the innermost alternative
        whole = torch.eye(len(places), dtype=torch.float64)
        for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
            if axis in a and axis in b and {**a, axis: 0} == {**b, axis: 0}:
                whole[i, j] = M_DD[a[axis], b[axis]]
        expected = (expected.movedim(dim, -1) @ whole).movedim(-1, dim)
    torch.testing.assert_close(rotate(tensor, text, SIZES, axis, M_DD), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("text", [text for text in SPELLINGS if "d" in Spelling.parse(text).axes])
def test_a_part_confines_the_product_to_one_alternative_of_a_fused_weight(text: str, part: int) -> None:
    tensor, M_DD = matrix_of(text, "d", 0)
    whole, confined = rotate(tensor, text, SIZES, "d", M_DD), rotate(tensor, text, SIZES, "d", M_DD, part)
    (dim, term), *_ = [
        (dim, term) for dim, term in enumerate(Spelling.parse(text).dims) if "d" in Spelling((term,)).axes
    ]
    inside = torch.tensor([part == dict(name)["|"] or "|" not in text for name in names(term, UNITS)])
    assert bool(inside.any())
    expected = torch.where(
        inside.reshape([-1 if i == dim else 1 for i in range(tensor.dim())]), whole, tensor
    )
    assert torch.equal(confined, expected)


@pytest.mark.parametrize(
    ("text", "shape", "axis", "size", "message"),
    [
        ("ffn hidden", (6, 5), "d", 4, 'has no axis "d"; it runs along ffn, hidden'),
        ("ffn hidden", (5, 6), "hidden", 5, r"spells the shape \(6, 5\), the tensor has \(5, 6\)"),
        ("ffn hidden", (6, 5), "hidden", 6, r"\(6, 6\) does not fit the 5 units of axis \"hidden\""),
    ],
)
def test_what_does_not_fit_is_an_error(
    text: str, shape: tuple[int, ...], axis: str, size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rotate(torch.zeros(shape), text, SIZES, axis, torch.eye(size, dtype=torch.float64))


# 5. What the table can't tell is refused, not guessed.


def test_a_set_of_weights_that_is_not_whole_is_an_error() -> None:
    model = pico("llama")
    rotation, anatomy = rotation_of(model), anatomy_of(model.config)
    outer = {name: model.get_parameter(name) for name in anatomy.outer}
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing; give all 3"):
        rotation.outer({name: w for name, w in outer.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"no row for model\.rope"):
        rotation.outer({**outer, "model.rope": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"input_layernorm\.weight is missing; give all 9"):
        rotation.inner({})


def test_rows_that_do_not_say_where_a_rotation_goes_are_refused() -> None:
    config = pico("llama").config
    anatomy = anatomy_of(config)
    assert refusal(anatomy, config) is None
    scale_pairs = dict(anatomy.scale_pairs)
    half = anatomy.extend(
        "llama", scale_pairs={**scale_pairs, "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj")}
    )
    assert "which norm self_attn.v_proj reads" in str(refusal(half, config))
    square = anatomy.extend("llama", layer={"self_attn.q_proj.weight": "hidden hidden"})
    assert "which norm self_attn.q_proj reads" in str(refusal(square, config))
    projected = anatomy.extend("llama", outer={**anatomy.outer, "model.project.weight": "hidden hidden"})
    assert "whether model.project stands before the final norm" in str(refusal(projected, config))
    biased = anatomy.extend("llama", layer={"input_layernorm.bias": "hidden"})
    assert LAYER_NORM in str(refusal(biased, config))
    without = anatomy.extend(
        "llama",
        scale_pairs={key: consumers for key, consumers in scale_pairs.items() if key != "self_attn.v_proj"},
    )
    assert "leave R2 out" in str(refusal(without, config)) and refusal(without, config, r2=False) is None
