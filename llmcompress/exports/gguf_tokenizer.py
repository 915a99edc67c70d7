"""A tokenizer as llama.cpp reads it: byte-level BPE (`gpt2`), or BPE with tokens for bytes (`llama`).

llama.cpp splits text before BPE by rules of its own, which a name chooses (`tokenizer.ggml.pre`). The name
is told from the rules in tokenizer.json, and a tokenizer with other rules is refused. A `llama` tokenizer
merges the pair of the best score in place of the first merge, so merges become scores, where that is the
same.

Source: llama.cpp's convert_hf_to_gguf.py and src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmcompress.errors import ModelError
from llmcompress.io.tokenizer import tokenizer_of

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}  # what splits text -> its name
WHOLE = ("llama-bpe",)  # rules under which a word that is a token is not merged from its parts
SPACE = "▁"


class Kind(IntEnum):
    """Types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. `merges` are of a `gpt2` tokenizer, `scores` of a `llama` one."""

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[Kind]
    ids: Mapping[str, int]  # bos, eos, unk and pad
    begins: bool  # whether bos is put before a text
    ends: bool
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_first: bool = False  # whether a space is put before a text
    chat_template: str | None = None

    def add_to(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([int(kind) for kind in self.kinds])
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, about."""
        return sum(len(token.encode()) + 16 for token in self.tokens) + sum(
            len(merge.encode()) + 8 for merge in self.merges
        )


def vocabulary_of(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of the tokenizer beside a model of `size` tokens. Errors: ModelError if llama.cpp would
    make other tokens of a text, or can't be told how to make them."""
    tokenizer = tokenizer_of(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json")
    said = json.loads(backend.to_str())
    if said["model"]["type"] != "BPE":
        raise ModelError(f"the tokenizer is a {said['model']['type']}; llama.cpp is written BPE alone")
    made = _bytes if said["model"].get("byte_fallback") else _bpe
    return made(said, tokenizer, size)


def _bpe(said: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """A byte-level BPE."""
    pre, model = _pre(said), said["model"]
    merges = [_pair(merge) for merge in model["merges"]]
    if not merges:
        raise ModelError("the tokenizer has no merges, which llama.cpp can't do without")
    if bool(model.get("ignore_merges")) != (pre in WHOLE):
        raise ModelError(f"the tokenizer splits text as {pre} does and merges it in another way")
    tokens, kinds = _tokens(said, None, size)
    told = [" ".join(pair) for pair in merges]  # no letter of a byte-level vocabulary is a space
    return Vocabulary("gpt2", pre, tokens, kinds, merges=told, **_common(tokenizer))


def _pre(said: Mapping[str, Any]) -> str:
    """The name of the rules by which a byte-level tokenizer splits text. Errors: ModelError."""
    normalizer, rules = said["normalizer"], said["pre_tokenizer"]
    steps = rules["pretokenizers"] if rules and rules["type"] == "Sequence" else [rules]
    kinds = [step["type"] if step else "nothing" for step in steps]
    first, last, found = steps[0] or {}, steps[-1] or {}, None
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and first["individual_digits"] and last["use_regex"]:
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            alone = first["behavior"] == "Isolated" and not first["invert"]
            found = SPLITS.get(first["pattern"].get("Regex")) if alone else None
    if found is None:
        raise ModelError(
            f"the tokenizer splits text in a way that llama.cpp has no name for ({' and '.join(kinds)})"
        )
    if normalizer is not None and not (found == "qwen2" and normalizer["type"] == "NFC"):
        raise ModelError(f"the tokenizer normalises text ({normalizer['type']}), which llama.cpp does not")
    return found


def _bytes(said: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """A BPE as SentencePiece has it, with a token per byte for letters that it lacks."""
    vocabulary: dict[str, int] = said["model"]["vocab"]
    merges = [_pair(merge) for merge in said["model"]["merges"]]
    added = {token["content"] for token in said["added_tokens"]}
    if (wrong := _out_of_order(merges, vocabulary.keys() - added)) is not None:
        raise ModelError(
            f"the tokenizer merges {wrong} in an order that no scores of tokens give, "
            "by which llama.cpp merges"
        )
    tokens, kinds = _tokens(said, tokenizer.unk_token, size)
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    # letters are not merged, so their scores mean nothing; SentencePiece has them behind all merges
    scores = [
        -float(rank.get(token, len(rank))) if kind is Kind.NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    told: dict[str, Any] = {"scores": scores, "space_first": _space_first(said)}
    return Vocabulary("llama", "default", tokens, kinds, **told, **_common(tokenizer))


def _out_of_order(merges: Sequence[tuple[str, str]], tokens: set[str]) -> str | None:
    """A token whose merges no score of it stands for, or None.

    Tokens with a higher score are merged first, from any two tokens that make it. So merges of one token must
    be adjacent, and there must be one for every two tokens that can arise.
    """
    known, order = set(merges), dict[str, int]()
    for number, (left, right) in enumerate(merges):
        if order.get(left + right, number - 1) != number - 1:
            return left + right
        order[left + right] = number
    arising = {token for token in tokens if len(token) == 1} | order.keys()
    for token in order:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in known and pair[0] in arising and pair[1] in arising:
                return token
    return None


def _space_first(said: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; spaces become ▁. Errors: ModelError for other rules."""
    normalizer, rules = said["normalizer"], said["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps == [{"type": "Prepend", "prepend": SPACE}, replaced] and rules is None:
        return True
    if steps == [replaced] and (rules is None or rules["type"] == "Split"):
        return False
    if steps == [None] and rules and rules["type"] == "Metaspace" and rules["replacement"] == SPACE:
        return bool(rules["prepend_scheme"] != "never")
    raise ModelError("the tokenizer treats spaces in a way that llama.cpp can't be told")


def _tokens(said: Mapping[str, Any], unknown: str | None, size: int) -> tuple[list[str], list[Kind]]:
    """The `size` tokens of a model, and their types. Errors: ModelError if the tokenizer has more."""
    special = {token["content"]: bool(token["special"]) for token in said["added_tokens"]}
    numbers = said["model"]["vocab"] | {token["content"]: token["id"] for token in said["added_tokens"]}
    most = max(numbers.values()) + 1
    if most > size:
        raise ModelError(f"the tokenizer has {most} tokens and the model {size}")
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [Kind.UNUSED] * size
    fallback = bool(said["model"].get("byte_fallback"))
    for token, number in numbers.items():
        tokens[number], kinds[number] = token, Kind.NORMAL
        if fallback and token == unknown:
            kinds[number] = Kind.UNKNOWN
        elif token in special:
            kinds[number] = Kind.CONTROL if special[token] else Kind.USER_DEFINED
        elif fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = Kind.BYTE
    return tokens, kinds


def _common(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What both kinds say: special tokens, whether they are put around a text, and the chat template."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    ids = {name: getattr(tokenizer, field) for name, field in names.items()}
    found: list[int] = tokenizer("a").input_ids
    template = tokenizer.chat_template
    return {
        "ids": {name: number for name, number in ids.items() if isinstance(number, int)},
        "begins": ids["bos"] is not None and found[:1] == [ids["bos"]],
        "ends": ids["eos"] is not None and found[-1:] == [ids["eos"]],
        "chat_template": template if isinstance(template, str) else None,
    }


def _pair(merge: Any) -> tuple[str, str]:
    """The two parts of a merge, in either of the two forms that tokenizer.json has had."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return str(left), str(right)
