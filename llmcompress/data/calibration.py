"""Token sequences for calibration and evaluation, from any text that a user can name.

Text is joined, tokenised without special tokens and cut into non-overlapping sequences of one length, as in
the GPTQ papers. So numbers compare with theirs, and a sequence is a row of a plain int64 matrix. Calibration
sequences are drawn by seed from the head of the calibration text: 16 sequences are read for each one drawn,
so a data set of terabytes costs no more than a small one. Evaluation sequences are the first of the
evaluation text, in order. The two texts come from different files, splits or rows, and a sequence found in
both is an error. Tokenising takes about four seconds of one core per million tokens.

If the tokenizer puts BOS before the text it encodes, the model expects it, so a sequence is BOS and length -
1 tokens of text. The output at BOS is the same for every text. Activations at BOS are used for calibration,
but the prediction there counts neither in perplexity, KL and top-1 agreement nor in a loss.
(lm-evaluation-harness counts it.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress import hub
from llmcompress.data.hub_datasets import hub_texts
from llmcompress.data.local_files import READABLE, file_texts, folder_texts, kind_of
from llmcompress.data.python_docs import python_docs
from llmcompress.data.rows import Piece, spelled
from llmcompress.data.sources import CHUNK, PYTHON_DOCS, DataSpec, Effort, Texts
from llmcompress.errors import DataError, first_line
from llmcompress.io.user_paths import path_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"  # the name of the embedded model in a recipe
# the embedded model, trained on the calibration side of python-docs
DEMO_MODEL: Path = Path(__file__).parents[1] / "demo"

POOL = 16  # sequences read for each calibration sequence drawn
SHORTEST = 128  # tokens: the least sequence length if none is given


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences, int64: calibration [samples, length] and evaluation [evaluation_samples, length].

    `sha256` is the hash of both tensors' bytes (little-endian int64), calibration first. `training` is a
    plain stream [T] of the rest of the calibration text, if a stage trains. `bos` is the token that each
    sequence begins with, or None if sequences are text from the start. The stream is without BOS, so whoever
    cuts sequences from it calls `with_bos`. `spec` is the requested spec; for a Hub data set it has the
    commit and the evaluation split that were used. Its `samples` is a number.
    """

    calibration: Tensor
    evaluation: Tensor
    spec: DataSpec
    sha256: str
    training: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    bos: int | None = None

    @property
    def unscored(self) -> int:
        """The number of positions at the start of each sequence that are not scored: 1 with BOS, else 0."""
        return int(self.bos is not None)

    @property
    def scored(self) -> Tensor:
        """The evaluation sequences at the scored positions, int64 [evaluation_samples, length - unscored]."""
        return self.evaluation[:, self.unscored :]

    @property
    def training_sha256(self) -> str:
        """The hash of the training stream."""
        return _sha256(self.training)

    @property
    def calibration_tokens(self) -> int:
        """The number of calibration tokens."""
        return self.calibration.numel()

    @property
    def evaluation_tokens(self) -> int:
        """The number of evaluation tokens."""
        return self.evaluation.numel()


def load_data(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    max_length: int | None,
    training: Callable[[int], int] = lambda length: 0,
    effort: Effort | None = None,
) -> CalibrationData:
    """Read, tokenise and cut the text of `spec` for a model of `vocab_size` tokens and `max_length` positions
    (None: no limit). `effort` decides how much text, as far as `spec` leaves that open.

    `training` maps the length of sequences to the number of tokens to train on. Fewer are returned if the
    text has no more. Equal spec, text and tokenizer give equal sequences. Errors: DataError for text that is
    missing, too short, the same on both sides, or not what the model reads.
    """
    if tokenizer is None:
        raise DataError(
            f"the base has no tokenizer, so {spec.source} can't be read; save the tokenizer beside its "
            "weights"
        )
    if spec.length is not None and max_length is not None and spec.length > max_length:
        raise DataError(
            f"length {spec.length} is more than the {max_length} positions of the model; use length: "
            f"{max_length}"
        )
    bos = bos_of(tokenizer, spec.bos)
    before = int(bos is not None)  # tokens of a sequence that are not text
    samples, longest = spec.amount(effort)
    # lengths of the text in a sequence
    lengths = [n - before for n in ([spec.length] if spec.length else _lengths(longest, max_length))]
    if lengths[0] < 2:
        raise DataError(
            f"length {lengths[0] + before} leaves no token to predict from text; use length: {2 + before} "
            "or more"
        )
    texts = _texts(spec)
    evaluation = _tokenise(texts.evaluation, tokenizer, spec.evaluation_samples * lengths[0], bos)
    trained = samples * lengths[0] + training(lengths[0] + before)
    calibration = _tokenise(texts.calibration, tokenizer, max(POOL * samples * lengths[0], trained), bos)
    _refuse_foreign(with_bos(torch.cat([calibration, evaluation])[None], bos), vocab_size)
    asked = (
        ("samples", samples, calibration),
        ("evaluation_samples", spec.evaluation_samples, evaluation),
    )
    length = next(
        (n for n in lengths if all(have.numel() // n >= want for _, want, have in asked)), lengths[-1]
    )
    for name, want, have in asked:
        _require(spec.source, name, want, have.numel(), length, before)
    every = calibration[: calibration.numel() // length * length].view(-1, length)
    pool = every[: POOL * samples]
    ahead = evaluation[: spec.evaluation_samples * length].view(-1, length)
    trains = training(length + before)
    _refuse_overlap(spec.source, every if trains else pool, ahead)
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(spec.seed))[:samples]
    drawn_NL, evaluates = with_bos(pool[drawn], bos), with_bos(ahead.clone(), bos)
    place = {"revision": texts.revision, "evaluation_split": texts.evaluation_split}
    read = spec.model_copy(update={"samples": samples, **place})
    found = CalibrationData(drawn_NL, evaluates, read, _sha256(drawn_NL, evaluates), bos=bos)
    if not trains:
        return found
    others = torch.ones(len(every), dtype=torch.bool).index_fill(0, drawn, False)
    return replace(found, training=every[others].flatten()[:trains].clone())


def with_bos(sequences_NL: Tensor, bos: int | None) -> Tensor:
    """Put BOS before each of the sequences [N, L], giving [N, L + 1]; without BOS return them as they are."""
    return sequences_NL if bos is None else F.pad(sequences_NL, (1, 0), value=bos)


def bos_of(tokenizer: PreTrainedTokenizerBase, wanted: Literal["auto"] | bool) -> int | None:
    """Return the token that sequences begin with, or None if they are text from the start.

    `auto` follows the tokenizer, which is tested by encoding. Errors: DataError for `True` without a BOS
    token.
    """
    bos: int | None = tokenizer.bos_token_id
    if wanted is True and bos is None:
        raise DataError(
            "bos: true asks for a BOS token and the tokenizer has none; use bos: auto or bos: false"
        )
    begins = wanted is True or (wanted == "auto" and bos is not None and _adds(tokenizer, bos))
    return bos if begins else None


def _adds(tokenizer: PreTrainedTokenizerBase, bos: int) -> bool:
    """Whether the tokenizer puts BOS before the text it encodes."""
    (full,), (plain,) = (_encoded(tokenizer, ["a"], special) for special in (True, False))
    return full[: 1 + len(plain)] == [bos, *plain]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Return the tokens of each text, with or without special tokens. Errors: DataError if the tokenizer
    fails."""
    try:
        found = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    except Exception as error:  # tokenizers raise bare Exceptions, as for a word without a token
        raise DataError(
            f"the tokenizer can't encode the text ({first_line(error)}); use the one of the model"
        ) from None
    return cast(list[list[int]], found)


def _sha256(*sides: Tensor) -> str:
    return hashlib.sha256(b"".join(side.numpy().astype("<i8").tobytes() for side in sides)).hexdigest()


def _lengths(longest: int, max_length: int | None) -> list[int]:
    """Return the sequence lengths to try: the longest or the model's maximum, then halves of it down to
    128."""
    most = min(longest, max_length or longest)
    return [most] + [most >> k for k in range(1, 5) if most >> k >= SHORTEST]


def _require(source: str, field: str, want: int, tokens: int, length: int, before: int) -> None:
    """Raise DataError if the text fills fewer sequences than requested.

    A sequence has `length` tokens of text after `before` other tokens.
    """
    side = "calibration" if field == "samples" else "evaluation"
    sequences = tokens // length
    if not tokens:
        raise DataError(
            f"the {side} text of {source} is empty or gives no tokens; give a source that holds text"
        )
    if sequences < want:
        fit = [f"{field}: {sequences}"] * (sequences > 0) + [f"length: {tokens // want + before}"] * (
            tokens >= 2 * want
        )
        raise DataError(
            f"the {side} text of {source} fills {sequences} sequences of {length + before} tokens ({tokens} "
            f"tokens) and {field} asks for {want}; use {' or '.join([*fit, 'give more text'])}"
        )


def _refuse_foreign(tokens: Tensor, vocab_size: int) -> None:
    """Raise DataError if the model has no embedding for a token."""
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest} and the model has {vocab_size} tokens (0 to "
            f"{vocab_size - 1}); use the tokenizer the model was trained with"
        )


def _refuse_overlap(source: str, pool_SL: Tensor, evaluation_SL: Tensor) -> None:
    """Raise DataError if a sequence of the evaluation text is also in the calibration text."""
    calibrates = {sequence.numpy().tobytes() for sequence in pool_SL}
    for number, sequence in enumerate(evaluation_SL):
        if sequence.numpy().tobytes() in calibrates:
            raise DataError(
                f"evaluation sequence {number} of {source} also stands in its calibration text, so it would "
                "measure what it was tuned on; use different text for the two"
            )


def _tokenise(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, enough: int, bos: int | None = None
) -> Tensor:
    """Return the first `enough` tokens of the joined pieces, int64 [T], or fewer if the text ends.

    No more text is read than needed. Conversations are rendered by the chat template, without its own BOS if
    sequences begin with `bos`.
    """
    without_bos = bos is not None
    lines = (
        [piece] if isinstance(piece, str) else spelled(piece, tokenizer, without_bos=without_bos)
        for piece in pieces
    )
    chunks, parts, have = _chunks(chain.from_iterable(lines)), [torch.empty(0, dtype=torch.int64)], 0
    # about 4 characters per token
    while have < enough and (batch := list(islice(chunks, 1 + min(15, (enough - have) * 4 // CHUNK)))):
        ids = _encoded(tokenizer, batch, special=False)
        parts.append(torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64))
        have += len(parts[-1])
    return torch.cat(parts)[:enough]


def _chunks(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the joined pieces in strings of about CHUNK characters, cut between pieces, or within a piece
    that is longer."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        for start in range(0, len(piece), CHUNK):
            held.append(piece[start : start + CHUNK])
            size += len(held[-1])
            if size >= CHUNK:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)


def _texts(spec: DataSpec) -> Texts:
    """Return the two sides of a source.

    A source that exists on disk is read from disk; otherwise a name spelled like a Hub id is a Hub data set.
    """
    source, path = spec.source, path_of(spec.source, "data", DataError)
    if source != PYTHON_DOCS and not path.exists():
        if kind_of(path) or not hub.is_id(source):
            raise DataError(
                f"{source} does not exist; name a {READABLE}, a folder of them, or a Hub data set"
            )
        return hub_texts(spec)
    given = [name for name in ("config", "revision", "evaluation_split") if getattr(spec, name) is not None]
    if given or spec.split != "train":
        raise DataError(
            f"{(given or ['split'])[0]} is for Hub data sets and {source} is not one; leave it out"
        )
    if source == PYTHON_DOCS:
        calibration, evaluation = python_docs()
        return Texts(calibration.splitlines(keepends=True), evaluation.splitlines(keepends=True))
    return folder_texts(path, spec.column) if path.is_dir() else file_texts(path, spec.column)
