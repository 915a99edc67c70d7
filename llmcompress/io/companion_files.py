"""The small files beside a model's weights: which of them are copied into an artefact and to the Hub, and
what is removed from them.

A folder may hold anything beside a model: notes, keys, links to other places. So only files with known names
are copied: those by which transformers finds a tokenizer, a processor, a chat template and the generation
settings, and those of licences. Links are followed inside their folder and, in the Hub's cache, where every
file is a link, to its blobs; nowhere else.

Two kinds of config entries are not copied either. One is a folder of the machine that wrote the config, which
is of no use elsewhere. The other is `auto_map`, which names code of the repository that a model came from.
No code is needed where transformers itself implements a model. If the user lets a model run its own code
(`io.own_code`), `auto_map` stays, and that code is copied too.
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
# files that some tokenizer classes read; beside other tokenizers such a name may mean anything
RARE = (
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
MAP = "auto_map"
CODE = (MAP, "custom_pipelines")  # keys that name code of a repository
ORIGINS = ("_name_or_path", "name_or_path")  # keys that name where a model or a tokenizer was loaded from
FILES = (
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
    "added_tokens_file",
    "chat_template_file",
)
# keys whose values are never paths, however they are spelled; so are keys that end in _token or _tokens
WORDS = ("added_tokens_decoder", "chat_template")


def kept(folder: Path, also: Collection[str] = (), *, code: bool = False) -> dict[str, bytes]:
    """The files of a folder that are copied, by name, with the content that `shareable` leaves; `also` are
    further names of its tokenizer."""
    return {
        str(file.relative_to(folder)): _content(file, code)
        for file in _named(folder, also)
        if is_inside(file, folder)
    }


def links_out(folder: Path, also: Collection[str] = ()) -> list[str]:
    """Names of files that would be copied if they were not links that leave the folder."""
    return [str(file.relative_to(folder)) for file in _named(folder, also) if not is_inside(file, folder)]


def _named(folder: Path, also: Collection[str]) -> Iterator[Path]:
    """The files of a folder whose names are on the list."""
    for pattern in (*TRAVELS, *sorted(set(also) - set(TRAVELS))):
        yield from (file for file in sorted(folder.glob(pattern)) if file.is_file())


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in its folder once links are followed; for a folder in the Hub's cache, the blobs
    there count too."""
    real, home = file.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    # CACHE/models--user--name/snapshots/COMMIT; the whole cache may share blobs
    repository = home.parent.parent
    cached = home.parent.name == "snapshots" and "--" in repository.name
    return cached and any(real.is_relative_to(place / "blobs") for place in (repository, repository.parent))


def _content(file: Path, code: bool) -> bytes:
    """The content of a file as it is copied: unchanged, except for configs, which `shareable` filters."""
    raw = file.read_bytes()
    if file.name not in CONFIGS:
        return raw
    try:
        fields = json.loads(raw)
    except ValueError:  # whoever loads the model will report it
        return raw
    if not isinstance(fields, dict) or (left := shareable(fields, code=code)) == fields:
        return raw
    return (json.dumps(left, indent=2, ensure_ascii=False) + "\n").encode()


def shareable(fields: Mapping[str, Any], *, code: bool = False) -> dict[str, Any]:
    """A config without entries that name code of its repository or folders of the machine that wrote it;
    nested entries included. With `code` its own `auto_map` is left, for code that is copied too."""
    left = {key: _shareable(key, value) for key, value in fields.items() if not _stays(key, value)}
    return left | ({MAP: fields[MAP]} if code and MAP in fields else {})


def _shareable(key: str, value: Any) -> Any:
    if _is_words(key):
        return value
    if isinstance(value, Mapping):
        return shareable(value)
    if isinstance(value, list):
        return [_shareable(key, item) for item in value if not _stays(key, item)]
    return value


def _stays(key: str, value: Any) -> bool:
    """Whether an entry of a config is left out."""
    if key in CODE or key in ORIGINS:
        return True
    return isinstance(value, str) and not _is_words(key) and (key in FILES or is_path(value))


def _is_words(key: str) -> bool:
    return key in WORDS or key.endswith(("_token", "_tokens"))
