"""The walk against the models themselves: layer by layer must be the same as all at once."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmcompress.errors import ModelError
from llmcompress.modeling import half_precision, token_limit
from llmcompress.modeling import sequential as walking
from llmcompress.modeling.backward import drawn_from, fisher_matrices, label_generator, output_fisher
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.modeling.sequential import head_input, logits, walk
from tests.models import FAMILIES, pico

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 96)  # 7 sequences of 24 tokens: batches of 4 and 3


def sequences(vocabulary: int) -> Tensor:
    return torch.randint(1, vocabulary, (7, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["live", "on disk"])
def test_the_blocks_one_by_one_give_the_logits_of_the_model(family: str, where: str, tmp_path: Path) -> None:
    model = pico(family)
    tokens = sequences(model.config.vocab_size)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
    if where == "live":
        resident: LayerwiseModel = InMemoryModel(model.config, model.state_dict(), CPU)
    else:
        model.save_pretrained(tmp_path)
        resident = DiskModel(tmp_path, CPU)
    walked = torch.cat(list(logits(resident, tokens)))
    assert (walked - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert all(p.is_meta for layer in resident.layers for p in layer.parameters()), "a layer stayed in memory"


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_what_each_linear_reads_in_the_model(family: str) -> None:
    model = pico(family)
    tokens = sequences(model.config.vocab_size)
    read: dict[str, list[Tensor]] = {}
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    names = [
        f"{resident.layer_name(i)}.{x}" for i in range(len(resident.layers)) for x in resident.anatomy.linears
    ]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        model(tokens, use_cache=False)
    checked = 0
    for layer in walk(resident, tokens):
        for linear, moments in layer.moments().items():
            X_TC = torch.cat(read[f"{layer.name}.{linear}"])
            expected = X_TC.T @ X_TC / len(X_TC)
            assert moments.tokens == len(X_TC) == tokens.numel()
            assert torch.allclose(moments.H_CC, expected, atol=1e-4 * float(expected.abs().max()))
            checked += 1
    assert checked == len(names)


def test_linears_that_read_one_input_share_one_matrix() -> None:
    model = pico("llama")
    layers = walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences(100))
    layer = next(layers)  # in memory for as long as the walk stands at it
    moments = layer.moments()
    assert moments["self_attn.q_proj"] is moments["self_attn.v_proj"]
    assert moments["mlp.gate_proj"] is moments["mlp.up_proj"]
    assert len({id(shared) for shared in moments.values()}) == 4


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_group_at_a_time_reads_the_same_and_the_reference_goes_through_the_weights_as_they_were(
    family: str, in_turn: bool
) -> None:
    """Group after group, with weights replaced in between, as plain passes of a changed and an unchanged copy
    have it."""
    model = pico(family).requires_grad_(False)
    tokens = sequences(model.config.vocab_size)
    read: dict[str, dict[str, Tensor]] = {"full": {}, "changed": {}}

    def spy(kind: str, whole: nn.Module) -> None:
        for name in names:
            whole.get_submodule(name).register_forward_pre_hook(partial(note, kind, name))

    def note(kind: str, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[kind][name] = args[0].flatten(0, -2)

    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    names = [
        f"{resident.layer_name(i)}.{x}" for i in range(len(resident.layers)) for x in resident.anatomy.linears
    ]
    changed = copy.deepcopy(model)
    spy("full", model)
    spy("changed", changed)
    model(tokens, use_cache=False)
    for layer in walk(resident, tokens, reference=True):
        for consumers in layer.anatomy.consumers:
            changed(tokens, use_cache=False)
            for linear, moments in layer.moments(consumers, in_turn=in_turn).items():
                full, x = (read[kind][f"{layer.name}.{linear}"] for kind in ("full", "changed"))
                for found, expected in (
                    (moments.H_CC, x.T @ x / len(x)),
                    (moments.X_FC, full.T @ x / len(x)),
                ):
                    assert found is not None
                    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
            for linear in consumers:
                layer.set_weight(linear, 0.9 * layer.weight(linear))
                changed.get_parameter(f"{layer.name}.{linear}.weight").data.mul_(0.9)
    assert all(
        not torch.equal(read["full"][name], read["changed"][name]) for name in names[len(names) // 2 :]
    )


def test_what_is_final_is_run_once_and_again_where_it_changed_after_all() -> None:
    model = pico("llama")
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    tokens, runs = sequences(100), list[int]()
    layers = walk(resident, tokens, reference=True)
    layer = next(layers)
    layer.module.get_submodule("self_attn.q_proj").register_forward_hook(lambda *_: runs.append(0))
    qkv, output, gates, down = layer.anatomy.consumers
    batches = len(layer.inputs)
    for group, linears in ((qkv, qkv), (output, output), (gates, gates), (down, down)):
        layer.moments(group, in_turn=True)
        for linear in linears:
            layer.set_weight(linear, 0.9 * layer.weight(linear))
    once = 2 * batches  # for each stream, on the way to the output projection
    assert len(runs) == once + 2, "on the way to the gates, the first batch shows what attention returns"
    known = [layer._finished.output(i, "self_attn") for i in range(batches)]
    outputs = layer.outputs(layer.inputs)
    assert len(runs) == once + 2
    assert all(layer._finished.output(i, "self_attn") is known[i] for i in range(batches))
    plain = [layer.run(hidden) for hidden in layer.inputs]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, plain, strict=True))
    layer.set_weight("self_attn.o_proj", layer.weight("self_attn.o_proj").clone())
    assert layer._finished.output(0, "self_attn"), "the same weight again changes nothing"
    layer.set_weight("self_attn.o_proj", 2 * layer.weight("self_attn.o_proj"))
    assert layer._finished.empty and not layer._finished_full.empty
    again = layer.outputs(layer.inputs)
    assert not torch.equal(again[0], outputs[0])
    assert torch.equal(again[0], layer.run(layer.inputs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_bfloat16_may_be_computed_in_it_and_states_stay_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "half_is_fast", lambda device: True)
    model = pico("llama").to(dtype)  # type: ignore[arg-type]  # a decorator hides its signature
    tokens = sequences(100)

    def states(half: bool) -> Tensor:
        resident = InMemoryModel(model.config, model.state_dict(), CPU)
        *_, last = walk(resident, tokens, through=True, half=half)
        return torch.cat(last.inputs)

    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    layers = walk(resident, tokens, reference=True, half=True)
    layer = next(layers)
    assert layer.half == (dtype == torch.bfloat16)
    for _ in layer.reads(*layer.anatomy.consumers):
        assert not torch.is_autocast_enabled("cpu"), "what is made of the inputs is made in float32"
    ours, exact = states(True), states(False)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, exact) == (dtype == torch.float32)
    assert float((ours - exact).norm() / exact.norm()) < 0.02


def test_a_pass_ends_where_its_group_has_read() -> None:
    model = pico("llama")
    layers = walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences(100), reference=True)
    layer = next(layers)
    ran: list[str] = []
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer.module.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: ran.append(name)
        )
    layer.moments(("self_attn.o_proj",))
    assert not ran
    layer.moments(("mlp.down_proj",))
    assert set(ran) == {"self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}, (
        "the last group runs to the end, for the targets"
    )
    ran.clear()
    assert all(torch.equal(*pair) for pair in zip(layer.targets, layer.outputs(layer.reference), strict=True))
    assert len(ran) == 3 * len(layer.inputs), "the targets were found twice"


def test_later_blocks_see_what_became_of_earlier_ones_and_the_reference_does_not() -> None:
    model = pico("qwen3")
    tokens = sequences(model.config.vocab_size)
    plain = [
        (layer.inputs, layer.targets)
        for layer in walk(InMemoryModel(model.config, model.state_dict(), CPU), tokens, reference=True)
    ]
    changed: list[tuple[list[Tensor], list[Tensor]]] = []
    for layer in walk(InMemoryModel(model.config, model.state_dict(), CPU), tokens, reference=True):
        changed.append((layer.inputs, layer.targets))
        layer.set_weight("mlp.down_proj", torch.zeros_like(layer.weight("mlp.down_proj")))
    assert all(torch.equal(a, b) for a, b in zip(plain[0][0], changed[0][0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain[1][0], changed[1][0], strict=True))
    for (_, plain_targets), (_, changed_targets) in zip(plain, changed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain_targets, changed_targets, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_outputs_by_inputs_whatever_way_they_are_stored(family: str) -> None:
    model = pico(family)
    layers = walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences(100))
    layer = next(layers)
    hidden = layer.inputs[0]
    before = layer.run(hidden)
    for linear in layer.anatomy.linears:
        module = layer.module.get_submodule(linear)
        W_RC = layer.weight(linear)
        x = torch.randn(3, W_RC.shape[1])
        bias = module.bias if isinstance(module.bias, Tensor) else 0.0
        assert torch.allclose(module(x), x @ W_RC.T + bias, atol=1e-5)
        layer.set_weight(linear, W_RC)
    assert torch.equal(layer.run(hidden), before)
    replaced = {
        f"{linear}.weight": layer.oriented(linear, 2 * layer.weight(linear))
        for linear in layer.anatomy.linears
    }
    assert not torch.allclose(layer.run(hidden, replaced), before)
    assert torch.equal(layer.run(hidden), before), "the layer's own weights were changed"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_fisher_matrices_are_the_mean_outer_product_of_the_models_own_gradients(
    family: str, tmp_path: Path
) -> None:
    model = pico(family).requires_grad_(False)
    tokens = sequences(model.config.vocab_size)[:4]
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    found = dict(output_fisher(resident, tokens, tmp_path, seed=3))
    assert sorted(found) == list(range(len(resident.layers)))
    assert list(tmp_path.iterdir()) == [], "scratch files were left behind"
    grads: dict[int, Tensor] = {}

    def keep(index: int, out: Tensor) -> None:
        out.register_hook(lambda grad: grads.__setitem__(index, grad))

    for index, layer in enumerate(model.get_submodule(resident.anatomy.layers).children()):
        layer.register_forward_hook(lambda _, args, out, index=index: keep(index, out))
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    scores = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
    labels = drawn_from(scores.detach().softmax(-1), label_generator(3, 0, CPU))
    torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    for index, F_DD in found.items():
        g_TD = grads[index].flatten(0, 1)
        expected = g_TD.T @ g_TD / len(g_TD)
        assert torch.allclose(F_DD, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_fisher_matrices_of_linears_are_those_of_the_gradients_of_their_outputs(
    family: str, tmp_path: Path
) -> None:
    model = pico(family).requires_grad_(False)
    tokens = sequences(model.config.vocab_size)[:4]
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    linears = {index: resident.anatomy_of_layer(index).linears for index in range(len(resident.layers))}
    layers = fisher_matrices(resident, tokens, tmp_path, 3, linears)
    found = {resident.layer_name(index): outputs for index, _, outputs in layers}
    grads: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        out.register_hook(lambda grad: grads.__setitem__(name, grad))

    names = [f"{layer}.{linear}" for layer, outputs in found.items() for linear in outputs]
    assert len(names) == sum(map(len, linears.values())) > 0
    for name in names:
        hook = partial(lambda name, _, args, out: keep(name, out), name)
        model.get_submodule(name).register_forward_hook(hook)
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    scores = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
    labels = drawn_from(scores.detach().softmax(-1), label_generator(3, 0, CPU))
    torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    for layer, outputs in found.items():
        for linear, F_RB in outputs.items():
            g_TR = grads[f"{layer}.{linear}"].flatten(0, 1)
            expected = g_TR.T @ g_TR / len(g_TR)
            assert torch.allclose(F_RB, expected, atol=1e-4 * float(expected.abs().max()))


def test_labels_are_drawn_as_often_as_they_are_likely() -> None:
    p_V = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    found = drawn_from(p_V.repeat(20000, 1), torch.Generator().manual_seed(0))
    assert found.dtype == torch.int64 and found.shape == (20000,)
    shares = found.bincount(minlength=6) / len(found)
    assert torch.equal(shares[p_V == 0], torch.zeros(3)), "a token of probability zero was drawn"
    torch.testing.assert_close(shares, p_V, rtol=0, atol=0.015)  # four standard errors
    other = drawn_from(p_V.repeat(20000, 1), torch.Generator().manual_seed(1))
    assert not torch.equal(found, other)


def test_the_fisher_matrix_predicts_the_divergence_of_a_small_error(tmp_path: Path) -> None:
    """KL per token is e F e^T / 2 for a small error e of the states that leave the last layer."""
    model = pico("llama")
    tokens = torch.randint(1, model.config.vocab_size, (64, 24), generator=torch.Generator().manual_seed(5))
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    F_DD = dict(output_fisher(resident, tokens, tmp_path, seed=0))[len(resident.layers) - 1]
    last: DecoderLayer | None = None
    for layer in walk(resident, tokens, through=True):
        last = layer
    assert last is not None
    generator = torch.Generator().manual_seed(6)
    kl, predicted = 0.0, 0.0
    with torch.no_grad():
        for hidden in last.inputs:
            error = 0.01 * torch.randn(hidden.shape, generator=generator)
            p = walking.leave(resident, hidden).log_softmax(-1)
            q = walking.leave(resident, hidden + error).log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            predicted += float(((error @ F_DD) * error).sum()) / 2
    assert predicted == pytest.approx(kl, rel=0.1)


def test_the_heads_moments_are_those_of_the_normed_states() -> None:
    model = pico("llama", tie_word_embeddings=False)
    tokens = sequences(model.config.vocab_size)
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    for layer in walk(resident, tokens, through=True):
        last = layer
    W_RC, moments = head_input(resident, last)
    with torch.no_grad():
        X_TC = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    assert torch.equal(W_RC, model.lm_head.weight)
    assert torch.allclose(moments.H_CC, X_TC.T @ X_TC / len(X_TC), atol=1e-4)
    assert moments.X_FC is None


def test_the_head_is_set_against_what_it_reads_in_the_full_model() -> None:
    model = pico("llama", tie_word_embeddings=False)
    tokens = sequences(model.config.vocab_size)
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    for layer in walk(resident, tokens, reference=True, through=True):
        last = layer
        if layer.name:
            layer.set_weight("mlp.down_proj", 0.5 * layer.weight("mlp.down_proj"))
    _, moments = head_input(resident, last)
    with torch.no_grad():
        full = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data.mul_(0.5)
        x = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    assert moments.X_FC is not None
    assert torch.allclose(moments.X_FC, full.T @ x / len(x), atol=1e-4)
    assert torch.allclose(moments.H_CC, x.T @ x / len(x), atol=1e-4)


def test_a_weight_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    model = pico("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of .* NaN or infinite"):
        list(logits(DiskModel(tmp_path, CPU), sequences(100)))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = pico("llama")
    state = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "layers.1.mlp.up_proj" not in name
    }
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        list(logits(DiskModel(tmp_path, CPU), sequences(100)))


def test_an_expert_reads_what_the_router_sends_it() -> None:
    """Also in the full model, whose own router may choose others: a pair of inputs is of one token."""
    model = pico("qwen3_moe")
    tokens = sequences(model.config.vocab_size)
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    resident.divide_experts()
    for layer in walk(resident, tokens, reference=True):
        for parameter in layer.anatomy.expert_linears:
            groups = [(linear,) for linear in parameter]
            moments = layer.moments(*groups)
            routed = [moments[linear].tokens for linear in parameter]
            assert sum(routed) == tokens.numel() * model.config.num_experts_per_tok
            assert len({*routed}) > 1, "the router sends each expert as many tokens"
            gaps = [moments[linear].gap_FC for linear in parameter]
            assert all(gap is not None and (layer.index or not gap.any()) for gap in gaps)
        for linear in layer.anatomy.linears:
            layer.set_weight(linear, 0.9 * layer.weight(linear))


def test_experts_as_linears_compute_what_they_did() -> None:
    model = pico("qwen3_moe").eval()
    tokens = sequences(model.config.vocab_size)
    resident = InMemoryModel(model.config, model.state_dict(), CPU)
    resident.divide_experts()
    resident.divide_experts()  # once more changes nothing
    assert resident.expert_linears and not resident.expert_weights and not resident.plain
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat([*logits(resident, tokens)]), expected, rtol=1e-4, atol=1e-5)
    assert resident.parameters() == sum(parameter.numel() for parameter in model.parameters())
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert resident.idle_parameters() == round(inside * (1 - chosen / experts))


@pytest.mark.parametrize("reference", [False, True])
def test_a_layer_gives_up_the_states_that_entered_it_as_it_passes_on_those_that_leave(
    reference: bool,
) -> None:
    model = pico("llama")
    layers = walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences(100), reference=reference)
    layer = next(layers)
    entered = layer.inputs
    assert len(entered) > 1
    layer.moments(layer.anatomy.consumers[0], in_turn=True)
    layer.moments(layer.anatomy.consumers[1], in_turn=True)
    expected = [layer.run(hidden) for hidden in entered]
    held = [weakref.ref(hidden) for hidden in entered]
    del entered
    following = next(layers)
    assert not layer.inputs and not layer.reference and layer._finished.empty
    assert all(torch.equal(a, b) for a, b in zip(following.inputs, expected, strict=True))
    assert len(following.reference) == (len(following.inputs) if reference else 0)
    assert all(hidden() is None for hidden in held)
