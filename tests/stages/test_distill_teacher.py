"""The teacher: what it says of a text is what the model says, in 4 bits, from disk and of fewer tokens
too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.algorithms.distillation_losses import Scores, TopK, token_loss, top_k
from llmcompress.derivation.shrink import tiny_model
from llmcompress.errors import ModelError, OutputError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import untracked
from llmcompress.stages.distill.teacher import (
    SEQUENCE,
    SHARD,
    CachedTeacher,
    LiveTeacher,
    TeacherOutput,
    forward_arguments,
    loaded,
    output_of,
)
from tests.artefacts import CPU, distance
from tests.models import FAMILIES, VARIANTS, pico, tiny, tiny_config

pytestmark = pytest.mark.usefixtures("short_runs")

V, L, K = 160, 8, 16
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
CAPPED: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (family, {"final_logit_softcapping": 2.0}) for family in ("gemma2", "gemma3_text")
)
SCALED: tuple[
    tuple[str, dict[str, Any], float], ...
] = (  # and what their logits are divided or multiplied by
    ("granite", {"logits_scaling": 8.0}, 1 / 8),
    ("cohere", {"logit_scale": 0.25}, 1 / 4),
    ("falcon_h1", {"lm_head_multiplier": 2.0}, 2.0),
    ("recurrent_gemma", {"logits_soft_cap": 0.2}, 1.0),
)
EVERY: tuple[tuple[str, dict[str, Any]], ...] = (*((family, {}) for family in FAMILIES), *VARIANTS, *CAPPED)


def live(model: PreTrainedModel) -> InMemoryModel:
    return InMemoryModel(model.config, dict(model.state_dict()), CPU)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return cast(Tensor, model(ids).logits).flatten(0, 1)


def made(scores: Scores) -> Tensor:
    """The logits that were not made."""
    return scores.logits(scores.product(torch.arange(scores.shape()[0])))


# a model in memory


@pytest.mark.parametrize(("family", "config"), EVERY)
def test_what_is_said_is_what_the_model_says(family: str, config: dict[str, Any]) -> None:
    model = pico(family, **config)
    with torch.no_grad():
        found = output_of(model, model(**forward_arguments(IDS)))
    assert torch.equal(made(found.scores), logits(model))
    assert len(found.hidden_BLD) == 3 and not found.attention_BHLL
    assert torch.equal(found.hidden_BLD[-1].flatten(0, 1), found.scores.hidden_TD)


@pytest.mark.parametrize(("family", "config", "scale"), SCALED)
def test_logits_that_the_model_scales_are_said_as_it_scales_them(
    family: str, config: dict[str, Any], scale: float
) -> None:
    small = tiny_config(family)
    small.update(config)
    model = tiny_model(small, dtype=torch.float32).eval()
    with torch.no_grad():
        found = output_of(model, model(**forward_arguments(IDS)))
    assert found.scores.scale == pytest.approx(scale, rel=1e-5)
    assert torch.allclose(made(found.scores), logits(model), atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_head_of_several_layers_is_refused(family: str) -> None:
    model = tiny(family).eval()
    with pytest.raises(ModelError, match="are not its head times its last hidden state"):
        output_of(model, model(**forward_arguments(IDS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_attention_goes_is_said_where_it_is_asked_for(family: str) -> None:
    model = pico(family)
    model.set_attn_implementation("eager")
    found = LiveTeacher(model, V)({"input_ids": IDS}, output_attentions=True)
    assert len(found.attention_BHLL) == 2
    for map_BHLL in found.attention_BHLL:
        assert map_BHLL.shape == (2, 4 if family in ("gpt2", "opt", "gpt_neox") else 8, 9, 9)
        assert torch.allclose(map_BHLL.sum(-1), torch.ones(()), atol=1e-5) and not map_BHLL.triu(1).any()
    assert torch.allclose(made(found.scores), logits(model), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_of_a_wider_vocabulary_the_first_tokens_are_said(family: str) -> None:
    model = pico(family)
    found = LiveTeacher(model, 100)({"input_ids": IDS}).scores
    assert found.shape() == (18, 100)
    assert torch.allclose(made(found), logits(model)[:, :100], atol=1e-5)


def test_a_bias_of_the_head_is_cut_with_it() -> None:
    model = cast(Any, pico("llama"))
    model.lm_head.bias = nn.Parameter(torch.arange(V) * 0.1)
    assert torch.allclose(
        made(LiveTeacher(model, 100)({"input_ids": IDS}).scores), logits(model)[:, :100], atol=1e-5
    )
    assert torch.allclose(made(LiveTeacher(model, V)({"input_ids": IDS}).scores), logits(model), atol=1e-5)


def test_a_teacher_is_in_use_and_does_not_learn() -> None:
    model = pico("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected, teacher = logits(model), LiveTeacher(model.train().requires_grad_(), V)
    with torch.enable_grad():
        found = teacher({"input_ids": IDS, "sequence": torch.arange(2)})
    assert torch.equal(made(found.scores), expected)
    assert not any(tensor.requires_grad for tensor in (*found.hidden_BLD, *teacher.model.parameters()))


# in 4 bits


def four_bit(model: nn.Module) -> dict[str, bitsandbytes_linear.Linear4bit]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes_linear.Linear4bit)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_teacher_is_the_model(family: str) -> None:
    model = pico(family)
    assert torch.equal(logits(loaded(live(model), None)), logits(model))


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3_moe"])
def test_a_teacher_in_4_bits_says_what_its_dequantised_weights_say(family: str) -> None:
    model = pico(family)
    plain = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and "layers." in n}
    teacher = loaded(live(model), "nf4")
    assert four_bit(teacher).keys() == plain.keys() and len(plain) >= 8
    found = made(LiveTeacher(teacher, V)({"input_ids": IDS}).scores)
    for name, module in four_bit(teacher).items():
        packed = bitsandbytes_linear.packed_of(module)
        assert (packed.format, packed.group_size, packed.double_quant) == ("nf4", 64, False)
        assert distance(bitsandbytes_layout.dequantize(packed, torch.float32), plain[name].weight.data) < 0.15
        plain[name].weight.data.copy_(bitsandbytes_layout.dequantize(packed, torch.float32))
    assert distance(found, logits(model)) < 0.03  # the kernels compute in bfloat16
    assert distance(found, logits(pico(family))) > 0.05


def test_what_the_kernels_do_not_take_stays_as_it_is() -> None:
    model = pico("llama", intermediate_size=48)  # neither rows of 48 weights nor 48 rows
    teacher = loaded(live(model), "nf4")
    assert {name.rpartition(".")[2] for name in four_bit(teacher)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    down = cast(Any, teacher).model.layers[0].mlp.down_proj
    assert type(down) is nn.Linear and torch.equal(
        down.weight, cast(Any, model).model.layers[0].mlp.down_proj.weight
    )
    assert type(teacher.get_output_embeddings()) is nn.Linear


# kept on disk


def sequences(count: int, seed: int = 0, vocabulary: int = V) -> Tensor:
    return torch.randint(0, vocabulary, (count, L), generator=torch.Generator().manual_seed(seed))


class Recorded(LiveTeacher):
    """A teacher that remembers the sequences that it was asked for."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        super().__init__(model, vocabulary)
        self.seen: list[Tensor] = []

    def __call__(self, batch: Mapping[str, Tensor], **more: bool) -> TeacherOutput:
        self.seen.append(batch["input_ids"])
        return super().__call__(batch, **more)


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    return LiveTeacher(pico("llama"), V)


def absent() -> LiveTeacher:
    raise AssertionError("the teacher was asked again")


def kept(
    folder: Path,
    teacher: LiveTeacher | Callable[[], LiveTeacher],
    sequences_NL: Tensor,
    key: str = "one",
    k: int = K,
    temperature: float = 1.0,
) -> CachedTeacher:
    return CachedTeacher(
        folder,
        key,
        (lambda: teacher) if isinstance(teacher, LiveTeacher) else teacher,
        sequences_NL,
        k,
        temperature,
        untracked,
    )


def batch(sequences_NL: Tensor, *numbers: int) -> dict[str, Tensor]:
    return {"input_ids": sequences_NL[list(numbers)], SEQUENCE: torch.tensor(numbers)}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def same(a: TopK, b: TopK) -> bool:
    return (
        torch.equal(a.index_TK, b.index_TK)
        and torch.equal(a.log_p_TK1, b.log_p_TK1)
        and a.temperature == b.temperature
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_what_was_kept_is_the_top_of_what_the_teacher_said(
    temperature: float, teacher: LiveTeacher, tmp_path: Path
) -> None:
    text = sequences(150)
    found = kept(tmp_path, teacher, text, temperature=temperature)
    for numbers in ((0,), (149, 0, 64, 63), (70, 70), tuple(range(150))):
        recalled = found(batch(text, *numbers)).scores
        exact = top_k(teacher(batch(text, *numbers)).scores, K, temperature=temperature)
        assert torch.equal(recalled.index_TK, exact.index_TK) and recalled.index_TK.dtype is torch.int64
        halved = exact.log_p_TK1.half().float().log_softmax(-1)  # they sum to one again
        assert torch.equal(recalled.log_p_TK1, halved) and recalled.temperature == temperature
        assert torch.allclose(halved, exact.log_p_TK1, atol=4e-3)
        assert recalled.log_p_TK1.shape == (len(numbers) * L, K + 1)


def test_what_was_kept_teaches_as_the_teacher_does(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(6)
    student = pico("llama", num_hidden_layers=1)
    own = output_of(student, student(**forward_arguments(text))).scores
    here = batch(text, *range(6))
    exact = top_k(teacher(here).scores, K)
    recalled = kept(tmp_path, teacher, text)(here).scores
    losses = [float(token_loss("forward_kl", own, top).detach()) for top in (recalled, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] > 0.1
    assert abs(float(token_loss("forward_kl", teacher(here).scores, recalled))) < 1e-4


def test_a_teacher_is_asked_once_for_each_sequence(tmp_path: Path) -> None:
    recorded, text, calls = Recorded(pico("llama"), V), sequences(150), 0

    def once() -> LiveTeacher:
        nonlocal calls
        calls += 1
        return recorded if calls == 1 else absent()

    first = kept(tmp_path, once, text)
    assert first.asked == 150 and torch.equal(torch.cat(recorded.seen), text) and calls == 1
    second = kept(tmp_path, once, text)
    assert second.asked == 0 and calls == 1
    here = batch(text, *range(150))
    assert same(first(here).scores, second(here).scores)
    kept(tmp_path, once, text.T.contiguous().T)  # the same tokens, laid out otherwise
    assert calls == 1


def test_of_a_longer_text_only_what_is_new_is_asked(tmp_path: Path) -> None:
    text, recorded = sequences(SHARD * 3), Recorded(pico("llama"), V)
    kept(tmp_path, recorded, text[: SHARD + 30])
    recorded.seen.clear()
    longer = kept(tmp_path, recorded, text)
    assert longer.asked == 2 * SHARD and torch.equal(torch.cat(recorded.seen), text[SHARD:])
    recorded.seen.clear()
    assert kept(tmp_path, absent, text[: 2 * SHARD]).asked == 0
    assert kept(tmp_path, absent, text[: SHARD + 30]).asked == 0  # the short end is kept too
    assert kept(tmp_path, absent, text[2 * SHARD :]).asked == 0
    here = batch(text, SHARD, 3 * SHARD - 1)
    exact = top_k(recorded(here).scores, K)
    assert torch.equal(longer(here).scores.index_TK, exact.index_TK)


def test_one_that_was_interrupted_asks_only_for_the_rest(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(SHARD * 3)

    def stopping(things: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        assert (what, count) == ("ask the teacher", 3)
        for number, thing in enumerate(things):
            if number == 2:
                raise KeyboardInterrupt
            yield thing

    with pytest.raises(KeyboardInterrupt):
        CachedTeacher(tmp_path, "one", lambda: teacher, text, K, 1.0, stopping)
    found = kept(tmp_path, teacher, text)
    assert found.asked == SHARD
    assert same(
        found(batch(text, 5, 190)).scores, kept(tmp_path / "other", teacher, text)(batch(text, 5, 190)).scores
    )


def flipped(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.slow
def test_a_damaged_shard_is_asked_again(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(SHARD + 10)
    here = batch(text, *range(SHARD + 10))
    expected = kept(tmp_path, teacher, text)(here).scores
    large = max(files(tmp_path), key=lambda path: path.stat().st_size)
    sound = large.read_bytes()
    for damaged in (flipped(sound), sound[:-1], sound[:20], b"", sound + b"\0"):
        large.write_bytes(damaged)
        again = kept(tmp_path, teacher, text)
        assert again.asked == SHARD and same(again(here).scores, expected)
    assert large.read_bytes() == sound and kept(tmp_path, absent, text).asked == 0
    large.unlink()
    assert kept(tmp_path, teacher, text).asked == SHARD


def test_a_shard_under_the_name_of_another_is_not_taken_for_it(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(SHARD)
    kept(tmp_path, teacher, text, key="two")
    (theirs,) = files(tmp_path)
    expected = kept(tmp_path, teacher, text)(batch(text, 0)).scores
    (ours,) = (path for path in files(tmp_path) if path != theirs)
    ours.write_bytes(theirs.read_bytes())
    found = kept(tmp_path, teacher, text)
    assert found.asked == SHARD and same(found(batch(text, 0)).scores, expected)


def test_nothing_of_another_teacher_setting_or_text_is_read(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(5)
    kept(tmp_path, teacher, text)
    other = text.clone()
    other[4, -1] = (other[4, -1] + 1) % V
    one: dict[str, Any] = {"sequences_NL": text}
    for change in (
        {"key": "another"},
        {"k": K + 1},
        {"temperature": 2.0},
        {"sequences_NL": other},
        {"sequences_NL": text.flip(0)},
        {"sequences_NL": text[:4]},
        {"sequences_NL": text.view(10, L // 2)},
        {"sequences_NL": text.flatten()[None]},
    ):
        with pytest.raises(AssertionError, match="asked again"):
            kept(tmp_path, absent, **one | change)
    assert kept(tmp_path, teacher, text, k=K + 1).asked == 5
    # what is there is not driven out
    assert kept(tmp_path, absent, text).asked == 0 and len(files(tmp_path)) == 2


def test_another_teacher_says_something_else(teacher: LiveTeacher, tmp_path: Path) -> None:
    text, other = sequences(5), LiveTeacher(pico("llama", num_hidden_layers=1), V)
    mine, theirs = kept(tmp_path, teacher, text, "mine"), kept(tmp_path, other, text, "theirs")
    here = batch(text, *range(5))
    assert not same(mine(here).scores, theirs(here).scores)
    assert torch.equal(theirs(here).scores.index_TK, top_k(other(here).scores, K).index_TK)


@pytest.mark.parametrize(("vocabulary", "width"), [(1 << 16, 2), (70000, 4)])
def test_a_large_vocabulary_has_wider_indices(vocabulary: int, width: int, tmp_path: Path) -> None:
    text = sequences(2)
    large = LiveTeacher(pico("llama", vocab_size=vocabulary, num_hidden_layers=1), vocabulary)
    found, here = kept(tmp_path, large, text), batch(text, 1, 0)
    exact = top_k(large(here).scores, K)
    assert torch.equal(found(here).scores.index_TK, exact.index_TK)
    # where a narrower one would fail
    assert bool((exact.index_TK >= (1 << 15 if width == 2 else 1 << 16)).any())
    assert found.token_bytes == K * width + (K + 1) * 2


@pytest.mark.parametrize(("k", "numbers"), [(1, 1), (K, K), (V - 1, V - 1), (V, V - 1), (100000, V - 1)])
def test_so_many_bytes_are_kept_of_a_token(
    k: int, numbers: int, teacher: LiveTeacher, tmp_path: Path
) -> None:
    text = sequences(SHARD + 3)
    found = kept(tmp_path, teacher, text, k=k)
    assert found.token_bytes == 2 * numbers + 2 * (numbers + 1)
    stored = 0
    for path in files(tmp_path):
        data = path.read_bytes()
        stored += len(data) - 8 - int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {
            "index": "I16",
            "log_p": "F16",
        }
    assert stored == found.token_bytes * text.numel()
    total = found(batch(text, SHARD + 2)).scores.log_p_TK1.exp().sum(1)
    assert torch.allclose(total, torch.ones(L), atol=2e-3)


def test_what_was_kept_of_a_sure_teacher_is_finite(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(2)
    found = kept(tmp_path, teacher, text, k=4, temperature=1e-3)(batch(text, 0, 1)).scores
    assert bool(found.log_p_TK1.isfinite().all()) and float(found.log_p_TK1.min()) < -100


def test_of_a_narrower_vocabulary_only_its_tokens_are_kept(tmp_path: Path) -> None:
    text, model = sequences(3, vocabulary=40), pico("llama")
    found = kept(tmp_path, LiveTeacher(model, 40), text, k=K)(batch(text, 0, 1, 2)).scores
    expected = top_k(logits(model, text)[:, :40], K)
    assert torch.equal(found.index_TK, expected.index_TK) and int(found.index_TK.max()) < 40
    assert torch.allclose(found.log_p_TK1, expected.log_p_TK1, atol=1e-2)


@pytest.mark.parametrize("below", [".", "a/b"])
def test_a_folder_that_can_not_be_written_is_told_in_one_line(
    below: str, teacher: LiveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        OutputError, match=r"can't write .*; free space there or set LLMCOMPRESS_CACHE"
    ) as told:
        kept(tmp_path / "file" / below, teacher, sequences(2))
    assert "\n" not in str(told.value) and (tmp_path / "file").read_text() == "in the way"


def test_a_shard_that_can_not_be_written_is_told_too(teacher: LiveTeacher, tmp_path: Path) -> None:
    text = sequences(2)
    kept(tmp_path, teacher, text)
    (shard,) = files(tmp_path)
    shutil.rmtree(shard.parent)
    shard.parent.write_text("a file in the place of the folder")
    with pytest.raises(OutputError, match="can't write"):
        kept(tmp_path, teacher, text)
