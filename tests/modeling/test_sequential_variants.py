"""Variants of a model in one pass, and what a walk back finds at its start: against the whole model, really
changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.algorithms.hessian import Moments
from llmcompress.architectures.families import anatomy_of
from llmcompress.modeling import token_limit
from llmcompress.modeling.backward import drawn_from, following, gradients, label_generator, output_fisher
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import (
    Edit,
    Edits,
    divergence,
    together,
    variants,
    without_each,
)
from tests.models import noise, pico

CPU = torch.device("cpu")
LAYERS = 3
TOKENS = torch.randint(1, 160, (5, 12), generator=torch.Generator().manual_seed(1))
MLP = {  # linears of one part of a layer
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gemma2": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
}
by_family = pytest.mark.parametrize("family", MLP)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 24)  # batches of 2, 2 and 1 sequences


def model_of(family: str) -> PreTrainedModel:
    """Three layers, all attending alike."""
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma2" else {}
    more = {name: value[:LAYERS] for name, value in types.items()}
    return pico(family, **{depth: LAYERS, **more}).requires_grad_(False)


def resident_of(model: PreTrainedModel) -> InMemoryModel:
    return InMemoryModel(model.config, model.state_dict(), CPU)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(anatomy_of(model.config).layers))


Change = Callable[[nn.Module], None]  # of a layer of a whole model


def changed(model: PreTrainedModel, changes: Mapping[int, Change | None]) -> PreTrainedModel:
    """A copy of a model with some of its layers really changed; None passes over one."""
    model = copy.deepcopy(model)
    for index, change in changes.items():
        layer = layers_of(model)[index]
        if change is None:
            cast(Any, layer).forward = lambda hidden, *args, **kwargs: hidden
        else:
            change(layer)
    return model


@torch.no_grad()
def leaving(model: PreTrainedModel) -> Tensor:
    """The states that leave the last layer of a whole model."""
    found: list[Tensor] = []
    hook = layers_of(model)[-1].register_forward_hook(lambda module, args, out: found.append(out))
    model(TOKENS, use_cache=False)
    hook.remove()
    return found[0]


def close(found: Sequence[Tensor], expected: Tensor) -> None:
    assert [len(hidden) for hidden in found] == [2, 2, 1]
    size = float(expected.abs().max())
    torch.testing.assert_close(torch.cat(list(found)), expected, rtol=0, atol=1e-5 * size)


def as_in(model: PreTrainedModel, family: str, source: int) -> tuple[Edit, Change]:
    """The feed-forward part of another layer, as an edit and done."""
    names = [f"{linear}.weight" for linear in MLP[family]]
    weights = {name: layers_of(model)[source].get_parameter(name).data for name in names}

    def change(layer: nn.Module) -> None:
        for name, weight in weights.items():
            layer.get_parameter(name).data = weight

    return (lambda layer: weights), change


def scaled(linear: str, by: float) -> tuple[Edit, Change]:
    def change(layer: nn.Module) -> None:
        layer.get_parameter(f"{linear}.weight").data *= by

    return (lambda layer: {f"{linear}.weight": by * layer.module.get_parameter(f"{linear}.weight")}), change


# variants


@by_family
def test_each_variant_is_the_model_with_its_weights_really_replaced(family: str) -> None:
    model = model_of(family)
    swaps = {source: as_in(model, family, source) for source in range(LAYERS)}
    wanted = {
        f"{index} as {source}": {index: swaps[source]} for index in range(LAYERS) for source in range(LAYERS)
    }
    wanted["all as 1"] = dict.fromkeys(range(LAYERS), swaps[1])
    found = variants(
        resident_of(model),
        TOKENS,
        {k: {i: edit for i, (edit, _) in own.items()} for k, own in wanted.items()},
    )
    assert found.keys() == {None, *wanted}
    close(found[None], leaving(model))
    for key, own in wanted.items():
        close(found[key], leaving(changed(model, {i: change for i, (_, change) in own.items()})))
    assert all(
        torch.allclose(torch.cat(found[f"{i} as {i}"]), torch.cat(found[None]), atol=1e-4)
        for i in range(LAYERS)
    )
    assert not torch.allclose(torch.cat(found["0 as 1"]), torch.cat(found[None]), atol=1e-2)


@by_family
def test_a_block_can_be_passed_over_first_last_or_between(family: str) -> None:
    model = model_of(family)
    edits: dict[str, Edits] = {str(index): {index: None} for index in range(LAYERS)}
    edits |= {"both": {0: None, 2: None}, "all": dict.fromkeys(range(LAYERS))}
    found = variants(resident_of(model), TOKENS, edits)
    for key, own in edits.items():
        close(found[key], leaving(changed(model, dict.fromkeys(own))))


@by_family
def test_candidates_go_on_top_of_a_base(family: str) -> None:
    """Where a candidate says nothing of a layer the base decides, where it does it takes the place of the
    base's."""
    model, first = model_of(family), MLP[family][0]
    (half, halve), (twice, double), (other, swap) = (
        scaled(first, 0.5),
        scaled(first, 2.0),
        as_in(model, family, 2),
    )
    base: Edits = {0: half, 1: None}
    edits: dict[int, Edits] = {
        0: {0: twice},
        1: {1: twice},
        2: {2: other},
        3: {0: None, 2: twice},
        4: {1: other, 2: None},
    }
    done: dict[int | None, dict[int, Change | None]] = {
        None: {0: halve, 1: None},
        0: {0: double, 1: None},
        1: {0: halve, 1: double},
        2: {0: halve, 1: None, 2: swap},
        3: {0: None, 1: None, 2: double},
        4: {0: halve, 1: swap, 2: None},
    }
    found = variants(resident_of(model), TOKENS, edits, base)
    assert found.keys() == done.keys()
    for key, changes in done.items():
        close(found[key], leaving(changed(model, changes)))


def test_variants_leave_the_model_as_it_was_and_no_block_in_memory() -> None:
    model = model_of("llama")
    resident, edit, made = resident_of(model), scaled("mlp.up_proj", 0.0)[0], list[int]()

    def counted(layer: DecoderLayer) -> Mapping[str, Tensor]:
        made.append(layer.index)
        assert not any(parameter.is_meta for parameter in layer.module.parameters())
        return edit(layer)

    keys = range(4)
    first = variants(resident, TOKENS, {key: dict.fromkeys(range(LAYERS), counted) for key in keys})
    assert made == sorted(made) and set(made) == set(range(LAYERS)), "layer after layer"
    assert all(parameter.is_meta for parameter in resident.layers.parameters())
    assert all(torch.equal(a, b) for key in keys for a, b in zip(first[key], first[0], strict=True))
    close(variants(resident, TOKENS, {0: {0: edit}})[None], leaving(model))


def test_where_all_pass_over_a_block_it_is_never_read() -> None:
    model = model_of("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if ".layers.1." not in name}
    resident = InMemoryModel(model.config, state, CPU)  # a model that lacks the weights of a layer
    found = variants(resident, TOKENS, {"first": {0: None}}, {1: None})
    close(found[None], leaving(changed(model, {1: None})))
    close(found["first"], leaving(changed(model, {0: None, 1: None})))


@by_family
@pytest.mark.parametrize("gone", [(), ((1, None),), ((0, "first"), (2, "last"))])
def test_without_each_is_the_model_without_blocks_and_with_linears_of_zeros(
    family: str, gone: Sequence[tuple[int, str | None]]
) -> None:
    model = model_of(family)
    linears = {"first": MLP[family][0], "last": MLP[family][-1]}
    out = [(index, linears[which] if which else None) for index, which in gone]
    parts = [(index, linear) for index in range(LAYERS) for linear in (None, *linears.values())]

    def done(left_out: Collection[tuple[int, str | None]]) -> PreTrainedModel:
        at = {index for index, _ in left_out}
        zeros = {index: [linear for number, linear in left_out if number == index] for index in at}
        return changed(model, {index: None if None in of else zeroed(of) for index, of in zeros.items()})

    def zeroed(names: Sequence[str | None]) -> Change:
        def change(layer: nn.Module) -> None:
            for name in names:
                layer.get_parameter(f"{name}.weight").data.zero_()

        return change

    found = without_each(resident_of(model), TOKENS, parts, out)
    layers = {index for index, linear in out if linear is None}
    assert found.keys() == {None} | {part for part in parts if part not in out and part[0] not in layers}
    for part, states in found.items():
        close(states, leaving(done([*out, *([part] if part else [])])))


# divergence


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.01, 1.0, 30.0]))
def test_divergence_is_torchs_mean_kl_a_token(seed: int, size: float) -> None:
    expected, found = size * noise(2, 5, 17, seed=seed), size * noise(2, 5, 17, seed=seed + 1)
    log_p, log_q = (scores.double().flatten(0, 1).log_softmax(-1) for scores in (expected, found))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    known = expected.log_softmax(-1)
    assert divergence(known, found) == pytest.approx(float(kl), rel=1e-4, abs=1e-7)
    assert divergence(known, expected) == 0 and divergence(known, expected + 3) == pytest.approx(0, abs=1e-5)


def test_divergence_of_scores_in_half_precision_is_computed_in_full() -> None:
    a, b = noise(2, 5, 17).bfloat16(), noise(2, 5, 17, seed=1).bfloat16()
    known = a.float().log_softmax(-1)
    assert divergence(known, b) == divergence(known, b.float()) > 0


# together


@by_family
def test_blocks_in_memory_together_compute_what_the_model_does(family: str) -> None:
    model = model_of(family)
    resident = resident_of(model)
    ins: dict[int, Tensor] = {}
    outs: dict[int, Tensor] = {}
    for index, module in enumerate(layers_of(model)):
        module.register_forward_pre_hook(lambda _, args, index=index: ins.__setitem__(index, args[0]))
        module.register_forward_hook(lambda _, args, out, index=index: outs.__setitem__(index, out))
    model(TOKENS, use_cache=False)
    for wanted in ((0, 2), (2, 1), (1,)):
        entering = {index: list(ins[index].split(2)) for index in wanted}
        with together(resident, TOKENS, entering) as layers:
            assert [layer.index for layer in layers] == list(wanted)
            for layer in layers:
                assert layer.name == resident.layer_name(layer.index)
                close(layer.outputs(layer.inputs), outs[layer.index])
                for linear in layer.anatomy.linears:
                    own = layers_of(model)[layer.index].get_parameter(f"{linear}.weight")
                    assert torch.equal(layer.module.get_parameter(f"{linear}.weight"), own)
        assert all(parameter.is_meta for parameter in resident.layers.parameters()), (
            "a layer stayed in memory"
        )


def test_blocks_together_run_with_the_gradients_of_parameters_that_they_are_given() -> None:
    model = model_of("llama")
    resident = resident_of(model)
    states = noise(5, 12, 64)
    shared = noise(320, 64).requires_grad_()
    with together(resident, TOKENS, {0: list(states.split(2)), 1: list(states.split(2))}) as layers:
        sums = [layer.run(layer.inputs[0], {"mlp.up_proj.weight": shared}).sum() for layer in layers]
        each = [torch.autograd.grad(one, shared, retain_graph=True)[0] for one in sums]
        (both,) = torch.autograd.grad(torch.stack(sums).sum(), shared)
    torch.testing.assert_close(both, each[0] + each[1])
    assert not torch.allclose(each[0], each[1], rtol=0.1)


# gradients to the first layer


@by_family
def test_the_last_gradients_are_those_at_the_output_of_the_embedding(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(args[0].detach().requires_grad_())
        return (entered[0], *args[1:])

    hook = layers_of(model)[0].register_forward_pre_hook(keep)
    scores = model(TOKENS, use_cache=False).logits[:, :-1]
    hook.remove()
    torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
    ).backward()
    (expected,) = (hidden.grad for hidden in entered)
    assert expected is not None and expected.shape == (5, 12, 64)
    steps = list(gradients(resident_of(model), TOKENS, tmp_path, following, first=True))
    assert [index for index, _, _ in steps] == [2, 1, 0, -1] and steps[-1][2] == {}
    found = torch.cat(steps[-1][1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert list(tmp_path.iterdir()) == [], "scratch files were left behind"


def test_without_first_the_walk_back_ends_at_the_first_block_and_says_the_same(tmp_path: Path) -> None:
    resident = resident_of(model_of("llama"))
    whole = {
        i: torch.cat(grads) for i, grads, _ in gradients(resident, TOKENS, tmp_path, following, first=True)
    }
    short = {i: torch.cat(grads) for i, grads, _ in gradients(resident, TOKENS, tmp_path, following)}
    assert whole.keys() - short.keys() == {-1} and all(
        torch.equal(grads, whole[i]) for i, grads in short.items()
    )


def test_watched_parameters_have_the_same_gradients_with_first(tmp_path: Path) -> None:
    resident = resident_of(model_of("llama"))
    watched = ["input_layernorm.weight"]
    plain = {i: found for i, _, found in gradients(resident, TOKENS, tmp_path, following, watched)}
    first = {
        i: found for i, _, found in gradients(resident, TOKENS, tmp_path, following, watched, first=True)
    }
    assert first.pop(-1) == {} and first.keys() == plain.keys()
    assert all(torch.equal(first[i][watched[0]], plain[i][watched[0]]) for i in plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_fisher_matrix_is_that_of_the_states_that_enter_the_first_block(
    family: str, tmp_path: Path
) -> None:
    """Labels are drawn as they come: the oracle takes the same draws, batch by batch."""
    model = model_of(family)
    found = dict(output_fisher(resident_of(model), TOKENS, tmp_path, seed=3, first=True))
    plain = dict(output_fisher(resident_of(model), TOKENS, tmp_path, seed=3))
    assert found.keys() == {-1, *range(LAYERS)} and all(
        torch.equal(F_DD, found[index]) for index, F_DD in plain.items()
    )
    grads = list[Tensor]()
    for number, tokens in enumerate(TOKENS.split(2)):
        entered: list[Tensor] = []

        def keep(
            module: nn.Module, args: tuple[Tensor, ...], entered: list[Tensor] = entered
        ) -> tuple[Tensor, ...]:
            entered.append(args[0].detach().requires_grad_())
            return (entered[0], *args[1:])

        hook = layers_of(model)[0].register_forward_pre_hook(keep)
        scores = model(tokens, use_cache=False).logits.flatten(0, 1)
        hook.remove()
        generator = label_generator(3, number, CPU)
        labels = drawn_from(scores.detach().softmax(-1), generator)
        torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
        assert entered[0].grad is not None
        grads.append(entered[0].grad.flatten(0, 1))
    g_TD = torch.cat(grads)
    expected = g_TD.T @ g_TD / len(g_TD)
    torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# moments of several layers


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), first=st.integers(0, 20), second=st.integers(0, 20))
def test_joined_moments_are_those_of_all_tokens_at_once(seed: int, first: int, second: int) -> None:
    a, b = noise(first, 6, seed=seed) + 1, 3 * noise(second, 6, seed=seed + 1)
    parts = [Moments(6), Moments(6)]
    for moments, x in zip(parts, (a, b), strict=True):
        moments.add(x)
    whole, before = Moments(6), copy.deepcopy(parts)
    whole.add(torch.cat([a, b]))
    both = parts[0].joined(parts[1])
    assert both.tokens == first + second and both.X_FC is None
    for name in ("H_CC", "mean_C", "full_C", "top_C"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    for moments, was in zip(parts, before, strict=True):
        assert all(
            torch.equal(getattr(moments, name), getattr(was, name))
            for name in ("H_CC", "mean_C", "full_C", "top_C")
        )


def test_joined_moments_leave_out_what_the_full_model_has_in_their_place_and_take_in_more() -> None:
    one, other = Moments(6), Moments(6)
    for seed, moments in enumerate((one, other)):
        moments.add(noise(9, 6, seed=seed), noise(9, 6, seed=seed + 5))
    both = one.joined(other)
    assert both.X_FC is None and one.X_FC is not None
    both.add(noise(4, 6, seed=9))
    x = torch.cat([noise(9, 6, seed=0), noise(9, 6, seed=1), noise(4, 6, seed=9)])
    torch.testing.assert_close(both.H_CC, x.T @ x / len(x))
    torch.testing.assert_close(both.mean_C, x.mean(0))
