"""Fidelity against float64 written out in full, and the costs of models small enough to count by hand."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmcompress.errors import DataError, ModelError
from llmcompress.report import metrics
from tests.bases import known

W, L, V = 12, 9, 37


@pytest.fixture
def sequences() -> Tensor:
    return torch.randint(V, (W, L), generator=torch.Generator().manual_seed(1))


def logits(seed: int, dtype: torch.dtype = torch.float32, near: Tensor | None = None) -> Tensor:
    noise = torch.randn(W, L, V, generator=torch.Generator().manual_seed(seed))
    return (3 * noise if near is None else near.float() + 0.1 * noise).to(dtype)


def cut(z: Tensor, batch: int) -> list[Tensor]:
    return [z[start : start + batch] for start in range(0, len(z), batch)]


def reference(z: Tensor, sequences: Tensor) -> Tensor:
    """Negative log-likelihood of each predicted token, float64 [W, L - 1]."""
    return -z.double().log_softmax(-1)[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).train(False)
    return model


def digest(model: nn.Module) -> str:
    return hashlib.sha256(
        b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())
    ).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 5 * V, 1 << 20])
def test_every_number_agrees_with_float64_in_every_dtype_and_chunk(
    sequences: Tensor, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS_CPU", chunk)
    base = logits(2, dtype)
    small = logits(3, dtype, near=base)
    found = metrics.fidelity(cut(small, 5), sequences, cut(base, 5))
    p, q = base.double().log_softmax(-1), small.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert found.perplexity == pytest.approx(float(reference(small, sequences).mean().exp()), rel=1e-6)
    assert found.base_perplexity == pytest.approx(float(reference(base, sequences).mean().exp()), rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / known(found.base_perplexity), rel=1e-9)
    assert found.kl_nats_mean == pytest.approx(float(kl.mean()), abs=1e-6)
    assert found.kl_nats_p99 == pytest.approx(float(kl.sort().values[math.ceil(0.99 * W * L) - 1]), abs=2e-6)
    assert found.top1_agreement == pytest.approx(float((base.argmax(-1) == small.argmax(-1)).double().mean()))
    assert found.tokens == W * (L - 1)
    assert torch.allclose(found.nll_nats, reference(small, sequences).mean(-1), rtol=1e-6)


def test_perplexity_alone_is_the_perplexity_beside_a_base(sequences: Tensor) -> None:
    alone, beside = (
        metrics.fidelity([logits(2)], sequences),
        metrics.fidelity([logits(2)], sequences, [logits(3)]),
    )
    assert alone.perplexity == pytest.approx(beside.perplexity, rel=1e-6)
    assert alone.perplexity_ci95 == pytest.approx(beside.perplexity_ci95, rel=1e-6)
    assert alone.kl_nats_mean is None
    assert alone.base_perplexity is None


def test_a_model_does_not_differ_from_itself(sequences: Tensor) -> None:
    found = metrics.fidelity([logits(2)], sequences, [logits(2)])
    assert found.facts().model_dump() == {
        "kl_nats_mean": 0.0,
        "kl_nats_p99": 0.0,
        "kl_nats_distribution": metrics.distribution(torch.zeros(W * L)).model_dump(),
        "top1_agreement": 1.0,
        "perplexity_ratio": 1.0,
        "perplexity_ratio_ci95": (1.0, 1.0),
    }


def test_rounding_never_leaves_a_divergence_below_zero(sequences: Tensor) -> None:
    base = logits(2)
    assert metrics.fidelity([base + 1e-6 * logits(3)], sequences, [base]).kl_nats_mean == pytest.approx(
        0, abs=1e-6
    )
    assert metrics.fidelity([base + 5], sequences, [base]).kl_nats_mean >= 0  # type: ignore[operator]


def test_kl_is_of_the_base_against_the_model_and_counts_the_last_position() -> None:
    base, small = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    # p = (3/4, 1/4) at the last position only, q = (1/2, 1/2)
    base[0, 1] = torch.tensor([math.log(3.0), 0.0])
    found = metrics.fidelity([small], torch.zeros(1, 2, dtype=torch.int64), [base])
    assert found.kl_nats_mean == pytest.approx(0.5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), abs=1e-7)
    assert found.perplexity == pytest.approx(2.0)


def test_the_interval_is_the_bootstrap_over_sequences(sequences: Tensor) -> None:
    found = metrics.fidelity([logits(2)], sequences)
    spread = float(found.nll_nats.std(correction=0)) / math.sqrt(W)  # of the mean of W drawn sequences
    low, high = (math.log(end / found.perplexity) for end in found.perplexity_ci95)
    assert low == pytest.approx(-1.96 * spread, rel=0.15)
    assert high == pytest.approx(1.96 * spread, rel=0.15)
    assert metrics.fidelity([logits(2)], sequences).perplexity_ci95 == found.perplexity_ci95


def test_pairing_makes_the_interval_of_the_ratio_narrow(sequences: Tensor) -> None:
    base = logits(2)
    found = metrics.fidelity([logits(3, near=base)], sequences, [base])
    low, high = found.perplexity_ratio_ci95 or (0.0, 0.0)
    own_low, own_high = found.perplexity_ci95
    assert low < known(found.perplexity_ratio) < high
    assert high - low < 0.3 * (own_high - own_low) / found.perplexity


def test_one_sequence_has_an_interval_without_width(sequences: Tensor) -> None:
    found = metrics.fidelity([logits(2)[:1]], sequences[:1])
    assert found.perplexity_ci95 == pytest.approx((found.perplexity, found.perplexity), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(1, 9), st.integers(1, 4), st.integers(0, 9))
def test_how_logits_are_cut_into_batches_changes_nothing(
    rows: int, length: int, vocabulary: int, batch: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, length, vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    parts, whole = (
        metrics.fidelity(cut(z, batch), tokens, cut(z.flip(0), batch)),
        metrics.fidelity([z], tokens, [z.flip(0)]),
    )
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.kl_nats_mean == pytest.approx(whole.kl_nats_mean, rel=1e-5, abs=1e-7)
    assert parts.perplexity_ci95[0] <= parts.perplexity <= parts.perplexity_ci95[1]


def test_logits_are_asked_for_one_batch_at_a_time_and_progress_is_told(sequences: Tensor) -> None:
    seen: list[tuple[int, int]] = []

    def batches() -> Iterator[Tensor]:
        for place, batch in enumerate(cut(logits(2), 4)):
            assert len(seen) == place  # the batch before has been measured
            yield batch

    metrics.fidelity(batches(), sequences, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(4, W), (8, W), (12, W)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("against", [False, True])
def test_non_finite_logits_are_a_model_error(sequences: Tensor, value: float, against: bool) -> None:
    broken = logits(2)
    broken[3, 2, 5] = value
    with pytest.raises(
        ModelError, match=r"the model yields non-finite logits .*; check the checkpoint"
    ) as error:
        metrics.fidelity([broken], sequences, [logits(2)] if against else None)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="non-finite logits"):
        metrics.fidelity([logits(2)], sequences, [broken])


def test_a_perplexity_beyond_all_numbers_is_a_model_error(sequences: Tensor) -> None:
    with pytest.raises(ModelError, match="the model is broken"):
        metrics.fidelity([1e4 * logits(2)], sequences)


def test_another_vocabulary_is_refused(sequences: Tensor) -> None:
    with pytest.raises(ModelError, match="predicts 37 tokens and its base 36: only models of one vocabulary"):
        metrics.fidelity([logits(2)], sequences, [logits(3)[..., :-1]])
    with pytest.raises(
        DataError, match=r"holds token 36, the vocabulary ends at 35: use the model's own tokenizer"
    ):
        metrics.fidelity([logits(2)[..., :-1]], torch.full((W, L), 36))


def test_batches_that_do_not_fit_the_sequences_are_a_mistake_of_the_caller(sequences: Tensor) -> None:
    with pytest.raises(ValueError, match="5 sequences of logits for 12"):
        metrics.fidelity([logits(2)[:5]], sequences)
    with pytest.raises(ValueError, match="do not continue sequences"):
        metrics.fidelity([logits(2), logits(2)], sequences)
    with pytest.raises(
        ValueError, match=r"base's logits \[12, 9, 37\] are not beside the model's \[4, 9, 37\]"
    ):
        metrics.fidelity(cut(logits(2), 4), sequences, [logits(2)])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        metrics.fidelity(cut(logits(2), 4), sequences, [logits(2)[:4]])
    with pytest.raises(ValueError, match=r"sequences are \[S >= 1, L >= 2\], not \[12, 1\]"):
        metrics.fidelity([logits(2)[:, :1]], sequences[:, :1])


def test_bytes_are_those_of_the_files_that_transformers_loads(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        metrics.size_bytes(tmp_path)
    for name, size in (("a.safetensors", 10), ("b.safetensors", 20), ("consolidated.safetensors", 30)):
        save_file({"w": torch.zeros(size)}, tmp_path / name)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert metrics.size_bytes(tmp_path) == sum(sizes.values())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors", "u": "b.safetensors"}})
    )
    assert metrics.size_bytes(tmp_path) == sizes["a.safetensors"] + sizes["b.safetensors"]
    index.write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"has no gone\.safetensors"):
        metrics.size_bytes(tmp_path)


def test_shared_parameters_count_once_and_packed_ones_as_what_they_stand_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 4, bias=False))
    model[1].weight = model[0].weight
    assert metrics.parameters(model) == 64 + 8 + 32
    packed = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=torch.Size((4, 8)))  # type: ignore[attr-defined]
    model[2].weight = packed
    assert metrics.parameters(model) == 64 + 8 + 32


@pytest.mark.parametrize("length", [2, 48])
def test_speed_reads_and_writes(length: int) -> None:
    model, tokens = llama(), torch.zeros(3, length, dtype=torch.int64)
    found = metrics.speed(model, tokens, repeats=1, budget_s=0.2)
    assert found.prefill_tokens_per_s > 0
    assert found.decode_tokens_per_s is not None and found.decode_tokens_per_s > 0


def test_speed_stays_within_the_positions_that_a_model_has() -> None:
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0
    )
    model: PreTrainedModel = GPT2LMHeadModel(config)
    metrics.speed(model, torch.zeros(1, 40, dtype=torch.int64), repeats=1, budget_s=0.2)


def test_measuring_leaves_the_model_as_it_was(sequences: Tensor) -> None:
    model = llama().train()
    before = digest(model)
    metrics.fidelity((model(batch).logits for batch in cut(sequences, 4)), sequences)
    metrics.speed(model, sequences, repeats=1, budget_s=0.2)
    metrics.parameters(model)
    assert digest(model) == before
    assert model.training
    model(sequences).logits.sum().backward()  # no buffer was left behind that autograd refuses


def test_peak_memory_is_more_than_what_is_held_now() -> None:
    held = torch.ones(30_000_000, dtype=torch.uint8)
    assert metrics.peak_memory_bytes() > held.nbytes
    assert metrics.peak_memory_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.gpu
def test_measuring_on_a_gpu_gives_the_numbers_of_the_cpu(sequences: Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, this machine has none")
    base, small = logits(2), logits(3)
    there = metrics.fidelity([small.cuda()], sequences, [base.cuda()])
    here = metrics.fidelity([small], sequences, [base])
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-5)
    assert there.kl_nats_mean == pytest.approx(here.kl_nats_mean, abs=1e-5)
    assert metrics.peak_memory_bytes("cuda") > 0


def test_the_environment_names_versions_and_a_device_in_words() -> None:
    found = metrics.environment("cpu")
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) == {"python", "torch", "transformers", "bitsandbytes", "llmcompress"}
    assert found.device.endswith(f", {torch.get_num_threads()} threads")
    assert len(found.device.split(",")[0]) > 2


def test_the_distribution_of_kl_counts_every_token_once() -> None:
    kl = torch.cat([torch.zeros(7), 10 ** torch.linspace(-8, 3, 993)])
    found = metrics.distribution(kl[torch.randperm(1000, generator=torch.Generator().manual_seed(0))])
    edges = torch.tensor(found.edges, dtype=torch.float64)
    assert sum(found.counts) == 1000 and len(found.counts) == len(edges) + 1
    for place, count in enumerate(found.counts):
        low = edges[place - 1] if place else 0.0
        high = edges[place] if place < len(edges) else math.inf
        assert count == int(((kl.double() >= low) & (kl.double() < high)).sum())
    ordered = kl.sort().values
    assert (found.p50, found.p90, found.p99) == tuple(float(ordered[n - 1]) for n in (500, 900, 990))
    assert found.largest == float(kl.max())


def test_a_value_at_an_edge_counts_above_it() -> None:
    found = metrics.distribution(torch.tensor([1.0]))
    assert found.edges[found.counts.index(1) - 1] == 1.0


def test_what_a_model_continues_is_what_it_generates() -> None:
    model: Any = llama()
    prompts = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(3))
    expected = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(metrics.continued(model, prompts, 9), expected[:, 5:])


def test_perplexity_costs_little_beside_a_forward_pass_of_a_small_model() -> None:
    """Hidden 256, 8 layers, V 4096: the loss takes 3 % of the forward pass on one core, and 10 % are allowed
    here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).train(False)
    tokens = torch.randint(4096, (4, 256))
    with torch.no_grad():
        z = model(tokens).logits
        forward_s = metrics._best(lambda: metrics._prefill_s(model, tokens), 5, 5.0)
    loss_s = metrics._best(lambda: _seconds(z, tokens), 5, 5.0)
    assert loss_s < 0.1 * forward_s


def _seconds(z: Tensor, tokens: Tensor) -> float:
    start = metrics._now(z.device)
    metrics._cross_entropy(z, tokens)
    return metrics._now(z.device) - start
