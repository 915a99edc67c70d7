"""Samples of text for the page of a report: what both models predict in a paragraph, and how each goes on.

The paragraph is the beginning of the first evaluation sequence; its logits are those that the measurement
computes anyway. The prompts are the beginnings of the first evaluation sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.report.schema import ContinuationFacts, ParagraphFacts
from llmcompress.report.visible import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAGRAPH = 256  # predicted tokens of the paragraph, if a sequence has so many
GUESSES = 3  # tokens that are named of each prediction
PROMPTS, PROMPT, WRITTEN = 5, 32, 40  # prompts, tokens of one, and tokens that are written after it
UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Ranked = tuple[list[int], list[float]]  # the tokens ranked first at a position, and their probabilities


class Witness:
    """Sees the pairs of logits that a measurement reads, and keeps what both models rank first in the
    paragraph."""

    def __init__(self, sequences: Tensor) -> None:
        """`sequences` [S, L] are the scored tokens; the paragraph is of the first."""
        self.tokens = sequences[0, : PARAGRAPH + 1]
        self.ranked: list[tuple[Ranked, Ranked]] = []

    @property
    def positions(self) -> int:
        """The number of predictions that are kept."""
        return len(self.tokens) - 1

    def seeing(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs (model, base) of logits [B, L, V] or [1, C, V] as they come, in the order of the
        positions."""
        for ours, theirs in pairs:
            left = self.positions - len(self.ranked)
            # row by row, as a copy of all would take as much memory as the logits
            self.ranked += [
                (_ranked(z), _ranked(z_base))
                for z, z_base in zip(ours[0, :left], theirs[0, :left], strict=True)
            ]
            yield ours, theirs

    def paragraph(self, kl: Tensor, tokenizer: PreTrainedTokenizerBase) -> ParagraphFacts:
        """Return the paragraph; `kl` is in nats at the scored positions, as `metrics.columns` measures it."""
        tokens = self.tokens.tolist()
        before = list(zip(tokens, self.ranked, strict=False))
        return ParagraphFacts(
            tokens=token_texts(tokens, tokenizer),
            kl_nats=tuple(float(f"{value:.4g}") for value in kl[: self.positions].tolist()),
            base=tuple(_guesses(token, theirs, tokenizer) for token, (_, theirs) in before),
            compressed=tuple(_guesses(token, ours, tokenizer) for token, (ours, _) in before),
        )


def _ranked(logits: Tensor) -> Ranked:
    """What logits [V] rank first."""
    z = logits.float()
    values, tokens = z.topk(min(GUESSES, len(z)))
    return tokens.tolist(), (values - z.logsumexp(-1)).exp().clamp(max=1).tolist()


def _guesses(
    before: int, ranked: Ranked, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, float], ...]:
    """The ranked tokens as they are spelled after the token `before`, with their probabilities."""
    return tuple(
        (_spelled_after(before, token, tokenizer), float(f"{share:.4f}"))
        for token, share in zip(*ranked, strict=True)
    )


def _spelled_after(before: int, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a token adds after another: some tokenizers drop the space of the first."""
    alone, both = _decoded([before], tokenizer), _decoded([before, token], tokenizer)
    return both[len(alone) :] if both.startswith(alone) else _decoded([token], tokenizer)


def token_texts(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The text that each token adds to those before it; together they are the text of all.

    A token that ends within a character adds nothing, and the one that completes it adds the character.
    """
    texts, done = list[str](), ""
    for count in range(1, len(tokens) + 1):
        text = _decoded(tokens[:count], tokenizer)
        unfinished = text.endswith(UNFINISHED) and count < len(tokens)
        texts.append("" if unfinished else text[len(done) :])
        done = done if unfinished else text
    return tuple(texts)


def _decoded(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return visible(str(text))


def prompts_of(sequences: Tensor) -> tuple[Tensor, int]:
    """Return the prompts [P, C] of evaluation sequences [S, L], and the number of tokens to write after
    them."""
    length = sequences.shape[1]
    written = min(WRITTEN, length // 2)
    return sequences[:PROMPTS, : min(PROMPT, length - written)], written


def continuations(
    prompts: Tensor, base: Tensor, compressed: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[ContinuationFacts, ...]:
    """Return what the two models wrote, [P, N] each, after the prompts [P, C]."""
    rows = zip(prompts.tolist(), base.tolist(), compressed.tolist(), strict=True)
    return tuple(_continuation(*row, tokenizer) for row in rows)


def _continuation(
    prompt: list[int], base: list[int], compressed: list[int], tokenizer: PreTrainedTokenizerBase
) -> ContinuationFacts:
    theirs, ours = _until_end(base, tokenizer), _until_end(compressed, tokenizer)
    pairs = list(zip(theirs, ours, strict=False))
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    start, rest = len(prompt), len(prompt) + shared
    spelled = token_texts([*prompt, *theirs], tokenizer)
    return ContinuationFacts(
        prompt="".join(spelled[:start]),
        shared="".join(spelled[start:rest]),
        base="".join(spelled[rest:]),
        compressed="".join(token_texts([*prompt, *ours], tokenizer)[rest:]),
        tokens=max(len(theirs), len(ours)),
        shared_tokens=shared,
    )


def _until_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens until the one that ends a text, which is kept."""
    end = tokenizer.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
