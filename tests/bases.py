"""What a run needs on disk, made on the spot: a pico base with a tokenizer of one token a byte, and a text
file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from transformers import PreTrainedTokenizerFast

from llmcompress.recipe.recipe import Recipe
from tests.models import pico

VOCABULARY = 256
Value = TypeVar("Value")


def known(value: Value | None) -> Value:
    """What a report says; a test that compares it fails where the report says nothing."""
    assert value is not None, "the report does not say"
    return value


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: 256 in all."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=96)


def bos_tokenizer(begins: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and `<s>`, token 256, which the tokenizer puts before what it encodes if `begins`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if begins:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", VOCABULARY)]
        )
    return tokenizer


def save_bos_base(folder: Path, family: str = "llama", **config: Any) -> Path:
    """A pico base of 257 tokens with a tokenizer that begins with BOS."""
    pico(family, **{"vocab_size": VOCABULARY + 1, "bos_token_id": VOCABULARY, **config}).save_pretrained(
        folder
    )
    bos_tokenizer().save_pretrained(folder)
    return folder


def llama_tokenizer(**settings: Any) -> dict[str, str]:
    """The files of a tokenizer as Llama's are: `▁` is put before the text by a normaliser, which the class
    leaves out.

    So LlamaTokenizer and what reads tokenizer.json as it is differ on `<s>hello`. `settings` go into
    tokenizer_config.json.
    """
    special = ("<unk>", "<s>", "</s>", "[INST]")
    letters = [*special, "▁", "\n", *map(chr, range(33, 127)), *"éß日本🙂"]
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    vocabulary = {
        token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])
    }
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    before = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    bpe.normalizer = tokenizers.normalizers.Sequence(before)
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    said = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 96, **named, **settings}
    return {"tokenizer.json": bpe.to_str(), "tokenizer_config.json": json.dumps(said)}


def save_base(folder: Path, family: str = "llama", *, max_shard_size: str = "1GB", **config: Any) -> Path:
    """A pico base of 256 tokens with its tokenizer."""
    pico(family, **{"vocab_size": VOCABULARY, **config}).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path) -> Path:
    """20 000 bytes of lines that are all different."""
    draw = random.Random(0)
    file.write_text("".join(f"fact {number}: {draw.random()}\n" for number in range(700)))
    return file


def facts(train: str, test: str, column: str = "text") -> dict[str, bytes]:
    """Two .jsonl files of a data set by their names: 300 rows that are all different, and 100 others."""
    rows = [
        json.dumps({column: f"fact {number} is {number * number} and {number**3}"}).encode()
        for number in range(400)
    ]
    return {train: b"\n".join(rows[:300]), test: b"\n".join(rows[300:])}


def small_recipe(text: Path, base: Path | None = None, **quantize: Any) -> Recipe:
    """8 sequences of 24 tokens calibrate, 4 evaluate."""
    data = {"source": str(text), "samples": 8, "length": 24, "evaluation_samples": 4}
    entries: dict[str, Any] = {"data": data, "stages": [{"quantize": quantize}]}
    return Recipe.model_validate(entries | ({"base": str(base)} if base else {}))


def staged_recipe(
    text: Path, base: Path, *stages: dict[str, Any], samples: int = 16, length: int = 48
) -> Recipe:
    """Several stages; `samples` sequences of `length` tokens calibrate, 8 evaluate."""
    data = {"source": str(text), "samples": samples, "length": length, "evaluation_samples": 8}
    return Recipe.model_validate({"base": str(base), "data": data, "stages": list(stages)})
