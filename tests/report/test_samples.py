"""Samples of text: each token has its own text, predictions are those of the logits, and continuations part
where they first differ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmcompress.report import samples
from llmcompress.report.samples import Witness, continuations, prompts_of, token_texts
from llmcompress.report.schema import ParagraphFacts
from tests.bases import VOCABULARY, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = "naïve 🦊\u202e ends\n"


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


def logits(S: int, L: int, seed: int) -> Tensor:
    return 3 * torch.randn(S, L, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_the_texts_of_tokens_are_the_text_and_a_character_is_told_where_it_ends() -> None:
    texts = token_texts(tokens_of(TEXT), TOKENIZER)
    assert "".join(texts) == "naïve 🦊⟨U+202E⟩ ends\n"
    assert len(texts) == len(TEXT.encode())
    fox = TEXT.encode().index("🦊".encode())
    assert texts[fox : fox + 4] == ("", "", "", "🦊")


def test_a_text_that_ends_within_a_character_says_so() -> None:
    assert token_texts(tokens_of("a🦊")[:3], TOKENIZER) == ("a", "", "\N{REPLACEMENT CHARACTER}")


def pieces(z: Tensor, batch: int, positions: int) -> Iterator[Tensor]:
    """Logits of whole sequences, or of parts of one."""
    for start in range(0, len(z), batch):
        yield from (
            z[start : start + batch].split(positions, dim=1) if batch == 1 else (z[start : start + batch],)
        )


@pytest.mark.parametrize(("batch", "positions"), [(2, 9), (1, 9), (1, 4)])
def test_a_witness_keeps_what_both_models_rank_first(batch: int, positions: int) -> None:
    ours, theirs = logits(4, 9, seed=1), logits(4, 9, seed=2)
    sequences = torch.tensor([tokens_of("some text")] * 4)
    kl = torch.arange(9) / 8
    witness = Witness(sequences)
    pairs = zip(pieces(ours, batch, positions), pieces(theirs, batch, positions), strict=True)
    passed = [(one.clone(), other.clone()) for one, other in witness.seeing(pairs)]
    assert torch.equal(torch.cat([one.flatten(0, 1) for one, _ in passed]), ours.flatten(0, 1))
    found = witness.paragraph(kl, TOKENIZER)
    assert "".join(found.tokens) == "some text" and found.kl_nats == tuple((kl[:8]).tolist())
    for z, told in ((ours, found.compressed), (theirs, found.base)):
        expected = z[0, :8].softmax(-1)
        shares = torch.tensor([[share for _, share in guesses] for guesses in told])
        torch.testing.assert_close(shares, expected.topk(3).values, atol=1e-4, rtol=0)
        first = [samples._spelled_after(97, int(token), TOKENIZER) for token in expected.argmax(-1)]
        assert [guesses[0][0] for guesses in told] == first


def test_a_paragraph_has_a_bounded_length() -> None:
    sequences = torch.full((2, samples.PARAGRAPH + 50), 97)
    witness = Witness(sequences)
    z = torch.zeros(1, 100, VOCABULARY)
    list(witness.seeing(iter([(z, z)] * 7)))
    assert witness.positions == len(witness.ranked) == samples.PARAGRAPH


def test_a_paragraph_has_one_of_each() -> None:
    with pytest.raises(ValueError, match="one item less"):
        ParagraphFacts(tokens=("a", "b"), kl_nats=(), base=(), compressed=())


def written(*texts: str) -> Tensor:
    return torch.tensor([tokens_of(text) for text in texts])


def test_continuations_part_at_the_first_token_that_differs() -> None:
    prompts = written("one ", "two ", "🦊")
    base, ours = written("abcdef", "abcdef", "🦊gh"), written("abcxyz", "abcdef", "🦄gh")
    first, same, fox = continuations(prompts, base, ours, TOKENIZER)
    assert (first.prompt, first.shared, first.base, first.compressed) == ("one ", "abc", "def", "xyz")
    assert (first.shared_tokens, first.tokens) == (3, 6)
    assert (same.shared, same.base, same.compressed, same.shared_tokens) == ("abcdef", "", "", 6)
    # half of the character is the same
    assert (fox.shared, fox.base, fox.compressed, fox.shared_tokens) == ("", "🦊gh", "🦄gh", 3)


def test_a_continuation_ends_where_its_text_ends() -> None:
    ends = byte_tokenizer()
    ends.eos_token = "!"
    (found,) = continuations(written("a"), written("b!cd"), written("bcd!"), ends)
    assert (found.shared, found.base, found.compressed, found.tokens) == ("b", "!", "cd!", 4)


@pytest.mark.parametrize(("length", "prompt", "tokens"), [(512, 32, 40), (24, 12, 12), (2, 1, 1)])
def test_prompts_leave_room_to_write(length: int, prompt: int, tokens: int) -> None:
    found, count = prompts_of(torch.zeros(8, length, dtype=torch.int64))
    assert found.shape == (5, prompt) and count == tokens
    assert prompt + tokens <= length
