"""Memory does not grow with the vocabulary: logits are made in pieces, with the numbers of whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmcompress.algorithms import logit_chunks
from llmcompress.kernels import attention
from llmcompress.modeling import stored_matrices
from llmcompress.modeling.backward import following, gradients, output_fisher
from llmcompress.modeling.foreign import WholeModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import divergences, head_states, logits, untracked, walk
from llmcompress.report import metrics
from llmcompress.report.metrics import fidelity
from tests.models import noise, pico

CPU = torch.device("cpu")
V, S, L = 4096, 5, 24
BUDGET = 1 << 16  # bytes: the logits of 4 positions


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation allocates; views of what is there do not
    count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        there = {_storage(given) for given in tree_leaves((args, kwargs)) if isinstance(given, Tensor)}
        for made in tree_leaves(found):
            if isinstance(made, Tensor) and _storage(made) not in there and not made.is_meta:
                self.size = max(self.size, made.untyped_storage().nbytes())
        return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def resident_of(family: str, seed: int = 0) -> InMemoryModel:
    model = pico(family, vocab_size=V)
    if seed:
        with torch.no_grad():
            head: nn.Module = model.get_output_embeddings()
            weight = head.get_parameter("weight")
            weight.add_(noise(*weight.shape, seed=seed), alpha=0.02)
    state = {name: tensor.bfloat16().clone() for name, tensor in model.state_dict().items()}
    return InMemoryModel(model.config, state, CPU)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, V, (S, L), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A call from which on memory is small."""

    def begin() -> None:
        monkeypatch.setattr(logit_chunks, "CPU_BYTES", BUDGET)
        monkeypatch.setattr(stored_matrices, "SLICE", BUDGET // 4)

    return begin


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "opt"])
@pytest.mark.parametrize("unscored", [0, 1])
def test_fidelity_over_pieces_is_that_over_whole_logits(
    family: str, unscored: int, tokens: Tensor, in_pieces: Callable[[], None]
) -> None:
    model, base = resident_of(family, seed=3), resident_of(family)
    scored = tokens[:, unscored:]

    def measured() -> metrics.Fidelity:
        ours, theirs = (logits(each, tokens, unscored=unscored) for each in (model, base))
        return fidelity(ours, scored, theirs)

    whole, alone = measured(), fidelity(logits(model, tokens, unscored=unscored), scored)
    in_pieces()
    parts = measured()
    assert max(len(z.flatten(0, 1)) for z in logits(model, tokens)) == 4
    assert parts.kl_nats_mean == pytest.approx(whole.kl_nats_mean, rel=1e-4, abs=1e-6)
    assert parts.kl_nats_p99 == pytest.approx(whole.kl_nats_p99, rel=1e-4, abs=1e-6)
    assert parts.top1_agreement == whole.top1_agreement
    assert parts.tokens == whole.tokens
    for found in (parts, fidelity(logits(model, tokens, unscored=unscored), scored)):
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert found.perplexity_ci95 == pytest.approx(alone.perplexity_ci95, rel=1e-5)


def test_no_tensor_of_an_evaluation_is_larger_than_a_piece(
    tokens: Tensor, in_pieces: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = resident_of("gemma3_text", seed=3), resident_of("gemma3_text")
    in_pieces()
    monkeypatch.setattr(metrics, "RESAMPLES", 20)  # the bootstrap's size is not that of the vocabulary
    with Largest() as largest:
        fidelity(logits(model, tokens), tokens, logits(base, tokens))
    layer = max(4 * p.numel() for p in model.layers[0].parameters())
    assert BUDGET <= largest.size <= max(BUDGET, layer, 4 * S * L * 320)
    assert largest.size < 4 * V * L, "logits of a whole sequence"


def test_no_tensor_of_the_fisher_pass_is_larger_than_a_piece(
    tokens: Tensor, in_pieces: Callable[[], None], tmp_path: Path
) -> None:
    model = resident_of("gemma3_text")
    in_pieces()
    with Largest() as largest:
        list(output_fisher(model, tokens, tmp_path, 0))
    layer = max(4 * p.numel() for p in model.layers[0].parameters())
    # what attention needs beside its inputs, whatever the vocabulary
    room = attention.KERNEL.required.attention_back_room() if attention.takes(CPU) else 0
    assert BUDGET <= largest.size <= max(BUDGET, layer, 4 * S * L * 320, room)
    assert largest.size < 4 * V * L, "logits of a whole sequence"


@pytest.mark.parametrize("unscored", [0, 6])
def test_gradients_over_pieces_are_those_over_whole_logits(
    unscored: int, tokens: Tensor, in_pieces: Callable[[], None], tmp_path: Path
) -> None:
    model = resident_of("llama")

    def found() -> dict[int, Tensor]:
        steps = gradients(model, tokens, tmp_path, following, first=True, unscored=unscored)
        return {index: torch.cat(grads) for index, grads, _ in steps}

    whole = found()
    in_pieces()
    for index, grad in found().items():
        torch.testing.assert_close(grad, whole[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unscored", [0, 1])
def test_divergences_over_pieces_are_those_over_whole_logits(
    unscored: int, tokens: Tensor, in_pieces: Callable[[], None]
) -> None:
    model = resident_of("llama")
    *_, last = walk(model, tokens, through=True)
    streams = {"near": [hidden + 0.1 * noise(*hidden.shape) for hidden in last.inputs]}
    whole = divergences(model, last.inputs, streams, unscored)
    in_pieces()
    assert divergences(model, last.inputs, streams, unscored) == pytest.approx(whole, rel=1e-5)


def test_what_the_head_reads_is_found_without_a_logit(tokens: Tensor) -> None:
    model = resident_of("llama")
    *_, last = walk(model, tokens, through=True)
    with Largest() as largest:
        read = head_states(model, last.inputs[0])
    assert largest.size <= last.inputs[0].nbytes
    norm = model.model.get_submodule(str(model.anatomy.norm))
    torch.testing.assert_close(read, norm(last.inputs[0]))
    assert next(logits(model, tokens)).shape == (S, L, V), "the head does not multiply any more"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("unscored", [0, 1])
def test_a_whole_model_gives_its_own_logits_in_pieces(
    family: str, unscored: int, tokens: Tensor, in_pieces: Callable[[], None]
) -> None:
    model = pico(family, vocab_size=V)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, unscored:]
    in_pieces()
    parts = list(WholeModel(model, CPU, 0).logits(tokens, untracked, unscored))
    assert {part.flatten(0, 1).shape[0] for part in parts} <= {1, 2, 3, 4}
    found = torch.cat([part.flatten(0, 1) for part in parts])
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits[:, unscored:], expected)


def test_timing_computes_the_logits_of_the_last_position_alone(tokens: Tensor) -> None:
    model = pico("llama", vocab_size=V)
    with Largest() as largest:
        metrics.speed(model, tokens, decode_tokens=4, repeats=1, budget_s=0.1)
    assert largest.size < 4 * V * L
