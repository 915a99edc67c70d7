"""The small files beside a model's weights: which of them travel into an artefact and on to the Hub, and how
much of each.

A folder may hold anything beside a model: notes, keys, links to other places. So what travels is a list of
names: those by which transformers finds a tokenizer, a processor, a chat template and the settings of
generation, and those of licences. Whatever has another name stays. A link is followed inside its folder, and
in the Hub's cache, where every file is one, but nowhere else.

Two things of a config stay here as well. A folder of the machine that wrote it is of no use elsewhere. And
`auto_map` names code of the repository that a model came from: the code is never copied, and none is needed,
as only architectures that transformers has itself are compressed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcompress.io.local_names import is_path

CONFIG = "config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("sentencepiece.model", "spm.model", "tiktoken.model", "tekken.json"),
)
RARE = (  # that some class of tokenizers reads; elsewhere such a name may mean anything
    *(
        "bpe.codes",
        "byte_maps.json",
        "dict.txt",
        "emoji.json",
        "entity_vocab.json",
        "normalizer.json",
        "prophetnet.tokenizer",
    ),
    *("source.spm", "target.spm", "spm_char.model", "target_vocab.json", "vocab-src.json", "vocab-tgt.json"),
    *("word_pronunciation.json", "word_shape.json"),
)
SETTINGS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
RIGHTS = (
    *(f"{name}{end}" for name in ("LICENSE", "LICENCE", "NOTICE", "COPYING") for end in ("", ".txt", ".md")),
    *("LICENSE-APACHE", "LICENSE-CODE", "LICENSE-MIT", "LICENSE-MODEL", "USE_POLICY.md"),
)
TRAVELS = (CONFIG, *TOKENIZER, *SETTINGS, *TEMPLATES, *RIGHTS)

CONFIGS = (CONFIG, "tokenizer_config.json", "special_tokens_map.json", *SETTINGS)
CODE = ("auto_map", "custom_pipelines")  # keys that name code of a repository
ORIGINS = ("_name_or_path", "name_or_path")  # keys that name where a model or a tokenizer was loaded from
FILES = (
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
    "added_tokens_file",
    "chat_template_file",
)
# keys of what is no path, however it is spelled; so are tokens
WORDS = ("added_tokens_decoder", "chat_template")


def kept(folder: Path, also: Collection[str] = ()) -> dict[str, bytes]:
    """What travels of a folder, by name, without what `shareable` leaves out; `also` are further names of its
    tokenizer."""
    return {
        str(file.relative_to(folder)): _content(file)
        for file in _named(folder, also)
        if is_inside(file, folder)
    }


def links_out(folder: Path, also: Collection[str] = ()) -> list[str]:
    """Names that would travel, but for being links that leave the folder."""
    return [str(file.relative_to(folder)) for file in _named(folder, also) if not is_inside(file, folder)]


def _named(folder: Path, also: Collection[str]) -> Iterator[Path]:
    """The files of a folder that have such a name."""
    for pattern in (*TRAVELS, *sorted(set(also) - set(TRAVELS))):
        yield from (file for file in sorted(folder.glob(pattern)) if file.is_file())


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in its folder once links are followed; of a folder in the Hub's cache, also among
    the blobs there."""
    real, home = file.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    # CACHE/models--user--name/snapshots/COMMIT; blobs may be shared by all of the cache
    repository = home.parent.parent
    cached = home.parent.name == "snapshots" and "--" in repository.name
    return cached and any(real.is_relative_to(place / "blobs") for place in (repository, repository.parent))


def _content(file: Path) -> bytes:
    """A file as it travels: as it is, but for a config that names what stays here."""
    raw = file.read_bytes()
    if file.name not in CONFIGS:
        return raw
    try:
        fields = json.loads(raw)
    except ValueError:  # whoever loads the model says so
        return raw
    if not isinstance(fields, dict) or (left := shareable(fields)) == fields:
        return raw
    return (json.dumps(left, indent=2, ensure_ascii=False) + "\n").encode()


def shareable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what names code of its repository, or folders of the machine that wrote it; nested
    ones too."""
    return {key: _shareable(key, value) for key, value in fields.items() if not _stays(key, value)}


def _shareable(key: str, value: Any) -> Any:
    if _is_words(key):
        return value
    if isinstance(value, Mapping):
        return shareable(value)
    if isinstance(value, list):
        return [_shareable(key, item) for item in value if not _stays(key, item)]
    return value


def _stays(key: str, value: Any) -> bool:
    """Whether an entry of a config is not passed on."""
    if key in CODE or key in ORIGINS:
        return True
    return isinstance(value, str) and not _is_words(key) and (key in FILES or is_path(value))


def _is_words(key: str) -> bool:
    return key in WORDS or key.endswith(("_token", "_tokens"))
