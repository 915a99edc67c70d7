"""How many tokens go through a model at once, and that a run goes on when memory runs out.

There is no GPU here, so a layer that is given more sequences than memory is said to hold raises what torch
raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Moments
from llmcompress.errors import ModelError
from llmcompress.modeling import layerwise, token_limit
from llmcompress.modeling.backward import following, gradients
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import head_input, logits, walk, without_each
from llmcompress.modeling.token_limit import TokenLimit, batches_of, first_sequences, fitting, loss_in_parts
from llmcompress.pipeline.run import run_recipe
from llmcompress.report.schema import Report
from llmcompress.stages.base import naming_layer
from llmcompress.stages.distill.trainer import DistillTrainer
from tests.bases import save_base, staged_recipe, write_text
from tests.models import TOKENS_ENTER_LAYERS, pico, tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
LENGTH = 24
Short = Callable[[int], list[int]]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Short:
    """Let memory run out where a layer is given more than so many sequences. The sizes that failed are
    listed."""
    plain, failed = DecoderLayer._run, list[int]()

    def only(most: int) -> list[int]:
        def run(layer: DecoderLayer, module: nn.Module, hidden: Tensor, *others: Any) -> Any:
            if len(hidden) > most:
                failed.append(len(hidden))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
            return plain(layer, module, hidden, *others)

        monkeypatch.setattr(DecoderLayer, "_run", run)
        return failed

    return only


def resident(family: str = "llama") -> InMemoryModel:
    model = tiny(family) if family in TOKENS_ENTER_LAYERS else pico(family)
    return InMemoryModel(model.config, model.state_dict(), CPU)


def sequences(count: int = 7, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 100, (count, length), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# --- how many


def test_a_cpu_takes_what_it_always_took_unless_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_limit, "free_memory", lambda device: 4 << 30)
    assert fitting(CPU, 4 * 81920) == token_limit.TOKENS_AT_ONCE == 2048
    monkeypatch.setattr(token_limit, "free_memory", lambda device: 1 << 30)
    assert fitting(CPU, 4 * 81920) == 512
    assert fitting(CPU, 1 << 40) == 1


@pytest.mark.parametrize(
    ("free", "token_bytes", "tokens"), [(80, 4 * 81920, 2048), (80, 38_000, 16384), (1, 4 * 81920, 512)]
)
def test_a_gpu_takes_what_keeps_it_busy(
    free: int, token_bytes: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_limit, "free_memory", lambda device: free << 30)
    assert fitting(GPU, token_bytes) == tokens


def test_the_bytes_of_a_token_are_those_of_all_inputs_and_outputs_of_the_linears() -> None:
    hidden, rows, kv, ffn = 64, 128, 32, 320
    linears = [
        (rows, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, rows),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
    ]
    assert resident().token_bytes() == 4 * sum(map(sum, linears))
    assert resident("qwen3_moe").token_bytes() > 0
    assert resident().limit.tokens == 2048 and resident().limit.most is None


@pytest.mark.parametrize("tokens", [24, 100, 300, 700])
@pytest.mark.parametrize("count", [1, 6, 7, 29])
def test_units_are_the_batches_of_a_cpu_whatever_the_batches_of_the_walk(
    tokens: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 100)
    text = sequences(count)
    limit = TokenLimit(CPU, tokens)
    batches = limit.batches(text)
    assert torch.equal(torch.cat(batches), text) and max(map(len, batches)) <= max(1, tokens // LENGTH)
    expected = batches_of(text)
    assert all(torch.equal(a, b) for a, b in zip(limit.units(batches), expected, strict=True))


def test_batches_of_a_gpu_hold_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 75)  # 3 sequences
    assert [len(batch) for batch in TokenLimit(GPU, 8 * LENGTH).batches(sequences(13))] == [6, 6, 1]


@pytest.mark.parametrize("tokens", [24, 300])
def test_larger_and_smaller_batches_change_no_more_than_the_order_of_sums(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 75)
    text, found = sequences(), []
    for limit in (TokenLimit(), TokenLimit(CPU, tokens)):
        model = resident()
        model.limit = limit
        moments = [layer.moments() for layer in walk(model, text, reference=True)]
        found.append((moments, list(logits(model, text))))
    (one, scores), (other, same) = found
    for a, b in zip(one, other, strict=True):
        for name in a:
            close(b[name].H_CC, a[name].H_CC)
    for a_BLV, b_BLV in zip(scores, same, strict=True):
        close(b_BLV, a_BLV)


# --- what happens when memory runs out


def out_above(most: int) -> Callable[[slice], slice]:
    def work(here: slice) -> slice:
        if here.stop - here.start > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return here

    return work


def test_a_batch_is_taken_in_halves_and_what_was_done_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    limit, done = TokenLimit(), list[slice]()

    def work(here: slice) -> None:
        if here.stop > 4 and here.stop - here.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done.append(here)

    limit.most = 4 * LENGTH
    with caplog.at_level(logging.WARNING):
        limit.each(work, 7, LENGTH)
    assert done == [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)]
    assert [record.getMessage() for record in caplog.records] == [
        "memory of cpu ran out with 72 tokens at once; going on with 24"
    ]
    assert limit.each(out_above(1), 3, LENGTH) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_memory_of_the_libraries_counts_and_other_errors_are_passed_on() -> None:
    assert token_limit.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert token_limit.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))

    def broken(here: slice) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        TokenLimit().each(broken, 4, LENGTH)


def test_a_single_sequence_that_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="single sequence of 24 tokens") as refused:
        TokenLimit().each(out_above(0), 4, LENGTH)
    assert "use shorter sequences (length in data), or a larger machine" in str(refused.value)
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_memory_that_runs_out_elsewhere_names_the_layer_in_one_line() -> None:
    with (
        pytest.raises(ModelError, match=r"layers\.3: CUDA out of memory\. Tried to allocate 2\.00 GiB\. Use"),
        naming_layer("layers.3"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")


@pytest.mark.parametrize(
    ("family", "most"), [("llama", 1), ("llama", 3), ("qwen3_moe", 3), ("gpt2", 3), ("gemma4_text", 3)]
)
def test_moments_outputs_and_targets_are_those_of_an_undisturbed_walk(
    family: str, most: int, short: Short, caplog: pytest.LogCaptureFixture
) -> None:
    def walked() -> list[tuple[dict[str, Moments], list[Tensor], list[Tensor]]]:
        found = []
        for layer in walk(resident(family), sequences(), reference=True):
            for consumers in layer.anatomy.consumers:
                moments = layer.moments(consumers, in_turn=True)
                for linear in consumers:
                    layer.set_weight(linear, 0.9 * layer.weight(linear))
            found.append((moments, layer.outputs(layer.inputs), layer.targets))
        return found

    undisturbed = walked()
    failed = short(most)
    disturbed = walked()
    assert failed[0] == 7 and failed == sorted(set(failed), reverse=True), "each size is tried once in a run"
    assert sum("ran out" in record.getMessage() for record in caplog.records) == len(failed)
    for (ours, outs, targets), (theirs, same, aims) in zip(disturbed, undisturbed, strict=True):
        for name, moments in ours.items():
            assert moments.tokens == theirs[name].tokens == 7 * LENGTH
            close(moments.H_CC, theirs[name].H_CC)
            close(moments.full_C, theirs[name].full_C)
            assert moments.gap_FC is not None and theirs[name].gap_FC is not None
            torch.testing.assert_close(moments.gap_FC, theirs[name].gap_FC, rtol=1e-3, atol=1e-4)
        for a, b in zip(outs + targets, same + aims, strict=True):
            close(a, b)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma4_text"])
def test_nothing_kept_for_a_whole_batch_is_used_for_its_parts(family: str) -> None:
    def walked(shrinking: Mapping[int, int]) -> Iterator[tuple[dict[str, Moments], list[Tensor]]]:
        """What each layer reads in turn and returns; `shrinking` is the limit from a group of linears on."""
        for layer in walk(resident(family), sequences(), reference=True):
            layer.limit = TokenLimit()
            found = dict[str, Moments]()
            for place, consumers in enumerate(layer.anatomy.consumers):
                layer.limit.most = shrinking.get(place, layer.limit.most)
                found |= layer.moments(consumers, in_turn=True)
                for linear in consumers:
                    layer.set_weight(linear, 0.9 * layer.weight(linear))
            layer.limit.most = shrinking.get(-1, layer.limit.most)
            yield found, layer.outputs(layer.inputs) + layer.targets

    for shrinking in (
        {1: 4 * LENGTH},
        {0: 4 * LENGTH, 2: LENGTH},
        {1: 5 * LENGTH, 2: 2 * LENGTH, -1: LENGTH},
    ):
        for (ours, outs), (theirs, same) in zip(walked(shrinking), walked({}), strict=True):
            for name, moments in ours.items():
                assert moments.tokens == 7 * LENGTH
                close(moments.H_CC, theirs[name].H_CC)
                close(moments.full_C, theirs[name].full_C)
            for a, b in zip(outs, same, strict=True):
                close(a, b)


def test_a_sum_of_moments_holds_nothing_of_a_part_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    X_TC, F_TC = torch.randn(2, 40, 6).unbind()
    plain, given = Moments(6), torch.Tensor.abs
    plain.add(X_TC, F_TC)

    def short_of(x: Tensor) -> Tensor:
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return given(x)

    monkeypatch.setattr(torch.Tensor, "abs", short_of)
    moments, layer = Moments(6), next(iter(walk(resident(), sequences(1))))
    layer.add(moments, X_TC.view(4, 10, 6), F_TC.view(4, 10, 6))
    assert moments.tokens == 40 and layer.limit.most == 10
    for part in ("H_CC", "gap_FC", "mean_C", "full_C", "top_C"):
        close(getattr(moments, part), getattr(plain, part))


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_gradients_head_inputs_and_streams_without_a_part_are_those_of_an_undisturbed_run(
    family: str, short: Short, tmp_path: Path
) -> None:
    def found() -> Iterator[Tensor]:
        model = resident(family)
        watched = ["self_attn.q_proj.weight"]
        for _, grads, own in gradients(model, sequences(), tmp_path, following, watched, first=True):
            yield from (torch.cat(grads), *own.values())
        for states in without_each(model, sequences(), [(0, None), (1, "mlp.down_proj")]).values():
            yield torch.cat(states)
        *_, last = walk(model, sequences(), reference=True, through=True)
        yield head_input(model, last)[1].H_CC

    undisturbed = list(found())
    failed = short(2)
    for ours, theirs in zip(found(), undisturbed, strict=True):
        close(ours, theirs)
    assert failed


def test_the_gradient_of_a_loss_in_parts_is_that_of_the_whole() -> None:
    x_BLC = torch.randn(5, 3, 4)
    weights = {"a": torch.randn(4, 2), "b": torch.randn(4, 2), "unused": torch.randn(2)}

    def loss(most: int, weights: Mapping[str, Tensor], here: slice) -> Tensor:
        if here.stop - here.start > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        x = x_BLC[here]
        return (x @ weights["a"] * (x @ weights["b"])).square().mean()

    def gradients_of(mean_of: Callable[[Mapping[str, Tensor]], Tensor], factor: int) -> list[Tensor]:
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        mean = mean_of(leaves)
        (mean if factor == 1 else factor * mean).backward()
        assert leaves["unused"].grad is None and leaves["a"].grad is not None and leaves["b"].grad is not None
        return [mean.detach(), leaves["a"].grad, leaves["b"].grad]

    for factor in (1, 3):
        expected = gradients_of(lambda leaves: loss(5, leaves, slice(0, 5)), factor)
        for most in (5, 2, 1):
            in_parts = partial(loss_in_parts, partial(loss, most), count=5, length=3)
            found = gradients_of(lambda leaves: in_parts(leaves, limit=TokenLimit()), factor)  # noqa: B023
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs) if (factor, most) == (1, 5) else True
                close(ours, theirs)
            with torch.no_grad():
                close(in_parts(weights, limit=TokenLimit()), expected[0])


# --- whole runs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def runs(
    stage: dict[str, Any], text: Path, folder: Path, disturb: Callable[[], object]
) -> tuple[Report, Report]:
    """The reports of a run, and of one that was disturbed."""
    base = save_base(folder / "base")
    recipe = staged_recipe(text, base, stage)
    plain = run_recipe(recipe, folder / "plain")
    disturb()
    return plain, run_recipe(recipe, folder / "disturbed")


@pytest.mark.slow(keep=1)
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(
    "stage",
    [
        {"quantize": {"format": "nf4", "rounding": "learned", "steps": 4}},
        {"quantize": {"format": "w8a8", "smooth": {}, "protect": 0.2}},
        {"share": {"pairs": [[0, 1]], "steps": 4}},
    ],
    ids=["learned", "smooth", "share"],
)
def test_a_run_that_was_short_of_memory_ends_as_one_that_was_not(
    stage: dict[str, Any], text: Path, tmp_path: Path, short: Short
) -> None:
    failed: list[list[int]] = []
    plain, disturbed = runs(stage, text, tmp_path, lambda: failed.append(short(1)))
    assert failed[0], "memory did run out"
    assert plain.fidelity.kl_nats_mean is not None
    assert disturbed.fidelity.kl_nats_mean == pytest.approx(plain.fidelity.kl_nats_mean, rel=0.05)


@pytest.mark.slow(keep=1)
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("tokens", [8 * 48, 48], ids=["large", "small"])
@pytest.mark.parametrize(
    "stage",
    [
        {"quantize": {"format": "w8a8", "smooth": {}, "protect": 0.2}},
        {"quantize": {"format": "nf4", "rounding": "learned", "steps": 4, "embedding": "int8"}},
        {"share": {"pairs": [[0, 1]], "steps": 4}},
        {"prune": {"axis": "ffn", "parameters": 0.9}},
        {"prune": {"axis": "hidden", "keep": 0.75}},
        {"prune": {"axis": "layer", "keep": 0.5}},
        {"tie": {}},
    ],
    ids=["smooth", "learned", "share", "budget", "hidden", "layer", "tie"],
)
def test_a_run_in_other_batches_takes_the_same_steps_and_samples(
    stage: dict[str, Any], tokens: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 2 * 48)
    plain, other = runs(
        stage, text, tmp_path, lambda: monkeypatch.setattr(layerwise, "fitting", lambda *_: tokens)
    )
    assert plain.fidelity.kl_nats_mean is not None
    # noise of 1e-6 in the moments moves the KL of such a model by 3 %
    assert other.fidelity.kl_nats_mean == pytest.approx(plain.fidelity.kl_nats_mean, rel=0.05)


@pytest.mark.slow(keep=1)
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("micro_batch", [2, 1, 4])
def test_training_goes_on_in_parts_with_the_same_gradients(
    micro_batch: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {
        "distill": {
            "steps": 4,
            "batch": 4,
            "micro_batch": micro_batch,
            "student": str(save_base(tmp_path / "student", num_hidden_layers=1)),
        }
    }
    failed, plain_loss, calls = list[int](), DistillTrainer.compute_loss, list[int]()

    def disturb() -> None:
        def compute_loss(
            trainer: DistillTrainer, model: nn.Module, inputs: dict[str, Any], *more: Any, **named: Any
        ) -> Any:
            loss = plain_loss(trainer, model, inputs, *more, **named)
            calls.append(len(inputs["input_ids"]))
            if len(inputs["input_ids"]) > 1 and len(calls) >= 2:
                loss.backward()  # memory runs out at its end, when gradients have been added
                failed.append(len(inputs["input_ids"]))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

        monkeypatch.setattr(DistillTrainer, "compute_loss", compute_loss)

    plain, disturbed = runs(stage, text, tmp_path, disturb)
    assert failed == {1: [], 2: [2], 4: [4, 2]}[micro_batch]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("disturbed", "plain"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    curves = [report.stages[0].model_dump()["losses"] for report in (plain, disturbed)]
    for (step, one), (same, other) in zip(*curves, strict=True):
        assert step == same and one == pytest.approx(other, rel=1e-3)


def test_the_first_sequences_that_hold_so_many_tokens() -> None:
    tokens = torch.arange(35).view(5, 7)
    for count, expected in ((1, 1), (7, 1), (8, 2), (35, 5), (1000, 5)):
        assert torch.equal(first_sequences(tokens, count), tokens[:expected])
